"""Passes over data: the objective, its gradient with a bound on the norm, and its Hessian.

Everything is computed in float64, block by block, so that the data need not be in one array.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree
from jax.flatten_util import ravel_pytree

from certunlearn._numerics import checks
from certunlearn.models.loss import ConvexLoss
from certunlearn.solvers import data_blocks
from certunlearn.solvers.data_blocks import Batch, Block, Data, LinearBlock

_ROUNDOFF = 2.0**-53
# A network that computes in a number format promises no less than so many of its roundoffs.
_LEAST_ALLOWANCE = 16
# Columns of the Hessian of a loss that is not one of a linear model, computed at once.
_COLUMNS = 32


class Evaluation(NamedTuple):
    """One pass at one point.

    Attributes:
      value: the objective.
      gradient: float64 `[p]`.
      bound: upper bound on the exact gradient's norm.
      rounding: what rounding may hide, which `bound` includes.
      rows: the number of examples.
    """

    value: float
    gradient: np.ndarray
    bound: float
    rounding: float
    rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """The mean loss over all data, plus the L2 term, as a function of a flat float64 vector.

    Attributes:
      loss: the loss.
      like: parameters, whose shape the flat vector stands for.
      blocks: `blocks(check)` starts a pass.
      allowance: see `solvers.minimize`; None: the gradient's rounding is proved.
    """

    loss: ConvexLoss
    like: ArrayTree
    blocks: Callable[[bool], Iterator[Block]]
    allowance: float | None

    def tree(self, flat: np.ndarray) -> ArrayTree:
        """The vector as float64 arrays of the parameters' shapes."""
        leaves, treedef = jax.tree.flatten(self.like)
        ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
        parts = np.split(np.array(flat, np.float64), ends)
        shaped = [part.reshape(np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)

    # Whoever starts too far away gets an infinite bound, and no warnings beside it.
    @np.errstate(over="ignore", invalid="ignore")
    def at(self, flat: np.ndarray, *, check: bool = False) -> Evaluation:
        """Objective and gradient, with an upper bound on the gradient's exact norm.

        Guarantee:
          Of linear models, as `convex.gradient_norm` proves. Of others, the allowance stands for
          what happens within a block: it is the caller's word.
        """
        loss = self.loss
        value, gradient, rows, longest, count = 0.0, np.zeros(flat.size), 0, 0, 0
        with jax.enable_x64(True):
            point = jax.tree.map(jnp.asarray, self.tree(flat))
            for size, examples in self.blocks(check):
                if isinstance(examples, LinearBlock):
                    part, slope = _sums(loss, point, examples)
                    value, gradient = value + float(part), gradient + flatten(slope)
                else:
                    part, slope = _means(loss, point, examples)
                    self._check_dtype(part.dtype)
                    value += size * float(part)
                    gradient = gradient + size * flatten(slope)
                rows, longest, count = rows + size, max(longest, size), count + 1
        if rows == 0:
            raise ValueError("data must hold at least one example, got none")
        value, gradient = value / rows, gradient / rows
        if data_blocks.is_linear(loss):
            value += loss.l2 / 2 * float(flat @ flat)
            gradient = gradient + loss.l2 * flat
        largest = loss.gradient_bound + loss.smoothness * _norm_bound(flat)
        outputs = loss.outputs or 1
        share = 2 * (longest + count + flat.size // outputs + outputs + 64) * _ROUNDOFF
        rounding = (share + (self.allowance or 0.0)) * largest
        return Evaluation(value, gradient, _norm_bound(gradient) + rounding, rounding, rows)

    def hessian(self, flat: np.ndarray, *, by_output: bool) -> np.ndarray:
        """The Hessian `[1, p, p]`, or its blocks of single outputs `[outputs, d, d]`.

        Parameters `[d, outputs]` are ordered by output, then by feature.
        """
        total, rows = np.zeros(()), 0
        with jax.enable_x64(True):
            point = jax.tree.map(jnp.asarray, self.tree(flat))
            for size, examples in self.blocks(False):
                if isinstance(examples, LinearBlock):
                    part = _hessian_sums(self.loss, point, examples, by_output)
                else:
                    part = size * _hessian_means(self.loss, point, examples)
                total, rows = total + np.asarray(part), rows + size
        total /= rows
        if not data_blocks.is_linear(self.loss):
            return _by_output(total, self.loss.outputs)[None]
        blocks = total if by_output else _assembled(total)
        diagonal = np.arange(blocks.shape[1])
        blocks[:, diagonal, diagonal] += self.loss.l2
        return blocks

    def _check_dtype(self, dtype: np.dtype) -> None:
        least = _LEAST_ALLOWANCE * float(jnp.finfo(dtype).eps)
        if self.allowance is not None and self.allowance < least:
            raise ValueError(
                f"allowance must be at least {least:.2g}, as the loss is computed in {dtype}, got "
                f"{self.allowance!r}: make the network compute in the dtype of its parameters, or "
                "allow for more"
            )


def objective(
    loss: ConvexLoss, params: ArrayTree, data: Data, allowance: float | None
) -> Objective:
    """The objective, with its arguments checked; data that fit are kept in float64.

    Raises:
      TypeError: if `loss` is no `ConvexLoss`, or an argument of the wrong type.
      ValueError: if shapes disagree, whole data break a bound, or the allowance is missing.
    """
    if not isinstance(loss, ConvexLoss):
        raise TypeError(f"loss must be a ConvexLoss, got {checks.shown(loss)}")
    if loss.feature_norm is None:
        if allowance is None:
            raise ValueError(
                "allowance must be given for a loss that is not one of a linear model, as the "
                "rounding inside its network has no proved bound, got None: state what its "
                "gradients err by at most, relative to G + L ||params||, see solvers.minimize"
            )
        allowance = checks.positive("allowance", allowance)
    elif allowance is not None:
        raise ValueError(
            "allowance must be None for the loss of a linear model, whose rounding is proved, got "
            f"{checks.shown(allowance)}"
        )
    if loss.feature_norm is not None:
        params = checks.numbers("params", params)
    batches = data_blocks.batches_of(data)

    def blocks(check: bool) -> Iterator[Block]:
        return data_blocks.blocks_of(loss, params, batches.start(), check=check)

    if not (batches.whole and all(data_blocks.fits(loss, one) for one in batches.start())):
        return Objective(loss, params, blocks, allowance)
    with jax.enable_x64(True):
        kept = list(blocks(True))
    return Objective(loss, params, lambda _: iter(kept), allowance)


def flatten(params: ArrayTree) -> np.ndarray:
    """The parameters as one float64 vector."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(params)]
    return np.concatenate(leaves)


def _norm_bound(flat: np.ndarray) -> float:
    """An upper bound on the norm; squares that underflow are within the rounding added to it."""
    return float(np.linalg.norm(flat)) * (1 + (flat.size + 8) * _ROUNDOFF)


def _total(loss: ConvexLoss, params: jax.Array, block: LinearBlock) -> jax.Array:
    outputs = jnp.matmul(block.features, params, precision="highest")
    each = _each(loss, outputs, block.targets, block.weights)
    return jnp.sum(jnp.where(block.used, each, 0))


def _each(
    loss: ConvexLoss, outputs: jax.Array, targets: jax.Array, weights: jax.Array | None
) -> jax.Array:
    assert loss.output_loss is not None, "blocks of other losses are batches"
    return loss.output_loss(outputs, targets, weights)


@functools.partial(jax.jit, static_argnames="loss")
def _sums(loss: ConvexLoss, params: jax.Array, block: LinearBlock) -> tuple[jax.Array, jax.Array]:
    """The sum of the block's losses and its gradient, without the L2 term."""
    return jax.value_and_grad(lambda w: _total(loss, w, block))(params)


@functools.partial(jax.jit, static_argnames="loss")
def _means(loss: ConvexLoss, params: ArrayTree, batch: Batch) -> tuple[jax.Array, ArrayTree]:
    """The loss of a batch and its gradient, L2 term included."""
    return jax.value_and_grad(loss.loss_fn)(params, batch)


@functools.partial(jax.jit, static_argnames=("loss", "by_output"))
def _hessian_sums(
    loss: ConvexLoss, params: jax.Array, block: LinearBlock, by_output: bool
) -> jax.Array:
    """Of each pair of outputs a <= b, or of each output, the sum of x x^T times the curvature."""
    outputs = jnp.matmul(block.features, params, precision="highest")

    def curvature(*row: jax.Array) -> jax.Array:
        output, target, *weight = row
        weights = weight[0][None] if weight else None
        return jax.hessian(lambda z: _each(loss, z[None], target[None], weights)[0])(output)

    rows = [outputs, block.targets] + ([] if block.weights is None else [block.weights])
    bends = jax.vmap(curvature)(*rows)
    used = block.used.reshape(block.used.shape + (1,) * (bends.ndim - 1))
    bends = jnp.where(used, bends, 0).reshape(len(outputs), -1)  # [rows, outputs^2]
    count = 1 if loss.outputs is None else loss.outputs
    first, second = (np.arange(count),) * 2 if by_output else np.triu_indices(count)

    def product(column: jax.Array) -> jax.Array:
        bent = bends[:, column][:, None] * block.features
        return jnp.matmul(block.features.T, bent, precision="highest")

    return jax.lax.map(product, jnp.asarray(first * count + second))


@functools.partial(jax.jit, static_argnames="loss")
def _hessian_means(loss: ConvexLoss, params: ArrayTree, batch: Batch) -> jax.Array:
    flat, unravel = ravel_pytree(params)
    slope = jax.grad(lambda w: loss.loss_fn(unravel(w), batch))
    column = lambda seed: jax.jvp(slope, (flat,), (seed,))[1]  # noqa: E731
    return jax.lax.map(column, jnp.eye(flat.size), batch_size=_COLUMNS)


def _assembled(pairs: np.ndarray) -> np.ndarray:
    """`[1, outputs d, outputs d]` from the blocks of pairs."""
    width = pairs.shape[1]
    count = int((np.sqrt(8 * len(pairs) + 1) - 1) / 2)
    whole = np.empty((count, width, count, width))
    for block, first, second in zip(pairs, *np.triu_indices(count), strict=True):
        whole[first, :, second] = block
        whole[second, :, first] = block.T
    return whole.reshape(1, count * width, count * width)


def _by_output(hessian: np.ndarray, outputs: int | None) -> np.ndarray:
    if outputs is None:
        return hessian
    order = np.arange(len(hessian)).reshape(-1, outputs).T.ravel()
    return hessian[np.ix_(order, order)]
