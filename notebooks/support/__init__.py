"""What lets the notebooks run and be read: claims, figures, statistics, the runner, the pages."""
