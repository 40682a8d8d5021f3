"""Gaussian noise on updates, and on the parameters before the first step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

from certunlearn._numerics import (
    checks,
    float_formats,
    normal_draws,
    norms,
    parallel,
    random_keys,
    schedules,
)
from certunlearn._numerics.checks import ScalarOrSchedule

# Standard deviations, in parameter units. Smaller noise would be flushed to zero in float32, and
# larger noise would overflow.
SMALLEST_NOISE, LARGEST_NOISE = 1e-30, 1e30
# A count of updates ends here, and so does the stream of noise.
LAST_COUNT = 2**31 - 1


class AddGaussianNoiseState(NamedTuple):
    """The position in a stream of noise. Secret: whoever has it can subtract the noise.

    Attributes:
      count: int32 scalar, updates seen.
      key_data: uint32 `[2]`, the key's words; plain numbers, so that any checkpointer stores them.
    """

    count: jax.Array  # type: ignore[assignment]
    key_data: jax.Array

    def __repr__(self) -> str:
        """Without the key."""
        return f"AddGaussianNoiseState(count={self.count}, key_data=<secret>)"


def add_gaussian_noise(
    noise_scale: ScalarOrSchedule, key: jax.Array
) -> optax.GradientTransformation:
    """Adds independent Gaussian noise to every coordinate of the updates.

    The noise is in *parameter* units: this stands last in a chain, after the learning rate.

    Args:
      noise_scale: standard deviation between 1e-30 and 1e30, or a schedule from the step number
        to it. Numbers are rounded up to the updates' precision; traced ones and those of a
        schedule are taken as they come, and give NaN if they are above 1e30 or negative. Noise
        below 4 spacings of floating-point numbers, at the largest entry of an update or of its
        parameter (pass `params`; in its own dtype, so narrow ones need much noise), gives NaN in
        that leaf: rounding would swallow it.
      key: `jax.random.key(...)` of the default kind, or its uint32 `[2]` data. Under `vmap`, one
        key per replica.

    Returns:
      A transform with state `AddGaussianNoiseState`. Updates come out in float32 or wider.

    Raises:
      TypeError: if `key` is not a key (a seed is none), or `noise_scale` not a number.
      ValueError: if `noise_scale` is out of range, or the key is of another kind: the others do not
        promise independent streams under `vmap`. By update, inside `shard_map(check_vma=False)`.

    Guarantee:
      The noise is independent across steps, leaves and coordinates: each step folds its number
      into the key, each leaf takes its own split. It is a function of the state alone, and so the
      same under jit, scan, donation and after a restore, and bit for bit the same under `jit` with
      sharded arrays. Inside `shard_map`, where each device sees its own piece of an update or its
      parameter (pass `params`), it also folds the device's place into the key, so that pieces have
      independent noise and copies equal noise; `pmap` holds copies. **Two states with one key draw
      the same noise**: calling `init` again replays it, so take a new key for every run; replicas
      under `vmap` and `pmap` need keys of their own, unless they are to stay equal. After 2^31 - 1
      updates, where the count ends, updates are NaN. Tails: `normal_draws.normal_from_words`.

    >>> tx = add_gaussian_noise(0.1, jax.random.key(0))
    >>> zeros = jnp.zeros(3)
    >>> first, state = tx.update(zeros, tx.init(zeros))
    >>> second, state = tx.update(zeros, state)
    >>> bool(jnp.any(first == second))
    False
    """
    if not callable(noise_scale) and not schedules.is_traced(noise_scale):
        noise_scale = check_noise_scale(checks.positive("noise_scale", noise_scale))
    key = random_keys.as_key(key)
    kind = str(jax.random.key_impl(key))
    if kind != "threefry2x32":
        raise ValueError(f"key must be of the kind 'threefry2x32', got {kind!r}")

    def init(params: ArrayTree) -> AddGaussianNoiseState:
        del params
        # A copy: a donated state must not take the caller's key with it.
        return AddGaussianNoiseState(
            jnp.zeros((), jnp.int32), jnp.array(jax.random.key_data(key), copy=True)
        )

    def update(
        updates: ArrayTree, state: AddGaussianNoiseState, params: ArrayTree | None = None
    ) -> tuple[ArrayTree, AddGaussianNoiseState]:
        parallel.check_tracked()
        stream = jax.random.wrap_key_data(state.key_data, impl="threefry2x32")
        step_key = jax.random.fold_in(stream, state.count)
        leaves, treedef = jax.tree.flatten(updates)
        holders = jax.tree.leaves(params)
        if len(holders) != len(leaves):
            holders = [jnp.asarray(leaf, float_formats.wide_dtype(leaf)) for leaf in leaves]
        leaf_keys = jax.random.split(step_key, len(leaves))
        noised = []
        for i, (leaf, holder) in enumerate(zip(leaves, holders, strict=True)):
            # An update may be a constant where the parameter is a piece.
            axes, leaf_key = parallel.pieces_axes(leaf, holder), leaf_keys[i]
            if axes:
                leaf_key = jax.random.fold_in(leaf_key, jax.lax.axis_index(axes))
            noised.append(_add_noise(leaf, holder, leaf_key, noise_scale, state.count))
        next_state = AddGaussianNoiseState(optax.safe_increment(state.count), state.key_data)
        return jax.tree.unflatten(treedef, noised), next_state

    return optax.GradientTransformation(init, update)


def check_noise_scale(values: checks.PerStep, zero_allowed: bool = False) -> checks.PerStep:
    """Returns noise scales, or raises ValueError if float32 noise of their size is no noise."""
    for value in np.unique(values):
        too_small = value < SMALLEST_NOISE * (1 - 1e-6) and not (zero_allowed and value == 0)
        if too_small or value > LARGEST_NOISE * (1 + 1e-6):
            raise ValueError(
                f"noise_scale must be between {SMALLEST_NOISE:g} and {LARGEST_NOISE:g}, where "
                f"float32 arithmetic neither underflows nor overflows, got {float(value)!r}"
            )
    return values


def _add_noise(
    leaf: Any, holder: Any, key: jax.Array, noise_scale: Any, count: jax.Array
) -> jax.Array:
    dtype = float_formats.wide_dtype(leaf)
    leaf = jnp.asarray(leaf, dtype)
    scale: Any
    if isinstance(noise_scale, schedules.Lookup):
        scale = noise_scale.rounded_up(count, dtype)
    elif isinstance(noise_scale, float):
        scale = schedules.round_up(noise_scale, dtype)
    else:
        scale = schedules.value_at(noise_scale, count)
    scale = jnp.asarray(scale, dtype)
    usable = (scale >= 0) & (scale <= LARGEST_NOISE * (1 + 1e-6)) & (count < LAST_COUNT)
    usable &= (scale == 0) | _carries(leaf, scale) & _carries(holder, scale)
    draw = normal_draws.standard_normal(key, jnp.shape(leaf), dtype)
    return float_formats.nan_where(~usable, leaf + scale * draw)


def _carries(leaf: Any, scale: jax.Array) -> jax.Array:
    """Whether noise on numbers of the leaf's size and dtype survives rounding.

    See `docs/theory/rounding.md`. No noise survives on an infinity.
    """
    return scale >= normal_draws.NOISE_SPACINGS * norms.spacing(leaf).astype(scale.dtype)


def noise_on_start(params: ArrayTree, noise_scale: float, key: jax.Array) -> ArrayTree:
    """Parameters with Gaussian noise, before the first step.

    Args:
      params: a pytree of float32 or float64 arrays.
      noise_scale: standard deviation in every coordinate, in parameter units.
      key: the noise key of the run.

    Returns:
      The noised parameters, in the same dtypes.

    Raises:
      TypeError, ValueError: as for `add_gaussian_noise`.

    Guarantee:
      As for `add_gaussian_noise`. No step of a run with the same key has the same noise.

    >>> noise_on_start(jnp.zeros(3), 0.1, jax.random.key(0)).shape
    (3,)
    """
    # No step has this number, so no step has this noise.
    tx = add_gaussian_noise(noise_scale, jax.random.fold_in(key, LAST_COUNT))
    noised, _ = tx.update(params, tx.init(params))
    return noised
