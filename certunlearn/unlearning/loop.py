"""The loop: project the trained model, run the noisy steps compiled, fine-tune, certify."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from certunlearn._numerics import checks
from certunlearn.certificates import Certificate, issuing
from certunlearn.unlearning import compiled_steps, inputs, interrupts, preparing, running
from certunlearn.unlearning.history import PrivateHistory, UnlearningState


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
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
    certificate: Certificate
    history: PrivateHistory
    model_state: Any = None

    def __repr__(self) -> str:
        """The claim. Of a run that was stopped, the parameters may be a hidden iterate."""
        c = self.certificate
        return (
            f"UnlearningResult(epsilon={c.epsilon:g}, delta={c.delta:g}, steps_run={c.steps_run}, "
            f"params=<{c.coverage['parameters']} numbers>, history=<private>)"
        )


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
    finetune_loss_fn: Callable[[Any, Any], jax.Array] | None = None,
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
    docstrings say. Every step is tried by its shapes first, so that what cannot work is refused
    before any noise. Ctrl-C or SIGTERM ends the run early between two steps; the result then
    certifies what was really run, and `history.state` can be resumed.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean loss of a batch, any JAX function.
      params: the trained parameters: a pytree of float32 or float64 arrays, or a Flax Linen
        variable dict, `TrainState` or NNX module (see `extract_params` for what `loss_fn` gets).
      retain_data: pytree of arrays with a common leading axis, all in memory; no forget data.
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
      finetune: (Optax optimizer, steps): noiseless steps on retain data after the noisy ones. The
        optimizer gets `params`' own tree, `optax.MaskedNode()` where a leaf is frozen, and
        `value`, `grad` and `value_fn` if it asks for them.
      finetune_loss_fn: the loss of those steps; None takes `loss_fn`, which a mechanism with
        `memoryless=False` forbids, for its loss may depend on the trained model. This one must not
        hold anything made from the trained model: see Guarantee.
      per_example: clip each example's gradient and average, instead of the batch gradient.
      microbatch_size: with `per_example`, examples handled at a time; must divide `batch_size`.
        With `DPSGD` any number: the room for a step's sample is rounded up to it.
      before_clip: Optax transform ahead of the clip, such as `optax.scale_by_adam()`; needs a
        mechanism with `memoryless=False`. Its state starts fresh and is discarded. It gets what
        fine-tuning optimizers get.
      frozen: pytree of bools structured like `params`, True where a leaf stays as it is. Frozen
        leaves are outside the guarantee and must not depend on the forget set.
      accountant: see `certunlearn.epsilon`; None for the one that asks for the least noise.
      forget_size: number of forget examples, for the record.
      recompute_state: `recompute_state(params, retain_data)` makes the model state other than
        parameters anew from the released parameters; see `recompute_statistics`.
      stop_after: run only so many of the noisy steps, certify those and return a resumable state.
        Fine-tuning is then left out. If the run is resumed, this stop's parameters must never
        leave: only one output of a run may.
      resume: `history.state` of a run of the same plan that was stopped early, or `state` of the
        exception that ended it. Data, centre and trained parameters must be the same, and are
        compared; losses and `before_clip` must be too, and cannot be.
      evaluate: `evaluate(params) -> value`, called outside the compiled steps with the parameters
        at step 0, every `evaluate_every` steps and at the end of each phase. Private.
      evaluate_every: how often.
      progress: whether to show a progress bar (needs tqdm; silently none without it).

    Returns:
      An `UnlearningResult`.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if an argument is out of range, parameters are not finite or narrower than
        float32, the data is empty, the model carries other state and `recompute_state` is None, an
        optimizer cannot take the parameters, or rounding would swallow the noise.
      FloatingPointError: if a gradient is not finite and the mechanism cannot do without that step
        (naming step and batch), or the parameters are not finite after the noisy steps. Nothing
        is released.
      UnlearningFailed: if anything raises after the first noisy step: `evaluate`, fine-tuning,
        memory running out. Its `state` can be resumed.
      UnlearningInterrupted: likewise, a KeyboardInterrupt, at a second Ctrl-C, or at the first one
        where nothing can be released yet.

    Guarantee:
      `certificate` states it. It covers `params` of the result (and `model_state`), nothing else:
      see `certificate.assumptions`. Fine-tuning is post-processing and costs nothing, if all that
      follows the last noisy step sees the released parameters and the retain data only. What is
      made from the trained model voids it, if `finetune_loss_fn` (or `loss_fn` in its place), the
      optimizer of `finetune` or `recompute_state` holds it, as functions hold all that they close
      over: a teacher, a penalty or mask computed from the trained model, and the running statistics
      of a BatchNorm that was split off functionally (`nnx.split`, `variables["batch_stats"]`). With
      a mechanism that is memoryless the same holds for `loss_fn` in the noisy steps.
    """
    inputs.function("evaluate", evaluate, "f(params) -> value", True)
    evaluate_every = checks.positive_int("evaluate_every", evaluate_every)
    progress = inputs.flag("progress", progress)
    run = preparing.prepare(
        loss_fn,
        params,
        retain_data,
        mechanism,
        delta=delta,
        batch_size=batch_size,
        epsilon=epsilon,
        noise_scale=noise_scale,
        key=key,
        center=center,
        finetune=finetune,
        finetune_loss_fn=finetune_loss_fn,
        per_example=per_example,
        microbatch_size=microbatch_size,
        before_clip=before_clip,
        frozen=frozen,
        accountant=accountant,
        forget_size=forget_size,
        recompute_state=recompute_state,
        stop_after=stop_after,
        resume=resume,
        progress=progress,
    )
    evaluations: list[tuple[int, Any]] = []

    def look(step: int, trainable: Any, last: bool) -> None:
        if evaluate is not None and (last or step % evaluate_every == 0):
            # A copy, for the next step overwrites the original in place.
            evaluations.append((step, evaluate(run.split.merge(compiled_steps.owned(trainable)))))

    if run.first == 0:
        look(0, run.carry[0], False)
    total = run.stop - run.first + (run.finetune_steps if run.stop == mechanism.steps else 0)
    with interrupts.deferred_interrupts() as interrupted, running.bar(total, progress) as advance:
        pause_every = None if evaluate is None else evaluate_every
        noisy = running.noisy_phase(run, look, pause_every, interrupted, advance)
        trainable, opt_state = noisy.carry
        with interrupts.carrying(lambda: running.state_of(run, noisy.step, noisy.carry)):
            before_noise = mechanism.before_noise(run.scale, trainable, opt_state)
            trainable, tuning_losses = running.noiseless_phase(
                run, noisy, look, interrupted, advance
            )
            released = run.split.merge(trainable)
            certificate = issuing.certify(
                mechanism,
                noise_scale=run.scale,
                delta=delta,
                params=released,
                state=opt_state,
                epsilon=epsilon,
                accountant=accountant,
                steps_run=noisy.step,
                frozen=run.split.frozen_names,
                key_source=run.key_source,
                retain_size=run.retain_size,
                forget_size=run.forget_size,
                finetune_steps=len(tuning_losses),
            )
            remade = None
            if recompute_state is not None:
                remade = _recomputed(recompute_state, released, run.data)
            seen = jax.device_get(noisy.stats)
            none = [np.zeros(0, np.float32)]
            done = noisy.step == mechanism.steps and len(tuning_losses) == run.finetune_steps
            if done and interrupted():
                warnings.warn("interrupted: the run was complete by then", stacklevel=2)
            history = PrivateHistory(
                losses=np.concatenate(none + [numbers.loss for numbers in seen]),
                clip_fractions=np.concatenate(none + [numbers.clip_fraction for numbers in seen]),
                nonfinite=int(sum(numbers.nonfinite.sum() for numbers in seen)),
                finetune_losses=np.asarray(jax.device_get(tuning_losses), np.float32),
                evaluations=evaluations,
                trained_digest=run.trained_digest,
                start_digest=run.start_digest,
                state=None if done else running.state_of(run, noisy.step, noisy.carry),
                before_noise=None if before_noise is None else run.split.merge(before_noise),
            )
    return UnlearningResult(
        params=released, certificate=certificate, history=history, model_state=remade
    )


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
