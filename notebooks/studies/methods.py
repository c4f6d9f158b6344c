"""Attribution methods on several models: what each predicts, what retraining shows, what it costs.

Sizes: n training points, m test points, p parameters, k subsets of the training points, c
checkpoints of Adam. Losses and their changes are in nats.
"""

from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
import scipy.linalg
import tensorflow as tf
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import gen_batches
from tqdm.auto import tqdm

from helpers import (
    CG,
    GaussNewton,
    Hessian,
    Objective,
    Removals,
    fit_head,
    predicted_loss_change,
    solve,
)
from helpers.ekfac import Blocks
from helpers.gradients import gradient_dots, per_example_gradients
from studies import many_fits
from studies.network_retraining import NetworkRemovals, polish
from support import evaluation


class Problem(NamedTuple):
    """Data, an untrained Keras model, its loss, and how Adam trains it; all parameters decay."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    model: Any
    loss: Any
    decay: float
    steps: int
    rate: float = 0.01


def some_digits(digits, n, seed):
    """Return n random training digits and the first 1,000 test digits: x, y, x_test, y_test."""
    some = np.random.default_rng([seed, 14]).permutation(len(digits.x_train))[:n]
    train = digits.x_train[some], digits.y_train[some]
    return *train, digits.x_test[:1000], digits.y_test[:1000]


def mlp(d, hidden):
    """Return a network of two hidden layers with batch normalisation, for d inputs and ten classes.

    The normalisation has no centre and no scale of its own: the next kernel and bias do both.
    """
    layers, body = keras.layers, []
    for _ in range(2):
        normalised = layers.BatchNormalization(center=False, scale=False, momentum=0.8)
        body += [layers.Dense(hidden), normalised, layers.Activation("tanh")]
    return keras.Sequential([keras.Input((d,)), *body, layers.Dense(10)])


def fit(problem, labels, seed):
    """Return a Problem's Objective at its minimum with labels (n,), and checkpoints (c, p).

    The model is trained from scratch by Adam; then its batch statistics stay as they are, and
    Newton's method (a head) or L-BFGS (a network) goes on to a gradient of zero.
    """
    looks = np.unique(np.geomspace(5, problem.steps, 6).astype(int))  # where TracIn looks
    every = np.arange(len(labels))[None]
    (theta,), (rest,), checkpoints = train_many(problem, labels, every, [seed], looks)
    model = keras.models.clone_model(problem.model)
    _assign(model, theta, rest)
    data = problem.loss, problem.x, labels
    objective = Objective(model, *data, weight_decay=problem.decay, decayed="all")
    fit_head(objective) if objective.head else polish(objective)
    return objective, checkpoints[:, 0]


def _assign(model, theta, rest):
    """Write the trainable parameters theta (p,) and the others, rest (q,), into a model."""
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    ends = np.cumsum([np.size(v) for v in variables])[:-1]
    for variable, part in zip(variables, np.split(np.r_[theta, rest], ends), strict=True):
        variable.assign(part.reshape(variable.shape))


class Case:
    """A Problem with its model at the minimum, and the test points on which methods are judged.

    Attributes
    ----------
    objective, checkpoints : what `fit` returns.
    accuracy : on all test points.
    x, y : the m test points of `like`, another Case, or chosen by `evaluation.choose_test_points`.
    gradients : (p, m), of their losses; solve : the Solvers of the objective.
    """

    def __init__(self, problem, seed, like=None):
        self.problem, self.seed = problem, seed
        self.objective, self.checkpoints = fit(problem, problem.y, seed)
        losses = self.objective.losses(problem.x_test, problem.y_test)
        outputs = self.objective.model.predict(problem.x_test, verbose=0)
        guess = outputs.argmax(1) if outputs.shape[1] > 1 else outputs[:, 0] > 0
        correct = guess == problem.y_test
        rules = evaluation.choose_test_points(losses, correct, seed=seed)
        rows = np.concatenate(list(rules.values()))
        points = (problem.x_test[rows], problem.y_test[rows]) if like is None else (like.x, like.y)
        self.accuracy, self.x, self.y = correct.mean(), *points
        self.gradients = per_example_gradients(self.objective, self.x, self.y).T
        self.solve = Solvers(self.objective)


class Solvers:
    """(M + damping I)^-1 b of one Objective, M its Hessian, Gauss-Newton's matrix, or EK-FAC's.

    names : of the methods; a convex head has no Gauss-Newton of its own, it is the Hessian.
    spectra : {method: eigenvalues (p,), eigenvectors (p, p)} of the two that are formed.
    """

    def __init__(self, objective):
        self.objective, dense = objective, {"exact": Hessian(objective).dense()}
        if not objective.head:
            dense["Gauss-Newton"] = GaussNewton(objective).dense()
        self.spectra = {name: scipy.linalg.eigh(matrix) for name, matrix in dense.items()}
        self.hessian, self.names = dense["exact"], [*dense, "EK-FAC"]

    def __call__(self, method, b, damping=0.0):
        if method == "EK-FAC":
            return Blocks(self.objective, damping).solve(b)
        values, vectors = self.spectra[method]
        return vectors @ ((vectors.T @ b) / (values + damping)[:, None])


def mean_change(cases, method, damping):
    """Return the predicted loss changes of a method of `Solvers`, mean over Cases, (m, n)."""
    pairs = [(c.objective, c.solve(method, c.gradients, damping)) for c in cases]
    return np.mean([predicted_loss_change(*pair) for pair in pairs], axis=0)


def noise_ceiling(losses, seed):
    """Return the highest rank correlation that mean losses allow: [mean, low, high].

    losses : (m, k, seeds), after training on k subsets from each seed. If those of two halves of
    the seeds correlate with r, the mean of all has reliability 2r / (1 + r) (Spearman 1910, Brown
    1910), and nothing that knows the subset alone correlates with it by more than the root of that.
    The interval is a 95 % bootstrap over test points.
    """
    halves = zip(losses[..., ::2].mean(2), losses[..., 1::2].mean(2), strict=True)
    r = [evaluation.agreement(*pair).rank for pair in halves]
    r = np.clip(evaluation.bootstrap_of_mean(r, [seed, 9]), 0, 1)
    return np.sqrt(2 * r / (1 + r))


def mean_predictions(cases, dampings):
    """Return {method: mean of `predictions` over Cases}, and the Hessian products of the first."""
    found = [predictions(case, dampings) for case in cases]
    mean = {m: np.mean([of[m] for of, _ in found], axis=0) for m in found[0][0]}
    return mean, found[0][1]


def predictions(case, dampings):
    """Return {method: predicted loss changes (m, n)}, and the Hessian products that CG took.

    dampings : {method: damping} of the methods that solve with a matrix.
    """
    objective, gradients, products = case.objective, case.gradients, np.nan
    change = partial(predicted_loss_change, objective)
    found = {m: change(case.solve(m, gradients, dampings[m])) for m in case.solve.names}
    if not objective.head:
        how = {"damping": dampings["exact"], "rtol": 1e-3, "precondition": None}
        solution = solve(objective, gradients, CG(**how))
        found["CG"], products = change(solution), solution.steps.sum()
    elif objective.head.c == 1:
        found["leverage"] = found["exact"] / (1 - Removals(objective).leverage)

    def dots(gradients):
        return gradient_dots(objective, gradients.T) / objective.n

    dots_at = partial(_summed, objective, case.x, case.y, dots)
    same = np.where(case.y[:, None] == case.problem.y, 1, -1)
    near = cosine_similarity(*(a.reshape(len(a), -1) for a in (case.x, case.problem.x)))
    return found | {
        "Newton": _after_newton(case, dampings["exact"]),
        "Grad-Dot": dots_at([objective.theta]),
        "TracIn": dots_at(case.checkpoints),
        "neighbours": same * near,
        "random": np.random.default_rng([case.seed, 3]).normal(size=same.shape),
    }, products


def _after_newton(case, damping):
    """Return the change of each test loss after a Newton step without each point, (m, n).

    A network's Hessian is damped, above its smallest eigenvalue: where all gradients are zero it
    may have a negative one.
    """
    if case.objective.head:
        return Removals(case.objective).newton_loss_change(case.x, case.y)
    above = -1.5 * case.solve.spectra["exact"][0][0]
    removals = NetworkRemovals(case.objective, case.solve.hessian, damping=max(damping, above))
    steps = removals.newton_steps(np.arange(case.objective.n))
    return removals.loss_change(removals.theta[:, None] + steps, case.x, case.y)


def _summed(objective, x, y, use, thetas):
    """Return the sum over parameters `thetas` (c, p) of use(the losses' gradients (k, p) there)."""
    home, total = objective.theta, 0
    for objective.theta in thetas:
        total = total + use(per_example_gradients(objective, x, y))
    objective.theta = home
    return total


def retrained(case, kept, seeds):
    """Return the test losses after training on each subset `kept` (n, k) alone.

    (m, k) for a head, refitted exactly; (m, k, seeds) for a network, trained from scratch from
    the initial parameters of seeds 0, 1, ..., seeds - 1.
    """
    problem, k, head = case.problem, kept.shape[1], case.objective.head
    if head:
        labels = np.repeat(problem.y[:, None], k, 1)
        how = {"start": np.repeat(case.objective.theta[:, None], k, 1), "tol": 1e-6}
        refits = many_fits.fit_many(case.objective, labels, weight=kept.astype(float), **how)
        return head.losses(case.y.astype(head.y.dtype), head.outputs(case.x, refits.theta))
    rows = np.repeat([np.flatnonzero(column) for column in kept.T], seeds, axis=0)
    thetas, rests, _ = train_many(problem, problem.y, rows, np.tile(np.arange(seeds), k))
    model, losses = keras.models.clone_model(problem.model), []
    for theta, rest in zip(thetas, rests, strict=True):
        _assign(model, theta, rest)
        outputs = model(case.x, training=False)
        losses.append(case.objective.loss_of_predictions(case.y, outputs).numpy())
    return np.stack(losses, axis=1).reshape(len(case.y), k, seeds)


def left_out(case, predicted, *, n_top, keep):
    """Return which training points are left out one at a time (k,), and the loss changes (m, k).

    The union over methods of the n_top largest predictions for each test point, so that no method
    chooses the points by which another is judged; predicted : {method: (m, n)}, one of them random.
    A head is refitted exactly; a network is trained on from where it stands, its statistics frozen.
    keep : a `stored.checkpoint`.
    """
    objective, every = case.objective, np.concatenate(list(predicted.values()))
    rows = np.unique([evaluation.top(row, n_top) for row in every])
    if objective.head:
        removals = Removals(objective)
        thetas = removals.exact(rows)
    else:
        removals = NetworkRemovals(objective, case.solve.hessian)
        thetas = removals.retrain(rows, checkpoint=keep).thetas
    return rows, removals.loss_change(thetas, case.x, case.y)


def suspicion(case, labels, dampings):
    """Return {method: suspicion of each training point (n,)} after training on labels (n,).

    The influence of each point on its own loss; for neighbours, how many of the ten nearest have
    another label; also the loss itself. For a head, Newton is the loss after leaving the point out.
    """
    x = case.problem.x
    objective, checkpoints = fit(case.problem, labels, case.seed)
    solve = Solvers(objective)
    gradients = per_example_gradients(objective, x, labels).T
    found = {m: (gradients * solve(m, gradients, dampings[m])).sum(0) for m in solve.names}
    found |= {"Grad-Dot": (gradients**2).sum(0), "loss": objective.losses(x, labels)}
    found["TracIn"] = _summed(objective, x, labels, lambda g: (g**2).sum(1), checkpoints)
    if objective.head:
        found["Newton"] = Removals(objective).left_out_losses()
    near = NearestNeighbors(n_neighbors=10, metric="cosine").fit(x.reshape(len(x), -1))
    differ = labels[near.kneighbors(return_distance=False)] != labels[:, None]
    tie, chance = np.random.default_rng([case.seed, 8]).random((2, len(labels)))
    return found | {"neighbours": differ.mean(1) + 1e-6 * tie, "random": chance}


def costs(case, cg_products):
    """Return {method: cost} for the m test points of one model, in gradients of its training loss.

    One of them is 6np operations. cg_products : Hessian products that CG took.
    """
    objective, m = case.objective, case.gradients.shape[1]
    n, p, head = objective.n, objective.p, objective.head
    c, unit, dots = (head.c if head else 10), 6 * n * p, 1 + m / 3
    form = n * p * p * (c + 1) / c / unit if head else 2 * p
    factor = (p**3 / 3 + 2 * p * p * m) / unit
    kernels = [layer.kernel.shape for layer in objective.model.layers if layer.trainable_variables]
    sides = [(int(np.prod(shape[:-1])), shape[-1]) for shape in kernels]
    blocks = sum(10 * (d**3 + o**3) + 4 * m * d * o * (d + o) for d, o in sides) / unit
    return {
        "exact": form + factor + dots,
        "CG": 2 * cg_products + dots,
        "leverage": form + factor + dots + n * p * p / unit,
        "Newton": form + factor + n * p * p * (c + 1) * 2 / unit + m / 3,
        "Gauss-Newton": c + 2 * n * c * p * p / unit + factor + dots,
        "EK-FAC": 2 * (1 + c) + blocks + dots,
        "Grad-Dot": dots,
        "TracIn": len(case.checkpoints) * dots,
        "neighbours": 1 / 3 + m / 3,
    }


def train_many(problem, labels, rows, seeds, keep=(), batch=32):
    """Train a Problem's model k times from scratch on subsets of its data, together: full Adam.

    All copies of a batch take their steps in one `tf.vectorized_map`. The learning rate falls to 0
    along a cosine; weight decay applies to every trainable parameter, inside the loss.

    labels : (n,). rows : (k, s) indices of each subset. seeds : (k,) of the initial parameters,
    `keras.utils.set_random_seed`. Returns the trainable (k, p) and other (k, q) parameters, in
    model order, and the trainable ones after the steps `keep`, (steps kept, k, p).
    """
    starts = {seed: _initial(problem.model, seed) for seed in dict.fromkeys(seeds)}
    theta, rest = (np.stack([starts[seed][k] for seed in seeds]) for k in (0, 1))
    step, ends = _adam_step(problem), []
    for part in tqdm([*gen_batches(len(rows), batch)], "trainings", unit="batch", leave=False):
        data = tf.constant(problem.x[rows[part]]), tf.constant(labels[rows[part]])
        state, taken = (tf.constant(theta[part]), tf.constant(rest[part])), []
        moments = tf.zeros_like(state[0]), tf.zeros_like(state[0])
        for k in range(problem.steps):
            now = problem.rate * (1 + np.cos(np.pi * k / problem.steps)) / 2
            state, moments = step(state, moments, data, tf.constant(k + 1.0), tf.constant(now))
            if k + 1 in keep:
                taken.append(state[0].numpy())
        taken = np.reshape(taken, (len(taken), *state[0].shape))
        ends.append((state[0].numpy(), state[1].numpy(), taken))
    thetas, rests, kept = zip(*ends, strict=True)
    return np.concatenate(thetas), np.concatenate(rests), np.concatenate(kept, 1)


def _initial(model, seed):
    keras.utils.set_random_seed(int(seed))
    fresh = keras.models.clone_model(model)
    return [_flat(fresh.trainable_variables), _flat(fresh.non_trainable_variables)]


def _flat(variables):
    return np.concatenate([np.zeros(0), *[np.ravel(v) for v in variables]])


def _adam_step(problem):
    model, b1, b2 = problem.model, 0.9, 0.999

    def parts(flat, variables):
        split = tf.split(flat, [int(np.prod(v.shape)) for v in variables]) if variables else []
        return [tf.reshape(t, v.shape) for t, v in zip(split, variables, strict=True)]

    def one_copy(copy):
        theta, rest, x, y = copy
        with tf.GradientTape() as tape:
            tape.watch(theta)
            own = parts(theta, model.trainable_variables)
            others = parts(rest, model.non_trainable_variables)
            outputs, moved = model.stateless_call(own, others, x, training=True)
            value = tf.reduce_mean(problem.loss(y, outputs))
            value += problem.decay / 2 * tf.reduce_sum(theta**2)
        moved = tf.concat([tf.reshape(t, [-1]) for t in moved], 0) if moved else rest
        return tape.gradient(value, theta), moved

    @tf.function
    def step(state, moments, data, k, rate):
        gradient, rest = tf.vectorized_map(one_copy, (*state, *data))
        m = b1 * moments[0] + (1 - b1) * gradient
        v = b2 * moments[1] + (1 - b2) * gradient**2
        k = tf.cast(k, m.dtype)
        length = tf.cast(rate, m.dtype) * tf.sqrt(1 - b2**k) / (1 - b1**k)
        return (state[0] - length * m / (tf.sqrt(v) + 1e-7), rest), (m, v)

    return step
