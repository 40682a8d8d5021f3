"""Differentially private training: nothing is left to unlearn."""

import dataclasses

from certunlearn._numerics import checks
from certunlearn._numerics.batches import PoissonSampling
from certunlearn.mechanisms import base, sentences, step_rules
from certunlearn.mechanisms.step_rules import StepRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPSGD(step_rules.ByRule):
    """Noisy training on all data, whose result hides any `deletions` examples (Abadi et al. 2016).

    Every step takes each example with probability `sampling_rate`, independently, and

        x <- x - learning_rate * sum of clip(g_i, clip_norm) / batch_size + noise

    with Gaussian noise of standard deviation `noise_scale` in parameter units: the noise multiplier
    is noise_scale * batch_size / (learning_rate * clip_norm). Deleting examples then takes nothing
    but removing them: what was trained is as if they had never been there.

    Args:
      clip_norm: largest norm of one example's gradient.
      learning_rate: gamma; one number.
      steps: T, number of steps.
      sampling_rate: q, in (0, 1]: the chance of each example in each step.
      batch_size: what sums of gradients are divided by: a fixed number, such as the expected size
        of a batch; it must not depend on who is in the data.
      deletions: k: the certificate is for the deletion of any k examples.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if an argument is out of range.

    Guarantee:
      None by itself. `accounting.subsampled` turns it into group privacy for k examples.

    >>> m = DPSGD(
    ...     clip_norm=1.0,
    ...     learning_rate=0.5,
    ...     steps=100,
    ...     sampling_rate=0.1,
    ...     batch_size=50,
    ...     deletions=1,
    ... )
    >>> m.noise_multiplier(0.02)
    2.0
    """

    clip_norm: float
    learning_rate: float
    steps: int
    sampling_rate: float
    batch_size: int
    deletions: int

    def __post_init__(self) -> None:
        """Checks every argument."""
        base.set_fields(self, steps=checks.steps("steps", self.steps))
        for name in ("batch_size", "deletions"):
            base.set_fields(self, **{name: checks.positive_int(name, getattr(self, name))})
        for name in ("clip_norm", "learning_rate", "sampling_rate"):
            base.set_fields(self, **{name: checks.positive(name, getattr(self, name))})
        if self.sampling_rate > 1:
            raise ValueError(f"sampling_rate must be at most 1, got {self.sampling_rate!r}")

    # The gradient of an example that is not finite counts as zero: within the sensitivity.
    tolerates_nonfinite = True

    def noise_multiplier(self, noise_scale: float) -> float:
        """Standard deviation of the noise on a sum of gradients, in units of the clip norm."""
        return noise_scale * self.batch_size / (self.learning_rate * self.clip_norm)

    def noise_scale(self, noise_multiplier: float) -> float:
        """The inverse of `noise_multiplier`: a standard deviation in parameter units."""
        return noise_multiplier * self.learning_rate * self.clip_norm / self.batch_size

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        return (
            "The guarantee compares the released parameters with the same training without the "
            "forget set.",
            f"The forget set has at most {self.deletions} examples; each example has one gradient "
            "in a batch, clipped by itself.",
            "Each step took every example with the sampling rate's chance, independently of all "
            "else.",
            "The parameters that training starts from, the frozen ones, the architecture and the "
            "input preprocessing do not depend on the forget set.",
            "Only parameters after noisy steps leave: no losses, gradient norms, counters, "
            "sample sizes, running statistics or optimizer state, and not the number of examples.",
            "What follows the last noisy step uses the released parameters, and no data that may "
            "still be deleted.",
            sentences.FIXED,
            "Which examples are forgotten was decided without looking at the released parameters "
            "or at other models trained on them.",
            "The noise and sampling keys are secret and are never used again, and all other "
            "randomness of the run is independent of them.",
            sentences.REAL,
        )

    def size_problems(self, retain_size: int | None, forget_size: int | None) -> list[str]:
        """How recorded numbers of examples contradict the mechanism, a sentence each."""
        problems = []
        if retain_size is not None:
            problems.append(
                "retain_size must be None with DPSGD: the number of examples in training is "
                "private, as it tells whether one was there"
            )
        if forget_size is not None and forget_size > self.deletions:
            problems.append(
                f"forget_size must be at most deletions={self.deletions}, got {forget_size}"
            )
        return problems

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return (
            "One training serves all requests, of up to `deletions` examples in all: the model "
            "stays as it is. Beyond that number it must be trained anew. That holds for each set "
            "of examples by itself; a request that depends on the released model is not covered, "
            "as the choice of examples may itself tell of them."
        )

    def rests_on(self) -> tuple[str, ...]:
        """`assumptions`, which are complete."""
        return self.assumptions

    def separations(self) -> None:
        """None: two trainings that differ by examples are no pair of runs on the same batches."""

    def poisson_sampling(self) -> PoissonSampling:
        """Every example with the sampling rate's chance."""
        return PoissonSampling(
            rate=self.sampling_rate,
            deletions=self.deletions,
            batch_size=self.batch_size,
            sensitivity=self.noise_scale(1.0),
        )

    def example_clip_norm(self) -> float:
        """The clip norm of every example."""
        return self.clip_norm

    def step_rule(self) -> StepRule:
        """A step; the gradients that reach it are clipped by example."""
        step_rules.check_products(self.learning_rate, self.clip_norm)
        return StepRule.of(learning_rate=self.learning_rate)

    def check_run(self, run: base.PlannedRun) -> None:
        """Also refuses another batch size, and whatever else would use the data."""
        super().check_run(run)
        if run.batch_size != self.batch_size:
            raise ValueError(
                f"batch_size must be the mechanism's, {self.batch_size}, got {run.batch_size}"
            )
        if run.finetuned:
            raise ValueError(
                "finetune and recompute_state must be None with DPSGD: its data is all the data, "
                "of which they would keep a trace; fine-tune on retain data once it is known"
            )
