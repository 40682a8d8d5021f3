"""Gaussian noise on updates, and on the parameters before the first step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

from certunlearn._numerics import (
    checks,
    float_formats,
    magnitudes,
    normal_draws,
    parallel,
    random_keys,
    schedules,
    threefry,
)
from certunlearn._numerics.checks import ScalarOrSchedule
from certunlearn._numerics.threefry import Purpose

# Standard deviations, in parameter units. Smaller noise would be flushed to zero in float32, and
# larger noise would overflow.
SMALLEST_NOISE, LARGEST_NOISE = 1e-30, 1e30
# A count of updates ends here, and so does the stream of noise.
LAST_COUNT = 2**31 - 1


class AddGaussianNoiseState(NamedTuple):
    """The position in a stream of noise. Secret: whoever has it can subtract the noise.

    Attributes:
      count: int32 scalar, updates seen.
      key_data: uint32 `[3]`, two words of the key and the number of the stream; plain numbers, so
        that any checkpointer stores them.
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
      key: `jax.random.key(...)`, or the uint32 `[2]` data of one of the default kind. Under `vmap`,
        one key per replica. The words of a key of another kind are hashed to two
        (`random_keys.words_of`).

    Returns:
      A transform with state `AddGaussianNoiseState`. Updates come out in float32 or wider.

    Raises:
      TypeError: if `key` is not a key (a seed is none), or `noise_scale` not a number.
      ValueError: if `noise_scale` is out of range. By update, inside `shard_map(check_vma=False)`;
        for a state of an older stream of noise; and for a leaf with an axis longer than 2^32.

    Guarantee:
      The noise is independent across steps, leaves and coordinates: each leaf has its own key, and
      each coordinate's bits are Threefry's for the counters (step, coordinate). It is a function of
      the state alone, and so bit for bit the same in eager mode, under jit, vmap, scan, donation,
      after a restore, and under `jit` for every sharding; no device asks another for it. Inside
      `shard_map`, where each device sees its own piece of an update or its
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
    words = random_keys.words_of(key)

    def init(params: ArrayTree) -> AddGaussianNoiseState:
        del params
        # New memory: a donated state must not take the caller's key with it.
        stream = jnp.full_like(words[:1], normal_draws.STREAM)
        return AddGaussianNoiseState(jnp.zeros((), jnp.int32), jnp.concatenate([words, stream]))

    def update(
        updates: ArrayTree, state: AddGaussianNoiseState, params: ArrayTree | None = None
    ) -> tuple[ArrayTree, AddGaussianNoiseState]:
        parallel.check_tracked()
        _check_stream(state)
        leaves, treedef = jax.tree.flatten(updates)
        holders = jax.tree.leaves(params)
        if len(holders) != len(leaves):
            holders = [jnp.asarray(leaf, float_formats.wide_dtype(leaf)) for leaf in leaves]
        keys = _leaf_keys(state.key_data, len(leaves))
        usable = state.count < LAST_COUNT
        usable &= state.key_data[2] == normal_draws.STREAM
        noised = []
        for i, (leaf, holder) in enumerate(zip(leaves, holders, strict=True)):
            dtype = float_formats.wide_dtype(leaf)
            scale = _scale_at(noise_scale, state.count, dtype)
            # An update may be a constant where the parameter is a piece.
            axes = parallel.pieces_axes(leaf, holder)
            noised.append(_noised(leaf, holder, keys[i], state.count, scale, usable, axes))
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


def _check_stream(state: AddGaussianNoiseState) -> None:
    """Raises ValueError for the state of a stream without a number, seen by its shape."""
    shape = jnp.shape(state.key_data)
    if shape != (3,):
        raise ValueError(
            "the state of add_gaussian_noise must have key_data of shape (3,), whose last word is "
            f"the number of the stream of noise ({normal_draws.STREAM}), got {shape}. A state with "
            "two words was made by an older version, whose noise was another: finish its run with "
            "that version, or begin the run anew, with a new key"
        )


@functools.partial(jax.jit, static_argnums=1)
def _leaf_keys(key_data: jax.Array, leaves: int) -> jax.Array:
    """A key for each leaf, uint32 `[leaves, 2]`."""
    numbers = jnp.arange(leaves, dtype=jnp.uint32)
    return jnp.stack(threefry.derived((key_data[0], key_data[1]), Purpose.LEAF, numbers), axis=1)


def _scale_at(noise_scale: Any, count: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if isinstance(noise_scale, schedules.Lookup):
        return jnp.asarray(noise_scale.rounded_up(count, dtype), dtype)
    if isinstance(noise_scale, float):
        return jnp.asarray(schedules.round_up(noise_scale, dtype), dtype)
    return jnp.asarray(schedules.value_at(noise_scale, count), dtype)


@functools.partial(jax.jit, static_argnums=6)
def _noised(
    leaf: Any,
    holder: Any,
    key: jax.Array,
    count: jax.Array,
    scale: jax.Array,
    usable: jax.Array,
    axes: tuple[str, ...],
) -> jax.Array:
    """An update with noise. Compiled as one, so that it rounds alike in eager mode."""
    leaf = jnp.asarray(leaf, scale.dtype)
    usable &= (scale >= 0) & (scale <= LARGEST_NOISE * (1 + 1e-6))
    usable &= (scale == 0) | _carried(leaf, holder, scale)
    words = (key[0], key[1])
    if axes:
        words = threefry.derived(words, Purpose.PIECE, jax.lax.axis_index(axes))
    step = count.astype(jnp.uint32)
    draw = normal_draws.draws(words, step, leaf.shape, leaf.dtype, parallel.explicit_sharding(leaf))
    return float_formats.nan_where(~usable, leaf + scale * draw)


def _carried(leaf: jax.Array, holder: Any, scale: jax.Array) -> jax.Array:
    """Whether noise on an update and its parameter, of their sizes and dtypes, survives rounding.

    See `docs/theory/rounding.md`. No noise survives on an infinity.
    """
    holder = jnp.asarray(holder)
    alike = [(x.dtype, x.shape, parallel.explicit_sharding(x)) for x in (leaf, holder)]
    if alike[0] == alike[1]:
        # Both in one pass. As bits, whose order is that of magnitudes, a NaN's above all.
        magnitude, _ = float_formats.masks(leaf.dtype)
        larger = jnp.maximum(*(float_formats.bits_of(x) & magnitude for x in (leaf, holder)))
        carriers = [jax.lax.bitcast_convert_type(larger, leaf.dtype)]
    else:
        carriers = [leaf, holder]
    spacings = [magnitudes.spacing(carrier).astype(scale.dtype) for carrier in carriers]
    return scale >= normal_draws.NOISE_SPACINGS * functools.reduce(jnp.maximum, spacings)


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
    words = random_keys.words_of(key)
    start = threefry.derived((words[0], words[1]), Purpose.START, 0)
    tx = add_gaussian_noise(noise_scale, jnp.stack(start))
    noised, _ = tx.update(params, tx.init(params))
    return noised
