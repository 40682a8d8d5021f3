"""One noisy step as a function of all that may differ between runs, and its compiled form."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

from certunlearn import transforms
from certunlearn._numerics import batches, checks, norms, random_keys, schedules
from certunlearn.mechanisms import Mechanism, noisy_optimizer
from certunlearn.transforms import gradients
from certunlearn.unlearning import kept_steps, model_loss, placement
from certunlearn.unlearning.model_loss import Loss

# The parameters that are trained, and the optimizer's state.
Carry = tuple[ArrayTree, optax.OptState]


class StepStats(NamedTuple):
    """Private numbers of the steps of one call; arrays `[steps in the call]`.

    `largest` has one for each leaf, its largest magnitude after the step, where all of a run must
    be held against rounding; else it is empty.
    """

    loss: jax.Array
    clip_fraction: jax.Array
    nonfinite: jax.Array
    largest: tuple[jax.Array, ...] = ()


class Fixed(NamedTuple):
    """What noisy steps are traced from besides their arguments.

    Attributes:
      loss: structure of the `Loss`, without its arrays.
      own: the mechanism, if it has no rule that takes its numbers traced, and
      own_center: its centre.
      before_clip: as for `noisy_sgd`.
      sampling: how steps draw their examples; None for batches.
      per_example: whether each example's gradient is clipped.
      microbatch_size: examples handled at a time, or None for all.
      watches: whether magnitudes are among the numbers shown.
    """

    loss: Any
    own: Mechanism | None
    own_center: ArrayTree | None
    before_clip: optax.GradientTransformation | None
    sampling: batches.PoissonSampling | None
    per_example: bool
    microbatch_size: int | None
    watches: bool


class Varied(NamedTuple):
    """What may differ between runs of the same compiled steps: arrays, traced inside of them.

    Attributes:
      arrays: of the loss.
      loss_key: from which the keys of the losses are made.
      limits: `[steps]` or `[1]`, what each example's gradient is clipped to; None if they are not.
      update: what the update depends on.
    """

    arrays: list[jax.Array]
    loss_key: jax.Array
    limits: jax.Array | None
    update: noisy_optimizer.StepArguments


def parts(
    loss: Loss,
    mechanism: Mechanism,
    noise_scale: checks.PerStep,
    center: ArrayTree | None,
    before_clip: optax.GradientTransformation | None,
    per_example: bool,
    microbatch_size: int | None,
    key: jax.Array,
) -> tuple[Fixed, Varied]:
    """What the steps of a run are traced from, and their first argument.

    Raises:
      ValueError: if gradients of examples are to be clipped to a norm out of range.
    """
    arguments = noisy_optimizer.step_arguments(mechanism, noise_scale, center)
    own = mechanism if arguments.rule is None else None
    sampling = mechanism.poisson_sampling()
    limits: jax.Array | None = None
    if sampling is not None:
        # Accountants read the sensitivity; a sample does not depend on it.
        sampling = dataclasses.replace(sampling, sensitivity=0.0)
    per_example = per_example or sampling is not None
    if per_example:
        numbers = np.atleast_1d(np.asarray(mechanism.example_clip_norm(), np.float64))
        for each in np.unique(numbers):
            norms.check_norm("clip_norm", each)
        limits = jnp.asarray(numbers)
    arrays, structure = jax.tree.flatten(loss)
    fixed = Fixed(
        loss=structure,
        own=own,
        own_center=None if own is None else center,
        before_clip=before_clip,
        sampling=sampling,
        per_example=per_example,
        microbatch_size=microbatch_size,
        watches=mechanism.watches_magnitudes,
    )
    return fixed, Varied(arrays, model_loss.loss_key(key), limits, arguments)


def compiled_noisy(this: kept_steps.Compiled[Fixed]) -> Callable[..., tuple[Carry, StepStats]]:
    """The compiled `run(varied, carry, data, sampling_key, step, count, *, most, layout)`."""

    @functools.partial(jax.jit, static_argnames=("most", "layout"), donate_argnums=1)
    def run(
        varied: Varied,
        carry: Carry,
        data: ArrayTree,
        sampling_key: jax.Array | None,
        step: int,
        count: int,
        *,
        most: int,
        layout: placement.Layout,
    ) -> tuple[Carry, StepStats]:
        return steps_of_call(
            this.fixed, varied, carry, data, sampling_key, step, count, most, layout
        )

    return run


def steps_of_call(
    fixed: Fixed,
    varied: Varied,
    carry: Carry,
    data: ArrayTree,
    sampling_key: jax.Array | None,
    step: int | jax.Array,
    count: int | jax.Array,
    most: int,
    layout: placement.Layout,
) -> tuple[Carry, StepStats]:
    """What a compiled call does; the arguments are those of `data_feeds.Call`."""

    def one(carry: Carry, offset: int | jax.Array) -> tuple[Carry, StepStats]:
        own = data if most == 1 else jax.tree.map(lambda batches: batches[offset], data)
        carry, stats = _noisy_step(fixed, varied, carry, own, sampling_key, step + offset)
        return placement.constrained(carry, layout), stats

    if most == 1:
        # No loop: it lowers to a `while`, unrolled or not, where XLA on CPU leaves convolutions
        # in layouts for which it has no fast kernel.
        carry, stats = one(carry, 0)
        return carry, jax.tree.map(lambda number: number[None], stats)

    def following(offset: jax.Array, before: tuple[Carry, StepStats]) -> tuple[Carry, StepStats]:
        carry, stats = one(before[0], offset)
        put = lambda whole, own: whole.at[offset].set(own)  # noqa: E731
        return carry, jax.tree.map(put, before[1], stats)

    # The number of steps is no constant: calls of fewer steps need no program of their own.
    _, shapes = jax.eval_shape(one, carry, 0)
    stats = jax.tree.map(lambda one: jnp.zeros((most, *one.shape), one.dtype), shapes)
    found: tuple[Carry, StepStats] = jax.lax.fori_loop(0, count, following, (carry, stats))
    return found


def _noisy_step(
    fixed: Fixed,
    varied: Varied,
    carry: Carry,
    data: ArrayTree,
    sampling_key: jax.Array | None,
    step: int | jax.Array,
) -> tuple[Carry, StepStats]:
    """Step number `step`, on a batch, or on what Poisson sampling takes from the data."""
    leaves, opt_state = carry
    before = _counts(opt_state)
    loss_fn: Loss = jax.tree.unflatten(fixed.loss, varied.arrays)
    key = jax.random.fold_in(varied.loss_key, step)
    factor, stats = 1.0, None
    batch = data
    if fixed.sampling is not None:
        # Without a key, the sample is drawn already.
        step_key = None
        if sampling_key is not None:
            step_key = jax.random.fold_in(random_keys.as_key(sampling_key), step)
        batch, factor = fixed.sampling.sample(data, step_key, fixed.microbatch_size)
    if fixed.per_example:
        assert varied.limits is not None
        norm = schedules.Lookup(varied.limits)(step)
        if fixed.sampling is not None:
            value_and_grad = gradients.sample_value_and_grad(loss_fn, norm, fixed.microbatch_size)
        else:
            value_and_grad = gradients.clipped_value_and_grad(
                loss_fn, norm, microbatch_size=fixed.microbatch_size, with_stats=True
            )
        (loss, stats), grads = value_and_grad(leaves, batch, key)
        grads = jax.tree.map(lambda g: factor * g, grads)
    else:
        mean_value_and_grad = gradients.mean_value_and_grad(loss_fn, fixed.microbatch_size)
        loss, grads = mean_value_and_grad(leaves, batch, key)
    update = noisy_optimizer.update_with(
        varied.update, fixed.own, fixed.own_center, fixed.before_clip
    )
    parts = None if fixed.per_example else fixed.microbatch_size
    updates, opt_state = update(
        grads, opt_state, leaves, **asked_for(loss_fn, parts, loss, grads, batch, key)
    )
    leaves = optax.apply_updates(leaves, updates)
    after = _counts(opt_state)
    clipped, nonfinite = after[0] - before[0], after[1] - before[1]
    if stats is not None:
        clipped, nonfinite = stats.clipped_fraction, stats.nonfinite
    largest: tuple[jax.Array, ...] = ()
    if fixed.watches:
        largest = tuple(jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(leaves))
    numbers = StepStats(
        jnp.asarray(loss, jnp.float32), jnp.asarray(clipped, jnp.float32), nonfinite, largest
    )
    return (leaves, opt_state), numbers


def asked_for(
    loss_fn: Loss,
    microbatch_size: int | None,
    loss: jax.Array,
    grads: ArrayTree,
    batch: ArrayTree,
    key: jax.Array,
) -> dict[str, Any]:
    """What optimizers with a line search or a plateau to look for ask for, by Optax's names."""
    value = gradients.mean_value(loss_fn, microbatch_size)
    return {"value": loss, "grad": grads, "value_fn": lambda params: value(params, batch, key)}


def _counts(opt_state: optax.OptState) -> tuple[jax.Array, jax.Array]:
    """How many gradients were clipped so far, and how many were not finite."""
    clips = _find(opt_state, transforms.ClipByGlobalNormState)[-1:]  # before_clip may have its own
    zeroed = [state.zeroed for state in _find(opt_state, transforms.ZeroNonfiniteState)]
    zeroed += [clip.nonfinite for clip in clips]
    none = jnp.zeros((), jnp.int32)
    return sum((clip.clipped for clip in clips), none), sum(zeroed, none)


def _find(opt_state: optax.OptState, kind: type) -> list[Any]:
    is_kind = lambda state: isinstance(state, kind)  # noqa: E731
    return [state for state in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(state)]
