"""The loop: project the trained model, run the noisy steps compiled, fine-tune, certify."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from certunlearn import (
    accounting,
    batches,
    certificates,
    checks,
    files,
    interrupts,
    leaves,
    mechanisms,
    model_state,
    steps,
    systems,
    trees,
)
from certunlearn import keys as keys_lib
from certunlearn.history import PrivateHistory, UnlearningState
from certunlearn.optimizer import noisy_sgd


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearningResult:
    """What `unlearn` returns.

    Attributes:
      params: the released parameters, structured like those that were passed.
      certificate: the public record of what was done and what it guarantees.
      history: the operator's **private** record; it must not leave with the model.
      model_state: what `recompute_state` returned; None if there was none, or if it failed, which
        a warning says.
    """

    params: Any
    certificate: certificates.Certificate
    history: PrivateHistory
    model_state: Any = None


def unlearn(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    retain_data: Any,
    mechanism: Any,
    *,
    delta: float,
    batch_size: int,
    epsilon: float | None = None,
    noise_scale: Any = None,
    key: jax.Array | None = None,
    center: Any = None,
    finetune: tuple[optax.GradientTransformation, int] | None = None,
    per_example: bool = False,
    microbatch_size: int | None = None,
    before_clip: optax.GradientTransformation | None = None,
    frozen: Any = None,
    accountant: str | None = None,
    forget_size: int | None = None,
    recompute_state: Callable[[Any, Any], Any] | None = None,
    stop_after: int | None = None,
    resume: UnlearningState | None = None,
    evaluate: Callable[[Any], Any] | None = None,
    evaluate_every: int = 10,
    progress: bool = True,
) -> UnlearningResult:
    """Makes a trained model forget, with a certificate (Koloskova et al., ICML 2025).

    For `GradientClipping`: projects `params` onto the mechanism's ball, runs its noisy steps on
    retain data, then optionally fine-tunes without noise; for other mechanisms, what their
    docstrings say. Ctrl-C during the noisy steps ends them early; the result
    then certifies what was really run, and `history.state` can be resumed.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean loss of a batch, any JAX function.
      params: the trained parameters: a pytree of float32 or float64 arrays, or a Flax Linen
        variable dict, `TrainState` or NNX module (see `extract_params` for what `loss_fn` gets).
      retain_data: pytree of arrays with a common leading axis; no forget data.
      mechanism: what the noisy steps do: any of `certunlearn.mechanisms`. With `DPSGD` this is the
        training itself, on all the data.
      delta: the certificate's delta.
      batch_size: examples in a batch; for `DPSGD` that of the mechanism, for `RewindToDelete` all.
      epsilon: the certificate's epsilon; the noise is calibrated to it. Or give
      noise_scale: standard deviation of the noise in parameter units, a number, `[steps]` numbers
        or a schedule; epsilon then follows from it.
      key: None draws keys from the operating system. A given key makes the run reproducible, for
        experiments; the certificate records which.
      center: the public centre of the ball, structured like `params`; zero if None. It must not
        depend on the forget set.
      finetune: (Optax optimizer, steps): noiseless steps on retain data after the noisy ones.
      per_example: clip each example's gradient and average, instead of the batch gradient.
      microbatch_size: with `per_example`, examples handled at a time; must divide `batch_size`.
      before_clip: Optax transform ahead of the clip, such as `optax.scale_by_adam()`; needs a
        mechanism with `memoryless=False`. Its state starts fresh and is discarded.
      frozen: pytree of bools structured like `params`, True where a leaf stays as it is. Frozen
        leaves are outside the guarantee and must not depend on the forget set.
      accountant: see `certunlearn.epsilon`; None for the one that asks for the least noise.
      forget_size: number of forget examples, for the record.
      recompute_state: `recompute_state(params, retain_data)` makes the model state other than
        parameters anew from the released parameters; see `recompute_statistics`.
      stop_after: run only so many of the noisy steps, certify those and return a resumable state.
        Fine-tuning is then left out. If the run is resumed, this stop's parameters must never
        leave: only one output of a run may.
      resume: `history.state` of a run of the same plan that was stopped early.
      evaluate: `evaluate(params) -> value`, called outside the compiled steps with the parameters
        at step 0, every `evaluate_every` steps and at the end of each phase. Private.
      evaluate_every: how often.
      progress: whether to show a progress bar (needs tqdm; silently none without it).

    Returns:
      An `UnlearningResult`.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if an argument is out of range, parameters are not finite or narrower than
        float32, the data is empty, or the model carries other state and `recompute_state` is None.

    Guarantee:
      `certificate` states it. It covers `params` of the result (and `model_state`), nothing else:
      see `certificate.assumptions`. Fine-tuning is post-processing and costs nothing.
    """
    mechanisms.check(mechanism)
    full = model_state.extract_params(params, recompute_state)
    split = leaves.Split.make(full, frozen)
    trees.check_wide(split.by_name)
    trees.check_finite("params", split.by_name)
    data = jax.tree.map(jnp.asarray, retain_data)
    size = batches.data_size(data)
    batch_size = batches.check_batch_size(batch_size, size)
    systems.check_run(
        mechanism,
        size=size,
        batch_size=batch_size,
        per_example=per_example,
        centered=center is not None,
        finetuned=finetune is not None or recompute_state is not None,
    )
    if not per_example and microbatch_size is not None:
        raise ValueError(f"microbatch_size={microbatch_size} needs per_example=True")
    optimizer, finetune_steps = _finetune(finetune)
    evaluate_every = checks.positive_int("evaluate_every", evaluate_every)
    forget_size = checks.optional_count("forget_size", forget_size)
    stop = mechanism.steps if stop_after is None else checks.positive_int("stop_after", stop_after)
    if stop > mechanism.steps:
        raise ValueError(f"stop_after must be at most steps={mechanism.steps}, got {stop}")
    mechanism.first(stop)  # not every one can stop early
    scale = _noise_scale(mechanism, epsilon, noise_scale, delta, accountant, progress)

    center_leaves = None if center is None else split.like_params("center", center)
    keys, key_source = _keys(key, resume)
    start = systems.start(mechanism, split.trainable, center_leaves, keys.noise)
    trained_digest = files.params_digest(full)
    start_digest = files.params_digest(split.merge(start))
    tx = noisy_sgd(mechanism, scale, key=keys.noise, center=center_leaves, before_clip=before_clip)
    carry: steps.Carry = (start, tx.init(start))
    plan = _plan_digest(mechanism, scale, size, batch_size, per_example, carry)
    step = 0
    if resume is not None:
        carry, step = _resumed(resume, plan, carry, stop)

    def loss_of_leaves(trainable: list[jax.Array], batch: Any) -> jax.Array:
        return loss_fn(split.merge(trainable), batch)

    evaluations: list[tuple[int, Any]] = []

    def look(step: int, trainable: list[jax.Array], last: bool) -> None:
        if evaluate is not None and (last or step % evaluate_every == 0):
            # A copy, for the next step overwrites the original in place.
            evaluations.append((step, evaluate(split.merge([jnp.copy(x) for x in trainable]))))

    if step == 0:
        look(0, carry[0], False)
    run = steps.noisy_steps(loss_of_leaves, tx, mechanism, batch_size, per_example, microbatch_size)
    pause_every = None if evaluate is None else evaluate_every
    stats: list[steps.StepStats] = []
    finetune_losses: list[jax.Array] = []
    total = stop - step + (finetune_steps if stop == mechanism.steps else 0)
    with interrupts.deferred_interrupts() as interrupted, _bar(total, progress) as advance:
        for order, position, at, count in steps.calls(
            keys.data, size, batch_size, step, stop, pause_every, systems.samples(mechanism)
        ):
            carry, numbers = run(carry, data, order, position, at, count=count)
            stats.append(numbers)
            step = at + count
            advance(count)
            look(step, carry[0], step == stop)
            if interrupted() and step < stop:
                if not systems.can_stop(mechanism, step):
                    raise KeyboardInterrupt("stopped before any noise: nothing can be released")
                warnings.warn(_interrupted(step, mechanism.steps), stacklevel=2)
                break
        trainable, opt_state = carry
        finished = step == mechanism.steps
        state = None if finished else _state(step, carry, keys, key_source, plan)
        before_noise = systems.before_noise(mechanism, scale, trainable, opt_state)
        del opt_state, carry  # what the optimizer remembers must not outlive the noisy steps
        if finished and optimizer is not None:
            tuning = steps.finetuning_steps(
                loss_of_leaves,
                trainable,
                optimizer,
                finetune_steps,
                keys.finetune,
                data,
                size,
                batch_size,
            )
            for trainable, loss in tuning:
                finetune_losses.append(loss)
                advance(1)
                done = len(finetune_losses)
                look(step + done, trainable, done == finetune_steps)
                if interrupted() and done < finetune_steps:
                    break  # fine-tuning is free, so stopping it is too

    released = split.merge(trainable)
    certificate = certificates.certify(
        mechanism,
        noise_scale=scale,
        delta=delta,
        params=released,
        epsilon=epsilon,
        accountant=accountant,
        steps_run=step,
        frozen=split.frozen_names,
        key_source=key_source,
        retain_size=size,
        forget_size=forget_size,
        finetune_steps=len(finetune_losses),
    )
    seen = jax.device_get(stats)
    history = PrivateHistory(
        losses=np.concatenate([numbers.loss for numbers in seen]),
        clip_fractions=np.concatenate([numbers.clip_fraction for numbers in seen]),
        nonfinite=int(sum(numbers.nonfinite.sum() for numbers in seen)),
        finetune_losses=np.asarray(jax.device_get(finetune_losses), np.float32),
        evaluations=evaluations,
        trained_digest=trained_digest,
        start_digest=start_digest,
        state=state,
        before_noise=None if before_noise is None else split.merge(before_noise),
    )
    remade = None if recompute_state is None else _recomputed(recompute_state, released, data)
    return UnlearningResult(
        params=released, certificate=certificate, history=history, model_state=remade
    )


def _finetune(
    finetune: tuple[optax.GradientTransformation, int] | None,
) -> tuple[optax.GradientTransformation | None, int]:
    if finetune is None:
        return None, 0
    if not (isinstance(finetune, tuple) and len(finetune) == 2 and hasattr(finetune[0], "update")):
        raise TypeError(f"finetune must be (Optax optimizer, steps), got {finetune!r}")
    return finetune[0], checks.positive_int("finetune steps", finetune[1])


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
    if accountant is None and "interpolation" in accounting.available(mechanism):
        accountant = "interpolation"
    accounting.epsilon(mechanism, noise_scale=noise_scale, delta=delta, accountant=accountant)
    return checks.per_step("noise_scale", noise_scale, mechanism.steps)


def _keys(key: jax.Array | None, resume: UnlearningState | None) -> tuple[keys_lib.Keys, str]:
    if resume is not None:
        if key is not None:
            raise ValueError("key must be None with resume: the saved state carries the keys")
        data, finetune = map(keys_lib.as_key, (resume.data_key, resume.finetune_key))
        # The noise key comes back with the optimizer state; the one here is overwritten.
        return keys_lib.Keys(keys_lib.system_keys().noise, data, finetune), resume.key_source
    if key is None:
        return keys_lib.system_keys(), keys_lib.FROM_SYSTEM
    return keys_lib.split_key(key), keys_lib.FROM_CALLER


def _plan_digest(
    mechanism: Any,
    scale: checks.PerStep,
    size: int,
    batch_size: int,
    per_example: bool,
    carry: steps.Carry,
) -> str:
    shapes = [(str(leaf.dtype), list(leaf.shape)) for leaf in jax.tree.leaves(carry)]
    plan = [mechanisms.to_record(mechanism), scale, size, batch_size, per_example, shapes]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def _state(
    step: int, carry: steps.Carry, keys: keys_lib.Keys, key_source: str, plan: str
) -> UnlearningState:
    return UnlearningState(
        step=step,
        leaves=tuple(np.array(leaf) for leaf in jax.tree.leaves(carry)),
        data_key=np.asarray(jax.random.key_data(keys.data)),
        finetune_key=np.asarray(jax.random.key_data(keys.finetune)),
        key_source=key_source,
        plan=plan,
    )


def _resumed(
    state: UnlearningState, plan: str, carry: steps.Carry, stop: int
) -> tuple[steps.Carry, int]:
    if state.plan != plan:
        raise ValueError(
            "resume is a state of another plan: mechanism, noise scale, data size, batch size and "
            "parameters must be those of the run that was stopped"
        )
    if state.step >= stop:
        raise ValueError(f"resume has run {state.step} steps already; stop_after={stop} is past")
    saved = [jnp.asarray(leaf) for leaf in state.leaves]
    return jax.tree.unflatten(jax.tree.structure(carry), saved), state.step


def _recomputed(recompute_state: Callable[[Any, Any], Any], released: Any, data: Any) -> Any:
    """What `recompute_state` returns; if it fails, a warning, for the unlearning is done."""
    try:
        return recompute_state(released, data)
    except Exception as error:
        warnings.warn(
            f"recompute_state failed ({error!r}); model_state is None. Recompute it from "
            "result.params before the model is used: the certificate stands",
            stacklevel=3,
        )
        return None


def _interrupted(step: int, planned: int) -> str:
    return (
        f"interrupted: stopped after {step} of {planned} noisy steps; the certificate is for "
        "those. That the stop did not depend on the model is for you to vouch."
    )


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar's `advance(steps)`, or a stand-in without tqdm or where none is wanted."""
    if not progress or importlib.util.find_spec("tqdm") is None:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="unlearning", unit="step") as bar:
        yield bar.update
