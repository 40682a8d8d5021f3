"""The optimizer as Optax transforms: clip, decay, noise, and the chain that is certified."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from certunlearn import checks, keys, noise, norms
from certunlearn.mechanisms import GradientClipping

Schedule = Callable[[Any], Any]


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


class ZeroNonfiniteState(NamedTuple):
    """`zeroed`, an int32 scalar: gradients that were not finite and became zero."""

    zeroed: jax.Array


class AddGaussianNoiseState(NamedTuple):
    """The position in a stream of noise. Secret: whoever has it can subtract the noise.

    Attributes:
      count: int32 scalar, updates seen.
      key_data: uint32 `[2]`, the key's words; plain numbers, so that any checkpointer stores them.
    """

    count: jax.Array  # type: ignore[assignment]
    key_data: jax.Array


class NoisySgdState(NamedTuple):
    """State of `noisy_sgd`. Secret, and to be discarded after the last step.

    Attributes:
      count: int32 scalar, updates seen, at most the mechanism's steps.
      inner_state: the chain's state.
    """

    count: jax.Array  # type: ignore[assignment]
    inner_state: Any


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
    _check_wide(params)
    _check_finite("params", params)
    if center is not None:
        _check_same_structure(params, center)
        _check_finite("center", center)
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
        result = norms.clip_tree(updates, _at(clip_norm, state.count))
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
    if not callable(weight_decay) and not _traced(weight_decay):
        number = checks.real("weight_decay", weight_decay)
        if not (np.isfinite(number) and number >= 0):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {number!r}")

    def init(params: Any) -> DecayTowardState:
        if center is not None:
            _check_same_structure(params, center)
        return DecayTowardState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: DecayTowardState, params: Any = None
    ) -> tuple[Any, DecayTowardState]:
        if params is None:
            raise ValueError("decay_toward needs params: call update(updates, state, params)")
        decay = _at(weight_decay, state.count)
        # By leaves: NNX hands init its variables and update their bare values.
        leaves, treedef = jax.tree.flatten(params)
        middles = [0.0] * len(leaves)
        if center is not None:
            middles = jax.tree.leaves(center)
            _check_same_shapes(params, middles)
        sums = []
        for leaf, param, middle in zip(jax.tree.leaves(updates), leaves, middles, strict=True):
            difference = param - jnp.asarray(middle, jnp.result_type(param))
            sums.append(leaf + jnp.asarray(decay, difference.dtype) * difference)
        decayed = jax.tree.unflatten(treedef, sums)
        return decayed, DecayTowardState(optax.safe_increment(state.count))

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
    if not callable(noise_scale) and not _traced(noise_scale):
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
    if isinstance(noise_scale, _Lookup):
        scale = noise_scale.rounded_up(count, dtype)
    elif isinstance(noise_scale, float):
        scale = _round_up(noise_scale, dtype)
    else:
        scale = _at(noise_scale, count)
    draw = noise.standard_normal(key, jnp.shape(leaf), dtype)
    return jnp.asarray(leaf, dtype) + jnp.asarray(scale, dtype) * draw


def noisy_sgd(
    mechanism: GradientClipping,
    noise_scale: Any,
    *,
    key: Any,
    center: Any = None,
    before_clip: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a `GradientClipping` certificate speaks about, as one Optax transform.

    One update is `-learning_rate * (clip(g) + weight_decay * (params - center)) + noise`. After
    `mechanism.steps` updates it returns zeros, so that the parameters stay those of the last step.

    Args:
      mechanism: clip norm, learning rate, weight decay (schedules by step number) and steps.
      noise_scale: standard deviation in parameter units, as `noise_scale(mechanism, ...)` gives
        it: a number, `[steps]` numbers or a schedule.
      key: secret and used for one run only; see `add_gaussian_noise`.
      center: the mechanism's public centre, structured like the parameters that `init` gets (for
        `nnx.Optimizer`, like `nnx.state(model, nnx.Param)`); None is the origin.
      before_clip: transform applied to gradients before the clip, such as
        `optax.scale_by_adam()`; its state starts fresh. Non-finite gradients reach it as zeros and
        are counted in a `ZeroNonfiniteState`.

    Returns:
      An optimizer for `TrainState.create(tx=...)`, `nnx.Optimizer` or a loop. Its state is a
      `NoisySgdState`: as secret as the trained model, and to be discarded after the last step.

    Raises:
      TypeError: if `mechanism` or `key` is of the wrong type.
      ValueError: if `noise_scale` is out of range, or `before_clip` is given and the mechanism
        claims to be memoryless; by init, if parameters are narrower than float32 (their rounding
        would swallow the noise) or `center` has another structure.

    Guarantee:
      Parameters that start within `init_radius` of the centre (`clip_params`) and take
      `mechanism.steps` of these updates are (epsilon, delta)-indistinguishable as the accountants
      state for this mechanism and noise scale, under `mechanism.assumptions`. Each update moves the
      parameters by a strictly clipped gradient whatever the gradient is, NaN included. Rounding in
      the other operations is not accounted for.

    Wrappers:
      * `optax.MultiSteps(tx, k)` keeps the guarantee: gradients are averaged first, then clipped;
        the run takes k times `mechanism.steps` calls. A non-finite gradient stays in its
        accumulator for good, and every later gradient counts as zero: no leak, no learning.
        `should_skip_update_fn` looks at gradients and is not covered.
      * `optax.inject_hyperparams(noisy_sgd)` keeps it, if nobody changes a hyperparameter in the
        state. Name the key static (`static_args=("key",)`): it would be shown among the
        hyperparameters. A schedule for the noise it evaluates by its own count, to float32.
      * `optax.masked(tx, mask)` **breaks it**: leaves outside the mask pass through as raw
        gradients, unclipped and without noise. Use
        `optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)`: the guarantee is
        then for the trained leaves, the frozen ones must not depend on the forget set, and a centre
        holds `optax.MaskedNode()` in the frozen places.
      * `optax.partition` with several noisy groups: each group is clipped by itself, so k groups
        have a joint clip norm (and initial radius) sqrt(k) times as large; and groups
        given the same key draw **the same noise**. Neither is certified by this mechanism.
      * Nothing that changes an update may stand after it (`optax.chain(tx, ...)`), and parameter
        averages such as EMA expose hidden iterates.

    Source:
      Koloskova et al. (ICML 2025), Certified Unlearning for Neural Networks, gradient clipping.

    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=2)
    >>> tx = noisy_sgd(m, 0.5, key=jax.random.key(0))
    >>> params = clip_params(jnp.array([3.0, 4.0]), m.init_radius)
    >>> state = tx.init(params)
    >>> for _ in range(3):  # the third changes nothing
    ...     updates, state = tx.update(params, state, params)
    >>> updates.tolist(), int(state.count)
    ([0.0, 0.0], 2)
    """
    if not isinstance(mechanism, GradientClipping):
        raise TypeError(f"mechanism must be a GradientClipping, got {mechanism!r}")
    if before_clip is not None and mechanism.memoryless:
        raise ValueError(
            "before_clip may carry state from step to step, which a memoryless mechanism excludes: "
            "declare GradientClipping(..., memoryless=False). Its guarantee is then that of the "
            "last step, without the minimum over earlier ones"
        )
    if not _traced(noise_scale):
        noise_scale = checks.per_step("noise_scale", noise_scale, mechanism.steps)
    parts = [] if before_clip is None else [_zero_nonfinite(), before_clip]
    parts.append(clip_by_global_norm(_scalar_or_lookup(mechanism.clip_norm)))
    # Without decay the centre plays no part, and parameters are not needed.
    if np.any(mechanism.weight_decay):
        parts.append(decay_toward(_scalar_or_lookup(mechanism.weight_decay), center))
    parts.append(optax.scale_by_learning_rate(_scalar_or_lookup(mechanism.learning_rate)))
    parts.append(add_gaussian_noise(_scalar_or_lookup(noise_scale), key))
    chain = optax.chain(*parts)

    def init(params: Any) -> NoisySgdState:
        _check_wide(params)
        if center is not None:
            _check_same_structure(params, center)
        return NoisySgdState(jnp.zeros((), jnp.int32), chain.init(params))

    def update(
        updates: Any, state: NoisySgdState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, NoisySgdState]:
        updates, inner_state = chain.update(updates, state.inner_state, params, **extra_args)
        live = state.count < mechanism.steps
        updates = jax.tree.map(lambda u: jnp.where(live, u, 0), updates)
        return updates, NoisySgdState(state.count + live.astype(jnp.int32), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _zero_nonfinite() -> optax.GradientTransformation:
    """Zeros instead of a gradient with a NaN or an infinity, lest it poison the state behind."""

    def init(params: Any) -> ZeroNonfiniteState:
        del params
        return ZeroNonfiniteState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: ZeroNonfiniteState, params: Any = None
    ) -> tuple[Any, ZeroNonfiniteState]:
        del params
        finite = jnp.array(True)
        for leaf in jax.tree.leaves(updates):
            finite &= jnp.all(jnp.isfinite(leaf))
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        return updates, ZeroNonfiniteState(state.zeroed + (~finite).astype(jnp.int32))

    return optax.GradientTransformation(init, update)


class _Lookup:
    """A table `[steps]` as an Optax schedule; the last value stands for all later steps."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __call__(self, count: Any) -> jax.Array:
        return jnp.asarray(self.values)[jnp.minimum(count, len(self.values) - 1)]

    def rounded_up(self, count: Any, dtype: Any) -> jax.Array:
        """The value at `count` as the next number of `dtype` that is not below it."""
        values = self.values if _traced(self.values) else _round_up(self.values, dtype)
        return _Lookup(values)(count)


def _scalar_or_lookup(values: Any) -> Any:
    if np.ndim(values) == 0:
        return values
    return _Lookup(values if _traced(values) else np.asarray(values))


def _at(value: Any, count: Any) -> Any:
    """A schedule's value at `count`, or the constant."""
    return value(count) if callable(value) else value


def _round_up(values: Any, dtype: Any) -> np.ndarray:
    """The nearest numbers of `dtype` that are not below `values`."""
    exact = np.asarray(values, np.float64)
    rounded = exact.astype(dtype)
    return np.where(rounded < exact, np.nextafter(rounded, np.asarray(np.inf, dtype)), rounded)


def _traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _check_wide(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
            raise ValueError(
                f"params must be float32 or float64, got {dtype} at {_name(path)}; keep float32 "
                "master weights, and freeze what is not a parameter"
            )


def _check_finite(name: str, tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not _traced(leaf) and not bool(jnp.all(jnp.isfinite(leaf))):
            raise ValueError(f"{name} must be finite, got a NaN or an infinity at {_name(path)}")


def _check_same_structure(params: Any, center: Any) -> None:
    expected: Any = jax.tree.structure(params)
    given: Any = jax.tree.structure(center)
    if given != expected:
        raise ValueError(
            f"center must have the structure of the parameters, {expected}, got {given}"
        )
    _check_same_shapes(params, jax.tree.leaves(center))


def _check_same_shapes(params: Any, middles: list[Any]) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if len(leaves) != len(middles):
        raise ValueError(f"center must have {len(leaves)} leaves, got {len(middles)}")
    for (path, leaf), middle in zip(leaves, middles, strict=True):
        if jnp.shape(leaf) != jnp.shape(middle):
            raise ValueError(
                f"center must have shape {jnp.shape(leaf)} at {_name(path)}, "
                f"got {jnp.shape(middle)}"
            )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the root"
