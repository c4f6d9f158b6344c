"""What two notebooks need or a test must reach; everything else stays in the notebook that uses it.

Layers, top to bottom; an import may only point down:

    notebook face   runtime, cluster, execute, reporting
    studies         attacks, corruptions, evaluation, vehicles
    mathematics     attribution, influence, many_fits, retraining, network_retraining,
                    approximations, solvers, spectrum, curvature, objective, head,
                    checks, keras_facts
    data            features, backbone, models, datasets, rendering
"""
