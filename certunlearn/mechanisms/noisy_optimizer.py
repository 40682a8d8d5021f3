"""The whole optimizer that a certificate speaks about, as one Optax transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

from certunlearn import transforms
from certunlearn._numerics import checks, parallel, schedules, trees
from certunlearn._numerics.checks import ScalarOrSchedule
from certunlearn.mechanisms import base, rounding, step_rules
from certunlearn.mechanisms.base import Mechanism
from certunlearn.mechanisms.step_rules import Rule
from certunlearn.transforms import gaussian_noise


class NoisySgdState(NamedTuple):
    """State of `noisy_sgd`. Secret, and to be discarded after the last step.

    Attributes:
      count: int32 scalar, updates seen, at most the mechanism's steps.
      inner_state: the chain's state.
    """

    count: jax.Array  # type: ignore[assignment]
    inner_state: Any

    def __repr__(self) -> str:
        """Without what is secret."""
        return f"NoisySgdState(count={self.count}, inner_state=<secret>)"


class BeforeClipState(NamedTuple):
    """State of `before_clip`, a transform of the caller's, whose counts are its own affair."""

    inner_state: Any


class Evidence(NamedTuple):
    """What an optimizer state shows of a run.

    Attributes:
      steps: updates taken, each with the noise that the mechanism has in it.
      nonfinite: gradients that were not finite, in place of which zero was used.
    """

    steps: int
    nonfinite: int


def noisy_sgd(
    mechanism: Mechanism,
    noise_scale: ScalarOrSchedule,
    *,
    key: jax.Array,
    center: ArrayTree | None = None,
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
        `optax.scale_by_adam()`; its state starts fresh. It gets the gradients as the caller's tree,
        and extra arguments of the update (`value=...`). Non-finite gradients reach it as zeros and
        are counted in a `transforms.ZeroNonfiniteState`.

    Returns:
      An optimizer for `TrainState.create(tx=...)`, `nnx.Optimizer` or a loop. Its state is a
      `NoisySgdState`: as secret as the trained model, and to be discarded after the last step, once
      `certify` has read from it how many steps there were.

    Raises:
      TypeError: if `mechanism` or `key` is of the wrong type.
      ValueError: if `noise_scale` is not between 1e-30 and 1e30, `mechanism.steps` is above
        2^31 - 2, `learning_rate * clip_norm` is below 1e-30 but not 0, or `before_clip` is given
        and the mechanism claims to be memoryless; by init, if parameters are narrower than float32
        (their rounding would swallow the noise), `noise_scale` is below 4 spacings of
        floating-point numbers at the largest of them, or `center` has another structure; by
        update, inside `shard_map(check_vma=False)`.

    Guarantee:
      For `GradientClipping`, and so for others with what they assume instead:
      parameters that start within `init_radius` of the centre (`clip_params`) and take
      `mechanism.steps` of these updates are (epsilon, delta)-indistinguishable as the accountants
      state for this mechanism and noise scale, under `mechanism.assumptions`. Each update moves the
      parameters by a strictly clipped gradient whatever the gradient is, NaN included, and every
      update that is counted holds its noise: where parameters or updates have grown so large that
      rounding would swallow it (see `add_gaussian_noise`), the update is NaN. Other rounding is not
      accounted for here.

    Devices:
      Under `jit`, sharded parameters are clipped as one and get the noise that one device would
      draw, bit for bit. Inside `shard_map`, arrays that differ between devices are taken for pieces
      of one: one clip over all, independent noise for each piece. Copies, as in `pmap`, have equal
      noise and stay equal.

    Wrappers:
      * `optax.MultiSteps(tx, k)` keeps the guarantee: gradients are averaged first, then clipped;
        the run takes k times `mechanism.steps` calls. A non-finite gradient stays in its
        accumulator for good, and every later gradient counts as zero: no leak, no learning.
      * `optax.apply_if_finite`, `optax.MultiSteps(should_skip_update_fn=...)` and
        `optax.conditionally_transform` **break it**: they look at private gradients and leave out
        updates with their noise, or let raw gradients pass. Nothing in here can prevent that, nor
        a loader that ends early. But such updates are not counted, so that `evidence` shows too few
        steps, and `certify(state=...)` refuses the run.
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

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=2)
    >>> tx = noisy_sgd(m, 0.5, key=jax.random.key(0))
    >>> params = transforms.clip_params(jnp.array([3.0, 4.0]), m.init_radius)
    >>> state = tx.init(params)
    >>> for _ in range(3):  # the third changes nothing
    ...     updates, state = tx.update(params, state, params)
    >>> updates.tolist(), int(state.count)
    ([0.0, 0.0], 2)
    """
    base.check(mechanism)
    if mechanism.exact:
        raise ValueError(
            f"mechanism must have noisy steps, got {type(mechanism).__name__}, which is exact and "
            "has none: train as you like, and use certunlearn.certify"
        )
    _check_before_clip(mechanism, before_clip)
    if mechanism.steps >= gaussian_noise.LAST_COUNT:
        raise ValueError(
            f"mechanism.steps must be at most {gaussian_noise.LAST_COUNT - 1}, where the count "
            f"of steps ends, got {mechanism.steps}"
        )
    if not schedules.is_traced(noise_scale):
        noise_scale = checks.per_step("noise_scale", noise_scale, mechanism.steps)
        gaussian_noise.check_noise_scale(noise_scale)
    noise = transforms.add_gaussian_noise(_where_noisy(mechanism, noise_scale), key)
    chain = _chain(mechanism.step_transforms(noise, center), before_clip)

    def init(params: Any) -> NoisySgdState:
        trees.check_wide(params)
        if mechanism.solve_to is not None:
            _check_double(mechanism, params)
        if not schedules.is_traced(noise_scale):
            rounding.check_start(mechanism, noise_scale, params)
        if center is not None:
            trees.check_same_structure(params, center)
        return NoisySgdState(jnp.zeros((), jnp.int32), chain.init(params))

    return optax.GradientTransformationExtraArgs(init, _update_of(chain, mechanism.steps))


class StepArguments(NamedTuple):
    """What a noisy step depends on besides its state and its gradient: arrays, or traced.

    Attributes:
      rule: the mechanism's; None if it has none.
      noise: of `schedules.NoiseTable`.
      steps: int32, the mechanism's number of steps.
      center: the public centre; None also where there is no rule.
    """

    rule: Rule | None
    noise: tuple[jax.Array, jax.Array | None]
    steps: jax.Array
    center: ArrayTree | None


def step_arguments(
    mechanism: Mechanism, noise_scale: checks.PerStep, center: ArrayTree | None
) -> StepArguments:
    """The arguments of `update_with` for one run, on the device."""
    rule = step_rules.rule_of(mechanism)
    return StepArguments(
        rule=None if rule is None else jax.tree.map(jnp.asarray, rule),
        noise=schedules.NoiseTable.rounded(_per_noisy_step(mechanism, noise_scale)),
        steps=jnp.asarray(mechanism.steps, jnp.int32),
        # A method of the user's own may look at the centre's numbers, as constants.
        center=None if rule is None or center is None else jax.tree.map(jnp.asarray, center),
    )


def update_with(
    arguments: StepArguments,
    own: Mechanism | None,
    own_center: ArrayTree | None,
    before_clip: optax.GradientTransformation | None,
) -> optax.TransformUpdateExtraArgsFn:
    """The update of `noisy_sgd` with traced numbers, for the state that `noisy_sgd` has made.

    Args:
      arguments: what varies from run to run.
      own: the mechanism if it has no rule, and
      own_center: its centre.
      before_clip: as for `noisy_sgd`.
    """
    table = schedules.NoiseTable(*arguments.noise)
    # The key is in the state; this one is for states that are not made here.
    noise = transforms.add_gaussian_noise(table, jnp.zeros(2, jnp.uint32))
    if own is not None:
        parts = own.step_transforms(noise, own_center)
    else:
        assert arguments.rule is not None
        parts = arguments.rule.transforms(noise, arguments.center)
    return _update_of(_chain(parts, before_clip), arguments.steps)


def _chain(
    parts: tuple[optax.GradientTransformation, ...],
    before_clip: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """The transforms of one step, with the caller's own before them."""
    if before_clip is not None:
        parts = (transforms.zero_nonfinite(), _before_clip(before_clip), *parts)
    return optax.with_extra_args_support(optax.chain(*parts))


def _update_of(
    chain: optax.GradientTransformationExtraArgs, steps: int | jax.Array
) -> optax.TransformUpdateExtraArgsFn:
    """The chain's update until the last step, and zeros after it."""

    def update(
        updates: Any, state: NoisySgdState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, NoisySgdState]:
        parallel.check_tracked()
        updates, inner_state = chain.update(updates, state.inner_state, params, **extra_args)
        live = state.count < steps
        updates = jax.tree.map(lambda u: jnp.where(live, u, jnp.zeros_like(u)), updates)
        # After the last step all stands still, so that all counts stay equal.
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(live, new, old), inner_state, state.inner_state
        )
        return updates, NoisySgdState(state.count + live.astype(jnp.int32), inner_state)

    return update


def evidence(state: Any) -> Evidence:
    """Reads from an optimizer's state how many noisy steps were taken.

    Args:
      state: any pytree with exactly one `NoisySgdState` in it: the optimizer's state, as it is or
        within those of wrappers, a `TrainState`, or an `nnx.Optimizer`.

    Returns:
      An `Evidence`. `nonfinite` is private: it depends on hidden parameters.

    Raises:
      TypeError: if the state is traced: evidence is of what was run.
      ValueError: if there is no such state, or more than one; if it is one of several under `vmap`;
        if nothing in it adds noise; or if its parts do not agree on the number of updates.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=2)
    >>> tx = noisy_sgd(m, 0.5, key=jax.random.key(0))
    >>> evidence(tx.init(jnp.zeros(3)))
    Evidence(steps=0, nonfinite=0)
    """
    is_noisy = lambda node: isinstance(node, NoisySgdState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=is_noisy) if is_noisy(node)]
    if len(found) != 1:
        raise ValueError(
            "state must hold exactly one NoisySgdState, the state of the optimizer that "
            f"noisy_sgd makes, got a {type(state).__name__} with {len(found)}"
        )
    steps = _number(found[0].count)
    zeroed = 0
    is_part = lambda node: isinstance(node, (*_COUNTING, BeforeClipState))  # noqa: E731
    parts = jax.tree.leaves(found[0].inner_state, is_leaf=is_part)
    # A mechanism of the user's own may put its transforms together without the noise.
    if not any(isinstance(part, transforms.AddGaussianNoiseState) for part in parts):
        raise ValueError(
            "state must be that of steps with noise, got one without: step_transforms of the "
            "mechanism must use the noise that it is given"
        )
    for part in parts:
        if isinstance(part, _COUNTING) and _number(part.count) != steps:
            raise ValueError(
                "state must be that of one run, got one whose parts disagree on the number of "
                "updates: some were skipped, or counts were changed"
            )
        if isinstance(part, transforms.ZeroNonfiniteState):
            zeroed += _number(part.zeroed)
        if isinstance(part, transforms.ClipByGlobalNormState):
            zeroed += _number(part.nonfinite)
    return Evidence(steps, zeroed)


_COUNTING = (
    transforms.AddGaussianNoiseState,
    transforms.ClipByGlobalNormState,
    transforms.DecayTowardState,
    transforms.ZeroNonfiniteState,
)


def _number(count: Any) -> int:
    """A count as an int; NNX wraps it into a variable."""
    leaves = jax.tree.leaves(count)
    if len(leaves) != 1 or jnp.shape(leaves[0]) != ():
        raise ValueError(
            "state must be that of one run, got counts of several (under vmap): give one at a time"
        )
    if schedules.is_traced(leaves[0]):
        raise TypeError("state must be concrete, got a traced one: call this outside of jit")
    return int(leaves[0])


def _check_before_clip(
    mechanism: Mechanism, before_clip: optax.GradientTransformation | None
) -> None:
    if before_clip is None:
        return
    name = type(mechanism).__name__
    if not mechanism.takes_before_clip:
        raise ValueError(
            f"before_clip must be None for {name}, whose separations rest on the gradient as it "
            "is; it is for GradientClipping"
        )
    if base.is_memoryless(mechanism):
        raise ValueError(
            "before_clip may carry state from step to step, which a memoryless mechanism excludes: "
            f"declare {name}(..., memoryless=False). Its guarantee is then that of the last step, "
            "without the minimum over earlier ones"
        )


def _check_double(mechanism: Mechanism, params: Any) -> None:
    """Refuses parameters narrower than those whose gradient norm was verified."""
    for leaf in jax.tree.leaves(params):
        if jnp.asarray(leaf).dtype != jnp.float64:
            raise ValueError(
                f"params must be float64 for {type(mechanism).__name__}, within jax.enable_x64(), "
                f"got {jnp.asarray(leaf).dtype}: the noise belongs on the very numbers whose "
                "gradient norm was verified, and is rounded with them afterwards"
            )


def _where_noisy(mechanism: Mechanism, noise_scale: Any) -> Any:
    """The noise of every step, as a number or a schedule: 0 where a step has none."""
    return schedules.scalar_or_lookup(_per_noisy_step(mechanism, noise_scale))


def _per_noisy_step(mechanism: Mechanism, noise_scale: Any) -> Any:
    noisy = base.noise_of_steps(mechanism)
    if np.all(noisy):
        return noise_scale
    where = jnp.where if schedules.is_traced(noise_scale) else np.where
    return where(noisy, noise_scale, 0.0)


def _before_clip(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The caller's transform, its state marked as such."""
    whole = optax.with_extra_args_support(inner)

    def init(params: ArrayTree) -> BeforeClipState:
        return BeforeClipState(whole.init(params))

    def update(
        updates: ArrayTree, state: BeforeClipState, params: ArrayTree | None = None, **extra: Any
    ) -> tuple[ArrayTree, BeforeClipState]:
        updates, inner_state = whole.update(updates, state.inner_state, params, **extra)
        return updates, BeforeClipState(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
