"""`Mechanism`, the base of every method, and what a method answers.

A mechanism says what one step may do and how it is run. Accountants read its `separations` and
nothing else of it; the loop asks it for its start, its transforms and its batches; the certificate
records it. Nobody asks for its type, so a method is one class, here or in a user's own code.
"""

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import jax
import numpy as np
import optax
from chex import ArrayTree

from certunlearn import transforms
from certunlearn._numerics import checks
from certunlearn._numerics.batches import PoissonSampling
from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.mechanisms import sentences

if TYPE_CHECKING:
    from certunlearn.mechanisms.plain_separations import Separations
    from certunlearn.mechanisms.published import PublishedNoise
    from certunlearn.mechanisms.step_rules import Rule

REFERENCES = ("retrained", "center")
# The exact minimiser of a convex objective on the retain data, with the same noise.
MINIMIZER = "minimizer"


class PlannedRun(NamedTuple):
    """What a mechanism is asked about a run before it starts.

    Attributes:
      size: number of examples.
      batch_size: examples in a batch.
      per_example: whether each example's gradient is to be clipped.
      centered: whether a centre was given.
      finetuned: whether something follows that uses the data.
    """

    size: int
    batch_size: int
    per_example: bool
    centered: bool
    finetuned: bool


class Mechanism(abc.ABC):
    """One unlearning method: what a step may do, and how it is run.

    Subclass it as a frozen dataclass, and it runs through `epsilon`, `noise_scale`, `noisy_sgd`,
    `unlearn`, `certify` and `verify` like those of this package. A subclass must have `steps`,
    `separations` and `update`; all else has a default.

    Attributes:
      steps: T, the number of updates; a field or a property.
      reference: what the result is indistinguishable from: `"retrained"`, or `"center"` for the
        same procedure started from the public centre.
      attackable: whether some loss and data do all that the separations allow. Only then is
        `epsilon_lower_bound` a lower bound for the method.
      tolerates_nonfinite: whether a zero in place of a gradient that is not finite is within the
        separations. False where steps must contract, which a step that is left out does not: such
        a run is refused.
      uses_center: whether `start` or `update` use the public centre; else `unlearn` refuses one.
      takes_before_clip: whether `noisy_sgd(before_clip=...)` may stand ahead of the update. Only
        where separations hold whatever reaches the update.
      watches_magnitudes: whether the largest parameters of every step must be known, because the
        rounding of noiseless steps counts (see `mechanisms.rounding`).
      start_radius: radius of the ball around the centre that starts are projected onto, in
        parameter units; None if they are not.
      solve_to: the norm of the objective's gradient on all retain data that must be reached, and
        verified, before the first step; None if nothing is solved. The noise is then added in
        float64, and `unlearn` needs a `convex.ConvexLoss`.
      exact: whether what is released is a function of retain data, public things and independent
        randomness alone: epsilon = delta = 0 without noise. Such a mechanism has no noisy step and
        no separations; accountant `"exact"` is for it.
      of_sums: whether what is released is a function of integer sums, whose digest the certificate
        must hold; `certunlearn.exact.certify` issues that.

    Guarantee:
      None by itself. A certificate for a mechanism holds if two runs of it, on the same batches and
      with the same randomness besides the noise, have the separations that it states.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class SignDescent(Mechanism):  # moves every one of `size` parameters by at most `step`
    ...     steps: int
    ...     step: float
    ...     size: int
    ...     distance: float
    ...
    ...     def separations(self):
    ...         return Separations(
    ...             initial_distance=self.distance,
    ...             contraction=1.0,
    ...             shift=2 * self.step * self.size**0.5,
    ...             steps=self.steps,
    ...         )
    ...
    ...     def update(self, center):
    ...         return optax.chain(optax.scale_by_sign(), optax.scale(-self.step))
    >>> from certunlearn.mechanisms import Separations
    >>> SignDescent(steps=3, step=0.1, size=25, distance=1.0).separations().shift
    1.0
    """

    steps: int
    reference: str = "retrained"
    attackable: bool = False
    tolerates_nonfinite: bool = False
    uses_center: bool = False
    takes_before_clip: bool = False
    watches_magnitudes: bool = False
    start_radius: float | None = None
    solve_to: float | None = None
    exact: bool = False
    of_sums: bool = False

    @abc.abstractmethod
    def separations(self) -> "Separations | None":
        """How far apart two runs can be, in plain numbers; None if the method is no such pair."""

    @abc.abstractmethod
    def update(self, center: ArrayTree | None) -> optax.GradientTransformation:
        """One update before its noise, from the gradient to the change of the parameters.

        Args:
          center: the public centre, structured like the parameters; None is the origin.
        """

    # What is certified.

    def rests_on(self) -> tuple[str, ...]:
        """What a certificate rests on, in sentences: those of the separations, and the trust."""
        stated = self.separations()
        if stated is None:
            raise NotImplementedError(f"{type(self).__name__} must define rests_on")
        return (*stated.rests_on(), sentences.trusted_separations(type(self).__name__))

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return sentences.OWN_REQUEST

    def first(self, steps: int) -> Self:
        """The mechanism that stops after the first `steps` steps of this one.

        Raises:
          TypeError: if `steps` is no field of the class, which must then define this itself.
          ValueError: if there are not so many.
        """
        steps = checks.steps("steps", steps)
        if steps > self.steps:
            raise ValueError(f"steps must be at most {self.steps}, got {steps}")
        if steps == self.steps:
            return self
        values = field_values(self)
        if "steps" not in values:
            raise TypeError(f"{type(self).__name__} must define first(steps): steps is no field")
        cut = {
            name: value[:steps]
            for name, value in values.items()
            if isinstance(value, tuple) and len(value) == self.steps
        }
        return dataclasses.replace(self, steps=steps, **cut)  # type: ignore[type-var]

    def size_problems(self, retain_size: int | None, forget_size: int | None) -> list[str]:
        """How recorded numbers of examples contradict the mechanism, a sentence each."""
        del retain_size, forget_size
        return []

    @property
    def why_exact(self) -> str:
        """Of an exact mechanism: why nothing is left of what was deleted, in words for people."""
        return "trained on retain data only"

    def published_noise(self) -> "PublishedNoise | None":
        """The closed form that was published for the method, if there is one."""
        return None

    def total_noise_scale(self, noise_scale: float) -> float | None:
        """Standard deviation of all steps' noise together, per coordinate of the last parameters.

        None where it is not known, as updates do more than contract.
        """
        del noise_scale
        return None

    # How it is run.

    def start(self, params: ArrayTree, center: ArrayTree | None, key: jax.Array) -> ArrayTree:
        """The parameters before the first step: projected onto the ball of starts, if there is one.

        Args:
          params: the trained parameters.
          center: the public centre; None is the origin.
          key: the noise key, for noise on the start; fold numbers into it beyond those of steps.
        """
        del key
        if self.start_radius is None:
            return params
        return transforms.clip_params(params, self.start_radius, center)

    def step_transforms(
        self, noise: optax.GradientTransformation, center: ArrayTree | None
    ) -> tuple[optax.GradientTransformation, ...]:
        """The transforms of one step in order, the noise among them.

        Args:
          noise: adds the step's noise; adds none at steps that have none.
          center: the public centre; None is the origin.
        """
        return transforms.zero_nonfinite(), self.update(center), noise

    def step_rule(self) -> "Rule | None":
        """The step as a function of its numbers, if it can take them traced.

        Returns:
          A pytree whose leaves are the numbers, and whose method `transforms(noise, center)` does
          what `step_transforms` does; or None. With a rule, runs with other numbers use the same
          compiled steps; without one, the numbers are constants of the compiled step, and another
          mechanism compiles its own. A class with a `step_transforms` or an `update` of its own is
          run by those, unless it has a `step_rule` of its own, too.
        """
        return None

    def example_clip_norm(self) -> PerStep | None:
        """The norm that each example's gradient may be clipped to instead of the batch's."""
        return None

    def poisson_sampling(self) -> PoissonSampling | None:
        """How each step draws its examples; None for batches of shuffled epochs."""
        return None

    def can_stop(self, steps: int) -> bool:
        """Whether there is a guarantee after the first `steps` steps: whether they had noise."""
        found = self.separations()
        return found is None or bool(np.any(found.noisy_steps[:steps]))

    def check_run(self, run: PlannedRun) -> None:
        """Refuses runs that the method does not allow.

        Raises:
          ValueError: saying what would be right.
        """
        name = type(self).__name__
        if run.per_example and self.example_clip_norm() is None:
            raise ValueError(f"per_example=True needs a clip norm, which this {name} has not")
        if run.centered and not self.uses_center:
            raise ValueError(f"center must be None: this {name} projects onto no ball")

    def loss_problem(self, strong_convexity: float) -> str | None:
        """Why a loss of this strong convexity is not what the separations rest on, or None."""
        del strong_convexity
        return None

    def rounding_problem(self, leaves: list[np.ndarray]) -> str | None:
        """Why the rounding of parameters like these breaks the separations, or None.

        Args:
          leaves: the parameters; for a leaf that is spread over devices an array of its shape and
            dtype, all of whose numbers are its largest magnitude.
        """
        del leaves
        return None

    def before_noise(self, scale: PerStep, params: ArrayTree, state: ArrayTree) -> Any:
        """The last parameters without their noise, for the next request; None where that has none.

        Args:
          scale: standard deviation of the noise, in parameter units.
          params: the parameters after the last noisy step.
          state: the optimizer's state there.
        """
        del scale, params, state
        return None


def check(mechanism: object) -> Mechanism:
    """The mechanism, or TypeError if it is none; ValueError if it contradicts itself."""
    if not isinstance(mechanism, Mechanism):
        raise TypeError(
            "mechanism must be a certunlearn.Mechanism, such as GradientClipping(...) or a "
            f"subclass of your own, got {checks.shown(mechanism)}"
        )
    if not dataclasses.is_dataclass(mechanism):
        raise TypeError(f"{type(mechanism).__name__} must be a frozen dataclass, to be recorded")
    stated = mechanism.separations()
    if mechanism.exact and (stated is not None or mechanism.steps != 0):
        raise ValueError(
            f"{type(mechanism).__name__} must have steps = 0 and no separations to be exact, got "
            f"steps = {mechanism.steps}: what needs noise is not exact"
        )
    if stated is not None and (stated.steps, stated.reference) != (
        mechanism.steps,
        mechanism.reference,
    ):
        raise ValueError(
            f"{type(mechanism).__name__}.separations() must have steps={mechanism.steps} and "
            f"reference={mechanism.reference!r}, got {stated.steps} and {stated.reference!r}"
        )
    return mechanism


def checked_noise(mechanism: Mechanism, noise_scale: ScalarOrSchedule | None) -> PerStep:
    """A noise scale as one number or `[steps]` numbers; 0.0 for an exact mechanism, and no other.

    Raises:
      TypeError: if it is missing, or no number, nor a sequence or schedule of them.
      ValueError: if noise is not positive and finite, or has another length; or if it is not 0
        where there is none.
    """
    if mechanism.exact:
        if noise_scale is not None and checks.real("noise_scale", noise_scale) != 0:
            raise ValueError(
                f"noise_scale must be 0 or None for {type(mechanism).__name__}, which adds no "
                f"noise, got {noise_scale!r:.80}"
            )
        return 0.0
    if noise_scale is None:
        raise TypeError(f"noise_scale must be given for {type(mechanism).__name__}, got None")
    return checks.per_step("noise_scale", noise_scale, mechanism.steps)


def checked_delta(mechanism: Mechanism, delta: float | None) -> float:
    """A delta strictly between 0 and 1; 0.0 for an exact mechanism, and no other.

    Raises:
      TypeError: if it is missing, or no number.
      ValueError: if it is out of range.
    """
    if mechanism.exact:
        if delta is not None and checks.real("delta", delta) != 0:
            raise ValueError(
                f"delta must be 0 or None for {type(mechanism).__name__}, whose guarantee is "
                f"epsilon = delta = 0, got {delta!r}"
            )
        return 0.0
    if delta is None:
        raise TypeError(f"delta must be one real number for {type(mechanism).__name__}, got None")
    return checks.open_unit("delta", delta)


def is_memoryless(mechanism: Mechanism) -> bool:
    """Whether updates depend on the past through the current parameters only."""
    stated = mechanism.separations()
    return stated is None or stated.memoryless


def noise_of_steps(mechanism: Mechanism) -> np.ndarray:
    """Bool `[steps]`: which updates noise follows."""
    stated = mechanism.separations()
    return np.ones(mechanism.steps, bool) if stated is None else stated.noisy_steps


def field_values(mechanism: Mechanism) -> dict[str, Any]:
    """A mechanism's fields, by name."""
    fields = dataclasses.fields(mechanism)  # type: ignore[arg-type]
    return {field.name: getattr(mechanism, field.name) for field in fields}


def set_fields(mechanism: Mechanism, **values: object) -> None:
    """Sets checked values in a frozen dataclass's `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(mechanism, name, value)


def per_step(mechanism: Mechanism, *names: str, zero_allowed: bool = False) -> None:
    """Checks and normalises fields that are numbers, `[steps]` numbers or schedules."""
    for name in names:
        value = getattr(mechanism, name)
        found = checks.per_step(name, value, mechanism.steps, zero_allowed=zero_allowed)
        set_fields(mechanism, **{name: found})


def check_learning_rate(mechanism: Mechanism) -> None:
    """Checks and normalises `learning_rate`: a schedule may be 0 at some steps, or at all.

    Such a step only adds its noise: it moves no two points apart and brings none closer. One number
    for all steps must be positive, for nothing would be learned.
    """
    per_step(mechanism, "learning_rate", zero_allowed=True)
    if field_values(mechanism)["learning_rate"] == 0:
        raise ValueError(
            "learning_rate must be positive, got 0.0 for all steps: for noise without steps use "
            "OutputPerturbation"
        )
