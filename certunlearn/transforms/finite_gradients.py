"""Zeros in place of gradients that are not finite."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree

from certunlearn._numerics import magnitudes


class ZeroNonfiniteState(NamedTuple):
    """Counters, int32 scalars. Private: `zeroed` depends on the hidden parameters.

    Attributes:
      count: updates seen.
      zeroed: updates with a NaN or an infinity, which became zero.
    """

    count: jax.Array  # type: ignore[assignment]
    zeroed: jax.Array

    def __repr__(self) -> str:
        """Without what is private."""
        return f"ZeroNonfiniteState(count={self.count}, zeroed=<private>)"


def zero_nonfinite() -> optax.GradientTransformation:
    """Replaces an update with a NaN or an infinity by zeros: later transforms would keep it.

    Returns:
      A transform with state `ZeroNonfiniteState`. Updates keep their dtypes.

    >>> tx = zero_nonfinite()
    >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(jnp.zeros(2)))
    >>> updates.tolist(), int(state.zeroed)
    ([0.0, 0.0], 1)
    """

    def init(params: ArrayTree) -> ZeroNonfiniteState:
        del params
        return ZeroNonfiniteState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        updates: ArrayTree, state: ZeroNonfiniteState, params: ArrayTree | None = None
    ) -> tuple[ArrayTree, ZeroNonfiniteState]:
        del params
        finite = magnitudes.all_finite(updates)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        zeroed = state.zeroed + (~finite).astype(jnp.int32)
        return updates, ZeroNonfiniteState(optax.safe_increment(state.count), zeroed)

    return optax.GradientTransformation(init, update)
