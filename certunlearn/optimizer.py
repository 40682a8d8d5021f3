"""The whole optimizer that a certificate speaks about, as one Optax transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from certunlearn import checks, schedules, transforms, trees
from certunlearn.mechanisms import GradientClipping


class NoisySgdState(NamedTuple):
    """State of `noisy_sgd`. Secret, and to be discarded after the last step.

    Attributes:
      count: int32 scalar, updates seen, at most the mechanism's steps.
      inner_state: the chain's state.
    """

    count: jax.Array  # type: ignore[assignment]
    inner_state: Any


class ZeroNonfiniteState(NamedTuple):
    """`zeroed`, an int32 scalar: gradients that were not finite and became zero."""

    zeroed: jax.Array


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
    >>> params = transforms.clip_params(jnp.array([3.0, 4.0]), m.init_radius)
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
    if not schedules.is_traced(noise_scale):
        noise_scale = checks.per_step("noise_scale", noise_scale, mechanism.steps)
    parts = [] if before_clip is None else [_zero_nonfinite(), before_clip]
    parts.append(transforms.clip_by_global_norm(schedules.scalar_or_lookup(mechanism.clip_norm)))
    # Without decay the centre plays no part, and parameters are not needed.
    if np.any(mechanism.weight_decay):
        parts.append(
            transforms.decay_toward(schedules.scalar_or_lookup(mechanism.weight_decay), center)
        )
    parts.append(optax.scale_by_learning_rate(schedules.scalar_or_lookup(mechanism.learning_rate)))
    parts.append(transforms.add_gaussian_noise(schedules.scalar_or_lookup(noise_scale), key))
    chain = optax.chain(*parts)

    def init(params: Any) -> NoisySgdState:
        trees.check_wide(params)
        if center is not None:
            trees.check_same_structure(params, center)
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
