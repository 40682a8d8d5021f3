"""How large fresh weights are, layer by layer: what noise is compared with."""

import dataclasses
import math

import jax
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A leaf of the parameters.

    Attributes:
      name: its path.
      size: how many numbers it has.
      fresh_scale: standard deviation of its fresh weights; None where none is known, as for biases.
    """

    name: str
    size: int
    fresh_scale: float | None


def layers_of(params: ArrayTree, center: ArrayTree | None) -> tuple[Layer, ...]:
    """The leaves, and how large their fresh weights are.

    With a centre that is the root mean square of its leaf. Else it is 1 / sqrt(fan_in) (LeCun), of
    leaves of two axes and more, whose last axis is the outputs, as in Flax. Values of `params`
    never enter: hyperparameters are derived from these numbers.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    middles = [None] * len(leaves) if center is None else jax.tree.leaves(center)
    return tuple(
        Layer(
            name=files.leaf_name(path),
            size=math.prod(np.shape(leaf)),
            fresh_scale=_by_shape(np.shape(leaf)) if middle is None else _by_values(middle),
        )
        for (path, leaf), middle in zip(leaves, middles, strict=True)
    )


def least_scale(layers: tuple[Layer, ...]) -> float | None:
    """The smallest scale of all layers that have one: what noise of one scale harms first."""
    known = [layer.fresh_scale for layer in layers if layer.fresh_scale is not None]
    return min(known, default=None)


def distance_between(params: ArrayTree, center: ArrayTree) -> float:
    """The L2 distance of the trained parameters from the centre, in float64."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(center), strict=True)
    return math.sqrt(
        math.fsum(
            float(np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
            for a, b in pairs
        )
    )


def _by_shape(shape: tuple[int, ...]) -> float | None:
    if len(shape) < 2 or 0 in shape:
        return None
    return 1 / math.sqrt(math.prod(shape[:-1]))


def _by_values(leaf: object) -> float | None:
    values = np.asarray(leaf, np.float64)
    scale = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
    return scale if scale > 0 and values.ndim >= 2 else None
