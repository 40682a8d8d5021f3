"""Shifted interpolation, exactly: the best way to close the distance between two runs.

docs/theory/shifted_interpolation.md derives it (after Bok, Su & Altschuler 2024). What the code
relies on, with w_t the product of c_k over t < k < tau:

- The least mu for a run of tau steps is the root of the energy sum (dS)^2 / dV of the lower convex
  hull of (0, 0), (V_1, S_1), ..., (V_tau, S_tau), V_j = sum_{t<j} (w_t sigma_t)^2 and
  S_j = initial_distance * (product of c_k over k < tau) + sum_{t<j} w_t s_t.
- One hull, built point by point, serves every tau: segments are kept in the units of a step, with
  the factor that leads to the next segment's.
- Any other path under S that ends at S_tau costs no less, and is a proof, too.
- A diameter makes every step a start of two points that far apart, if the run is memoryless.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

_STARTS = 50
# Steps of all those runs together, which are fewer then: each takes half a microsecond.
_MOST_STARTED = 5_000_000
# Segments that grow beyond this are kept in the units of an earlier step, within float64.
_LARGE = 1e120


def gdp_mu(
    initial_distance: float,
    contraction: ArrayLike,
    shift: ArrayLike,
    noise_scale: ArrayLike,
    memoryless: bool = True,
    diameter: float = math.inf,
) -> float:
    """The least mu for which shifted interpolation proves mu-GDP of the run's last parameters.

    Args:
      initial_distance: largest distance of the two starts, in parameter units.
      contraction: float array `[steps]` (or a number): c_t >= 0.
      shift: float array `[steps]` (or a number): s_t >= 0, in parameter units.
      noise_scale: float array `[steps]` (or a number): standard deviation sigma_t >= 0 of the noise
        in every coordinate, in parameter units. A step without noise is folded into the next.
      memoryless: whether updates depend on the past through the current parameters only. Then
        everything after any step tau is post-processing, and the least mu over tau holds.
      diameter: largest distance of two points that a step can end at, after its noise; of use if
        `memoryless`.

    Returns:
      mu >= 0; infinity if no noise follows a shift.

    Raises:
      TypeError: if something is not a number.
      ValueError: if it is negative or not finite, or the lengths differ.

    Guarantee:
      For any updates whose separation is at most c_t r + s_t, given any common history, followed
      by independent noise N(0, sigma_t^2 I), the last parameters of two runs are mu-GDP. Optimizer
      state may be carried across steps if `memoryless` is False. Float64 arithmetic; the relative
      error is of the order of 1e-13.

    Source:
      Bok, Su & Altschuler (2024), Theorem 3.1 and Section 4; exact optimisation:
      docs/theory/shifted_interpolation.md.

    >>> gdp_mu(2.0, [1.0], [0.0], [1.0])
    2.0
    >>> round(gdp_mu(2.0, [1.0] * 4, 0.5, 1.0), 12)  # (2 + 4 * 0.5) / sqrt(4)
    2.0
    """
    curve = gdp_mu_curve(initial_distance, contraction, shift, noise_scale, memoryless, diameter)
    return float(curve[-1])


def gdp_mu_curve(
    initial_distance: float,
    contraction: ArrayLike,
    shift: ArrayLike,
    noise_scale: ArrayLike,
    memoryless: bool = True,
    diameter: float = math.inf,
) -> np.ndarray:
    """`gdp_mu` of the run stopped after 1, 2, ... steps; same arguments, float64 `[steps]`.

    >>> gdp_mu_curve(2.0, 1.0, [0.0, 0.0], 1.0).round(4).tolist()
    [2.0, 1.4142]
    """
    distance = _checked("initial_distance", initial_distance)
    if distance.ndim:
        raise ValueError(f"initial_distance must be one number, got shape {distance.shape}")
    if math.isnan(diameter) or diameter < 0:
        raise ValueError(f"diameter must be at least 0, got {diameter!r}")
    per_step = {
        "contraction": _checked("contraction", contraction),
        "shift": _checked("shift", shift),
        "noise_scale": _checked("noise_scale", noise_scale),
    }
    lengths = {a.shape for a in per_step.values() if a.ndim} or {(1,)}
    length = lengths.pop()
    if lengths or len(length) != 1 or length[0] == 0:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in per_step.items())
        raise ValueError(f"arrays must have one common length [steps] of at least 1, got {shapes}")
    arrays = [np.broadcast_to(a, length).tolist() for a in per_step.values()]
    curve = _mu(_energies(float(distance), *arrays))
    if math.isfinite(diameter) and memoryless:  # else histories would have to be common
        for start in _starts(length[0]):
            later = _mu(_energies(diameter, *(array[start:] for array in arrays)))
            curve[start:] = np.minimum(curve[start:], later)
    return np.minimum.accumulate(curve) if memoryless else curve


def _starts(steps: int) -> list[int]:
    """Steps that a run is taken to start after: some, as any will do, and all near the end."""
    count = min(_STARTS, max(steps - 1, 0), _MOST_STARTED // steps)
    spread = np.linspace(1, steps - 1, count)
    return sorted({*spread.round().astype(int).tolist(), *range(max(1, steps - _STARTS), steps)})


def _checked(name: str, value: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, got {value!r}") from error
    wrong = ~(np.isfinite(array) & (array >= 0))
    if np.any(wrong):
        raise ValueError(f"{name} must be finite and at least 0, got {float(array[wrong][0])!r}")
    return array


def _energies(
    distance: float, contraction: list[float], shift: list[float], noise_scale: list[float]
) -> list[float]:
    """Energy of the hull after each step.

    A stack holds the hull's segments as (rise dS, run dV, factor, energy up to and with it). The
    factor converts a segment's units into those of the one above it, and the top's into the
    current step's: dS by the factor, dV by its square.
    """
    stack: list[tuple[float, float, float, float]] = []
    energies = []
    start = distance
    for c, s, sigma in zip(contraction, shift, noise_scale, strict=True):
        rise, run, factor, own = c * start + s, sigma * sigma, c, 1.0
        start = 0.0
        if c == 0:
            stack.clear()  # what came before is forgotten, however large it has become
        # The hull's slopes must increase: what rises more steeply before is merged with what
        # follows. Cross-multiplied slopes, so that a noiseless step (run 0) needs no division.
        while stack:
            below_rise, below_run, below_factor, _ = stack[-1]
            factor_down = below_factor * factor
            if below_rise * run < rise * below_run * factor_down:
                break
            stack.pop()
            if factor_down > 1:
                if below_rise == below_run == 0:
                    factor = factor_down  # which may be infinite: nothing to be converted
                    continue
                grown = max(factor_down * below_rise, factor_down * factor_down * below_run)
                if grown > _LARGE:
                    # In the units of the earlier, as in the later's it would be beyond float64.
                    # Once the factor itself is, what is added is 0: noise that is left out is on
                    # the safe side, and there is no rise then, or the two would not be merged.
                    rise = below_rise + rise / factor_down
                    run = below_run + run / factor_down / factor_down
                    factor, own = 1.0, own * factor_down
                    continue
            rise += factor_down * below_rise
            run += factor_down * factor_down * below_run
            factor = factor_down
        if stack:
            below_rise, below_run, below_factor, below_energy = stack[-1]
            stack[-1] = (below_rise, below_run, below_factor * factor, below_energy)
        before = stack[-1][3] if stack else 0.0
        energy = before + _energy(rise, run)
        stack.append((rise, run, own, energy))
        energies.append(energy)
    return energies


def _energy(rise: float, run: float) -> float:
    if rise == 0:
        return 0.0
    return rise * rise / run if run > 0 else math.inf


def _mu(energies: list[float]) -> np.ndarray:
    found = np.sqrt(energies)
    return np.where(np.isnan(found), np.inf, found)  # numbers beyond float64 prove nothing
