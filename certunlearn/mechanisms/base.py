"""What every mechanism answers, and the sentences that several of them rest on."""

import dataclasses
import math
from typing import Any, Protocol, Self, cast

import numpy as np

from certunlearn import checks

REFERENCES = ("retrained", "center")

# Share of the distance before a single last noise that is kept in reserve for the rounding of the
# noiseless steps, unless the mechanism says otherwise: see `certunlearn.rounding`, which refuses
# runs whose rounding needs more.
ROUNDING_SHARE = 1e-3

UNSEEN = (
    "The steps of the run use retain data only, in batches drawn by a rule that does not see the "
    "forget set."
)
LAST_ONLY = (
    "Only the parameters after the last noisy step leave: no intermediate parameters, losses, "
    "gradient norms, counters, running statistics or optimizer state."
)
POST = "What follows the last noisy step uses the released parameters and retain data only."
REQUESTS = (
    "Which examples are forgotten was decided without looking at earlier releases of models "
    "trained on them."
)
FIXED = (
    "The step count and every hyperparameter were fixed without looking at the trained model or at "
    "the run."
)
SECRET = (
    "The noise key is secret and is never used again, and all other randomness of the run is "
    "independent of it."
)
REAL = (
    "The noise is exactly Gaussian, and the rounding of gradients and of noisy steps moves no two "
    "runs farther apart."
)
ON_THE_WAY = (
    "On the way to the noise no parameter, and no change of one in a step, reached the next power "
    "of two above the largest parameter that was checked for rounding."
)
# What every run on retain data rests on.
RUN = (UNSEEN, LAST_ONLY, POST, FIXED, REQUESTS, SECRET, REAL)
CENTER = (
    "The centre of the ball, the frozen parameters, the architecture and the input preprocessing "
    "do not depend on the forget set."
)
PUBLIC = (
    "The frozen parameters, the architecture and the input preprocessing do not depend on the "
    "forget set."
)
NO_MEMORY = (
    "Each update depends on the past only through the current parameters: no momentum or other "
    "optimizer state, no running averages, no teacher, mask or penalty computed from the trained "
    "model."
)
ANY_START = (
    "Each request is served from the current model, whatever it is, with the same certificate for "
    "the union of all deletions so far: the start is any point of the ball. What earlier releases "
    "say of examples that are deleted later no certificate covers. If a request depends on earlier "
    "releases, what remains true is conditional: given all that was released and requested before, "
    "the release is as close as certified to the same procedure on the same remaining data; which "
    "examples were deleted may itself tell of them."
)


def compared(reference: str) -> str:
    """The sentence that names the reference process of a method that starts from any model."""
    start = {
        "retrained": "the same procedure started from a model trained without the forget set",
        "center": "the same procedure started from the centre itself",
    }[reference]
    return f"The guarantee compares the released parameters with {start}."


class Mechanism(Protocol):
    """A pair of runs on the same batches that differ in where they started, as accountants see it.

    Two runs and a separation: an update maps points at distance r to points at distance at most
    `contraction[t] * r + shift[t]`, before its noise is added.
    """

    @property
    def steps(self) -> int:
        """Number of updates."""

    @property
    def initial_distance(self) -> float:
        """Largest distance of the two starts, in parameter units."""

    @property
    def start_distance(self) -> float:
        """`initial_distance`, or less where starts are projected: what accountants read."""

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[steps]`."""

    @property
    def shift(self) -> np.ndarray:
        """float64 `[steps]`, in parameter units."""

    @property
    def noisy(self) -> np.ndarray:
        """Bool `[steps]`: whether noise follows the update."""

    @property
    def diameter(self) -> float:
        """Largest distance of two points that a step can end at; infinity if nothing limits it."""

    @property
    def init_noise_scale(self) -> float:
        """Standard deviation of noise on the starts, in parameter units."""

    @property
    def memoryless(self) -> bool:
        """Whether updates depend on the past through the current parameters only."""

    @property
    def attackable(self) -> bool:
        """Whether some loss and data do all that the separations allow, as attacks suppose."""

    @property
    def reference(self) -> str:
        """What the result is indistinguishable from: `"retrained"` or `"center"`."""

    @property
    def tolerates_nonfinite(self) -> bool:
        """Whether a zero update in place of a gradient that is not finite is within the separation.

        True where separations hold for any update; False where steps must contract, which a step
        that is left out does not.
        """

    def size_problems(self, retain_size: int | None, forget_size: int | None) -> list[str]:
        """How recorded numbers of examples contradict the mechanism, a sentence each."""

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate rests on, in sentences."""

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""

    def first(self, steps: int) -> Self:
        """The mechanism that stops after the first `steps` steps of this one."""


class Separations:
    """What most mechanisms have in common."""

    diameter: Any = math.inf
    init_noise_scale: Any = 0.0
    memoryless: Any = True
    attackable: Any = False
    reference: Any = "retrained"
    tolerates_nonfinite = False

    @property
    def shift(self) -> np.ndarray:
        """float64 `[steps]`: none."""
        return np.zeros(_any(self).steps)

    @property
    def noisy(self) -> np.ndarray:
        """Bool `[steps]`: all of them."""
        return np.ones(_any(self).steps, bool)

    def size_problems(self, retain_size: int | None, forget_size: int | None) -> list[str]:
        """How recorded numbers of examples contradict the mechanism: they cannot."""
        del retain_size, forget_size
        return []

    @property
    def start_distance(self) -> float:
        """Largest distance of the two starts, after what the method does to them."""
        return float(_any(self).initial_distance)

    def separation(self, step: int, distance: float) -> float:
        """Largest distance after update `step`, before its noise, of points `distance` apart."""
        return float(_any(self).contraction[step] * distance + _any(self).shift[step])

    def first(self, steps: int) -> Self:
        """The mechanism that stops after the first `steps` steps of this one.

        Raises:
          ValueError: if there are not so many.
        """
        steps = checks.steps("steps", steps)
        whole = _any(self)
        if steps > whole.steps:
            raise ValueError(f"steps must be at most {whole.steps}, got {steps}")
        cut = {
            field.name: value[:steps]
            for field in dataclasses.fields(whole)
            if isinstance(value := getattr(whole, field.name), tuple)
        }
        return cast(Self, dataclasses.replace(whole, steps=steps, **cut))


class FromBall(Separations):
    """Starts from any model, projected onto a ball around a public centre."""

    # Whatever an update is, a zero update too, the separations hold.
    tolerates_nonfinite = True

    @property
    def initial_distance(self) -> float:
        """Largest distance between the two starts, in parameter units."""
        run = _any(self)
        return float(run.init_radius * (2.0 if run.reference == "retrained" else 1.0))

    @property
    def start_sentence(self) -> str:
        """The assumption on where the run started."""
        radius = _any(self).init_radius
        return f"The run started within {radius!r} of the centre (L2 norm, parameter units)."

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return ANY_START


class LastNoisy(Separations):
    """Updates without noise, and one Gaussian after the last."""

    @property
    def noisy(self) -> np.ndarray:
        """Bool `[steps]`: the last only."""
        count = _any(self).steps
        return np.arange(count) == count - 1

    def first(self, steps: int) -> Self:
        """The mechanism itself: a part of it has no noise, and no guarantee.

        Raises:
          ValueError: if `steps` is not the number of its steps.
        """
        count = _any(self).steps
        if checks.steps("steps", steps) != count:
            raise ValueError(
                f"{type(self).__name__} adds its noise after the last step, so it cannot stop "
                f"early: steps must be {count}, got {steps}"
            )
        return self


class StepsThenNoise(LastNoisy):
    """Steps that rely on what they leave of a distance, and one Gaussian after the last.

    `factors`, float64 `[steps]`, say how far each step moves two points at distance 1; `past_steps`
    how many steps without noise led to the start; `past_error` how far these lead two runs apart
    that differ by 1 more at each of them: the sum of the later factors' products; `rounding_share`
    which share of the distance is kept in reserve for rounding (see `certunlearn.rounding`).
    """

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[steps]`: the factors, the last times 1 + `rounding_share`."""
        found = np.array(_any(self).factors, np.float64)
        found[-1] *= 1 + _any(self).rounding_share
        return found


def _any(mechanism: Any) -> Any:
    """A mixin's own class, which has what the mixin lacks."""
    return mechanism


def set_fields(mechanism: Any, **values: Any) -> None:
    """Sets checked values in a frozen dataclass's `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(mechanism, name, value)


def per_step(mechanism: Any, *names: str, zero_allowed: bool = False) -> None:
    """Checks and normalises fields that are numbers, `[steps]` numbers or schedules."""
    for name in names:
        value = getattr(mechanism, name)
        found = checks.per_step(name, value, mechanism.steps, zero_allowed=zero_allowed)
        set_fields(mechanism, **{name: found})


def learning_rates(mechanism: Any) -> None:
    """Checks and normalises `learning_rate`: a schedule may be 0 at some steps, or at all.

    Such a step only adds its noise: it moves no two points apart and brings none closer. One number
    for all steps must be positive, for nothing would be learned.
    """
    per_step(mechanism, "learning_rate", zero_allowed=True)
    if mechanism.learning_rate == 0:
        raise ValueError(
            "learning_rate must be positive, got 0.0 for all steps: for noise without steps use "
            "OutputPerturbation"
        )


def check_rounding_share(mechanism: Any) -> None:
    """Checks and normalises `rounding_share`."""
    share = checks.real("rounding_share", mechanism.rounding_share)
    if not 0 <= share <= 1:
        raise ValueError(f"rounding_share must be between 0 and 1, got {share!r}")
    set_fields(mechanism, rounding_share=share)


def check_decay(mechanism: Any) -> None:
    """Refuses weight decay that overshoots the centre."""
    product = np.max(np.multiply(mechanism.learning_rate, mechanism.weight_decay))
    if product > 1:
        raise ValueError(
            f"weight_decay * learning_rate must be at most 1, got {product:g}; lower the "
            f"learning rate or the weight decay by a factor of {product:g} or more"
        )
