"""The phases of a run: noisy steps, then noiseless ones, each checked before anything leaves."""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certunlearn.mechanisms import rounding
from certunlearn.unlearning import compiled_steps, interrupts, preparing, resuming
from certunlearn.unlearning.history import UnlearningState


class Noisy(NamedTuple):
    """Where the noisy steps ended: how many there were, with what, and their private numbers."""

    step: int
    carry: compiled_steps.Carry
    stats: list[compiled_steps.StepStats]


def noisy_phase(
    run: preparing.Prepared,
    look: Callable[[int, Any, bool], None],
    pause_every: int | None,
    interrupted: Callable[[], bool],
    advance: Callable[[int], object],
) -> Noisy:
    """Runs the noisy steps, to their end or to an interrupt, and checks what they come to."""
    stats: list[compiled_steps.StepStats] = []
    here = (run.first, run.carry)  # together, so that an interrupt cannot part them
    peaks = [np.max(np.abs(leaf), initial=0) for leaf in jax.tree.leaves(run.carry[0])]
    broken: Exception | None = None
    with interrupts.carrying(lambda: state_of(run, *here)):
        if run.first == run.stop:
            look(run.first, run.carry[0], True)
        sampling = run.mechanism.poisson_sampling() is not None
        for order, position, at, count in compiled_steps.calls(
            run.keys.data, run.size, run.batch_size, run.first, run.stop, pause_every, sampling
        ):
            carry, numbers = run.noisy(here[1], run.data, order, position, at, count=count)
            here = (at + count, carry)
            stats.append(numbers)
            now = map(np.max, numbers.largest or peaks)
            grown = list(map(np.maximum, peaks, now))
            broken = _broken(run, numbers, at, position) or _rounded_away(run, peaks, grown)
            if broken is not None:
                break
            peaks = grown
            advance(count)
            look(here[0], carry[0], here[0] == run.stop)
            if interrupted() and here[0] < run.stop:
                if not run.mechanism.can_stop(here[0]):
                    raise KeyboardInterrupt("before any noise: nothing can be released")
                warnings.warn(_interrupted(here[0], run.mechanism.steps), stacklevel=3)
                break
    if broken is not None:
        raise broken  # out here, for no state is worth keeping
    step, (trainable, _) = here
    _check_finite(trainable, f"noisy step {step}")
    rounding.check(run.mechanism, run.scale, jax.tree.leaves(trainable))
    return Noisy(*here, stats)


def _broken(
    run: preparing.Prepared, numbers: compiled_steps.StepStats, step: int, position: int
) -> Exception | None:
    """Why the steps of a call are not what the mechanism certifies, or None.

    Asking waits for the device, so only those mechanisms are asked about whose separations do not
    hold whatever an update is.
    """
    if run.mechanism.tolerates_nonfinite:
        return None
    if np.any(numbers.nonfinite):
        index = int(np.argmax(numbers.nonfinite))
        epoch = (step + index) // (run.size // run.batch_size)
        return FloatingPointError(
            f"loss_fn has a gradient that is not finite at step {step + index}, batch "
            f"{position + index} of epoch {epoch}: without that step "
            f"{type(run.mechanism).__name__} does not bring models as close as it certifies. "
            "Nothing is released. Look for a NaN in retain_data, and for a loss that overflows"
        )
    return None


def _rounded_away(run: preparing.Prepared, peaks: list[Any], grown: list[Any]) -> ValueError | None:
    """What rounding says to parameters of these largest magnitudes, a number for each leaf.

    None if the spacing of floating-point numbers there is what it was at the earlier `peaks`.
    """
    if not np.all(np.isfinite(grown)) or list(map(np.spacing, peaks)) == list(
        map(np.spacing, grown)
    ):
        return None
    like = jax.tree.leaves(run.split.trainable)
    leaves = [np.broadcast_to(peak, leaf.shape) for peak, leaf in zip(grown, like, strict=True)]
    try:
        rounding.check(run.mechanism, run.scale, leaves)
    except ValueError as error:
        return error
    return None


def noiseless_phase(
    run: preparing.Prepared,
    noisy: Noisy,
    look: Callable[[int, Any, bool], None],
    interrupted: Callable[[], bool],
    advance: Callable[[int], object],
) -> tuple[Any, list[jax.Array]]:
    """Fine-tunes, if that is asked for and the noisy steps are complete."""
    trainable = noisy.carry[0]
    losses: list[jax.Array] = []
    if run.optimizer is None or run.noiseless is None or noisy.step < run.mechanism.steps:
        return trainable, losses
    tuning = compiled_steps.finetuning_steps(
        run.noiseless,
        run.optimizer,
        trainable,
        run.finetune_steps,
        run.keys.finetune,
        run.data,
        run.size,
        run.batch_size,
    )
    for number in range(run.finetune_steps):
        if interrupted():  # fine-tuning is free, so stopping it is too
            planned = run.finetune_steps
            warnings.warn(f"interrupted: {number} of {planned} fine-tuning steps", stacklevel=3)
            break
        trainable, loss = next(tuning)
        losses.append(loss)
        advance(1)
        look(noisy.step + number + 1, trainable, number + 1 == run.finetune_steps)
    _check_finite(trainable, f"{len(losses)} fine-tuning steps")
    return trainable, losses


def _check_finite(trainable: Any, after: str) -> None:
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(trainable)):
        raise FloatingPointError(
            f"the parameters are not finite after {after}, and nothing is released: lower the "
            "learning rate, or look for a loss that overflows; where parameters or updates are "
            "so large that rounding would swallow the noise, updates are NaN, too"
        )


def state_of(
    run: preparing.Prepared, step: int, carry: compiled_steps.Carry
) -> UnlearningState | None:
    """What it takes to go on; None before the first step, when there is nothing to lose yet."""
    saved = resuming.snapshot(carry) if step > 0 else None
    if saved is None:
        return None
    return resuming.state(step, saved, run.keys, run.key_source, run.plan())


def _interrupted(step: int, planned: int) -> str:
    return (
        f"interrupted: stopped after {step} of {planned} noisy steps; the certificate is for "
        "those. That the stop did not depend on the model is for you to vouch."
    )


@contextlib.contextmanager
def bar(total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar's `advance(steps)`, or a stand-in without tqdm or where none is wanted."""
    if not progress or importlib.util.find_spec("tqdm") is None:
        yield lambda count: None
        return
    from tqdm import tqdm

    bar = tqdm(total=total, desc="unlearning", unit="step")

    def advance(count: int) -> None:
        with contextlib.suppress(Exception):  # a closed terminal must not cost the run
            bar.update(count)

    try:
        yield advance
    finally:
        with contextlib.suppress(Exception):
            bar.close()
