"""Factors of the Hessian that a training keeps for later requests."""

import dataclasses

import numpy as np
import scipy  # its parts load when they are first used
from chex import ArrayTree

from certunlearn._numerics import checks
from certunlearn.models.loss import ConvexLoss
from certunlearn.solvers import data_blocks
from certunlearn.solvers.data_blocks import Data
from certunlearn.solvers.data_passes import Objective, flatten, objective

# Up to so many parameters the whole Hessian is factored: 300 MB, and some seconds.
MOST_FACTORED = 6144
# Up to so many numbers in the blocks of single outputs: 2 GiB.
_MOST_IN_BLOCKS = 2**28
# A product of matrices takes about so much of the time that as many flops of a pass take.
_SPEED_OF_PRODUCTS = 0.5


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Curvature:
    """A factor of the Hessian at some parameters, to keep for later requests. Private.

    It may be that of other data, other parameters or another loss: it decides how fast a solver
    converges, and nothing else. It holds traces of the rows that it was computed from. Keep it as
    private as the data, also after a deletion.

    Args:
      factors: lower Cholesky factors `[blocks, m, m]`, blocks times m the number of parameters: of
        the whole Hessian, or of its blocks of single outputs.
      outputs: parameters are `[d, outputs]`, and the factors' numbers are ordered by output, then
        by feature; None: as the parameters are.
    """

    factors: np.ndarray
    outputs: int | None

    def __repr__(self) -> str:
        """The size alone."""
        return f"Curvature(of {self.size} parameters, private)"

    @property
    def size(self) -> int:
        """The number of parameters."""
        return int(self.factors.shape[0] * self.factors.shape[1])

    def solve(self, gradient: np.ndarray) -> np.ndarray:
        """The inverse of the factored matrix times a flat vector."""
        width = self.outputs or 1
        ordered = gradient.reshape(-1, width).T.reshape(self.factors.shape[:2])
        solved = [
            scipy.linalg.cho_solve((factor, True), part, check_finite=False)
            for factor, part in zip(self.factors, ordered, strict=True)
        ]
        return np.concatenate(solved).reshape(width, -1).T.ravel()


def factorize(
    loss: ConvexLoss, params: ArrayTree, data: Data, *, allowance: float | None = None
) -> Curvature:
    """Factors the Hessian of the objective at `params`, to keep from a training for `minimize`.

    Args:
      loss, params, data, allowance: as for `minimize`.

    Returns:
      A `Curvature`, private: of the whole Hessian for up to 6144 parameters, else of its blocks of
      single outputs.

    Raises:
      ValueError: if that is too large as well, or as for `minimize`.

    >>> from certunlearn import convex
    >>> loss = convex.ridge_regression(feature_norm=1.0, target_norm=1.0, l2=0.5)
    >>> factorize(loss, np.zeros(2), (np.eye(2), np.ones(2)))
    Curvature(of 2 parameters, private)
    """
    return factored(objective(loss, params, data, allowance), flatten(params))


def factored(aim: Objective, flat: np.ndarray) -> Curvature:
    """The factor at a point; takes one pass over the data.

    Raises:
      ValueError: if even single outputs have too many parameters.
    """
    if not is_factorable(aim.loss, flat.size):
        raise ValueError(
            f"params must be fewer for a factor of the Hessian, got {flat.size}: minimize without "
            "one (method='lbfgs')"
        )
    blocks = aim.hessian(flat, by_output=flat.size > MOST_FACTORED)
    return Curvature(np.stack([_cholesky(block) for block in blocks]), aim.loss.outputs)


def is_factorable(loss: ConvexLoss, size: int) -> bool:
    """Whether a factor, whole or by output, is small enough."""
    by_output = data_blocks.is_linear(loss) and loss.outputs is not None
    return size <= MOST_FACTORED or (by_output and size**2 <= _MOST_IN_BLOCKS * (loss.outputs or 1))


def cost_in_passes(loss: ConvexLoss, size: int, rows: int) -> float:
    """About how many passes take as long as a factor does."""
    outputs = loss.outputs or 1
    block = size / outputs if size > MOST_FACTORED else size
    return _SPEED_OF_PRODUCTS * block * (0.25 + size / (12 * rows))


def check_curvature(curvature: Curvature | None, size: int) -> None:
    """Raises if it is no factor for so many parameters."""
    if curvature is None:
        return
    if not isinstance(curvature, Curvature):
        raise TypeError(f"curvature must be a Curvature or None, got {checks.shown(curvature)}")
    if curvature.size != size:
        raise ValueError(
            f"curvature must be of {size} parameters, as params are, got one of {curvature.size}"
        )


def _cholesky(matrix: np.ndarray) -> np.ndarray:
    # Rounding may leave tiny negative eigenvalues where l2 is tiny. A factor of a matrix nearby
    # serves as well, as it decides about speed only.
    ridge, diagonal = 0.0, np.arange(len(matrix))
    largest = float(np.max(matrix[diagonal, diagonal]))
    while True:
        try:
            return scipy.linalg.cholesky(matrix, lower=True)
        except scipy.linalg.LinAlgError:
            more = max(2 * ridge, 1e-13 * largest)
            matrix = matrix.copy()
            matrix[diagonal, diagonal] += more - ridge
            ridge = more
