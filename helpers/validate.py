"""Can I trust this on my model? Predicted loss changes against what a removal really does.

A convex head at its minimum is refitted exactly. Any other model is *held near*: theta is moved to
the minimum of

    L(t) - (1/n) (w_i loss_i(t) + (1/2) t . (decay * t)) - grad L(theta) . (t - theta)
         + (damping/2) ||t - theta||^2,

of which theta is the minimum when nothing is removed, wherever its training stopped. To first order
in 1/n this is the influence with H + damping I (Koh & Liang 2017, section 4.2; the proximal
response of Bae et al. 2022, with the loss itself in the place of its Bregman divergence).
"""

import time
import warnings
from typing import NamedTuple

import numpy as np
import scipy.optimize
from scipy import stats
from tqdm.auto import tqdm

from . import checks
from .hessian import operator_of_model
from .influence import predicted_loss_change, s_test
from .objective import loss_and_gradient, summed_loss_and_gradient
from .removals import Removals


class Validation(NamedTuple):
    """Predicted and actual changes of m test losses by k removals, in nats, and what they say.

    rows : (k,) training points, half of them the largest |prediction|, half drawn at random;
    predicted, actual : (m, k); r : Pearson's, over all of them; slope : least squares of actual on
    predicted, without an intercept; seconds : a removal took; advice : one sentence.
    """

    rows: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray
    r: float
    slope: float
    seconds: float
    advice: str

    def __str__(self):
        return (
            f"{len(self.rows)} removals, {len(self.actual)} test points: r {self.r:.2f}, slope "
            f"{self.slope:.2f} (actual over predicted), {self.seconds:.2g} s a removal. "
            f"{self.advice}"
        )


def validate(H, x_test, y_test, removals=20, *, damping="auto", solver=None, seed=0):
    """Return the Validation of `predicted_loss_change` on some test points, by real removals.

    H, solver, damping : as `s_test` takes them, an Objective or the Hessian or Gauss-Newton matrix
    of one; a model that is held near is held by that damping. seed : of the removals at random.
    Interrupted (Ctrl-C) while a model is held near, it returns what was finished. A float32 model
    is held near in a float64 copy, ValueError where none can be made; a UserWarning says where it
    does not stay near.
    """
    H = operator_of_model(H)
    objective, solution = H.objective, s_test(H, x_test, y_test, solver, damping=damping)
    predicted = predicted_loss_change(objective, solution)
    removals = min(removals, objective.n - 1)
    order = np.argsort(-np.abs(predicted).max(0), kind="stable")
    top, rest = np.split(order, [-(-removals // 2)])
    random = np.random.default_rng(seed).choice(rest, removals - len(top), replace=False)
    rows, started = np.concatenate([top, random]), time.perf_counter()
    try:
        without = Removals(objective) if objective.head else None
    except np.linalg.LinAlgError:  # a loss that does not bend upwards
        without = None
    if without and without.at_minimum:
        actual = without.loss_change(without.exact(rows), x_test, y_test)
    else:
        actual = _held_near(objective, rows, x_test, y_test, solution.damping)
    done = actual.shape[1]
    if done < 2:
        raise ValueError(f"{done} removals are finished; two at least say something.")
    rows, predicted = rows[:done], predicted[:, rows[:done]]
    r = stats.pearsonr(predicted.ravel(), actual.ravel()).statistic
    slope = np.vdot(predicted, actual) / np.vdot(predicted, predicted)
    seconds = (time.perf_counter() - started) / done
    advice = _advice(r, slope, bool(objective.head), bool(solution.converged.all()))
    return Validation(rows, predicted, actual, float(r), float(slope), seconds, advice)


def _advice(r, slope, convex, solved):
    """Return one sentence on what to do."""
    if not solved:
        return "The system was not solved: raise the damping."
    if r >= 0.9 and 0.8 <= slope <= 1.25:
        return "Order and size can be trusted for single removals."
    if convex:
        return "Take one Newton step: Removals(objective).newton_loss_change(x_test, y_test)."
    if r >= 0.9:
        return "Trust the order, not the size: multiply by the slope, or raise the damping."
    return "Raise the damping, or take the last layer alone (parameters='last_layer')."


def _held_near(objective, rows, x_test, y_test, damping):
    """Return the actual changes (m, k) of test losses; of the removals finished, where cut off."""
    if objective.dtype != "float64":
        objective = objective.in_float64()
        if objective is None:
            raise ValueError(
                "One removal moves the parameters by less than float32 can tell, and no float64 "
                "copy of this model can be made (of a subclassed one it takes get_config): build "
                "it in float64, keras.config.set_dtype_policy('float64'). (LoRA's factors are "
                "float32 in every model.)"
            )
    theta, slope, n = objective.theta, objective.gradient(), objective.n
    before, changes, astray = objective.losses(x_test, y_test), [], 0

    def target(away, x, y, weight):
        objective.theta = t = theta + away
        whole = summed_loss_and_gradient(objective).numpy().astype(np.float64) / n
        own = loss_and_gradient(objective, x, y, weight).numpy().astype(np.float64) / n
        value, gradient = whole[0] - own[0], whole[1:] - own[1:]
        kept = (1 - share / n) * objective.decay * t
        value += kept @ t / 2 - slope @ away + damping / 2 * away @ away
        return value, gradient + kept - slope + damping * away

    def scaled(u):  # so that tolerances are relative: value and slope are of size one
        value, gradient = target(length * u, *point)
        return (value - start) / (size * length), gradient / size

    options = {"maxiter": 200, "maxcor": 30, "ftol": 1e-14, "gtol": 1e-7}
    how = {"method": "L-BFGS-B", "jac": True, "options": options}
    try:
        for row in tqdm(checks.rows(rows, n), "removals", unit="removal", leave=False):
            point, counted = objective.data.gather([row]), objective.loss.counted
            share = 1.0 if counted is None else counted[row]
            start, steep = target(0 * theta, *point)
            size = np.linalg.norm(steep) or 1.0
            length = size / (damping or 1.0)
            found = scipy.optimize.minimize(scaled, 0 * theta, **how)
            along = abs(steep @ found.x) / size  # twice the fall, in a quadratic bowl
            wrong = np.linalg.norm(found.jac) > 0.1 or -found.fun > 2 * along
            astray += wrong and along * size * length > 1e-12 * abs(start)  # not by rounding alone
            objective.theta = theta + length * found.x
            changes.append(objective.losses(x_test, y_test) - before)
    except KeyboardInterrupt:
        tqdm.write(f"interrupted after {len(changes)} of {len(rows)} removals")
    finally:
        objective.theta = theta
    if astray:
        warnings.warn(
            f"After {astray} of {len(changes)} removals the model does not stay near: the loss "
            "with this damping has no minimum at theta. Raise the damping.",
            stacklevel=3,
        )
    return np.array(changes).T.reshape(len(before), -1)
