"""The PyTorch libraries, in their own environment (`make peers`), on the same weights and data.

Their conjugate gradients get the number of steps at which exact CG reaches a relative residual of
1e-3 on the task. None of them carries the regulariser's share; it is left out of their reference.
"""

import itertools
import logging
import os
import shutil
import sys
import tempfile
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.manual_seed(0)


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean((-2, -1))


class Binary(nn.Module):
    """A logistic head with the logits (0, x.theta)."""

    def __init__(self, d):
        super().__init__()
        self.fc = nn.Linear(d, 1, bias=False)

    def forward(self, x):
        z = self.fc(x)
        return torch.cat([torch.zeros_like(z), z], -1)


def network(task):
    """Return the PyTorch model of a task."""
    if task == "t1":
        return Binary(2048)
    if task == "t3":
        parts = [nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
        parts = [m for part in parts for m in (part, nn.Tanh())]
        return nn.Sequential(*parts, nn.Conv2d(8, 10, 1), Mean())
    widths = {"t4": (64, 300, 300, 10), "softmax": (64, 10), "mlp": (64, 16, 10)}[task]
    parts = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


def build(task, data, dtype):
    """Return the model with the stored weights, and the tensors of the task."""
    model = network(task).to(dtype)
    theta = data["theta"]
    for parameter in model.parameters():  # Keras' order of axes is the reverse of PyTorch's
        shape = tuple(parameter.shape)
        keras_shape = (shape[2], shape[3], shape[1], shape[0]) if len(shape) == 4 else shape[::-1]
        part, theta = np.split(theta, [parameter.numel()])
        axes = (3, 2, 0, 1) if len(shape) == 4 else tuple(range(len(shape)))[::-1]
        parameter.data = torch.tensor(part.reshape(keras_shape).transpose(axes).copy(), dtype=dtype)
    model.eval()
    x, xt = (torch.tensor(data[k], dtype=dtype) for k in ("x_train", "x_test"))
    x, xt = (a.permute(0, 3, 1, 2).contiguous() if a.ndim == 4 else a for a in (x, xt))
    y, yt = (torch.tensor(data[k]).long() for k in ("y_train", "y_test"))
    return model, x, y, xt, yt


def prepare(method, task, data, steps=None, dtype=torch.float32):
    """Return a callable () -> predicted loss changes (m, n), and its settings in words."""
    library, kind = method.split()
    model, x, y, xt, yt = build(task, data, dtype)
    ridge = float(data["weight_decay"]) + float(data["damping"])
    steps = int(steps or data.get("cg_steps", 0))
    function = {"dattri": dattri, "pyDVL": pydvl, "captum": captum, "kronfluence": kronfluence}
    scores, settings = function[library](kind, model, x, y, xt, yt, ridge, steps)
    return lambda: scores().astype(np.float64) / len(x), settings


def dattri(kind, model, x, y, xt, yt, ridge, steps):
    from dattri.algorithm import influence_function as attributors
    from dattri.task import AttributionTask

    def loss(parameters, batch):
        outputs = torch.func.functional_call(model, parameters, (batch[0],))
        return functional.cross_entropy(outputs, batch[1])

    train = DataLoader(TensorDataset(x, y), batch_size=len(x))
    test = DataLoader(TensorDataset(xt, yt), batch_size=len(xt))

    def run():
        task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
        if kind == "explicit":
            a = attributors.IFAttributorExplicit(task, regularization=ridge)
        else:
            a = attributors.IFAttributorCG(
                task, max_iter=steps, tol=1e-6, regularization=ridge, mode="rev-rev"
            )
        a.cache(train)
        return a.attribute(train, test).detach().numpy().T

    return run, "dense Hessian" if kind == "explicit" else f"{steps} steps"


def pydvl(kind, model, x, y, xt, yt, ridge, steps):
    from pydvl.influence import torch as influences

    train = DataLoader(TensorDataset(x, y), batch_size=len(x))

    def run():
        if kind == "direct":
            a = influences.DirectInfluence(model, functional.cross_entropy, regularization=ridge)
        else:
            a = influences.CgInfluence(
                model, functional.cross_entropy, regularization=ridge, rtol=1e-8, atol=1e-12,
                maxiter=steps, solve_simultaneously=True, warn_on_max_iteration=False,
            )  # fmt: skip
        return a.fit(train).influences(xt, yt, x, y).detach().numpy()

    return run, "dense Hessian" if kind == "direct" else f"{steps} steps, all columns at once"


def captum(kind, model, x, y, xt, yt, ridge, steps):
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    folder = tempfile.mkdtemp()
    checkpoint = os.path.join(folder, "checkpoint.pt")
    torch.save(model.state_dict(), checkpoint)

    def load(network, path):
        network.load_state_dict(torch.load(path))
        return 1.0

    def run():  # captum sums the Hessian over the data
        a = ArnoldiInfluenceFunction(
            model, TensorDataset(x, y), checkpoint, load, batch_size=len(x),
            loss_fn=nn.CrossEntropyLoss(reduction="sum"), sample_wise_grads_per_batch=True,
            projection_dim=200, arnoldi_dim=250, arnoldi_tol=1e-6, hessian_reg=ridge * len(x),
            hessian_inverse_tol=1e-8,
        )  # fmt: skip
        return a.influence((xt, yt)).detach().numpy() * len(x)

    return run, "rank 200 of 250 Krylov vectors"


def kronfluence(kind, model, x, y, xt, yt, ridge, steps):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Loss(Task):
        def compute_train_loss(self, batch, model, sample=False):
            outputs, labels = model(batch[0]), batch[1]
            if sample:
                with torch.no_grad():
                    probabilities = functional.softmax(outputs.detach(), -1)
                    labels = torch.multinomial(probabilities, 1).flatten()
            return (batch[2] * functional.cross_entropy(outputs, labels, reduction="none")).sum()

        def compute_measurement(self, batch, model):
            return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    every = kind == "every-label"
    one, classes = torch.ones(len(x), dtype=x.dtype), model(xt).shape[-1]
    train, test, fitted = TensorDataset(x, y, one), TensorDataset(xt, yt, one[: len(xt)]), None
    if every:  # each example once a label, its loss times sqrt(C p): the Fisher without sampling
        root = (classes * functional.softmax(model(x).detach(), -1)).sqrt().flatten()
        labels = torch.arange(classes).repeat(len(x))
        fitted = TensorDataset(x.repeat_interleave(classes, 0), labels, root)
    task = Loss()
    model = prepare_model(model, task)
    names = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    factors = FactorArguments(
        strategy="ekfac", use_empirical_fisher=every, **{f"{n}_dtype": x.dtype for n in names}
    )
    names = ("per_sample_gradient", "precondition", "score")
    options = {f"{n}_dtype": x.dtype for n in names}

    def run():
        folder = tempfile.mkdtemp()
        try:
            a = Analyzer(
                analysis_name="b", model=model, task=task, cpu=True, disable_tqdm=True,
                output_dir=folder, log_level=logging.ERROR, disable_model_save=True,
            )  # fmt: skip
            a.fit_all_factors(
                factors_name="f", dataset=fitted or train, per_device_batch_size=500,
                factor_args=factors, overwrite_output_dir=True,
            )  # fmt: skip
            a.compute_pairwise_scores(
                scores_name="s", factors_name="f", query_dataset=test, train_dataset=train,
                per_device_query_batch_size=len(xt), per_device_train_batch_size=500,
                score_args=ScoreArguments(damping_factor=ridge, **options),
                overwrite_output_dir=True,
            )  # fmt: skip
            return a.load_pairwise_scores("s")["all_modules"].numpy()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return run, f"damping {ridge:g}"


if __name__ == "__main__":  # peers.py METHOD TASK DATA.npz CHANGES.npy, in float64
    with np.load(sys.argv[3]) as stored:
        run, _ = prepare(*sys.argv[1:3], dict(stored), dtype=torch.float64)
    np.save(sys.argv[4], run())
