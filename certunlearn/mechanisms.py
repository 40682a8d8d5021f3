"""What one unlearning step may do: separation functions, initial distances and assumptions.

A mechanism is all that an accountant ever sees. It answers three questions about a pair of runs
that use the same batches and differ only in where they started:

* `initial_distance`: how far apart the two starts can be;
* `contraction` and `shift`: one step maps two points at distance r to points at distance at most
  `contraction[t] * r + shift[t]` before its noise is added (the *separation* of the step);
* `memoryless`: whether a step depends on the past only through the current parameters.
"""

import dataclasses
from typing import Any

import numpy as np

from certunlearn import checks

REFERENCES = ("retrained", "center")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientClipping:
    """Noisy SGD on the retain data with clipped gradients (Koloskova et al., ICML 2025).

    The trained parameters are projected onto a ball of radius `init_radius` around a public centre
    c, then for t = 0, ..., steps - 1

        x <- x - learning_rate_t * (clip(g_t, clip_norm_t) + weight_decay_t * (x - c)) + noise_t

    with independent Gaussian noise of standard deviation `noise_scale_t` in every coordinate.

    Args:
      init_radius: C0, radius of the ball of starts, in parameter units.
      clip_norm: C1, largest global L2 norm of a step's gradient: a number, `[steps]` numbers or an
        Optax schedule, which is evaluated here.
      learning_rate: gamma, likewise.
      weight_decay: lambda >= 0, likewise; `learning_rate * weight_decay` must be at most 1.
      steps: T, number of noisy steps.
      reference: what the result is indistinguishable from. `"retrained"`: the same procedure
        started from a model trained without the forget set; two starts are at most
        `2 * init_radius` apart. `"center"`: the same procedure started from the centre itself, at
        distance `init_radius`.
      memoryless: True for plain SGD: each update is a function of the step number, the current
        parameters and randomness independent of the noise. Must be False if anything else carries
        over from step to step (momentum, Adam, running averages) or if the gradient depends on
        the trained model (teachers, masks or penalties computed from it).

    Raises:
      TypeError: if an argument is not a number (or numbers).
      ValueError: if an argument is out of range or a schedule has the wrong length.

    Guarantee:
      None by itself: it states what the optimizer does. The separation holds for *any* loss and
      any batches, since two clipped gradients differ by at most `2 * clip_norm`.

    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> m.initial_distance, m.separation(0, 2.0)
    (2.0, 2.2)
    """

    init_radius: float
    clip_norm: Any
    learning_rate: Any
    weight_decay: Any = 0.0
    steps: int
    reference: str = "retrained"
    memoryless: bool = True

    def __post_init__(self) -> None:
        """Checks every argument and evaluates schedules."""
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        steps = checks.positive_int("steps", self.steps)
        set_field("steps", steps)
        set_field("init_radius", checks.positive("init_radius", self.init_radius))
        for name in ("clip_norm", "learning_rate"):
            set_field(name, checks.per_step(name, getattr(self, name), steps))
        decay = checks.per_step("weight_decay", self.weight_decay, steps, zero_allowed=True)
        set_field("weight_decay", decay)
        checks.choice("reference", self.reference, REFERENCES)
        if not isinstance(self.memoryless, bool):
            raise TypeError(f"memoryless must be True or False, got {self.memoryless!r}")
        product = np.max(np.multiply(self.learning_rate, self.weight_decay))
        if product > 1:
            raise ValueError(
                f"weight_decay * learning_rate must be at most 1, got {product:g}; lower the "
                f"learning rate or the weight decay by a factor of {product:g} or more"
            )

    @property
    def initial_distance(self) -> float:
        """Largest distance between the two starts, in parameter units."""
        return self.init_radius * (2.0 if self.reference == "retrained" else 1.0)

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[steps]`: c_t = 1 - learning_rate_t * weight_decay_t, in [0, 1]."""
        decayed = np.multiply(self.learning_rate, self.weight_decay)
        return np.broadcast_to(1.0 - decayed, (self.steps,))

    @property
    def shift(self) -> np.ndarray:
        """float64 `[steps]`: s_t = 2 * learning_rate_t * clip_norm_t, in parameter units."""
        return np.broadcast_to(2.0 * np.multiply(self.learning_rate, self.clip_norm), (self.steps,))

    def separation(self, step: int, distance: float) -> float:
        """Largest distance after step `step`, before its noise, of points `distance` apart."""
        return float(self.contraction[step] * distance + self.shift[step])

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        start = {
            "retrained": "the same procedure started from a model trained without the forget set",
            "center": "the same procedure started from the centre itself",
        }[self.reference]
        memory = (
            "Each update depends on the past only through the current parameters: no momentum or "
            "other optimizer state, no running averages, no teacher, mask or penalty computed "
            "from the trained model."
            if self.memoryless
            else "State that updates carry from step to step starts fresh, not from the original "
            "training, and is discarded after the last noisy step."
        )
        return (
            f"The guarantee compares the released parameters with {start}.",
            "The centre of the ball, the frozen parameters, the architecture and the input "
            "preprocessing do not depend on the forget set.",
            "The noisy steps use retain data only, in batches drawn by a rule that does not see "
            "the forget set.",
            memory,
            "Only the parameters after the last noisy step leave: no intermediate parameters, "
            "losses, gradient norms, counters, running statistics or optimizer state.",
            "The step count and every hyperparameter were fixed without looking at the trained "
            "model or at the run.",
            "The noise key is secret and is never used again.",
            "Rounding is not accounted for: real arithmetic and exact Gaussian noise.",
        )

    def first(self, steps: int) -> "GradientClipping":
        """The mechanism that stops after the first `steps` steps of this one."""
        steps = checks.positive_int("steps", steps)
        if steps > self.steps:
            raise ValueError(f"steps must be at most {self.steps}, got {steps}")
        cut: dict[str, Any] = {
            name: value[:steps]
            for name in ("clip_norm", "learning_rate", "weight_decay")
            if isinstance(value := getattr(self, name), tuple)
        }
        return dataclasses.replace(self, steps=steps, **cut)


MECHANISMS = {"GradientClipping": GradientClipping}


def to_record(mechanism: GradientClipping) -> dict[str, Any]:
    """The mechanism as a JSON-ready dict: its class's name and every field, schedules as lists."""
    fields = {
        field.name: list(value)
        if isinstance(value := getattr(mechanism, field.name), tuple)
        else value
        for field in dataclasses.fields(mechanism)
    }
    return {"name": type(mechanism).__name__, **fields}


def from_record(record: dict[str, Any]) -> GradientClipping:
    """The mechanism that `to_record` wrote.

    Raises:
      TypeError: if a value has the wrong type.
      ValueError: if the mechanism is unknown, a field is missing or surplus, or out of range.
    """
    if not isinstance(record, dict):
        raise TypeError(f"mechanism must be an object, got {record!r}")
    fields = dict(record)
    name = fields.pop("name", None)
    if name not in MECHANISMS:
        raise ValueError(f"mechanism name must be one of {sorted(MECHANISMS)}, got {name!r}")
    kind = MECHANISMS[name]
    expected = {field.name for field in dataclasses.fields(kind)}
    if set(fields) != expected:
        difference = sorted(set(fields) ^ expected)
        raise ValueError(f"mechanism has missing or unknown fields: {', '.join(difference)}")
    return kind(**fields)
