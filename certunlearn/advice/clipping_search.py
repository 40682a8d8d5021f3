"""Proposes every hyperparameter of `GradientClipping`, by the accountants and a short search."""

import dataclasses
import math
from collections.abc import Sequence

from certunlearn import accounting, mechanisms
from certunlearn._numerics import checks

# What is tried by default: numbers of steps, and how much of the start's distance to the centre
# weight decay takes away over all of them, as steps * learning_rate * weight_decay.
STEPS = (1, 2, 4, 8)
DECAYS = (0.0, 0.5)
# A radius within this factor of the best costs nothing that anyone notices: fewer steps win.
NEAR = 1.05
# Digits of the radius, rounded down, so that it can be read and typed.
_DIGITS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """A point of the search.

    Attributes:
      steps: T.
      total_decay: steps * learning_rate * weight_decay.
      kept_radius: what is left of the radius after the steps, in parameter units.
    """

    steps: int
    total_decay: float
    kept_radius: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A mechanism with all its hyperparameters, and what they come to.

    Attributes:
      mechanism: for `unlearn`, `noise_scale` or `certunlearn plan`.
      noise_scale: standard deviation of each step's noise that the accountant asks for.
      total_noise: standard deviation of all steps' noise together, in each last parameter.
      kept_radius: the norm of what the start may keep of the old model, after weight decay.
      most_kept_radius: the largest that any mechanism can keep with so much noise; see
        `suggest_clipping`.
      tried: the grid that was searched.
    """

    mechanism: mechanisms.GradientClipping
    noise_scale: float
    total_noise: float
    kept_radius: float
    most_kept_radius: float
    tried: tuple[Tried, ...]


def suggest_clipping(
    *,
    total_noise: float,
    epsilon: float = 1.0,
    delta: float = 1e-5,
    clip_norm: float = 1.0,
    travel: float = 1.0,
    steps: Sequence[int] = STEPS,
    decays: Sequence[float] = DECAYS,
    reference: str = "retrained",
    accountant: str | None = None,
    progress: bool = False,
) -> Suggestion:
    """The `GradientClipping` that keeps most of the old model, with no more noise than you allow.

    You say how much noise the network bears. All else follows. The search takes, of all numbers of
    steps and weight decays, that which leaves the most of the start:

        maximise  init_radius * (1 - learning_rate * weight_decay)^steps
        such that the guarantee holds, the noise in x_T is at most `total_noise`, and the
                  clipped gradients can move x_T by `travel` times what the start keeps

    Why that is sensible. The certificate counts lengths in units of the noise alone, and all of
    them scale together: twice the noise allows twice the radius. So the noise that the network
    bears sets the scale. Without clipped gradients (`travel` near 0) the most is kept, which is
    `OutputPerturbation`; then the noise meets no gradient before its end. `travel = 1` lets
    gradients move the model as far as the start may lie from the centre: by interpolation that is
    where noise per step is least, gamma C1 T = C0 (Koloskova et al.). By interpolation all numbers
    of steps keep the same, so one step is proposed. Coupling charges for gradients less, the less
    the more steps there are. Of what comes within 5% of the best the fewest steps are taken, then
    the least weight decay: each step costs a gradient.

    Only public numbers may enter: every hyperparameter must be fixed without looking at the trained
    model, its distance to the centre included.

    Args:
      total_noise: largest standard deviation of all noise in one parameter of x_T, in parameter
        units. Typical: a tenth of the standard deviation of fresh weights, 0.1 / sqrt(fan_in) of
        the widest layer. Then the noise adds 1% to the variance of that layer's fresh weights.
      epsilon: target, typically 0.5 to 8.
      delta: target, well below 1 over the number of rows.
      clip_norm: C1. Only its product with the learning rate enters a certificate. At or below the
        usual norm of a gradient, each step has the full length that is paid for.
      travel: how far clipped gradients can move x_T, in units of `kept_radius`.
      steps: the numbers of steps to try.
      decays: what to try as steps * learning_rate * weight_decay; each below every number of steps.
      reference: as for `GradientClipping`.
      accountant: None for the best, which takes some seconds for each pair that is tried;
        `"interpolation"` takes none.
      progress: whether to show coupling's progress (needs tqdm).

    Returns:
      the mechanism, its noise, and the grid. The radius is rounded down to three digits.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if one is out of range.

    Guarantee:
      None by itself. `unlearn` certifies the mechanism like any other. No method that starts from a
      ball, whatever its accountant, can keep more than `most_kept_radius` with so much noise: if
      all gradients are zero, two starts at opposite ends of the ball give two Gaussians that are
      `2 * kept_radius` apart (`kept_radius` for the reference `"center"`), of standard deviation
      `total_noise`.

    >>> found = suggest_clipping(total_noise=0.01, epsilon=8.0, accountant="interpolation")
    >>> m = found.mechanism
    >>> m.steps, m.init_radius, m.clip_norm, m.learning_rate, m.weight_decay
    (1, 0.00416, 1.0, 0.00416, 0.0)
    """
    total_noise = checks.positive("total_noise", total_noise)
    clip_norm = checks.positive("clip_norm", clip_norm)
    travel = checks.positive("travel", travel)
    target = {"epsilon": epsilon, "delta": delta, "accountant": accountant, "progress": progress}
    tried, noise_of_unit = [], {}
    for count, decay in _grid(steps, decays):
        unit = _scaled(1.0, count, decay, clip_norm, travel, reference)
        noise = accounting.noise_scale(unit, **target)  # type: ignore[arg-type]
        noise_of_unit[count, decay] = noise
        in_all = unit.total_noise_scale(noise)
        assert in_all is not None
        kept = total_noise / in_all
        tried.append(Tried(steps=count, total_decay=decay, kept_radius=kept))
    best = _chosen(tried)
    kept = rounded_down(best.kept_radius)
    mechanism = _scaled(kept, best.steps, best.total_decay, clip_norm, travel, reference)
    noise = kept * noise_of_unit[best.steps, best.total_decay]
    in_all = mechanism.total_noise_scale(noise)
    assert in_all is not None
    return Suggestion(
        mechanism=mechanism,
        noise_scale=noise,
        total_noise=in_all,
        kept_radius=kept,
        most_kept_radius=in_all / _noise_of_unit_ball(epsilon, delta, reference),
        tried=tuple(tried),
    )


def _grid(steps: Sequence[int], decays: Sequence[float]) -> list[tuple[int, float]]:
    """All pairs, fewest steps and least decay first."""
    counts = sorted({checks.steps("steps", each) for each in steps})
    shares = sorted({checks.real("decays", each) for each in decays})
    if not counts or not shares:
        raise ValueError(f"steps and decays must not be empty, got {steps!r} and {decays!r}")
    if not (shares[0] >= 0 and shares[-1] < counts[0]):
        raise ValueError(
            f"decays must be at least 0 and below every number of steps, got {decays!r} with "
            f"steps={counts[0]}: a step may not take the whole start away"
        )
    return [(count, share) for count in counts for share in shares]


def _scaled(
    kept: float, steps: int, decay: float, clip_norm: float, travel: float, reference: str
) -> mechanisms.GradientClipping:
    """The mechanism that keeps `kept` of a start, and whose gradients can move it `travel` x that.

    Every step takes a share decay / steps of the way to the centre.
    """
    factor = 1 - decay / steps
    reached = math.fsum(factor**step for step in range(steps))  # by steps of length one
    learning_rate = kept * travel / (reached * clip_norm)
    return mechanisms.GradientClipping(
        init_radius=kept / factor**steps,
        clip_norm=clip_norm,
        learning_rate=learning_rate,
        weight_decay=decay / steps / learning_rate,
        steps=steps,
        reference=reference,
    )


def _chosen(tried: Sequence[Tried]) -> Tried:
    """The first, and so the cheapest, that is as good as the best."""
    most = max(each.kept_radius for each in tried)
    return next(each for each in tried if each.kept_radius * NEAR >= most)


def rounded_down(value: float) -> float:
    """The number with three digits, never more than it is.

    >>> rounded_down(0.123999), rounded_down(2.0), rounded_down(1234.5)
    (0.123, 2.0, 1230.0)
    """
    unit = math.floor(math.log10(value)) - _DIGITS + 1
    digits = math.floor(value / 10.0**unit * (1 + 1e-12))
    return min(float(f"{digits}e{unit}"), value)


def _noise_of_unit_ball(epsilon: float, delta: float, reference: str) -> float:
    """The standard deviation that one Gaussian needs for starts in a ball of radius 1."""
    ball = mechanisms.OutputPerturbation(init_radius=1.0, reference=reference)
    return accounting.noise_scale(ball, epsilon=epsilon, delta=delta)
