"""EK-FAC: the Gauss-Newton matrix layer by layer, in the eigenbasis of its Kronecker factors."""

from dataclasses import dataclass
from typing import ClassVar

import keras
import numpy as np
import tensorflow as tf

from . import keras_facts
from .gradients import map_rows, opened, patches
from .hessian import output_factors
from .objective import compiled
from .solvers import Solver


@dataclass(frozen=True)
class EKFAC(Solver):
    """(G + diag(decay) + damping I)^-1 with G one block a layer, diagonal in a Kronecker basis.

    George et al. 2018; Grosse et al. 2023, section 2.2. With a (d,) a Dense layer's input and
    g (o,) a column of F_i (F_i F_i' = A_i, the Hessian of loss_i in the outputs) pulled back to the
    layer's output before the activation, its block of G is the mean over examples of the sum over
    columns of vec(a g') vec(a g')'. Q and R are the eigenvectors of E[a a'] and E[g g']; in the
    basis Q (x) R the diagonal of G is kept exactly. A bias is one more input that is always 1. For
    Conv2D a are patches; gradients and factors are sums over positions (Grosse & Martens 2016).

    All columns are used, none sampled. Coordinates are scaled by the square root of decay +
    damping, so that a bias without decay beside a kernel with it costs no accuracy. The certificate
    holds x against the whole operator (`GaussNewton(objective)` is what EK-FAC approximates); it is
    judged by being nearer to the solution than zero is.

    damping : it may be 0 where every parameter is decayed. The objective's parameters are those of
    Dense and Conv2D layers.
    """

    approximate: ClassVar[float] = 1.0

    def run(self, H, b):
        return Blocks(H.objective, self.damping).solve(b), {"method": "EK-FAC"}


class Blocks:
    """The factors of EK-FAC for an objective and a damping, for any number of right-hand sides."""

    def __init__(self, objective, damping):
        if objective is None:
            raise ValueError("EK-FAC needs the layers of a model: pass a GaussNewton or Hessian.")
        shift = objective.decay + damping
        if shift.min() <= 0:
            raise ValueError("EK-FAC needs weight decay on every parameter, or damping > 0.")
        wheres = list(_blocks(objective).values())
        scales = [1 / np.sqrt(shift[where[:, :1]]) for where in wheres]
        squares = [(k, k) for where in wheres for k in where.shape]
        known = [[tf.constant(scale[:, 0], objective.dtype) for scale in scales]]
        bases = [np.linalg.eigh(f)[1] for f in _sums(objective, _factors, squares, known)]
        known.append([tf.constant(basis, objective.dtype) for basis in bases])
        diagonals = _sums(objective, _diagonals, [where.shape for where in wheres], known)
        diagonals = [1 + diagonal / objective.n for diagonal in diagonals]
        self._layers = list(zip(wheres, scales, bases[::2], bases[1::2], diagonals, strict=True))

    def solve(self, b):
        """Return the solution for columns (p, k), in float64."""
        x = np.empty_like(b)
        for where, scale, q, r, diagonal in self._layers:
            v = b[where] * scale[..., None]
            v = np.einsum("ai,bj,abk->ijk", q, r, v, optimize=True) / diagonal[..., None]
            x[where] = np.einsum("ai,bj,ijk->abk", q, r, v, optimize=True) * scale[..., None]
        return x


def _blocks(objective):
    """Return {layer: where its kernel (d, o), with the bias as last row, stands in theta}."""
    ends = np.cumsum([0, *objective.sizes])
    left = {
        id(v): np.arange(*at)
        for v, *at in zip(objective.variables, ends[:-1], ends[1:], strict=True)
    }
    blocks = {}
    for layer in keras_facts.all_layers(objective.model):
        supported = type(layer) in (keras.layers.Dense, keras.layers.Conv2D)
        if supported and keras_facts.is_known(layer) and id(layer.kernel) in left:
            where = left.pop(id(layer.kernel)).reshape(-1, layer.kernel.shape[-1])
            bias = left.pop(id(layer.bias), None) if layer.use_bias else None
            blocks[layer] = where if bias is None else np.vstack([where, bias])
    if left:
        names = [v.path for v in objective.variables if id(v) in left]
        raise ValueError(
            f"EK-FAC is defined for the kernels (and their biases) of Dense and Conv2D layers, not "
            f"for {len(names)} others, such as {names[0]}: leave them out with parameters=[layer "
            "names], or solve by CG with GaussNewton(objective)."
        )
    return blocks


def _passes(objective, x, y):
    """Return, for each block, inputs a (b, T, d) and pulled-back directions g (C, b, T, o).

    T positions: 1 for a Dense layer on vectors. One forward pass, one backward pass a column of F.
    """
    blocks = _blocks(objective)
    inputs, befores, back = opened(objective, x, list(blocks))
    rows, widths = tf.shape(inputs[0])[0], [int(np.prod(b.shape[1:])) for b in befores]

    def pulled(direction):
        return tf.concat([tf.reshape(g, (rows, -1)) for g in back(direction)], 1)

    factors, signs = output_factors.graph(objective, x, y)
    factors *= tf.maximum(signs, 0)[:, None, :]  # EK-FAC has no negative eigenvalue
    columns = tf.transpose(factors, (2, 0, 1))
    parts = tf.split(map_rows(objective, pulled, columns), widths, axis=2)
    for (layer, where), a, g in zip(blocks.items(), inputs, parts, strict=True):
        g, a = tf.reshape(g, (tf.shape(g)[0], rows, -1, where.shape[1])), patches(layer, a)
        if a.shape[-1] < len(where):  # the layer's bias multiplies ones
            a = tf.concat([a, tf.ones_like(a[..., :1])], 2)
        yield a, g


def _sums(objective, terms, shapes, known):
    """Return the sums over all batches of what terms(passes, weight, *known) yields, in float64."""
    *ends, size = np.cumsum([np.prod(shape) for shape in shapes])
    packed = _packed(objective, terms, int(size), known).numpy().astype(np.float64)
    parts = np.split(packed, ends)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@compiled
def _packed(objective, terms, size, known):
    def one_batch(x, y, weight):
        passes = _passes(objective, x, y)
        return tf.concat([tf.reshape(s, [-1]) for s in terms(passes, weight, *known)], 0)

    # a pass holds the activations of C columns, and their gradients
    gradients = 8 * objective.p / max(1, objective.data.bytes_an_example)
    copies = int(objective.loss.width * (1 + gradients))
    return objective.data.accumulate(one_batch, tf.zeros(size, objective.dtype), copies)


def _factors(passes, weight, scales):
    """Yield the sums of w a a' and of w g g' over examples, columns and positions."""
    for (a, g), scale in zip(passes, scales, strict=True):
        for rows in (a * scale, g):
            weighted = tf.reshape(rows * weight[:, None, None], (-1, rows.shape[-1]))
            flat = tf.reshape(rows, (-1, rows.shape[-1]))
            yield tf.matmul(flat, weighted, transpose_a=True)


def _diagonals(passes, weight, scales, bases):
    """Yield the sums of w (q' a g' r)^2 over examples and columns."""
    for (a, g), scale, q, r in zip(passes, scales, bases[::2], bases[1::2], strict=True):
        a, g = tf.matmul(a * scale, q), tf.matmul(g, r)
        if a.shape[1] == 1:  # the square of a g' is the product of the squares
            squares = tf.reduce_sum(g[:, :, 0] ** 2, 0) * weight[:, None]
            yield tf.matmul(a[:, 0] ** 2, squares, transpose_a=True)
        else:
            rows = tf.matmul(a[None], g, transpose_a=True)
            yield tf.reduce_sum(rows**2 * weight[:, None, None], (0, 1))
