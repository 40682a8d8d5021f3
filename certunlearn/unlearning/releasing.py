"""The end of a run: its parameters leave, with a certificate of what was run."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import random_keys as keys_lib
from certunlearn.certificates import Certificate, issuing
from certunlearn.unlearning import interrupts, running, solving
from certunlearn.unlearning.finetuning import Finetuned
from certunlearn.unlearning.prepared_run import Prepared
from certunlearn.unlearning.private_history import PrivateHistory
from certunlearn.unlearning.running import Noisy

# What `recompute_state` returned if it raised.
_FAILED = object()
# Epochs are folded into the same key, and never reach this number.
_FOR_MODELS = np.uint32(2**32 - 2)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class UnlearningResult:
    """What `unlearn` returns.

    Attributes:
      params: the released parameters, in what was passed: a pytree, a module, or a `TrainState` at
        step 0 with a fresh optimizer state. Of a variable dict with other collections the
        parameters alone.
      certificate: the public record of what was done and what it guarantees.
      history: the operator's **private** record; it must not leave with the model.
      model_state: what `recompute_state` returned; None if there was none, or if it failed, which
        a warning says.
    """

    params: ArrayTree
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


def release(
    prepared: Prepared, noisy: Noisy, finetuned: Finetuned | None = None
) -> UnlearningResult:
    """The last part of `unlearn`: checks and certifies what was run.

    Args:
      prepared: what `prepare` returned.
      noisy: what `run_noisy_steps` returned for it.
      finetuned: what `run_finetuning` returned for it; None releases the parameters after the noisy
        steps.

    Returns:
      An `UnlearningResult`. If the noisy steps or the fine-tuning are not complete, its
      `history.state` can be resumed.

    Raises:
      ValueError: if the parts are not of one run.
      UnlearningFailed: if no certificate can be issued. Its `state` can be resumed.
      UnlearningInterrupted: at a KeyboardInterrupt, likewise.

    Guarantee:
      `certificate` states it, for `params` and `model_state` of the result and nothing else. The
      number of steps that it certifies is what the optimizer's state has counted. One run, one
      output: of a run that is resumed afterwards, this output must not leave.
    """
    running.check_same_run(prepared, "noisy", noisy.start)
    if finetuned is not None:
        running.check_same_run(prepared, "finetuned", finetuned.start)
    with interrupts.carrying(lambda: running.state_of(prepared, noisy.step, noisy.carry)):
        return _released(prepared, noisy, finetuned)


def is_complete(prepared: Prepared, noisy: Noisy, finetuned: Finetuned | None) -> bool:
    """Whether all planned steps were taken, with noise and without."""
    planned = 0 if prepared.tuning is None else prepared.tuning.steps
    taken = 0 if finetuned is None else len(finetuned.losses)
    return noisy.step == prepared.mechanism.steps and taken == planned


def _released(prepared: Prepared, noisy: Noisy, finetuned: Finetuned | None) -> UnlearningResult:
    trainable = noisy.trainable if finetuned is None else finetuned.trainable
    released = prepared.split.merge(trainable)
    # What has no noisy step has no evidence of any.
    exact = prepared.mechanism.exact
    certificate = issuing.certify(
        prepared.mechanism,
        noise_scale=prepared.noise_scale,
        delta=prepared.delta,
        params=released,
        state=None if exact else noisy.carry[1],
        epsilon=prepared.epsilon,
        accountant=prepared.accountant,
        steps_run=None if exact else noisy.step,
        frozen=prepared.split.frozen_names,
        key_source=prepared.key_source,
        retain_size=prepared.examples.retain_size,
        forget_size=prepared.options.forget_size,
        finetune_steps=0 if finetuned is None else len(finetuned.losses),
        streamed=prepared.examples.feed.streamed,
    )
    form, remade = prepared.form, None
    if prepared.options.recompute_state is not None:
        view = form.view(released)
        remade = _recomputed(prepared.options.recompute_state, view, prepared.examples.feed.given)
        remade = None if remade is _FAILED else form.state_of(remade, view)
    return UnlearningResult(
        params=form.rebuilt(released, remade, _model_key(prepared)),
        certificate=certificate,
        history=_history(prepared, noisy, finetuned),
        model_state=remade,
    )


def _model_key(prepared: Prepared) -> jax.Array:
    """Where random keys of the released model come from: of no secret, if there is one."""
    if prepared.key_source == keys_lib.FROM_CALLER:
        return jax.random.fold_in(prepared.keys.finetune, _FOR_MODELS)
    return keys_lib.system_keys().data


def _history(prepared: Prepared, noisy: Noisy, finetuned: Finetuned | None) -> PrivateHistory:
    seen = jax.device_get(noisy.stats)
    none = [np.zeros(0, np.float32)]
    solved = noisy.solved
    complete = is_complete(prepared, noisy, finetuned)
    later, losses = ([], []) if finetuned is None else (finetuned.evaluations, finetuned.losses)
    return PrivateHistory(
        losses=np.concatenate(none + [numbers.loss for numbers in seen]),
        clip_fractions=np.concatenate(none + [numbers.clip_fraction for numbers in seen]),
        nonfinite=int(sum(numbers.nonfinite.sum() for numbers in seen)),
        finetune_losses=np.asarray(jax.device_get(losses), np.float32),
        evaluations=noisy.evaluations + later,
        trained_digest=prepared.trained_digest,
        start_digest=prepared.start_digest,
        state=None if complete else running.state_of(prepared, noisy.step, noisy.carry),
        before_noise=_before_noise(prepared, noisy),
        gradient_norm=None if solved is None else solved.gradient_norm,
        passes=None if solved is None else solved.passes,
    )


def _before_noise(prepared: Prepared, noisy: Noisy) -> ArrayTree | None:
    """The last parameters without their noise, if there is but one."""
    key = _model_key(prepared)
    if noisy.solved is not None:
        return prepared.form.rebuilt(noisy.solved.params, None, key)
    with solving.precision(prepared.mechanism):
        found = prepared.mechanism.before_noise(prepared.noise_scale, *noisy.carry)
    if found is None:
        return None
    return prepared.form.rebuilt(prepared.split.merge(found), None, key)


def _recomputed(recompute_state: Callable[[Any, Any], Any], released: Any, data: Any) -> Any:
    """What `recompute_state` returns, or `_FAILED` and a warning, for the unlearning is done."""
    try:
        return recompute_state(released, data)
    except Exception as error:
        warnings.warn(
            f"recompute_state failed ({error!r}); model_state is None. Recompute it from "
            "result.params before the model is used: the certificate stands",
            stacklevel=5,
        )
        return _FAILED
