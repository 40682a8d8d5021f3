"""What the package's own mechanisms have in common: pairs of runs that state their separations."""

import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn import transforms
from certunlearn._numerics import checks
from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.mechanisms import base, rounding, sentences, step_rules
from certunlearn.mechanisms.plain_separations import (
    Separations,
    accumulated_noise_scale,
    compact,
)

# Share of the distance before a single last noise that is kept in reserve for the rounding of the
# noiseless steps, unless the mechanism says otherwise: see `mechanisms.rounding`, which refuses
# runs whose rounding needs more.
ROUNDING_SHARE = 1e-3


class PairOfRuns(step_rules.ByRule):
    """Two runs with properties for their separations, each with the most common default."""

    init_noise_scale: float = 0.0
    memoryless: bool = True
    initial_distance: float

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[steps]`: the factor by which updates move two points nearer."""
        raise NotImplementedError

    @property
    def shift(self) -> np.ndarray:
        """float64 `[steps]`, in parameter units: none."""
        return np.zeros(self.steps)

    @property
    def diameter(self) -> float:
        """Largest distance of two points that a step can end at: nothing limits it."""
        return math.inf

    @property
    def noisy(self) -> np.ndarray:
        """Bool `[steps]`, whether noise follows the update: all of them."""
        return np.ones(self.steps, bool)

    @property
    def start_distance(self) -> float:
        """Largest distance of the two starts, after what the method does to them."""
        return float(self.initial_distance)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        raise NotImplementedError

    def rests_on(self) -> tuple[str, ...]:
        """`assumptions`, which are complete."""
        return self.assumptions

    def separation(self, step: int, distance: float) -> float:
        """Largest distance after update `step`, before its noise, of points `distance` apart."""
        return float(self.contraction[step] * distance + self.shift[step])

    def separations(self) -> Separations:
        """The pair in plain numbers."""
        return Separations(
            initial_distance=self.start_distance,
            contraction=compact(self.contraction),
            shift=compact(self.shift),
            noisy=None if np.all(self.noisy) else tuple(self.noisy.tolist()),
            steps=self.steps,
            diameter=self.diameter,
            init_noise_scale=self.init_noise_scale,
            memoryless=self.memoryless,
            reference=self.reference,
        )

    def total_noise_scale(self, noise_scale: float) -> float | None:
        """Standard deviation of all noise in a last coordinate, each decayed by the later steps."""
        return accumulated_noise_scale(self.separations(), noise_scale)


class FromBall(PairOfRuns):
    """Starts from any model, projected onto a ball of `init_radius` around a public centre."""

    # Whatever an update is, a zero update too, the separations hold.
    tolerates_nonfinite = True
    uses_center = True
    init_radius: float

    @property
    def initial_distance(self) -> float:  # type: ignore[override]
        """Largest distance between the two starts, in parameter units."""
        return float(self.init_radius * (2.0 if self.reference == "retrained" else 1.0))

    @property
    def start_radius(self) -> float | None:  # type: ignore[override]
        """Radius of the ball of starts."""
        return self.init_radius

    @property
    def start_sentence(self) -> str:
        """The assumption on where the run started."""
        radius = self.init_radius
        return f"The run started within {radius!r} of the centre (L2 norm, parameter units)."

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        return (
            sentences.compared(self.reference),
            self.start_sentence,
            sentences.CENTER,
            sentences.NO_MEMORY if self.memoryless else sentences.FRESH_STATE,
            *sentences.RUN,
        )

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return sentences.ANY_START


class LastNoisy(PairOfRuns):
    """Updates without noise, and one Gaussian after the last."""

    @property
    def noisy(self) -> np.ndarray:
        """Bool `[steps]`: the last only."""
        return np.arange(self.steps) == self.steps - 1

    def first(self, steps: int) -> Self:
        """The mechanism itself: a part of it has no noise, and no guarantee.

        Raises:
          ValueError: if `steps` is not the number of its steps.
        """
        if checks.steps("steps", steps) != self.steps:
            raise ValueError(
                f"{type(self).__name__} adds its noise after the last step, so it cannot stop "
                f"early: steps must be {self.steps}, got {steps}"
            )
        return self

    def before_noise(self, scale: PerStep, params: ArrayTree, state: ArrayTree) -> ArrayTree:
        """The last parameters without the one noise, for the next request."""
        is_noise = lambda s: isinstance(s, transforms.AddGaussianNoiseState)  # noqa: E731
        states = [s for s in jax.tree.leaves(state, is_leaf=is_noise) if is_noise(s)]
        last = states[-1]._replace(count=states[-1].count - 1)
        sigma = scale[-1] if isinstance(scale, tuple) else scale
        tx = transforms.add_gaussian_noise(sigma, jax.random.key(0))  # the state's key counts
        noise, _ = tx.update(jax.tree.map(jnp.zeros_like, params), last)
        return jax.tree.map(jnp.subtract, params, noise)


class StepsThenNoise(LastNoisy):
    """Steps that rely on what they leave of a distance, and one Gaussian after the last.

    `rounding_share` says which share of the distance is kept in reserve for rounding; see
    `mechanisms.rounding`, which reads the rest.
    """

    watches_magnitudes = True
    rounding_share: float
    past_steps: int
    past_error: float

    @property
    def factors(self) -> np.ndarray:
        """float64 `[steps]`: how far each step moves two points at distance 1."""
        raise NotImplementedError

    @property
    def final_distance(self) -> float:
        """What the steps leave of the initial distance, in exact arithmetic."""
        raise NotImplementedError

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[steps]`: the factors, the last times 1 + `rounding_share`."""
        found = np.array(self.factors, np.float64)
        found[-1] *= 1 + self.rounding_share
        return found

    def noiseless_run(self) -> rounding.NoiselessRun:
        """The steps before the noise, as `mechanisms.rounding` reads them."""
        return rounding.NoiselessRun(
            initial_distance=self.initial_distance,
            factors=self.factors,
            past_steps=self.past_steps,
            past_error=self.past_error,
            final_distance=self.final_distance,
            rounding_share=self.rounding_share,
        )

    def rounding_problem(self, leaves: list[np.ndarray]) -> str | None:
        """Whether rounding needs more than the share of the distance kept in reserve for it."""
        return rounding.steps_problem(self.noiseless_run(), leaves)


def check_rounding_share(mechanism: StepsThenNoise) -> None:
    """Checks and normalises `rounding_share`."""
    share = checks.real("rounding_share", mechanism.rounding_share)
    if not 0 <= share <= 1:
        raise ValueError(f"rounding_share must be between 0 and 1, got {share!r}")
    base.set_fields(mechanism, rounding_share=share)


def clipped_shift(
    steps: int, learning_rate: ScalarOrSchedule, clip_norm: ScalarOrSchedule | None
) -> np.ndarray:
    """float64 `[steps]`: how far two clipped gradients move runs apart, in parameter units."""
    product = np.multiply(checks.known(learning_rate), checks.known(clip_norm))
    return np.broadcast_to(2.0 * product, (steps,))


def decayed(
    steps: int, learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule
) -> np.ndarray:
    """float64 `[steps]`: the factor by which weight decay brings two runs nearer."""
    product = np.multiply(checks.known(learning_rate), checks.known(weight_decay))
    return np.broadcast_to(1.0 - product, (steps,))


def check_decay(learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule) -> None:
    """Refuses weight decay that overshoots the centre."""
    product = np.max(np.multiply(checks.known(learning_rate), checks.known(weight_decay)))
    if product > 1:
        raise ValueError(
            f"weight_decay * learning_rate must be at most 1, got {product:g}; lower the "
            f"learning rate or the weight decay by a factor of {product:g} or more"
        )
