"""Influence functions on Keras models: the mathematics alone; no file is read, nothing is drawn.

    objective = Objective(model, loss, x, y, weight_decay=1e-3)
    solution = s_test(objective, x_test, y_test, CG(damping=0.01))
    changes = predicted_loss_change(objective, solution)

Layers, top to bottom; an import may only point down:

    validate
    influence, removals, ekfac
    solvers
    spectrum, fit
    hessian
    gradients
    objective
    head                loss
    batches, parameters
    checks, derivatives
    keras_facts, linalg
"""

from .ekfac import EKFAC
from .fit import fit_head
from .hessian import GaussNewton, Hessian
from .influence import (
    influence_on_loss,
    influence_wrt_input,
    most_influential,
    predicted_loss_change,
    s_test,
    self_influence,
)
from .objective import Objective
from .removals import Removals
from .solvers import CG, Cholesky, Eigh, LiSSA, LowRank, solve
from .spectrum import choose_damping
from .validate import validate

__all__ = [
    "CG",
    "EKFAC",
    "Cholesky",
    "Eigh",
    "GaussNewton",
    "Hessian",
    "LiSSA",
    "LowRank",
    "Objective",
    "Removals",
    "choose_damping",
    "fit_head",
    "influence_on_loss",
    "influence_wrt_input",
    "most_influential",
    "predicted_loss_change",
    "s_test",
    "self_influence",
    "solve",
    "validate",
]
