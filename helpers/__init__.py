"""What two notebooks need or a test must reach; everything else stays in the notebook that uses it.

Layers, top to bottom; an import may only point down:

    notebook face   runtime, execute, reporting
    studies         evaluation
    mathematics     influence, retraining, solvers, curvature, objective
    data            features, models, datasets, rendering
"""
