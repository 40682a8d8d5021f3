"""Small transforms that stand between the others: zeros for bad gradients, noise and projection."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree

from certunlearn._numerics import norms
from certunlearn.transforms.clip_decay_noise import add_gaussian_noise

# A step number that no run reaches: the noise on the start is not that of any step.
_BEFORE_THE_FIRST_STEP = 2**31 - 1


class ZeroNonfiniteState(NamedTuple):
    """`count` and `zeroed`, int32 scalars: gradients seen, and those that became zero."""

    count: jax.Array  # type: ignore[assignment]
    zeroed: jax.Array

    def __repr__(self) -> str:
        """Without what is private."""
        return f"ZeroNonfiniteState(count={self.count}, zeroed=<private>)"


def zero_nonfinite() -> optax.GradientTransformation:
    """Zeros instead of a gradient with a NaN or an infinity, which would spoil the state behind."""

    def init(params: Any) -> ZeroNonfiniteState:
        del params
        return ZeroNonfiniteState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: ZeroNonfiniteState, params: Any = None
    ) -> tuple[Any, ZeroNonfiniteState]:
        del params
        finite = norms.all_finite(updates)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        zeroed = state.zeroed + (~finite).astype(jnp.int32)
        return updates, ZeroNonfiniteState(optax.safe_increment(state.count), zeroed)

    return optax.GradientTransformation(init, update)


def noise_then_projection(
    noise: optax.GradientTransformation, project: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Noise, then a projection that passes on a NaN: by itself it would end at the centre.

    Whether noise is lost may depend on private gradients, so a step without it must not go on.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        noised, state = noise.update(updates, state, params)
        projected, _ = project.update(noised, project.init(params), params)
        lost = norms.holds_nan(noised)
        return jax.tree.map(lambda leaf: norms.nan_where(lost, leaf), projected), state

    return optax.GradientTransformation(noise.init, update)


def noise_on_start(params: ArrayTree, noise_scale: float, key: jax.Array) -> ArrayTree:
    """Parameters with Gaussian noise of standard deviation `noise_scale`, before the first step.

    Args:
      params: the parameters.
      noise_scale: standard deviation, in parameter units.
      key: the noise key of the run; no step's noise comes from the same stream.
    """
    tx = add_gaussian_noise(noise_scale, jax.random.fold_in(key, _BEFORE_THE_FIRST_STEP))
    noised, _ = tx.update(params, tx.init(params))
    return noised
