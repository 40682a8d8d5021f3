"""The noisy steps of a run, each checked before anything can leave."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import processes
from certunlearn.mechanisms import rounding
from certunlearn.unlearning import interrupts, periodic_saves, placement, resuming, solving
from certunlearn.unlearning.compiled_steps import Carry, StepStats
from certunlearn.unlearning.data_feeds import Call
from certunlearn.unlearning.evaluating import Evaluations
from certunlearn.unlearning.prepared_run import Prepared, Start
from certunlearn.unlearning.private_history import UnlearningState
from certunlearn.unlearning.solving import Solved


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Noisy:
    """Where the noisy steps ended. Private: it holds the keys, and a hidden iterate if resumed.

    Attributes:
      step: noisy steps taken, those before a resumption among them.
      carry: what is trained of the parameters, in the precision of the steps, and the optimizer's
        state.
      trainable: what is trained of the parameters, in that of the release.
      solved: where the solver stopped before the noise; None if nothing was solved in this run.
      stats: numbers of the steps that were taken now, one for each compiled call.
      evaluations: (step, answer) for each call of `Options.evaluate`.
      start: that of the run: who belongs to which.
    """

    step: int
    carry: Carry
    trainable: ArrayTree
    solved: Solved | None
    stats: list[StepStats]
    evaluations: list[tuple[int, Any]]
    start: Start

    def __repr__(self) -> str:
        """How many steps there were, and nothing that is secret."""
        return f"Noisy(step={self.step}, <private>)"


def run_noisy_steps(
    prepared: Prepared,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    advance: Callable[[int], object] = lambda count: None,
) -> Noisy:
    """The second part of `unlearn`: runs the noisy steps, to their end or to an interrupt.

    With a mechanism that solves, it minimises the objective first, and adds noise only if it has
    verified that the tolerance is reached.

    Args:
      prepared: what `prepare` returned; it can be run once.
      interrupted: asked after every compiled call whether to stop. Its answer must not depend on
        the model.
      advance: told after every compiled call how many steps it took.

    Returns:
      A `Noisy`, for `run_finetuning` and `release`.

    Raises:
      RuntimeError: if `prepared` was run before.
      ValueError: if parameters grew so large that rounding would swallow the noise, or the solver
        did not reach the tolerance. Nothing is released.
      FloatingPointError: if a gradient is not finite and the mechanism cannot do without that
        step, or the parameters are not finite at the end.
      UnlearningFailed: if anything else raises after the first step. Its `state` can be resumed.
      UnlearningInterrupted: likewise, a KeyboardInterrupt, or `interrupted` where there is no noise
        yet.

    Guarantee:
      None before `release` has certified it: nothing of what is returned may leave.
    """
    here = (prepared.first, prepared.start.take())  # together, so that no interrupt can part them
    evaluations = Evaluations(prepared)
    watch = Watch(prepared, here[1][0])
    broken: Exception | None = None
    solved = None
    precision = solving.precision(prepared.mechanism)
    with interrupts.carrying(lambda: state_of(prepared, *here)), precision:
        at_once = prepared.first == prepared.stop
        looked = (prepared.first == 0 or at_once) and evaluations.look(
            prepared.first, here[1][0], at_once
        )
        if looked and not at_once and interrupted():
            raise KeyboardInterrupt("before the first step")
        if prepared.solve is not None and not at_once:
            solved = prepared.solve(here[1][0])
            if interrupted():
                raise KeyboardInterrupt(_UNNOISED)
            here = (0, (solving.as_wide(solved.params), here[1][1]))
        layout = placement.automatic(here[1])
        with contextlib.closing(_calls(prepared)) as calls:
            for data, sampling_key, step, count, most in calls:
                assert prepared.noisy is not None
                carry, stats = prepared.noisy(
                    here[1], data, sampling_key, step, count=count, most=most, layout=layout
                )
                here = (step + count, carry)
                broken = watch.problem(stats, step)
                if broken is not None:
                    break
                advance(count)
                if periodic_saves.due(prepared, here[0]):
                    saved = state_of(prepared, *here, on_host=prepared.options.saves_to_file)
                    periodic_saves.save(prepared.options, saved)
                evaluations.look(here[0], carry[0], here[0] == prepared.stop)
                if here[0] < prepared.stop and interrupted():
                    stop_early(prepared, here[0])
                    break
    if broken is not None:
        raise broken  # out here, for no state is worth keeping
    return ended(prepared, *here, watch.stats, evaluations.found, solved)


def ended(
    prepared: Prepared,
    step: int,
    carry: Carry,
    stats: list[StepStats],
    evaluations: list[tuple[int, Any]],
    solved: Solved | None,
) -> Noisy:
    """The noisy steps of a run, checked as a whole; see `Noisy` for the arguments.

    Raises:
      FloatingPointError: if parameters are not finite.
      ValueError: if rounding would swallow the noise.
    """
    trainable = carry[0]
    if prepared.mechanism.solve_to is not None:
        trainable = solving.as_released(trainable, prepared.split.trainable)
    trainable = placement.like(trainable, prepared.split.trainable)
    check_finite(trainable, f"noisy step {step}")
    rounding.check(prepared.mechanism, prepared.noise_scale, jax.tree.leaves(carry[0]))
    return Noisy(
        step=step,
        carry=carry,
        trainable=trainable,
        solved=solved,
        stats=stats,
        evaluations=evaluations,
        start=prepared.start,
    )


_UNNOISED = (
    "after the objective was minimised, before its noise: nothing is released, and there is no "
    "state to resume, as no noise was added. Call it again: from a start near the minimiser it "
    "takes few passes"
)


def _calls(prepared: Prepared) -> Generator[Call, None, None]:
    """The compiled calls that take the noisy steps."""
    examples = prepared.examples
    if prepared.solve is not None:  # its steps are noise alone, and look at no data
        return (Call((), None, step, 1) for step in range(prepared.first, prepared.stop))
    steps = examples.noisy(
        prepared.keys.data,
        prepared.first,
        prepared.stop,
        prepared.longest,
        prepared.options.pauses,
    )
    return examples.feed.calls(steps)


class Watch:
    """Holds every call's numbers against what the mechanism certifies."""

    def __init__(self, prepared: Prepared, trainable: ArrayTree) -> None:
        """`trainable`: what the run starts from."""
        self.stats: list[StepStats] = []
        self._prepared = prepared
        # The largest magnitude of each leaf so far.
        self._peaks = list(map(processes.largest, jax.tree.leaves(trainable)))

    def problem(self, stats: StepStats, step: int) -> Exception | None:
        """Why the steps of a call are not what the mechanism certifies, or None.

        Args:
          stats: the call's numbers.
          step: the first of its steps.
        """
        self.stats.append(stats)
        # Where noise was swallowed there is a NaN: what swallowed it came before.
        finite = [np.where(np.isfinite(each), each, 0) for each in stats.largest]
        peaks = [np.max(each) for each in finite] or self._peaks
        grown = list(map(np.maximum, self._peaks, peaks))
        problem = self._nonfinite(stats, step) or self._rounded_away(grown)
        self._peaks = grown
        return problem

    def _nonfinite(self, stats: StepStats, step: int) -> FloatingPointError | None:
        """Asking waits for the device: only where separations do not hold whatever an update is."""
        mechanism, examples = self._prepared.mechanism, self._prepared.examples
        if mechanism.tolerates_nonfinite or not np.any(stats.nonfinite):
            return None
        step += int(np.argmax(stats.nonfinite))
        epoch, position = divmod(step, examples.size // examples.batch_size)
        return FloatingPointError(
            f"loss_fn has a gradient that is not finite at step {step}, batch "
            f"{position} of epoch {epoch}: without that step "
            f"{type(mechanism).__name__} does not bring models as close as it certifies. "
            "Nothing is released. Look for a NaN in retain_data, and for a loss that overflows"
        )

    def _rounded_away(self, grown: list[Any]) -> ValueError | None:
        """What rounding says to parameters of these largest magnitudes, a number for each leaf.

        None if the spacing of floating-point numbers there is what it was before.
        """
        run = self._prepared
        if list(map(np.spacing, self._peaks)) == list(map(np.spacing, grown)):
            return None
        like = jax.tree.leaves(run.split.trainable)
        leaves = [np.broadcast_to(peak, leaf.shape) for peak, leaf in zip(grown, like, strict=True)]
        try:
            rounding.check(run.mechanism, run.noise_scale, leaves)
        except ValueError as error:
            return error
        return None


def stop_early(prepared: Prepared, step: int) -> None:
    """Warns that the run ends early, or raises where nothing could be certified."""
    planned = prepared.mechanism.steps
    if not prepared.mechanism.can_stop(step):
        raise KeyboardInterrupt("before any noise: nothing can be released")
    warnings.warn(
        f"interrupted: stopped after {step} of {planned} noisy steps; the certificate is for "
        "those. It holds only if the stop did not depend on the model, which nobody can check.",
        stacklevel=4,
    )


def check_finite(trainable: ArrayTree, after: str) -> None:
    """Raises FloatingPointError if parameters are not finite."""
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(trainable)):
        raise FloatingPointError(
            f"the parameters are not finite after {after}, and nothing is released: lower the "
            "learning rate, or look for a loss that overflows; where parameters or updates are "
            "so large that rounding would swallow the noise, updates are NaN, too"
        )


def check_same_run(prepared: Prepared, name: str, start: Start) -> None:
    """Raises ValueError if what a part of a run returned is not of this run."""
    if start is not prepared.start:
        raise ValueError(f"{name} must come from the run of this prepared, got another run's")


def state_of(
    prepared: Prepared, step: int, carry: Carry, *, on_host: bool = True
) -> UnlearningState | None:
    """What it takes to go on; None before the first step, when there is nothing to lose yet.

    Args:
      prepared: the run.
      step: noisy steps taken.
      carry: parameters and optimizer state after them.
      on_host: whether arrays are to be NumPy's; else they are copies where the originals are.
    """
    saved = resuming.snapshot(carry, on_host) if step > 0 else None
    if saved is None:
        return None
    return resuming.state(step, saved, prepared.keys, prepared.key_source, prepared.plan())
