"""The steps without noise that follow the noisy ones."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
from chex import ArrayTree

from certunlearn.unlearning import compiled_steps, interrupts, placement, running
from certunlearn.unlearning.evaluating import Evaluations
from certunlearn.unlearning.prepared_run import Prepared, Start
from certunlearn.unlearning.running import Noisy


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Finetuned:
    """What fine-tuning came to.

    Attributes:
      trainable: what is trained of the parameters.
      losses: **private**, the batch loss before each step.
      evaluations: **private**, (step, answer) for each call of `Options.evaluate`.
      start: that of the run: who belongs to which.
    """

    trainable: ArrayTree
    losses: list[jax.Array]
    evaluations: list[tuple[int, Any]]
    start: Start

    def __repr__(self) -> str:
        """How many steps there were, and nothing that is secret."""
        return f"Finetuned(steps={len(self.losses)}, <private>)"


def run_finetuning(
    prepared: Prepared,
    noisy: Noisy,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    advance: Callable[[int], object] = lambda count: None,
) -> Finetuned:
    """The third part of `unlearn`: fine-tunes, if asked for and the noisy steps are complete.

    Args:
      prepared: what `prepare` returned.
      noisy: what `run_noisy_steps` returned for it. It stays as it is.
      interrupted: asked before every step whether to stop.
      advance: told after every step that there was one.

    Returns:
      A `Finetuned`, for `release`.

    Raises:
      ValueError: if `noisy` is of another run.
      UnlearningFailed: if anything raises, or parameters are not finite. Its `state` can be
        resumed, to fine-tune otherwise.
      UnlearningInterrupted: likewise, a KeyboardInterrupt.

    Guarantee:
      Post-processing: it sees the noisy steps' last parameters and the retain data only, if what
      the caller passed to `prepare` does; see `unlearn`.
    """
    running.check_same_run(prepared, "noisy", noisy.start)
    with interrupts.carrying(lambda: running.state_of(prepared, noisy.step, noisy.carry)):
        return _finetuned(prepared, noisy, interrupted, advance)


def _finetuned(
    prepared: Prepared,
    noisy: Noisy,
    interrupted: Callable[[], bool],
    advance: Callable[[int], object],
) -> Finetuned:
    trainable, evaluations = noisy.trainable, Evaluations(prepared)
    losses: list[jax.Array] = []
    tuning, examples = prepared.tuning, prepared.examples
    if tuning is not None and noisy.step == prepared.mechanism.steps:
        planned = examples.noiseless(prepared.keys.finetune, tuning.steps, noisy.step)
        with contextlib.closing(examples.feed.calls(planned)) as calls:
            steps = compiled_steps.finetuning_steps(
                tuning.compiled, tuning.optimizer, trainable, calls
            )
            for number in range(tuning.steps):
                if interrupted():  # fine-tuning is free, so stopping it is too
                    warnings.warn(
                        f"interrupted: {number} of {tuning.steps} fine-tuning steps", stacklevel=4
                    )
                    break
                trainable, loss = next(steps)
                losses.append(loss)
                advance(1)
                evaluations.look(noisy.step + number + 1, trainable, number + 1 == tuning.steps)
        trainable = placement.like(trainable, prepared.split.trainable)
        running.check_finite(trainable, f"{len(losses)} fine-tuning steps")
    return Finetuned(
        trainable=trainable, losses=losses, evaluations=evaluations.found, start=prepared.start
    )
