"""Zeros in place of gradients that are not finite."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree

from certunlearn._numerics import norms


class ZeroNonfiniteState(NamedTuple):
    """`count` and `zeroed`, int32 scalars: gradients seen, and those that became zero."""

    count: jax.Array  # type: ignore[assignment]
    zeroed: jax.Array

    def __repr__(self) -> str:
        """Without what is private."""
        return f"ZeroNonfiniteState(count={self.count}, zeroed=<private>)"


def zero_nonfinite() -> optax.GradientTransformation:
    """Zeros instead of a gradient with a NaN or an infinity, which would spoil the state behind."""

    def init(params: ArrayTree) -> ZeroNonfiniteState:
        del params
        return ZeroNonfiniteState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        updates: ArrayTree, state: ZeroNonfiniteState, params: ArrayTree | None = None
    ) -> tuple[ArrayTree, ZeroNonfiniteState]:
        del params
        finite = norms.all_finite(updates)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        zeroed = state.zeroed + (~finite).astype(jnp.int32)
        return updates, ZeroNonfiniteState(optax.safe_increment(state.count), zeroed)

    return optax.GradientTransformation(init, update)
