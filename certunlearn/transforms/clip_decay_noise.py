"""The parts of the optimizer as Optax transforms: clip, decay and noise; see also `projection`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from certunlearn._numerics import checks, keys, normal_draws, norms, parallel, schedules, trees
from certunlearn.transforms.projection import clip_params as clip_params
from certunlearn.transforms.projection import project_onto_ball as project_onto_ball

# Noise beyond would overflow, or be flushed to zero, in float32.
SMALLEST_NOISE, LARGEST_NOISE = 1e-30, 1e30
# A count ends here; so does the stream of noise.
LAST_COUNT = 2**31 - 1


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


class DecayTowardState(NamedTuple):
    """`count`, an int32 scalar: updates seen."""

    count: jax.Array  # type: ignore[assignment]


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


def clip_by_global_norm(clip_norm: Any) -> optax.GradientTransformation:
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

    def init(params: Any) -> ClipByGlobalNormState:
        del params
        return ClipByGlobalNormState(*(jnp.zeros((), jnp.int32) for _ in range(3)))

    def update(
        updates: Any, state: ClipByGlobalNormState, params: Any = None
    ) -> tuple[Any, ClipByGlobalNormState]:
        del params
        parallel.check_tracked()
        result = norms.clip_tree(updates, schedules.value_at(clip_norm, state.count))
        return result.tree, ClipByGlobalNormState(
            count=optax.safe_increment(state.count),
            clipped=state.clipped + result.clipped.astype(jnp.int32),
            nonfinite=state.nonfinite + result.nonfinite.astype(jnp.int32),
        )

    return optax.GradientTransformation(init, update)


def decay_toward(weight_decay: Any, center: Any = None) -> optax.GradientTransformation:
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

    def init(params: Any) -> DecayTowardState:
        if center is not None:
            trees.check_same_structure(params, center)
        return DecayTowardState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: DecayTowardState, params: Any = None
    ) -> tuple[Any, DecayTowardState]:
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
            dtype = norms.common_dtype([leaf, pulled])
            sums.append(jnp.asarray(leaf, dtype) + pulled.astype(dtype))
        decayed = jax.tree.unflatten(treedef, sums)
        return decayed, DecayTowardState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def add_gaussian_noise(noise_scale: Any, key: Any) -> optax.GradientTransformation:
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
      under `vmap` and `pmap` need keys of their own, unless they shall stay equal. After 2^31 - 1
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
    key = keys.as_key(key)
    kind = str(jax.random.key_impl(key))
    if kind != "threefry2x32":
        raise ValueError(f"key must be of the kind 'threefry2x32', got {kind!r}")

    def init(params: Any) -> AddGaussianNoiseState:
        del params
        # A copy: a donated state must not take the caller's key with it.
        return AddGaussianNoiseState(
            jnp.zeros((), jnp.int32), jnp.array(jax.random.key_data(key), copy=True)
        )

    def update(
        updates: Any, state: AddGaussianNoiseState, params: Any = None
    ) -> tuple[Any, AddGaussianNoiseState]:
        parallel.check_tracked()
        stream = jax.random.wrap_key_data(state.key_data, impl="threefry2x32")
        step_key = jax.random.fold_in(stream, state.count)
        leaves, treedef = jax.tree.flatten(updates)
        holders = jax.tree.leaves(params)
        if len(holders) != len(leaves):
            holders = [jnp.asarray(leaf, norms.wide_dtype(leaf)) for leaf in leaves]
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
    dtype = norms.wide_dtype(leaf)
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
    return norms.nan_where(~usable, leaf + scale * draw)


def _carries(leaf: Any, scale: jax.Array) -> jax.Array:
    """Whether numbers of the leaf's size and dtype have room for such noise; see `rounding`.

    Noise of at most 1e30 has none beside infinity.
    """
    return scale >= normal_draws.NOISE_SPACINGS * norms.spacing(leaf).astype(scale.dtype)
