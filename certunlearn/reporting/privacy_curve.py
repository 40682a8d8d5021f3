"""Epsilon against delta: the curve of a run, as numbers and as an SVG picture."""

import dataclasses
import math

import numpy as np

from certunlearn import accounting
from certunlearn._numerics.safe_rounding import rounded_down, rounded_up
from certunlearn.certificates import Certificate
from certunlearn.mechanisms import Separations

_DELTAS = tuple(10.0 ** (-exponent / 4) for exponent in range(4, 49))  # 1e-1 to 1e-12
_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 60
_BLUE, _ORANGE = "#0072b2", "#d55e00"  # told apart by the colour-blind, too


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run is certified for at many deltas.

    Attributes:
      points: (epsilon, delta) by shifted interpolation.
      claim: (epsilon, delta) of the certificate, by its own accountant.
      lower: an epsilon at the claim's delta that an attack reaches, or None.
    """

    points: tuple[tuple[float, float], ...]
    claim: tuple[float, float]
    lower: float | None


def curve_of(certificate: Certificate, lower: float | None) -> Curve | None:
    """The curve of a verified certificate; None if its record has no mu."""
    if not certificate.mu:
        return None
    # Two unit Gaussians at distance mu are as easy to tell apart as the runs.
    pair = Separations(initial_distance=certificate.mu, contraction=[1.0], shift=[0.0])
    points = [
        (accounting.epsilon(pair, noise_scale=1.0, delta=delta, accountant="interpolation"), delta)
        for delta in _DELTAS
    ]
    known = tuple(point for point in points if math.isfinite(point[0]))
    return Curve(known, (certificate.epsilon, certificate.delta), lower) if known else None


def to_svg(curve: Curve) -> str:
    """The curve as an SVG element. It holds numbers only."""
    epsilons = [epsilon for epsilon, _ in curve.points] + [curve.claim[0]]
    deltas = [delta for _, delta in curve.points] + [curve.claim[1]]
    ticks = _ticks(max(epsilons))
    last = ticks[-1] or 1.0
    low = math.floor(math.log10(max(min(deltas), 1e-300)))

    def x(epsilon: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * epsilon / last

    def y(delta: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * math.log10(max(delta, 10.0**low)) / low

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="epsilon against delta">',
        *(_vertical(x(tick), f"{tick:g}") for tick in ticks),
        *(_horizontal(y(10.0**power), power) for power in range(0, low - 1, -_stride(low))),
        f'<text x="{(_WIDTH + _LEFT) / 2:.0f}" y="{_HEIGHT - 14}" text-anchor="middle">'
        "epsilon (smaller is stronger)</text>",
        f'<text x="16" y="{(_HEIGHT - _BOTTOM) / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(_HEIGHT - _BOTTOM) / 2:.0f})">delta</text>',
    ]
    line = " ".join(f"{x(epsilon):.1f},{y(delta):.1f}" for epsilon, delta in curve.points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{_BLUE}" stroke-width="2.5"/>')
    claim_x, claim_y = x(curve.claim[0]), y(curve.claim[1])
    if curve.lower is not None:
        low_x = x(curve.lower)
        parts += [
            f'<line x1="{low_x:.1f}" y1="{claim_y:.1f}" x2="{claim_x:.1f}" y2="{claim_y:.1f}" '
            f'stroke="{_ORANGE}" stroke-width="5"/>',
            f'<path d="M {low_x:.1f} {claim_y - 9:.1f} v 18" stroke="{_ORANGE}" stroke-width="3"/>',
        ]
    parts.append(f'<circle cx="{claim_x:.1f}" cy="{claim_y:.1f}" r="6" fill="{_ORANGE}"/>')
    return "\n".join([*parts, "</svg>"])


def caption(curve: Curve) -> str:
    """What the picture shows, in words."""
    epsilon, delta = curve.claim
    words = (
        f"One run, and many pairs (epsilon, delta) that hold for it. The line is what shifted "
        f"interpolation certifies. The dot is the claim, epsilon = {rounded_up(epsilon)} at "
        f"delta = {rounded_up(delta)}, by the certificate's own accountant."
    )
    if curve.lower is None:
        return words
    return f"{words} The bar ends at {rounded_down(curve.lower)}, which an attack reaches."


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least the largest."""
    power = 10.0 ** math.floor(math.log10(max(largest, 1e-12) / 4))
    step = next(power * each for each in (1, 2, 5, 10) if power * each * 6 >= largest)
    return [float(f"{tick:.12g}") for tick in np.arange(math.ceil(largest / step) + 1) * step]


def _stride(low: int) -> int:
    return max(1, math.ceil(-low / 6))


def _vertical(at: float, label: str) -> str:
    bottom = _HEIGHT - _BOTTOM
    return (
        f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}" stroke="#ddd"/>'
        f'<text x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{label}</text>'
    )


def _horizontal(at: float, power: int) -> str:
    label = "1" if power == 0 else f"1e{power}"
    return (
        f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 8}" y="{at + 5:.1f}" text-anchor="end">{label}</text>'
    )
