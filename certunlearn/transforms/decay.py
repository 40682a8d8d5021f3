"""Weight decay toward a public centre."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

from certunlearn._numerics import checks, float_formats, schedules, trees
from certunlearn._numerics.checks import ScalarOrSchedule


class DecayTowardState(NamedTuple):
    """Counter of `decay_toward`.

    Attributes:
      count: int32 scalar, updates seen.
    """

    count: jax.Array  # type: ignore[assignment]


def decay_toward(
    weight_decay: ScalarOrSchedule, center: ArrayTree | None = None
) -> optax.GradientTransformation:
    """Adds `weight_decay * (params - center)` to the updates: decay toward a public centre.

    Args:
      weight_decay: lambda >= 0, or a schedule from the step number to it.
      center: pytree like the parameters; None is the origin.

    Returns:
      A transform with state `DecayTowardState`, whose update needs the parameters.

    Raises:
      TypeError: if `weight_decay` is not a number.
      ValueError: if it is negative; by init and update, if `center` differs from the parameters in
        structure or shape, or the parameters are missing.

    Guarantee:
      With a later factor of -learning_rate the parameters contract by 1 - learning_rate *
      weight_decay around the centre, which is all that the mechanism's `contraction` says.

    >>> tx = decay_toward(0.5, center=jnp.array([1.0]))
    >>> params = jnp.array([3.0])
    >>> updates, _ = tx.update(jnp.array([0.0]), tx.init(params), params)
    >>> updates.tolist()
    [1.0]
    """
    if not callable(weight_decay) and not schedules.is_traced(weight_decay):
        number = checks.real("weight_decay", weight_decay)
        if not (np.isfinite(number) and number >= 0):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {number!r}")

    def init(params: ArrayTree) -> DecayTowardState:
        if center is not None:
            trees.check_same_structure(params, center)
        return DecayTowardState(jnp.zeros((), jnp.int32))

    def update(
        updates: ArrayTree, state: DecayTowardState, params: ArrayTree | None = None
    ) -> tuple[ArrayTree, DecayTowardState]:
        if params is None:
            raise ValueError("decay_toward needs params: call update(updates, state, params)")
        decay = schedules.value_at(weight_decay, state.count)
        # By leaves: NNX hands init its variables and update their bare values.
        leaves, treedef = jax.tree.flatten(params)
        middles = trees.center_leaves(leaves, params, center)
        sums = []
        for leaf, param, middle in zip(jax.tree.leaves(updates), leaves, middles, strict=True):
            difference = param - jnp.asarray(middle, jnp.result_type(param))
            pulled = jnp.asarray(decay, difference.dtype) * difference
            dtype = float_formats.common_dtype([leaf, pulled])
            sums.append(jnp.asarray(leaf, dtype) + pulled.astype(dtype))
        decayed = jax.tree.unflatten(treedef, sums)
        return decayed, DecayTowardState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
