"""The mathematics of influence functions on Keras models, and what it needs of data and models.

Layers, top to bottom; an import may only point down:

    vehicles        the thesis's two classes, their features and their head
    mathematics     attribution, influence, many_fits, retraining, network_retraining,
                    approximations, solvers, spectrum, curvature, objective, head,
                    checks, keras_facts
    data            features, backbone, models, datasets, rendering
    settings        runtime
"""
