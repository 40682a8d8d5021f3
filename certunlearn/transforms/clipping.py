"""Clipping of updates to a largest norm over all leaves, strictly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree

from certunlearn._numerics import norms, parallel, schedules
from certunlearn._numerics.checks import ScalarOrSchedule


class ClipByGlobalNormState(NamedTuple):
    """Counters, all int32 scalars. Private: `clipped` depends on the hidden parameters.

    Attributes:
      count: updates seen.
      clipped: updates scaled down.
      nonfinite: updates with a NaN or an infinity, which became zero.
    """

    count: jax.Array  # type: ignore[assignment]
    clipped: jax.Array
    nonfinite: jax.Array

    def __repr__(self) -> str:
        """Without what is private."""
        return f"ClipByGlobalNormState(count={self.count}, clipped=<private>, nonfinite=<private>)"


def clip_by_global_norm(clip_norm: ScalarOrSchedule) -> optax.GradientTransformation:
    """Scales updates down to an L2 norm of at most `clip_norm` over all leaves, strictly.

    Unlike `optax.clip_by_global_norm`, which overshoots by rounding and passes NaN through.

    Args:
      clip_norm: C1, or a schedule from the step number to it.

    Returns:
      A transform with state `ClipByGlobalNormState`. Updates come out in float32 or wider.

    Raises:
      TypeError: if `clip_norm` is not a number.
      ValueError: if it is out of range; by update, inside `shard_map(check_vma=False)`.

    Guarantee:
      Every update that leaves has norm at most `clip_norm (1 - 5 u)` in exact arithmetic, u the
      unit roundoff (see `norms.clip_tree`); one with a NaN or an infinity leaves as zero and is
      counted. So a learning rate times it, both rounded, is at most `learning_rate * clip_norm`,
      if that is no less than 1e-30 (below, rounding is not relative).

    >>> tx = clip_by_global_norm(1.0)
    >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(jnp.zeros(2)))
    >>> updates.tolist(), int(state.nonfinite)
    ([0.0, 0.0], 1)
    """
    if not callable(clip_norm):
        norms.check_norm("clip_norm", clip_norm)

    def init(params: ArrayTree) -> ClipByGlobalNormState:
        del params
        return ClipByGlobalNormState(*(jnp.zeros((), jnp.int32) for _ in range(3)))

    def update(
        updates: ArrayTree, state: ClipByGlobalNormState, params: ArrayTree | None = None
    ) -> tuple[ArrayTree, ClipByGlobalNormState]:
        del params
        parallel.check_tracked()
        result = norms.clip_tree(updates, schedules.value_at(clip_norm, state.count))
        return result.tree, ClipByGlobalNormState(
            count=optax.safe_increment(state.count),
            clipped=state.clipped + result.clipped.astype(jnp.int32),
            nonfinite=state.nonfinite + result.nonfinite.astype(jnp.int32),
        )

    return optax.GradientTransformation(init, update)
