"""What a run does before its first step: checks, the noise scale, keys, the start, a rehearsal."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from chex import ArrayTree

from certunlearn import accounting, mechanisms
from certunlearn._numerics import checks, files, loss_functions, model_trees, trees
from certunlearn._numerics import random_keys as keys_lib
from certunlearn._numerics.checks import ScalarOrSchedule
from certunlearn.certificates import issuing
from certunlearn.mechanisms import Mechanism, PlannedRun, base, rounding
from certunlearn.mechanisms.noisy_optimizer import noisy_sgd
from certunlearn.unlearning import (
    agreement,
    compiled_steps,
    held_arrays,
    inputs,
    leaf_split,
    model_forms,
    other_state,
    periodic_saves,
    placement,
    plan_digests,
    rehearsal,
    resuming,
    solving,
)
from certunlearn.unlearning.data_feeds import Feed, RetainData
from certunlearn.unlearning.model_loss import Loss
from certunlearn.unlearning.prepared_run import Examples, Prepared, Start, Tuning
from certunlearn.unlearning.private_history import UnlearningState
from certunlearn.unlearning.run_options import (
    DEFAULTS,
    Finetune,
    LossFn,
    Options,
    as_finetune,
    as_options,
    finetuning_loss,
)


def prepare(
    loss_fn: LossFn,
    params: ArrayTree,
    retain_data: RetainData,
    mechanism: Mechanism,
    *,
    delta: float | None = None,
    batch_size: int | None = None,
    epsilon: float | None = None,
    noise_scale: ScalarOrSchedule | None = None,
    key: jax.Array | None = None,
    center: ArrayTree | None = None,
    finetune: Finetune | tuple[optax.GradientTransformation, int] | None = None,
    accountant: str | None = None,
    options: Options = DEFAULTS,
    progress: bool = True,
) -> Prepared:
    """The first part of `unlearn`: checks everything and makes ready what the run needs.

    Every step is tried by its shapes, so that what cannot work is refused before any noise.

    Args:
      loss_fn: this and all other arguments as for `unlearn`.
      params: the trained model.
      retain_data: the examples to keep: arrays, a source of examples, or a `Stream`.
      mechanism: what the noisy steps do.
      delta: the certificate's delta.
      batch_size: examples in a batch.
      epsilon: the certificate's epsilon, or give
      noise_scale: standard deviation of the noise, in parameter units.
      key: None draws keys from the operating system.
      center: the public centre.
      finetune: noiseless steps after the noisy ones.
      accountant: None for the one that asks for the least noise.
      options: what else is asked for.
      progress: whether to show a progress bar while the noise is calibrated.

    Returns:
      A `Prepared`, for one call of `run_noisy_steps`.

    Raises:
      TypeError: if an argument is missing or not of the right kind.
      ValueError: if an argument is out of range, or a step cannot work.

    Guarantee:
      None yet: nothing of it may leave. It holds the trained model and the keys.
    """
    mechanism, more = mechanisms.check(mechanism), as_options(options)
    inputs.function("loss_fn", loss_fn, loss_functions.SIGNATURE)
    solving.check(mechanism, loss_fn, more, tuned=finetune is not None)
    progress = inputs.flag("progress", progress)
    tuning = as_finetune(finetune)
    tuning_loss = None if tuning is None else finetuning_loss(mechanism, tuning, loss_fn)
    _check_resumption(key, more)
    delta = mechanisms.checked_delta(mechanism, delta)
    form = other_state.checked_form(params, more.recompute_state)
    split = _split(form.params, form.flags(more.frozen))
    examples = Examples.make(retain_data, batch_size, mechanism, more, split.leaves)
    split = _placed(split, examples, mechanism, more)
    finetuned = tuning is not None or more.recompute_state is not None
    _check_run(mechanism, examples, more, center is not None, finetuned)
    stop = _stop(mechanism, more)
    center = None if center is None else inputs.arrays("center", model_trees.parameters(center))
    if mechanism.exact:  # which trains from the centre: of the trained model it gets the structure
        split = split.replaced("center", center)
    middle = _center(center, split)
    scale = _noise_scale(mechanism, epsilon, noise_scale, delta, accountant, progress)
    issuing.check_plan(mechanism, scale, split.frozen_names, accountant)
    loss, convolves, later = _losses(loss_fn, tuning_loss, split, form, examples, mechanism, middle)
    longest = compiled_steps.longest_call(split.leaves, convolves)
    settings = plan_digests.settings_of(mechanism, scale, split, examples)
    keys, key_source = agreement.agreed_keys(
        *_keys(key, more.resume), split.leaves, settings, more.resume
    )
    plan = plan_digests.planned(settings, split, examples, center)
    with solving.precision(mechanism):
        start = _start(mechanism, split, middle, keys)
        rounding.check(mechanism, scale, jax.tree.leaves(start))
        tx = _optimizer(mechanism, scale, keys, middle, more)
        carry = placement.together(_carry(mechanism, start, tx), examples.mesh)
        if more.resume is not None:
            carry = _resumed(more.resume, stop, mechanism.steps, plan, carry)
        noisy = _noisy_steps(
            loss, tx, mechanism, scale, middle, examples, keys, carry, more, longest
        )
    return Prepared(
        mechanism=mechanism,
        noise_scale=scale,
        delta=delta,
        epsilon=epsilon,
        accountant=accountant,
        options=more,
        form=form,
        split=split,
        examples=examples,
        first=0 if more.resume is None else more.resume.step,
        stop=stop,
        keys=keys,
        key_source=key_source,
        start=Start(carry),
        solve=_solver(mechanism, loss_fn, split, examples.feed, more),
        noisy=noisy,
        longest=longest,
        tuning=_tuning(tuning, later, examples, keys, start),
        plan=plan,
        trained_digest=files.params_digest(form.params),
        start_digest=files.params_digest(split.merge(start)),
    )


def _check_resumption(key: jax.Array | None, more: Options) -> None:
    """Refuses keys besides those of a state, and to overwrite a state that is not resumed."""
    if more.resume is not None and key is not None:
        raise ValueError("key must be None with resume: the saved state carries the keys")
    periodic_saves.check(more)


def _stop(mechanism: Mechanism, more: Options) -> int:
    """After how many noisy steps to stop."""
    if not mechanism.exact:
        stop = inputs.stop_after(more.stop_after, mechanism.steps)
        mechanism.first(stop)  # not every one can stop early
        return stop
    if more.stop_after is not None or more.resume is not None or more.before_clip is not None:
        raise ValueError(
            f"stop_after, resume and before_clip must be None for {type(mechanism).__name__}, "
            "which has no noisy steps"
        )
    return 0


def _optimizer(
    mechanism: Mechanism,
    scale: checks.PerStep,
    keys: keys_lib.Keys,
    center: ArrayTree | None,
    more: Options,
) -> optax.GradientTransformation | None:
    """What takes the noisy steps; None if there are none."""
    if mechanism.exact:
        return None
    return noisy_sgd(mechanism, scale, key=keys.noise, center=center, before_clip=more.before_clip)


def _carry(
    mechanism: Mechanism, start: ArrayTree, tx: optax.GradientTransformation | None
) -> compiled_steps.Carry:
    """What the first step starts from, in the precision of the steps."""
    if mechanism.solve_to is not None:
        start = solving.as_wide(start)
    carry: compiled_steps.Carry = compiled_steps.owned(
        (start, () if tx is None else tx.init(start))
    )
    return carry


def _solver(
    mechanism: Mechanism, loss_fn: LossFn, split: leaf_split.Split, feed: Feed, more: Options
) -> Callable[[ArrayTree], solving.Solved] | None:
    """Minimises the objective on the data as they were given, in their own precision."""
    if mechanism.solve_to is None:
        return None
    with solving.precision(mechanism):
        wide = feed.for_solvers()

    def solve(trainable: ArrayTree) -> solving.Solved:
        loss: Any = loss_fn  # a ConvexLoss, as has been checked
        return solving.solve(mechanism, loss, split.merge(trainable), wide, more)

    return solve


def _split(given: Any, frozen: ArrayTree | None) -> leaf_split.Split:
    """The parameters as arrays, wide and finite where they are trained."""
    split = leaf_split.Split.make(inputs.arrays("params", given), frozen)
    trees.check_wide(split.by_name)
    trees.check_finite("params", split.by_name)
    return split


def _center(center: ArrayTree | None, split: leaf_split.Split) -> ArrayTree | None:
    """What is trained of the centre."""
    if center is None:
        return None
    middle = split.like_params("center", center)
    inputs.check_real("center", middle)
    return placement.like(middle, split.trainable)


def _noise_scale(
    mechanism: Mechanism,
    epsilon: float | None,
    noise_scale: ScalarOrSchedule | None,
    delta: float,
    accountant: str | None,
    progress: bool,
) -> checks.PerStep:
    if mechanism.exact:
        accounting.epsilon(mechanism, accountant=accountant)  # refuses accountants of noise
        if epsilon is not None and checks.real("epsilon", epsilon) != 0:
            raise ValueError(
                f"epsilon must be 0 or None for {type(mechanism).__name__}, which is exact, got "
                f"{epsilon!r}"
            )
        return mechanisms.checked_noise(mechanism, noise_scale)
    if (epsilon is None) == (noise_scale is None):
        raise ValueError(
            f"give either epsilon or noise_scale, got epsilon={epsilon!r} and "
            f"noise_scale={noise_scale!r}"
        )
    if noise_scale is None:
        assert epsilon is not None
        return accounting.noise_scale(
            mechanism, epsilon=epsilon, delta=delta, accountant=accountant, progress=progress
        )
    # Refuses now what could not be certified at the end. What interpolation certifies, the best of
    # all accountants certifies too, so the slower ones are not asked yet.
    if accountant is None and accounting.supported_accountants(mechanism)["interpolation"] is None:
        accountant = "interpolation"
    accounting.epsilon(mechanism, noise_scale=noise_scale, delta=delta, accountant=accountant)
    return checks.per_step("noise_scale", noise_scale, mechanism.steps)


def _losses(
    loss_fn: LossFn,
    tuning_loss_fn: LossFn | None,
    split: leaf_split.Split,
    form: model_forms.ModelForm,
    examples: Examples,
    mechanism: Mechanism,
    center: ArrayTree | None,
) -> tuple[Loss, bool, Loss | None]:
    """The losses with noise and without, each tried, and whether the first has convolutions."""
    feed, trainable = examples.feed, split.trainable
    loss = Loss.of(loss_fn, split, form)
    batch = feed.batch_shapes(examples.at_once)
    # With samples this is the training itself, from a start that may be known to the loss.
    trained = held_arrays.secret(split.trained_of(form.params), center)
    trained = trained if examples.sampling is None else []
    kept_out = trained if base.is_memoryless(mechanism) else []
    convolves = rehearsal.check_loss("loss_fn", loss, trainable, batch, kept_out)
    if tuning_loss_fn is None:
        return loss, convolves, None
    later = Loss.of(tuning_loss_fn, split, form)
    batch = feed.batch_shapes(examples.accumulated or examples.batch_size)
    rehearsal.check_loss("finetune loss_fn", later, trainable, batch, trained)
    return loss, convolves, later


def _keys(key: jax.Array | None, resume: UnlearningState | None) -> tuple[keys_lib.Keys, str]:
    if resume is not None:
        data, finetune = map(keys_lib.as_key, (resume.data_key, resume.finetune_key))
        # The noise key comes back with the optimizer state; the one here is overwritten.
        return keys_lib.Keys(keys_lib.system_keys().noise, data, finetune), resume.key_source
    if key is None:
        return keys_lib.system_keys(), keys_lib.FROM_SYSTEM
    return keys_lib.split_key(key), keys_lib.FROM_CALLER


def _check_run(
    mechanism: Mechanism, examples: Examples, more: Options, centered: bool, finetuned: bool
) -> None:
    """Refuses what the mechanism does not allow."""
    mechanism.check_run(
        PlannedRun(
            size=examples.size,
            batch_size=examples.batch_size,
            per_example=examples.per_example,
            centered=centered,
            finetuned=finetuned,
        )
    )
    if problems := mechanism.size_problems(examples.retain_size, more.forget_size):
        raise ValueError("; ".join(problems))


def _placed(
    split: leaf_split.Split, examples: Examples, mechanism: Mechanism, more: Options
) -> leaf_split.Split:
    """The parameters where they have to lie, if that is on several devices."""
    leaves = placement.together(split.leaves, examples.mesh)
    agreement.check_options(leaves, more, mechanism.solve_to is not None)
    return dataclasses.replace(split, leaves=leaves)


def _start(
    mechanism: Mechanism, split: leaf_split.Split, center: ArrayTree | None, keys: keys_lib.Keys
) -> ArrayTree:
    """The start of the run, which lies as the trained parameters do."""
    start = mechanism.start(split.trainable, center, keys.noise)
    return placement.like(start, split.trainable)


def _resumed(
    state: UnlearningState,
    stop: int,
    steps: int,
    plan: Callable[[], dict[str, str]],
    like: compiled_steps.Carry,
) -> compiled_steps.Carry:
    """Parameters and optimizer state of the run that goes on."""
    if state.step > stop or state.step == stop < steps:
        raise ValueError(f"resume has run {state.step} steps already; stop_after={stop} is past")
    carry: compiled_steps.Carry = resuming.restore(state, plan(), like)
    return carry


def _noisy_steps(
    loss: Loss,
    tx: optax.GradientTransformation | None,
    mechanism: Mechanism,
    scale: checks.PerStep,
    center: ArrayTree | None,
    examples: Examples,
    keys: keys_lib.Keys,
    carry: compiled_steps.Carry,
    more: Options,
    longest: int,
) -> Callable[..., tuple[compiled_steps.Carry, compiled_steps.StepStats]] | None:
    """The compiled noisy steps, tried by their shapes; None if there are none."""
    if tx is None:
        return None
    if mechanism.solve_to is not None:
        return compiled_steps.noise_alone(tx)
    noisy = compiled_steps.noisy_steps(
        loss,
        mechanism,
        scale,
        center=center,
        before_clip=more.before_clip,
        per_example=examples.per_example,
        microbatch_size=examples.microbatch_size,
        key=keys.data,
    )
    call = examples.feed.trial(examples.noisy(keys.data, 0, 1, longest))
    rehearsal.try_noisy_steps(noisy, carry, call, more.before_clip is not None)
    return noisy


def _tuning(
    tuning: Finetune | None,
    loss: Loss | None,
    examples: Examples,
    keys: keys_lib.Keys,
    start: ArrayTree,
) -> Tuning | None:
    """The compiled noiseless step, tried by its shapes."""
    if tuning is None or loss is None:
        return None
    one = compiled_steps.noiseless_step(loss, tuning.optimizer, keys.finetune, examples.accumulated)
    call = examples.feed.trial(examples.noiseless(keys.finetune, tuning.steps, 0))
    rehearsal.try_noiseless_step(one, tuning.optimizer, start, call)
    return Tuning(tuning.optimizer, tuning.steps, one)
