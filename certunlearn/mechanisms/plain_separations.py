"""`Separations`: a mechanism of plain numbers, to account for and certify any paper's method."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

from certunlearn import transforms
from certunlearn._numerics import checks, norms
from certunlearn._numerics.checks import PerStep
from certunlearn.mechanisms import base, sentences, step_rules
from certunlearn.mechanisms.step_rules import StepRule

_LONGEST_SENTENCE = 2_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Separations(base.Mechanism):
    """How far apart two runs can be, step by step, in plain numbers.

    Two runs start at most `initial_distance` apart. Update t maps points at distance r to points at
    distance at most `contraction[t] * r + shift[t]`, before its noise is added.

    It is what every mechanism says of itself to the accountants, and a mechanism by itself: derive
    the numbers of a paper's method, and account for it and certify it. In `noisy_sgd` and `unlearn`
    it runs the simplest method that has them, so that they are true by construction: a start
    projected onto the ball of radius `initial_distance / 2` around the centre (`initial_distance`
    with `reference="center"`), then for each step

        x <- c + contraction_t * (x - c) - clip(g_t, shift_t / 2) + noise_t

    around the centre c: a learning rate is part of the shift. With a `diameter`, the noised x is
    projected onto the ball of half of it around c. With `transform` it runs that instead, from the
    parameters as they are, and the separations and the diameter are the caller's word.

    Args:
      initial_distance: largest distance of the two starts (L2 norm, parameter units), at least 0.
      contraction: at least 0: a number or `[steps]` numbers.
      shift: at least 0, likewise, in parameter units.
      noisy: `[steps]` bools, whether noise follows the update; None for all.
      assumptions: what the separations rest on, in the user's words: sentences of printable ASCII.
      steps: number of steps; needed only if neither contraction nor shift is a sequence.
      diameter: largest distance of two points that a step can end at, its noise included; infinity
        if nothing limits it.
      init_noise_scale: standard deviation of noise on the starts, in parameter units.
      memoryless: as for `GradientClipping`.
      reference: `"retrained"`, `"center"`, or `"minimizer"`: the exact minimiser of an objective on
        the retain data, for a method that minimises and runs by a `transform` or a loop of its own.
      transform: an Optax transform from the gradient to an update before its noise.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if a number is out of range, lengths differ, or no step has noise.

    Guarantee:
      None by itself: certificates record these numbers with the assumptions. What the accountants
      derive from them holds for every method that has such separations.

    >>> import certunlearn as cu
    >>> runs = cu.Separations(initial_distance=2.0, contraction=[0.9] * 4, shift=[0.1] * 4)
    >>> runs.steps, runs.separation(0, 2.0)
    (4, 1.9000000000000001)
    >>> round(cu.epsilon(runs, noise_scale=2.0, delta=1e-5, accountant="interpolation"), 3)
    1.897
    """

    initial_distance: float
    contraction: PerStep | Sequence[float]
    shift: PerStep | Sequence[float]
    noisy: Sequence[bool] | None = None
    assumptions: Sequence[str] = ()
    steps: int = 0
    diameter: float = math.inf
    init_noise_scale: float = 0.0
    memoryless: bool = True
    reference: str = "retrained"
    transform: optax.GradientTransformation | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Checks every argument; sequences become tuples."""
        steps = _steps(self.steps, self.contraction, self.shift, self.noisy)
        base.set_fields(
            self,
            steps=steps,
            contraction=checks.per_step("contraction", self.contraction, steps, zero_allowed=True),
            shift=checks.per_step("shift", self.shift, steps, zero_allowed=True),
            initial_distance=_not_negative("initial_distance", self.initial_distance),
            init_noise_scale=_not_negative("init_noise_scale", self.init_noise_scale),
            memoryless=checks.flag("memoryless", self.memoryless),
            assumptions=_sentences(self.assumptions),
            noisy=_noisy(self.noisy, steps),
        )
        if self.diameter != math.inf:
            base.set_fields(self, diameter=checks.positive("diameter", self.diameter))
        checks.choice("reference", self.reference, (*base.REFERENCES, base.MINIMIZER))

    @property
    def attackable(self) -> bool:  # type: ignore[override]
        """Whether attacks are lower bounds: they know nothing of a diameter."""
        return math.isinf(self.diameter)

    @property
    def tolerates_nonfinite(self) -> bool:  # type: ignore[override]
        """Whether a gradient that is not finite may be left out: in the simplest method, yes."""
        return self.transform is None

    @property
    def uses_center(self) -> bool:  # type: ignore[override]
        """Whether the centre is used: by the simplest method."""
        return self.transform is None

    @property
    def noisy_steps(self) -> np.ndarray:
        """Bool `[steps]`: whether noise follows the update."""
        return np.ones(self.steps, bool) if self.noisy is None else np.array(self.noisy)

    def separation(self, step: int, distance: float) -> float:
        """Largest distance after update `step`, before its noise, of points `distance` apart."""
        c, s = (np.broadcast_to(each, self.steps)[step] for each in (self.contraction, self.shift))
        return float(c * distance + s)

    def separations(self) -> Self:
        """Itself."""
        return self

    def rests_on(self) -> tuple[str, ...]:
        """The user's assumptions, and what every run rests on."""
        memory = sentences.NO_MEMORY if self.memoryless else sentences.FRESH_STATE
        stated = [] if self.noisy is None else [sentences.STATED_ROUNDING]
        if math.isfinite(self.diameter):
            stated.append(sentences.stated_diameter(self.diameter))
        if self.init_noise_scale > 0:
            stated.append(sentences.stated_start_noise(self.init_noise_scale))
        return (
            sentences.compared(self.reference),
            "The two starts are at most "
            f"{self.initial_distance!r} apart (L2 norm, parameter units).",
            sentences.STATED_SEPARATIONS,
            *self.assumptions,
            sentences.CENTER,
            memory,
            *stated,
            *sentences.RUN,
        )

    def total_noise_scale(self, noise_scale: float) -> float | None:
        """All noise of the simplest method together; None for another."""
        if self.transform is not None or math.isfinite(self.diameter):
            return None
        return accumulated_noise_scale(self, noise_scale)

    def first(self, steps: int) -> Self:
        """The separations of the first `steps` steps."""
        steps = checks.steps("steps", steps)
        if steps > self.steps:
            raise ValueError(f"steps must be at most {self.steps}, got {steps}")
        return dataclasses.replace(
            self,
            steps=steps,
            contraction=_cut(self.contraction, steps),
            shift=_cut(self.shift, steps),
            noisy=None if self.noisy is None else tuple(self.noisy)[:steps],
        )

    @property
    def start_radius(self) -> float | None:  # type: ignore[override]
        """Radius of the ball of starts of the simplest method; None for another."""
        if self.transform is not None or self.initial_distance == 0:
            return None
        return self.initial_distance / (2 if self.reference == "retrained" else 1)

    def start(self, params: ArrayTree, center: ArrayTree | None, key: jax.Array) -> ArrayTree:
        """The projected parameters; the centre itself if starts are not apart.

        Raises:
          ValueError: if the reference is a minimiser, near which no projection brings a start.
        """
        if self.transform is None and self.reference == base.MINIMIZER:
            raise ValueError(
                "reference must be 'retrained' or 'center' to be run, got 'minimizer': give the "
                "method's own update as transform=..., or use PerturbedMinimizer"
            )
        if self.transform is None and self.initial_distance == 0:
            params = jax.tree.map(jnp.zeros_like, params) if center is None else center
        started = super().start(params, center, key)
        if self.init_noise_scale == 0:
            return started
        return transforms.noise_on_start(started, self.init_noise_scale, key)

    def step_transforms(
        self, noise: optax.GradientTransformation, center: ArrayTree | None
    ) -> tuple[optax.GradientTransformation, ...]:
        """The update and the noise; in the simplest method also the projection."""
        rule = self.step_rule()
        if rule is None:
            return super().step_transforms(noise, center)
        return rule.around(self.update(center), noise, center)

    def update(self, center: ArrayTree | None) -> optax.GradientTransformation:
        """The simplest update with these separations, or the given one.

        Raises:
          ValueError: if a contraction is above 1, or a shift too small for float32 arithmetic.
        """
        rule = self.step_rule()
        if rule is None:
            assert self.transform is not None
            return self.transform
        return rule.update(center)

    def step_rule(self) -> StepRule | None:
        """The simplest step with these separations; None with a transform.

        Raises:
          ValueError: if a contraction is above 1, or a shift too small for float32 arithmetic.
        """
        if self.transform is not None:
            return None
        contraction, shift = (np.asarray(v, np.float64) for v in (self.contraction, self.shift))
        if np.any(contraction > 1):
            raise ValueError(
                f"contraction must be at most 1 to be run, got {float(contraction.max())!r}; give "
                "the method's own update as transform=..."
            )
        half = np.where(shift > 0, shift / 2, 1.0)
        if np.any(half < norms.SMALLEST_NORM):
            raise ValueError(
                f"shift must be 0 or at least {2 * norms.SMALLEST_NORM:g}, where float32 "
                f"arithmetic does not underflow, got {2 * float(half.min())!r}"
            )
        decay, finite = 1 - contraction, math.isfinite(self.diameter)
        return StepRule(
            clip_norm=step_rules.numbers(half),
            factor=None if np.all(shift > 0) else np.atleast_1d(np.where(shift > 0, 1.0, 0.0)),
            weight_decay=step_rules.numbers(decay) if np.any(decay) else None,
            learning_rate=1.0,
            radius=self.diameter / 2 if finite else None,
            projection=step_rules.AFTER_NOISE if finite else step_rules.NOWHERE,
        )


class Run(NamedTuple):
    """Separations with their noise, as arrays.

    Attributes:
      initial_distance: of the two starts.
      contraction: float64 `[steps]`.
      shift: float64 `[steps]`, parameter units.
      noise: float64 `[steps]`, standard deviations, 0 where there is no noise.
    """

    initial_distance: float
    contraction: np.ndarray
    shift: np.ndarray
    noise: np.ndarray


def with_noise(separations: Separations, noise_scale: PerStep) -> Run:
    """The run whose noisy steps have noise of this standard deviation (parameter units)."""
    steps = (separations.steps,)
    return Run(
        separations.initial_distance,
        np.broadcast_to(np.asarray(separations.contraction, np.float64), steps),
        np.broadcast_to(np.asarray(separations.shift, np.float64), steps),
        np.where(separations.noisy_steps, np.asarray(noise_scale, np.float64), 0.0),
    )


def accumulated_noise_scale(separations: Separations, noise_scale: float) -> float:
    """Standard deviation of all steps' noise together, where updates do no more than contract.

    >>> nine = Separations(initial_distance=1.0, contraction=1.0, shift=0.1, steps=9)
    >>> accumulated_noise_scale(nine, 0.5)
    1.5
    """
    noise = with_noise(separations, noise_scale)
    later = np.concatenate([np.cumprod(noise.contraction[:0:-1])[::-1], [1.0]])
    return math.sqrt(float(np.sum((later * noise.noise) ** 2)))


def compact(values: Any) -> PerStep:
    """`[steps]` numbers as one number where they are all the same."""
    array = np.asarray(values, np.float64)
    first = float(array.flat[0])
    return first if np.all(array == first) else tuple(array.tolist())


def _cut(value: Any, steps: int) -> PerStep:
    return tuple(value[:steps]) if isinstance(value, tuple) else value


def _steps(steps: object, *per_step: Any) -> int:
    """The number of steps, from whichever argument says it."""
    lengths = [len(value) for value in per_step if value is not None and np.ndim(value) > 0]
    if steps != 0:
        return checks.steps("steps", steps)
    if not lengths:
        raise ValueError("steps must be given where contraction and shift are single numbers")
    return checks.steps("steps", lengths[0])


def _not_negative(name: str, value: object) -> float:
    number = checks.real(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be at least 0 and finite, got {number!r}")
    return number


def _noisy(noisy: Any, steps: int) -> tuple[bool, ...] | None:
    if noisy is None:
        return None
    if np.ndim(noisy) != 1 or len(noisy) != steps:
        raise ValueError(f"noisy must have a bool for each of the {steps} steps, got {noisy!r:.80}")
    found = tuple(checks.flag("noisy", value) for value in noisy)
    if not any(found):
        raise ValueError("noisy must be True at one step or more: nothing is hidden without noise")
    return None if all(found) else found


def _sentences(assumptions: Any) -> tuple[str, ...]:
    if isinstance(assumptions, str) or not isinstance(assumptions, Sequence):
        raise TypeError(f"assumptions must be a list of sentences, got {checks.shown(assumptions)}")
    for sentence in assumptions:
        if not isinstance(sentence, str):
            raise TypeError(f"assumptions must be sentences, got {checks.shown(sentence)}")
        if not (sentence.isascii() and sentence.isprintable()):
            raise ValueError(f"assumptions must be printable ASCII, got {checks.shown(sentence)}")
        if not 0 < len(sentence) <= _LONGEST_SENTENCE:
            raise ValueError(f"assumptions must have 1 to {_LONGEST_SENTENCE} characters each")
    return tuple(assumptions)
