"""Rewind-to-delete: training again from an old checkpoint, without the forget set."""

import dataclasses
import math
from typing import Self

import numpy as np

from certunlearn._numerics import checks
from certunlearn._numerics.checks import ScalarOrSchedule
from certunlearn.mechanisms import base, pairs, sentences
from certunlearn.mechanisms.step_rules import StepRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewindToDelete(pairs.StepsThenNoise):
    """Steps on retain data from an old checkpoint, then one Gaussian (Mu & Klabjan 2024).

    Training was full-batch gradient descent on all n examples from a public start. Its checkpoint
    after `trained_steps` steps is rewound to, `steps` full-batch steps on the n - k retained
    examples follow, and noise after the last. The loss need not be convex.

    Derivation. The reference trains on the retained examples from the same start, for as many steps
    in all. Let D_t be the distance of the two after t steps of training. With gradients L-Lipschitz
    a step maps points at distance r to points at distance at most (1 + gamma L) r, and at the same
    point the gradients of the means over n and over n - k examples are at most 2 k G / n apart: the
    first is (n - k)/n of the second plus k/n of the mean over the k, both of norm at most G. So

        D_0 = 0,    D_{t+1} <= (1 + gamma L) D_t + 2 gamma k G / n,

    up to the checkpoint. From there on both take the same steps, which is (1 + gamma L)^K. Note
    that D is grown *up to the checkpoint*: the later it is, the larger, and so the fewer steps to
    rewind, the more noise; this is the price of saving steps.

    Args:
      learning_rate: gamma of the steps from the checkpoint: a number, `[steps]` numbers or a
        schedule, maybe 0 at some steps.
      smoothness: L: gradients of the mean loss are L-Lipschitz, for all data.
      gradient_bound: G: every example's gradient has at most this norm, wherever training goes
        (a bound within a ball, as of `convex.ridge_regression`, must hold on all the way); without
        terms that all examples share, such as an L2 penalty.
      training_learning_rate: gamma of the steps up to the checkpoint; one number.
      trained_steps: number of those.
      steps: K, number of steps from the checkpoint on.
      size: n, examples in training, the forget set included.
      deletions: k, examples in the forget set.
      rounding_share: how much more distance the noise covers, as a share of what is left, for the
        rounding of the steps without noise; `mechanisms.rounding` says when more is needed.

    Raises:
      TypeError: if an argument is not a number (or numbers).
      ValueError: if an argument is out of range, or the distance that follows is not finite.

    Guarantee:
      None by itself. The noise covers the final distance, and a share more for rounding
      (`mechanisms.rounding`), by the exact Gaussian mechanism.

    >>> m = RewindToDelete(
    ...     learning_rate=0.1, smoothness=1.0, gradient_bound=1.0, training_learning_rate=0.1,
    ...     trained_steps=2, steps=2, size=100, deletions=1,
    ... )
    >>> round(m.initial_distance, 6), round(m.final_distance, 6)  # 0.002 * 2.1, and that * 1.21
    (0.0042, 0.005082)
    """

    learning_rate: ScalarOrSchedule
    smoothness: float
    gradient_bound: float
    training_learning_rate: float
    trained_steps: int
    steps: int
    size: int
    deletions: int
    rounding_share: float = pairs.ROUNDING_SHARE

    def __post_init__(self) -> None:
        """Checks every argument and evaluates schedules."""
        for name in ("trained_steps", "steps"):
            base.set_fields(self, **{name: checks.steps(name, getattr(self, name))})
        for name in ("size", "deletions"):
            base.set_fields(self, **{name: checks.positive_int(name, getattr(self, name))})
        for name in ("smoothness", "gradient_bound", "training_learning_rate"):
            base.set_fields(self, **{name: checks.positive(name, getattr(self, name))})
        base.check_learning_rate(self)
        pairs.check_rounding_share(self)
        if self.deletions >= self.size:
            raise ValueError(f"deletions must be fewer than size={self.size}, got {self.deletions}")
        if not math.isfinite(self.final_distance):
            raise ValueError(
                f"{self.trained_steps} and {self.steps} steps with learning rate times smoothness "
                f"{self.training_learning_rate * self.smoothness:g} let the two drift apart "
                "without bound; lower the learning rate or the number of steps"
            )

    def size_problems(self, retain_size: int | None, forget_size: int | None) -> list[str]:
        """How recorded numbers of examples contradict the mechanism, a sentence each."""
        problems, least = [], self.size - self.deletions
        if retain_size is not None and not least <= retain_size < self.size:
            problems.append(
                f"retain_size must be from {least} to {self.size - 1}, what at most "
                f"{self.deletions} deletions leave of {self.size}, got {retain_size}"
            )
        if forget_size is not None and forget_size > self.deletions:
            problems.append(
                f"forget_size must be at most deletions={self.deletions}, got {forget_size}"
            )
        if (retain_size or 0) + (forget_size or 0) > self.size:
            problems.append(
                f"retain_size and forget_size must be at most size={self.size} together, got "
                f"{retain_size} + {forget_size}"
            )
        return problems

    @property
    def initial_distance(self) -> float:  # type: ignore[override]
        """Largest distance of the two at the checkpoint, in parameter units."""
        # The recursion's sum, gamma * ((1 + gamma L)^t - 1) / (gamma L).
        return (
            self._growth() / self.smoothness * 2 * self.deletions * self.gradient_bound / self.size
        )

    @property
    def past_steps(self) -> int:  # type: ignore[override]
        """Steps without noise before the checkpoint."""
        return self.trained_steps

    @property
    def past_error(self) -> float:  # type: ignore[override]
        """How far training leads two runs apart that differ by 1 more after each step."""
        return self._growth() / (self.training_learning_rate * self.smoothness)

    def _growth(self) -> float:
        """(1 + gamma L)^t - 1, of the training up to the checkpoint."""
        factor = self.training_learning_rate * self.smoothness
        log_factor = self.trained_steps * math.log1p(factor)
        return math.expm1(log_factor) if log_factor < 700 else math.inf

    @property
    def factors(self) -> np.ndarray:
        """float64 `[steps]`: 1 + learning_rate_t * smoothness, above 1."""
        rates = np.broadcast_to(checks.known(self.learning_rate), (self.steps,))
        return np.asarray(1 + rates * self.smoothness)

    @property
    def final_distance(self) -> float:
        """Largest distance of the two before the noise, in parameter units."""
        logs = float(np.sum(np.log(self.factors)))
        return math.exp(logs) * self.initial_distance if logs < 700 else math.inf

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        return (
            "The guarantee compares the released parameters with the same procedure, training "
            "included, on the data without the forget set.",
            f"Training was full-batch gradient descent on {self.size} examples from a start that "
            f"does not depend on them, with learning rate {self.training_learning_rate!r}; the "
            f"parameters rewound to are those after its step {self.trained_steps}.",
            f"The gradient of the mean loss of any data is {self.smoothness!r}-Lipschitz in the "
            f"parameters, and every example's gradient, without terms that all share, has a norm "
            f"of at most {self.gradient_bound!r} wherever training goes.",
            f"The forget set has at most {self.deletions} examples, and the steps from the "
            "checkpoint on take full batches of all others.",
            sentences.ON_THE_WAY,
            sentences.PUBLIC,
            sentences.NO_MEMORY,
            *sentences.RUN,
        )

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return (
            "Each request rewinds to the same checkpoint of the original training, with "
            "`deletions` the number of all deletions so far: `next` counts them. The certificate "
            "is then for their union, and for the last release alone: what several releases say "
            "together it does not cover. If a request depends on earlier releases, what remains "
            "true is conditional: given the requests, the release is as close as certified to the "
            "same procedure on the same remaining data; which examples were deleted may itself "
            "tell of them."
        )

    def next(self, *, deletions: int) -> Self:
        """The mechanism for the next request, of so many more deletions."""
        total = self.deletions + checks.positive_int("deletions", deletions)
        return dataclasses.replace(self, deletions=total)

    def check_run(self, run: base.PlannedRun) -> None:
        """Also refuses batches that are not all of the retained examples."""
        super().check_run(run)
        least = self.size - self.deletions
        if not least <= run.size < self.size or run.batch_size != run.size:
            raise ValueError(
                f"RewindToDelete takes full batches of the {least} or more examples that are left "
                f"of {self.size}, got {run.size} examples and batch_size={run.batch_size}"
            )

    def step_rule(self) -> StepRule:
        """A step down the gradient, which is not clipped."""
        return StepRule.of(learning_rate=self.learning_rate)
