"""What `unlearn` does before its first step: checks, the noise scale, the start, a rehearsal."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from certunlearn import accounting, mechanisms
from certunlearn._numerics import batches, checks, files, trees
from certunlearn._numerics import keys as keys_lib
from certunlearn.certificates import issuing
from certunlearn.mechanisms import rounding
from certunlearn.mechanisms.optimizer import noisy_sgd
from certunlearn.unlearning import (
    compiled_steps,
    inputs,
    leaf_split,
    model_state,
    rehearsal,
    resuming,
)
from certunlearn.unlearning.history import UnlearningState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready to start.

    Attributes:
      mechanism: what the noisy steps do.
      scale: standard deviation of the noise: a number, or one for each step.
      split: the parameters, and which of them are frozen.
      data: the retain data as JAX arrays.
      size: number of its examples.
      batch_size: examples in a batch.
      retain_size: number of retain examples, where it may be published.
      forget_size: number of forget examples, if given.
      first: noisy steps that were run before.
      stop: noisy steps after which to stop.
      keys: of noise, batches and fine-tuning batches.
      key_source: how they were drawn.
      carry: parameters and optimizer state to start from.
      noisy: the compiled noisy steps.
      optimizer: of the fine-tuning, or None.
      noiseless: its compiled step, or None.
      finetune_steps: their number.
      plan: computes the digests of what the run depends on.
      trained_digest: SHA-256 of the trained parameters.
      start_digest: SHA-256 of the parameters before the first step.
    """

    mechanism: Any
    scale: checks.PerStep
    split: leaf_split.Split
    data: Any
    size: int
    batch_size: int
    retain_size: int | None
    forget_size: int | None
    first: int
    stop: int
    keys: keys_lib.Keys
    key_source: str
    carry: compiled_steps.Carry
    noisy: Callable[..., tuple[compiled_steps.Carry, compiled_steps.StepStats]]
    optimizer: optax.GradientTransformation | None
    noiseless: Callable[..., tuple[Any, optax.OptState, jax.Array]] | None
    finetune_steps: int
    plan: Callable[[], dict[str, str]]
    trained_digest: str
    start_digest: str


def prepare(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    retain_data: Any,
    mechanism: Any,
    *,
    delta: float,
    batch_size: int,
    epsilon: float | None,
    noise_scale: Any,
    key: jax.Array | None,
    center: Any,
    finetune: tuple[optax.GradientTransformation, int] | None,
    finetune_loss_fn: Callable[[Any, Any], jax.Array] | None,
    per_example: bool,
    microbatch_size: int | None,
    before_clip: optax.GradientTransformation | None,
    frozen: Any,
    accountant: str | None,
    forget_size: int | None,
    recompute_state: Callable[[Any, Any], Any] | None,
    stop_after: int | None,
    resume: UnlearningState | None,
    progress: bool,
) -> Prepared:
    """Checks what `unlearn` was given, which see, and makes ready what the run needs."""
    mechanisms.check(mechanism)
    inputs.function("loss_fn", loss_fn, "f(params, batch) -> scalar")
    inputs.function("finetune_loss_fn", finetune_loss_fn, "f(params, batch) -> scalar", True)
    inputs.function("recompute_state", recompute_state, "f(params, retain_data) -> state", True)
    per_example = inputs.flag("per_example", per_example)
    sampling = mechanism.poisson_sampling() is not None
    if before_clip is not None:
        inputs.transform("before_clip", before_clip)
    optimizer, finetune_steps = inputs.finetuning(finetune)
    tuning_loss = inputs.finetuning_loss(mechanism, optimizer, finetune_loss_fn, loss_fn)
    inputs.check_resume(resume, key)
    given = model_state.extract_params(params, recompute_state)
    whole = inputs.arrays("params", given)
    split = leaf_split.Split.make(whole, frozen)
    trees.check_wide(split.by_name)
    trees.check_finite("params", split.by_name)
    data = inputs.arrays("retain_data", retain_data, keys=True)
    size = batches.data_size(data)
    batch_size = batches.check_batch_size(batch_size, size)
    microbatch_size = inputs.microbatch(microbatch_size, per_example or sampling)
    mechanism.check_run(
        size=size,
        batch_size=batch_size,
        per_example=per_example,
        centered=center is not None,
        finetuned=finetune is not None or recompute_state is not None,
    )
    forget_size = checks.optional_count("forget_size", forget_size)
    # Where steps draw samples the number of all examples is itself what must not show.
    retain_size = None if sampling else size
    if problems := mechanism.size_problems(retain_size, forget_size):
        raise ValueError("; ".join(problems))
    stop = mechanism.steps if stop_after is None else checks.positive_int("stop_after", stop_after)
    if stop > mechanism.steps:
        raise ValueError(f"stop_after must be at most steps={mechanism.steps}, got {stop}")
    mechanism.first(stop)  # not every one can stop early
    middle = None
    if center is not None:
        center = inputs.arrays("center", center)
        middle = split.like_params("center", center)
        inputs.check_real("center", middle)

    def loss(trainable: Any, batch: Any) -> jax.Array:
        return loss_fn(split.merge(trainable), batch)

    def loss_afterwards(trainable: Any, batch: Any) -> jax.Array:
        return tuning_loss(split.merge(trainable), batch)

    scale = _noise_scale(mechanism, epsilon, noise_scale, delta, accountant, progress)
    issuing.check_plan(mechanism, scale, split.frozen_names, accountant)
    examples = 1 if per_example or sampling else batch_size
    rehearsal.check_loss("loss_fn", loss, split.trainable, data, examples)
    if finetune_loss_fn is not None:
        rehearsal.check_loss("finetune_loss_fn", loss_afterwards, split.trainable, data, batch_size)
    keys, key_source = _keys(key, resume)
    start = mechanism.start(split.trainable, middle, keys.noise)
    rounding.check(mechanism, scale, jax.tree.leaves(start))
    tx = noisy_sgd(mechanism, scale, key=keys.noise, center=middle, before_clip=before_clip)
    carry: compiled_steps.Carry = compiled_steps.owned((start, tx.init(start)))

    plan = functools.cache(
        lambda: resuming.plan(
            {
                "mechanism": mechanisms.to_record(mechanism),
                "noise_scale": scale,
                "batch_size": batch_size,
                "per_example": per_example,
                "frozen": split.is_frozen,
            },
            {"params": whole, "retain_data": data, "center": center},
        )
    )
    first = 0
    if resume is not None:
        first = resume.step
        if first > stop or first == stop < mechanism.steps:
            raise ValueError(f"resume has run {first} steps already; stop_after={stop} is past")
        carry = resuming.restore(resume, plan(), carry)

    noisy = compiled_steps.noisy_steps(
        loss, tx, mechanism, batch_size, per_example, microbatch_size
    )
    call = next(compiled_steps.calls(keys.data, size, batch_size, 0, 1, None, sampling))
    rehearsal.try_noisy_steps(noisy, carry, data, call, before_clip is not None)
    noiseless = None
    if optimizer is not None:
        noiseless = compiled_steps.noiseless_step(loss_afterwards, optimizer, batch_size)
        rehearsal.try_noiseless_step(noiseless, optimizer, start, data, call[0])
    return Prepared(
        mechanism=mechanism,
        scale=scale,
        split=split,
        data=data,
        size=size,
        batch_size=batch_size,
        retain_size=retain_size,
        forget_size=forget_size,
        first=first,
        stop=stop,
        keys=keys,
        key_source=key_source,
        carry=carry,
        noisy=noisy,
        optimizer=optimizer,
        noiseless=noiseless,
        finetune_steps=finetune_steps,
        plan=plan,
        trained_digest=files.params_digest(given),
        start_digest=files.params_digest(split.merge(start)),
    )


def _noise_scale(
    mechanism: Any,
    epsilon: float | None,
    noise_scale: Any,
    delta: float,
    accountant: str | None,
    progress: bool,
) -> checks.PerStep:
    if (epsilon is None) == (noise_scale is None):
        raise ValueError(
            f"give either epsilon or noise_scale, got epsilon={epsilon!r} and "
            f"noise_scale={noise_scale!r}"
        )
    if epsilon is not None:
        return accounting.noise_scale(
            mechanism, epsilon=epsilon, delta=delta, accountant=accountant, progress=progress
        )
    # Refuses at once what could not be certified at the end. Whatever interpolation certifies, the
    # least of all accountants does; the others' time is saved for the end.
    if accountant is None and "interpolation" in accounting.supported_names(mechanism):
        accountant = "interpolation"
    accounting.epsilon(mechanism, noise_scale=noise_scale, delta=delta, accountant=accountant)
    return checks.per_step("noise_scale", noise_scale, mechanism.steps)


def _keys(key: jax.Array | None, resume: UnlearningState | None) -> tuple[keys_lib.Keys, str]:
    if resume is not None:
        data, finetune = map(keys_lib.as_key, (resume.data_key, resume.finetune_key))
        # The noise key comes back with the optimizer state; the one here is overwritten.
        return keys_lib.Keys(keys_lib.system_keys().noise, data, finetune), resume.key_source
    if key is None:
        return keys_lib.system_keys(), keys_lib.FROM_SYSTEM
    return keys_lib.split_key(key), keys_lib.FROM_CALLER
