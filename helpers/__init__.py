"""The mathematics of influence functions on Keras models: no file is read, nothing is drawn.

Layers, top to bottom; an import may only point down:

    influence, retraining, ekfac
    approximations
    solvers
    spectrum
    curvature
    objective
    head
    checks
    keras_facts
"""
