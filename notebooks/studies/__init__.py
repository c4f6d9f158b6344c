"""Experiments too long for a cell of a notebook: one file a study, named after its notebook."""
