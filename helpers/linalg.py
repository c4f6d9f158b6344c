"""Dense matrices in float64: products on whichever device there is, and Cholesky factors."""

import numpy as np
import scipy.linalg
import tensorflow as tf

ON_GPU = bool(tf.config.list_physical_devices("GPU"))


def gemm(a, b):
    """Return a @ b in float64: on the GPU where there is one, else by NumPy's BLAS.

    TensorFlow's own float64 product is 2.5 times slower than OpenBLAS on a CPU.
    """
    return tf.matmul(a, b).numpy() if ON_GPU else a @ b


def gram(phi, weight):
    """Return phi' diag(weight) phi; weights of one sign take half the work (a symmetric GEMM)."""
    sign = 1 if weight.min() >= 0 else -1 if weight.max() <= 0 else 0
    if sign == 0:
        return gemm(phi.T, phi * weight[:, None])
    half = phi * np.sqrt(np.abs(weight))[:, None]
    return sign * gemm(half.T, half)


def damped(matrix, damping):
    """Return matrix + damping I as a new array."""
    matrix = matrix.copy()
    matrix[np.diag_indices_from(matrix)] += damping
    return matrix


class Factor:
    """A Cholesky factor of a symmetric positive definite matrix (p, p), used for many solves.

    Raises
    ------
    np.linalg.LinAlgError
        if the matrix has an eigenvalue that is not positive.
    """

    def __init__(self, matrix):
        try:
            self.lower = scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
        except np.linalg.LinAlgError as error:
            raise np.linalg.LinAlgError(
                "The matrix is not positive definite, so it has no Cholesky factor. In a solve add "
                "damping above minus its smallest eigenvalue, or use the Gauss-Newton matrix. An "
                "exact fit or removal needs a loss that bends upwards: let every parameter decay "
                "(weight_decay > 0, decayed='all'), or take another loss."
            ) from error

    def solve(self, b):
        """Return the solution for b, (p,) or (p, k)."""
        return scipy.linalg.cho_solve((self.lower, True), b, check_finite=False)

    def whiten(self, b):
        """Return L^-1 b, whose squared column norms are b' A^-1 b."""
        return scipy.linalg.solve_triangular(self.lower, b, lower=True, check_finite=False)

    def unwhiten(self, b):
        """Return L^-T b: the coordinates in which the matrix is the identity, turned back."""
        return scipy.linalg.solve_triangular(
            self.lower, b, lower=True, trans="T", check_finite=False
        )
