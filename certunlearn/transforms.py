"""The parts of the optimizer as Optax transforms: projection, clip, decay and noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from certunlearn import checks, keys, noise, norms, schedules, trees


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


def clip_params(params: Any, radius: float, center: Any = None) -> Any:
    """Projects parameters onto the L2 ball of the given radius around a public centre.

    Args:
      params: a pytree of float32 or float64 arrays.
      radius: C0, between 1e-30 and 1e30, over all leaves together.
      center: pytree like `params`; None is the origin. It is used in the parameters' dtypes.

    Returns:
      The projection, in the same dtypes; `params` themselves, bit for bit, if they lie inside. If
      `radius` is below the spacing of floating-point numbers around the centre, the centre.

    Raises:
      TypeError: if `radius` is not a number.
      ValueError: if a leaf is narrower than float32 or not real, if `center` differs in structure
        or shape, if anything is not finite, or if `radius` is out of range.

    Guarantee:
      `||result - center|| <= radius` in exact arithmetic on the returned numbers. Traced
      parameters that are not finite give the centre. With u the unit roundoff, adding the centre
      to a clipped difference y moves a coordinate by at most u |c_i + y_i|, in all
      at most u (||c|| + radius); the radius aimed at is smaller by one and a half times that.

    Source:
      Koloskova et al. (ICML 2025), Certified Unlearning for Neural Networks: the first step.

    >>> print(clip_params({"w": jnp.array([3.0, 4.0])}, radius=1.0)["w"].round(3))
    [0.6 0.8]
    """
    norms.check_norm("radius", radius)
    trees.check_wide(params)
    trees.check_finite("params", params)
    if center is not None:
        trees.check_same_structure(params, center)
        trees.check_finite("center", center)
    return jax.jit(_project)(params, radius, center)


def _project(params: Any, radius: jax.Array, center: Any) -> Any:
    params = jax.tree.map(jnp.asarray, params)
    if center is None:
        return norms.clip_tree(params, radius).tree
    center = jax.tree.map(lambda p, c: jnp.asarray(c, p.dtype), params, center)
    difference = jax.tree.map(jnp.subtract, params, center)
    untouched = norms.clip_tree(difference, radius)
    roundoff = norms.coarsest_eps(params) / 2
    target = radius - 1.5 * roundoff * (norms.norm_bound(center) + radius)
    # A target below zero, or not a number, counts as a radius of zero: the centre.
    clipped = norms.clip_tree(difference, target).tree
    inside = ~(untouched.clipped | untouched.nonfinite)
    return jax.tree.map(lambda p, c, y: jnp.where(inside, p, c + y), params, center, clipped)


def clip_by_global_norm(clip_norm: Any) -> optax.GradientTransformation:
    """Scales updates down to an L2 norm of at most `clip_norm` over all leaves, strictly.

    Unlike `optax.clip_by_global_norm`, which overshoots by rounding and passes NaN through.

    Args:
      clip_norm: C1, or a schedule from the step number to it.

    Returns:
      A transform with state `ClipByGlobalNormState`. Updates come out in float32 or wider.

    Raises:
      TypeError: if `clip_norm` is not a number.
      ValueError: if it is out of range.

    Guarantee:
      Every update that leaves has norm at most `clip_norm` in exact arithmetic (see
      `norms.clip_tree`); one with a NaN or an infinity leaves as zero and is counted.

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
        middles = [0.0] * len(leaves)
        if center is not None:
            middles = jax.tree.leaves(center)
            trees.check_same_shapes(params, middles)
        sums = []
        for leaf, param, middle in zip(jax.tree.leaves(updates), leaves, middles, strict=True):
            difference = param - jnp.asarray(middle, jnp.result_type(param))
            sums.append(leaf + jnp.asarray(decay, difference.dtype) * difference)
        decayed = jax.tree.unflatten(treedef, sums)
        return decayed, DecayTowardState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def project_onto_ball(radius: float, center: Any = None) -> optax.GradientTransformation:
    """Changes updates so that the updated parameters are in the L2 ball around a public centre.

    Args:
      radius: between 1e-30 and 1e30, over all leaves together.
      center: pytree like the parameters; None is the origin.

    Returns:
      A stateless transform, whose update needs the parameters.

    Raises:
      TypeError: if `radius` is not a number.
      ValueError: if it is out of range; by update, if the parameters are missing, or `center`
        differs from them in structure or shape.

    Guarantee:
      `||params + updates - center|| <= radius` in real arithmetic; updated parameters that are not
      finite become the centre. The sum of parameters and update rounds as any update does.

    Source:
      Koloskova et al. (ICML 2025), model clipping.

    >>> tx, params = project_onto_ball(1.0), jnp.array([0.0, 0.5])
    >>> updates, _ = tx.update(jnp.array([3.0, 3.5]), tx.init(params), params)
    >>> print((params + updates).round(3))
    [0.6 0.8]
    """
    norms.check_norm("radius", radius)

    def init(params: Any) -> optax.EmptyState:
        if center is not None:
            trees.check_same_structure(params, center)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("project_onto_ball needs params: call update(updates, state, params)")
        leaves = jax.tree.leaves(params)
        middles: list[Any] = [0.0] * len(leaves)
        if center is not None:
            middles = jax.tree.leaves(center)
            trees.check_same_shapes(params, middles)
        moves, treedef = jax.tree.flatten(updates)
        offsets = [
            p - jnp.asarray(c, jnp.result_type(p)) for p, c in zip(leaves, middles, strict=True)
        ]
        moved = [o + u for o, u in zip(offsets, moves, strict=True)]
        result = norms.clip_tree(moved, radius)
        inside = ~(result.clipped | result.nonfinite)
        moves = [
            jnp.where(inside, u, new - o)
            for u, new, o in zip(moves, result.tree, offsets, strict=True)
        ]
        return jax.tree.unflatten(treedef, moves), state

    return optax.GradientTransformation(init, update)


def add_gaussian_noise(noise_scale: Any, key: Any) -> optax.GradientTransformation:
    """Adds independent Gaussian noise to every coordinate of the updates.

    The noise is in *parameter* units: this stands last in a chain, after the learning rate.

    Args:
      noise_scale: standard deviation, or a schedule from the step number to it. Numbers are
        rounded up to the updates' precision; traced ones are taken as they come.
      key: `jax.random.key(...)` of the default kind, or its uint32 `[2]` data. Under `vmap`, one
        key per replica.

    Returns:
      A transform with state `AddGaussianNoiseState`. Updates come out in float32 or wider.

    Raises:
      TypeError: if `key` is not a key (a seed is none), or `noise_scale` not a number.
      ValueError: if `noise_scale` is not positive, or the key is of another kind: the others do not
        promise independent streams under `vmap`.

    Guarantee:
      The noise is independent across steps, leaves and coordinates: each step folds its number
      into the key, each leaf takes its own split. It is a function of the state alone, and so the
      same under jit, scan, donation, sharding and after a restore. **Two states with one key draw
      the same noise**: calling `init` again replays it, so take a new key for every run. Tails are
      those of `noise.normal_from_words`.

    >>> tx = add_gaussian_noise(0.1, jax.random.key(0))
    >>> zeros = jnp.zeros(3)
    >>> first, state = tx.update(zeros, tx.init(zeros))
    >>> second, state = tx.update(zeros, state)
    >>> bool(jnp.any(first == second))
    False
    """
    if not callable(noise_scale) and not schedules.is_traced(noise_scale):
        noise_scale = checks.positive("noise_scale", noise_scale)
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
        del params
        stream = jax.random.wrap_key_data(state.key_data, impl="threefry2x32")
        step_key = jax.random.fold_in(stream, state.count)
        leaves, treedef = jax.tree.flatten(updates)
        leaf_keys = jax.random.split(step_key, len(leaves))
        noised = [
            _add_noise(leaf, leaf_keys[i], noise_scale, state.count)
            for i, leaf in enumerate(leaves)
        ]
        next_state = AddGaussianNoiseState(optax.safe_increment(state.count), state.key_data)
        return jax.tree.unflatten(treedef, noised), next_state

    return optax.GradientTransformation(init, update)


def _add_noise(leaf: Any, key: jax.Array, noise_scale: Any, count: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
    scale: Any
    if isinstance(noise_scale, schedules.Lookup):
        scale = noise_scale.rounded_up(count, dtype)
    elif isinstance(noise_scale, float):
        scale = schedules.round_up(noise_scale, dtype)
    else:
        scale = schedules.value_at(noise_scale, count)
    draw = noise.standard_normal(key, jnp.shape(leaf), dtype)
    return jnp.asarray(leaf, dtype) + jnp.asarray(scale, dtype) * draw
