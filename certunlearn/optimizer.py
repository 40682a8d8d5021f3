"""The whole optimizer that a certificate speaks about, as one Optax transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from certunlearn import checks, mechanisms, schedules, transforms, trees
from certunlearn.mechanisms import (
    DPSGD,
    DescentToDelete,
    GradientClipping,
    ModelClipping,
    OutputPerturbation,
    ProjectedNoisySGD,
    RewindToDelete,
)


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
    mechanism: Any,
    noise_scale: Any,
    *,
    key: Any,
    center: Any = None,
    before_clip: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a certificate speaks about, as one Optax transform.

    For `GradientClipping` one update is `-learning_rate * (clip(g) + weight_decay * (params -
    center)) + noise`; for others, what their docstrings say, with noise and projection where they
    have them. After `mechanism.steps` updates it returns zeros, so that the parameters stay those
    of the last step.

    Args:
      mechanism: any of them. For `DPSGD` updates must be sums of clipped gradients over
        `batch_size`, of a Poisson sample: `unlearn` sees to that.
      noise_scale: standard deviation in parameter units, as `noise_scale(mechanism, ...)` gives
        it: a number, `[steps]` numbers or a schedule.
      key: secret and used for one run only; see `add_gaussian_noise`.
      center: the mechanism's public centre, if it has one, structured like the parameters that
        `init` gets (for `nnx.Optimizer`, like `nnx.state(model, nnx.Param)`); None is the origin.
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
      For `GradientClipping`, and so for others with what they assume instead:
      parameters that start within `init_radius` of the centre (`clip_params`) and take
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
    mechanisms.check(mechanism)
    if before_clip is not None and not isinstance(mechanism, GradientClipping):
        raise ValueError(f"before_clip is for GradientClipping, not {type(mechanism).__name__}")
    if before_clip is not None and mechanism.memoryless:
        raise ValueError(
            "before_clip may carry state from step to step, which a memoryless mechanism excludes: "
            "declare GradientClipping(..., memoryless=False). Its guarantee is then that of the "
            "last step, without the minimum over earlier ones"
        )
    if not schedules.is_traced(noise_scale):
        noise_scale = checks.per_step("noise_scale", noise_scale, mechanism.steps)
    chain = optax.chain(*_parts(mechanism, noise_scale, key, center, before_clip))

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


def _parts(
    mechanism: Any,
    noise_scale: Any,
    key: Any,
    center: Any,
    before_clip: optax.GradientTransformation | None,
) -> list[Any]:
    """The transforms of one update, in order."""
    noise = transforms.add_gaussian_noise(schedules.scalar_or_lookup(noise_scale), key)
    match mechanism:
        case GradientClipping():
            first = [] if before_clip is None else [_zero_nonfinite(), before_clip]
            return [*first, _clip(mechanism), *_descent(mechanism, center), noise]
        case ModelClipping(clip_norm=None):
            project = transforms.project_onto_ball(mechanism.model_radius, center)
            return [_zero_nonfinite(), *_descent(mechanism, center), project, noise]
        case ModelClipping():
            project = transforms.project_onto_ball(mechanism.model_radius, center)
            return [_clip(mechanism), *_descent(mechanism, center), noise, project]
        case OutputPerturbation():
            return [optax.set_to_zero(), noise]
        case ProjectedNoisySGD(radius=float(radius)):
            project = transforms.project_onto_ball(radius, center)
            return [_zero_nonfinite(), *_descent(mechanism), noise, project]
        case ProjectedNoisySGD() | DPSGD():
            return [_zero_nonfinite(), *_descent(mechanism), noise]
        case DescentToDelete() | RewindToDelete():
            where = jnp.where if schedules.is_traced(noise_scale) else np.where
            at_last = where(mechanism.noisy, noise_scale, 0.0)
            late = transforms.add_gaussian_noise(schedules.scalar_or_lookup(at_last), key)
            return [_zero_nonfinite(), *_descent(mechanism), late]
    raise TypeError(f"no optimizer for {mechanism!r}")


def _clip(mechanism: Any) -> optax.GradientTransformation:
    return transforms.clip_by_global_norm(schedules.scalar_or_lookup(mechanism.clip_norm))


def _descent(mechanism: Any, center: Any = None) -> list[optax.GradientTransformation]:
    parts = []
    # Without decay the centre plays no part, and parameters are not needed.
    if np.any(getattr(mechanism, "weight_decay", 0)):
        decay = schedules.scalar_or_lookup(mechanism.weight_decay)
        parts.append(transforms.decay_toward(decay, center))
    rate = schedules.scalar_or_lookup(mechanism.learning_rate)
    return [*parts, optax.scale_by_learning_rate(rate)]


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
