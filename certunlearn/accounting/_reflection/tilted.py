"""Tilted pooling: pairs of a step whose L is a line in their distance; docs/theory/tilted.md.

All lengths are in units of the step's noise. What the code relies on:

- Positive and negative mass are cut into cells, so that the ends of cell i are at distances
  nodes[i] and nodes[i + 1]. Each cell's two parts are paired as independent, tilted by e^(m v) with
  a slope m of the cell's own: a pair at distance D then has L = alpha + m D, and alpha is the
  logarithm of the ratio of the cell's two tilted masses. Where the cuts are, and which slopes are
  taken, never matters for soundness.
- Each pair then runs on, as a Brownian pair with the mirror m, to a node of its cell.
"""

import concurrent.futures
from typing import NamedTuple

import numpy as np
import scipy  # its parts load when they are first used

from certunlearn.accounting._reflection.kernel import Entries, Operator, Rows, Target

# Ways to cut that are tried: tilts, each this many times the next, by bends, which are in units of
# the noise's inverse variance.
_RATIO = 1.1
_BENDS = np.array([0.0, 0.012, 0.025, 0.04, 0.06])
# For a level L, tilts from and to these shares of it are tried; at every so many rows and levels.
_LEAST_TILT, _MOST_TILT, _ROWS_APART, _LEVELS_APART = 0.03, 1.1, 8, 8
# Tilts of a row, as shares of its highest L.
_SHARES = _RATIO ** -np.arange(37.0)

# Rows farther apart than this are left to the mirrors.
FARTHEST = 10.0
# Covers the quadrature and the rounding of weights, and of the two masses in alpha.
_RELATIVE, _LESS, _ABSOLUTE = 1e-6, 1e-7, 1e-290
# By how much the logarithms of a cell's two densities may change along it, as the proof asks for.
_STEEPEST, _WIDEST_SQUARED = 1.0, 0.2
_HIGHEST = 600.0  # logarithms of densities, so that they stay within float64
_DEEP = 12.0  # deviations out to which cuts are looked for
_PLACES = 160
_THREADS = 2

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(7)
_POINTS, _WEIGHTS = (_POINTS + 1) / 2, _WEIGHTS / 2
_MOMENTS = np.stack([_WEIGHTS * _POINTS**i for i in range(3)], axis=1)


class Step(NamedTuple):
    """One row: two displaced points, and where the noise may lead.

    Attributes:
      rho: the separation.
      time: the share of the noise that is used before nodes are looked out for.
      near: the last node to be hit almost surely.
      nodes: float64 `[nodes]`: the ends of cells, distances; the first is 0.
      optimistic: every rounding to the other side.
    """

    rho: float
    time: float
    near: int
    nodes: np.ndarray
    optimistic: bool


class Cuts(NamedTuple):
    """Ways to cut the mass of one row into cells.

    Attributes:
      tilt: float64 `[cuts]`: the L of which nothing is left for a slope but the bend.
      starts: float64 `[cuts, nodes]`: where positive mass is cut, from where it begins.
      bend: float64 `[cuts, cells]`: by what a cell's slope is less than the state's.
      positive: three float64 `[cuts, cells]`: moments 0 to 2 of the place in the cell, from 0 to 1,
        by the tilted positive density in units of a Gaussian's at the cell's start.
      negative: two: moments 1 and 2 by the negative one, normalised.
      alpha: float64 `[cuts, nodes]`: L at each node less the state's slope times its distance.
      used: int `[cuts]`: how many cells are of use.
    """

    tilt: np.ndarray
    starts: np.ndarray
    bend: np.ndarray
    positive: list[np.ndarray]
    negative: list[np.ndarray]
    alpha: np.ndarray
    used: np.ndarray


def cut(step: Step, tilts: np.ndarray, bends: np.ndarray) -> Cuts:
    """The row's cuts by tilts and bends, float64 `[cuts]` each."""
    rho, t, nodes = step.rho, step.time, step.nodes
    starts = _starts(step, tilts, bends)
    ends = nodes - starts
    z = tilts[:, None] * t / rho
    h, dx, dy = np.diff(nodes), np.diff(starts, axis=1), np.diff(ends, axis=1)
    bend = bends[:, None] * ((starts[:, :-1] + dx / 2) * dx + (ends[:, :-1] + dy / 2) * dy) / h
    # Logarithms of the densities, x right and y left of z*, are rate * distance - its square / 2t.
    sides = ((starts, (rho / 2 - z) / t, -bend), (ends, (rho / 2 + z) / t, bend))
    usable = np.ones(bend.shape, bool)
    for cuts, rate, more in sides:
        first, width = cuts[:, :-1], np.diff(cuts, axis=1)
        steep = rate + more - np.stack([first, cuts[:, 1:]]) / t
        usable &= (width > 0) & (width**2 < _WIDEST_SQUARED * t)
        usable &= width * np.maximum(np.abs(steep).max(axis=0), rho / t) < _STEEPEST
        usable &= np.abs(first * rate) + first**2 / (2 * t) < _HIGHEST
    used = np.where(usable.all(axis=1), usable.shape[1], usable.argmin(axis=1))
    cell = np.arange(len(h)) < used[:, None]
    masses, heights = [], []
    for cuts, rate, more in sides:
        first = np.where(cell, cuts[:, :-1], 0.0)
        width = np.where(cell, np.diff(cuts, axis=1), h / 2)  # any, where it is not used
        slope = np.where(cell, rate + more - first / t, 0.0)
        inside = width[..., None] * _POINTS
        density = np.exp(inside * (slope[..., None] - inside / (2 * t)))
        density *= -np.expm1(-rho / t * (first[..., None] + inside))
        masses.append(density @ _MOMENTS * width[..., None])
        heights.append(first * rate - first**2 / (2 * t))
    positive, negative = (list(np.moveaxis(m, -1, 0)) for m in masses)
    alpha = heights[1] - heights[0] + np.log(negative[0]) - np.log(positive[0])
    if step.optimistic:
        at_nodes = _largest(np.where(cell, alpha, -np.inf), np.where(cell, bend * h, 0.0))
    else:
        at_nodes = -_largest(np.where(cell, _LESS - alpha, -np.inf), np.where(cell, -bend * h, 0.0))
    return Cuts(
        tilts,
        np.where(np.arange(len(nodes)) <= used[:, None], starts, 0.0),
        np.where(cell, bend, 0.0),
        positive,
        [m / negative[0] for m in negative[1:]],
        np.where(np.isfinite(at_nodes), at_nodes, 0.0),
        used,
    )


def _largest(lower: np.ndarray, fall: np.ndarray) -> np.ndarray:
    """At each node the larger of its two cells' values, from those at cells' lower nodes."""
    below = np.pad(lower, ((0, 0), (0, 1)), constant_values=-np.inf)
    above = np.pad(lower - fall, ((0, 0), (1, 0)), constant_values=-np.inf)
    return np.maximum(below, above)


def _starts(step: Step, tilts: np.ndarray, bends: np.ndarray) -> np.ndarray:
    """Where positive mass is cut, `[cuts, nodes]`; NaN too far out.

    By equal shares of the tilted tails, about.
    """
    rho, t, nodes = step.rho, step.time, step.nodes
    shares, places = [], []
    for sign in (-1, 1):
        rate = (rho / 2 + sign * tilts[:, None] * t / rho) / t
        inverse = 1 / t - sign * bends[:, None]  # bent densities are narrower right, wider left
        end = np.maximum(0.0, rate / inverse) + _DEEP / np.sqrt(inverse)
        place = np.linspace(0, 1, _PLACES) * end
        log = place * (rate - place * inverse / 2)
        density = np.exp(log - log.max(axis=1, keepdims=True)) * -np.expm1(-rho * place / t)
        mass = (density[:, 1:] + density[:, :-1]) / 2
        above = np.cumsum(mass[:, ::-1], axis=1)[:, ::-1]
        below = np.cumsum(mass, axis=1) - mass
        total = above[:, :1]
        near = np.log1p(-np.minimum(below / total, 0.9))
        log_tail = np.where(below < total / 2, near, np.log(np.maximum(above / total, 1e-300)))
        # Linear in the distance near 0 and in a Gaussian's tail.
        shares.append(np.sqrt(np.maximum(-log_tail, 0)))
        places.append(place[:, :-1])
    found = np.empty((len(tilts), len(nodes)))
    for i, (positive, negative, x, y) in enumerate(zip(*shares, *places, strict=True)):
        distance = x + np.interp(positive, negative, y, right=1e9)
        found[i] = np.interp(nodes, distance, x, right=np.nan)
    found[:, 0] = 0  # no mass is left out
    return found


def weights(
    step: Step, cuts: Cuts, which: np.ndarray, levels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights and L at the nodes, `[states, nodes]`, and the rest `[states]`, charged at 1.

    Args:
      step: the row.
      cuts: of the row.
      which: int `[states]`: the cut of each state.
      levels: float64 `[states]`: L.
    """
    rho, t, nodes = step.rho, step.time, step.nodes
    starts, used = cuts.starts[which], cuts.used[which]
    slope = ((levels - cuts.tilt[which]) / rho)[:, None]
    line = cuts.alpha[which] + slope * nodes
    # Pairs whose L could be negative are of no use: their cells end the list.
    number = np.arange(len(nodes))
    below = (line < 0) & (number <= used[:, None])
    first = np.where(below.any(axis=1), below.argmax(axis=1), len(nodes))
    used = np.minimum(used, np.maximum(first - 1, 0))
    cell = number[:-1] < used[:, None]

    h, dx = np.diff(nodes), np.diff(starts, axis=1)
    dy = h - dx
    slopes = np.where(cell, slope - cuts.bend[which], 0.0)
    away = (levels * t / rho - rho / 2)[:, None] + starts[:, :-1]
    scale = np.exp(-(away**2) / (2 * t)) / (np.sqrt(2 * np.pi * t) * h)
    # Lines above e^(-slope x / 2) and e^(slope y / 2) within a cell: at its start, and the rise.
    start_x, rise_x = _line(-slopes * dx / 2, step.optimistic)
    start_y, rise_y = _line(slopes * dy / 2, step.optimistic)
    p0, p1, p2 = (m[which] for m in cuts.positive)
    n1, n2 = (m[which] for m in cuts.negative)
    right, left = start_x * p0 + rise_x * p1, start_y + rise_y * n1
    far_x, far_y = dx * (start_x * p1 + rise_x * p2), dy * (start_y * n1 + rise_y * n2)
    near_x, near_y = dx * right - far_x, dy * left - far_y
    up = scale * (far_x * left + right * far_y) * np.exp(-slopes * h / 2)
    down = scale * (near_x * left + right * near_y)
    weight = np.zeros_like(starts)
    weight[:, :-1] = np.where(cell, np.maximum(down, 0), 0)
    weight[:, 1:] += np.where(cell, np.maximum(up, 0), 0)
    line = np.maximum(line, 0)
    if step.optimistic:
        return weight, line, np.zeros(len(levels))
    # What lies beyond the last cell of use.
    end = np.take_along_axis(starts, used[:, None], axis=1)[:, 0]
    beyond = scipy.special.ndtr((rho / 2 - levels * t / rho - end) / np.sqrt(t))
    rest = np.where(used > 0, (1 + _RELATIVE) * beyond + _ABSOLUTE, 1.0)
    return (1 + _RELATIVE) * weight, line, rest


def _line(exponent: np.ndarray, lower: bool) -> tuple[np.ndarray, np.ndarray]:
    """Start and rise of a line in u above e^(exponent * u) for u from 0 to 1, or below it."""
    if lower:
        middle = np.exp(exponent / 2)
        return middle * (1 - exponent / 2), middle * exponent
    return np.ones_like(exponent), np.expm1(np.minimum(exponent, _HIGHEST))


def _entries(step: Step, weight: np.ndarray, line: np.ndarray, target: Target) -> Entries:
    """Weights and L at the nodes, `[states, nodes]` each, shared by the levels around L."""
    number = np.arange(len(step.nodes))
    width = target.spacing[: len(number)]
    level = np.minimum(line / width, target.columns - 2).astype(np.int32)
    over = np.clip(line - level * width, 0, width)
    base = (number + np.where(number > step.near, len(target.nodes), 0)) * target.columns
    place = (base + level).astype(np.int32)
    if step.optimistic:
        return Entries(weight, over / width, place)
    # The chord in e^L; rounded down, for values fall and the truncated series is below e^x - 1.
    share = np.clip((over + over**2 / 2 + over**3 / 6) / np.expm1(width), 0, 1)
    return Entries(weight * (1 - share), weight * share, place)


def _step(rows: Rows, row: int, target: Target, tail: float, optimistic: bool = False) -> Step:
    rho = float(rows.separation[row])
    end = int(np.searchsorted(target.nodes[: target.size], rho + 2 * tail)) + 2
    nodes = target.nodes[: min(end, target.size)]
    return Step(rho, float(rows.time[row]), int(rows.near[row]), nodes, optimistic)


def _matrix(
    step: Step, cuts: Cuts, which: np.ndarray, levels: np.ndarray, target: Target
) -> tuple[Entries, np.ndarray]:
    weight, line, rest = weights(step, cuts, which, levels)
    return _entries(step, weight, line, target), rest


def _ways(tilts: np.ndarray) -> np.ndarray:
    """Tilts by bends: float64 `[ways, 2]`."""
    return np.stack(np.meshgrid(tilts, _BENDS, indexing="ij"), axis=-1).reshape(-1, 2)


def _tried(
    step: Step, ways: np.ndarray, levels: np.ndarray, target: Target, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the ways is best at each level, and the value there; the last and 1 if none is."""
    tilts, bends = ways.T
    in_reach = (_LEAST_TILT * levels[:, None] <= tilts) & (tilts <= _MOST_TILT * levels[:, None])
    state, which = np.nonzero(in_reach)
    found = np.ones((len(levels), len(ways)))
    if len(state):
        matrix, rest = _matrix(step, cut(step, tilts, bends), which, levels[state], target)
        found[state, which] = matrix.times(values.reshape(-1)) + rest
    best = np.where(in_reach.any(axis=1), found.argmin(axis=1), len(ways) - 1)
    return best, found.min(axis=1)


def _spread(best: np.ndarray, levels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Ways for all levels, from the best of some: the nearest's bend, and its share of the level.

    Args:
      best: int `[asked]`: numbers of ways, those of `_SHARES`.
      levels: float64 `[levels]`.
      asked: int `[asked]`: of the levels.
    """
    nearest = np.abs(np.arange(len(levels))[:, None] - asked).argmin(axis=1)
    tilt, bend = np.divmod(best[nearest], len(_BENDS))
    ratio = np.maximum(levels, levels[1]) / np.maximum(levels[asked[nearest]], levels[1])
    tilt = tilt - np.round(np.log(ratio) / np.log(_RATIO)).astype(int)
    return np.asarray(np.clip(tilt, 0, len(_SHARES) - 1) * len(_BENDS) + bend)


def operator(
    rows: Rows, target: Target, tail: float, values: np.ndarray, optimistic: bool = False
) -> tuple[np.ndarray, Operator | None]:
    """Which of `rows` tilts serve, and the step from those, by the cuts that are best for `values`.

    Args:
      rows: where from; their mirrors are not read.
      target: where to.
      tail: deviations of the noise beyond which everything counts as 1.
      values: as `kernel.Operator` takes them, for steps that are not merged; not optimistic.
      optimistic: every rounding to the other side.
    """
    near = np.flatnonzero(rows.separation <= FARTHEST)
    if not len(near):
        return near, None
    some = np.unique(np.append(np.arange(0, len(near), _ROWS_APART), len(near) - 1))

    def choose(row: int) -> np.ndarray:
        step, levels = _step(rows, row, target, tail), rows.levels[row]
        asked = np.unique(np.append(np.arange(0, len(levels), _LEVELS_APART), [1, len(levels) - 1]))
        best = _tried(step, _ways(levels[-1] * _SHARES), levels[asked], target, values)[0]
        return _spread(best, levels, asked)

    def make(number: int) -> tuple[Entries, np.ndarray]:
        row = near[number]
        step, levels = _step(rows, row, target, tail, optimistic), rows.levels[row]
        used, which = np.unique(chosen[np.abs(some - number).argmin()], return_inverse=True)
        tilts, bends = _ways(levels[-1] * _SHARES)[used].T
        return _matrix(step, cut(step, tilts, bends), which, levels, target)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        chosen = list(pool.map(choose, near[some]))
        matrices, rests = zip(*pool.map(make, range(len(near))), strict=True)
    matrix = tuple((each,) for each in matrices)
    return near, Operator(matrix, np.concatenate(rests), geometric=optimistic)


def least(
    row: Rows, target: Target, tail: float, values: np.ndarray, epsilons: np.ndarray
) -> np.ndarray:
    """float64 `[epsilons]`: from one row, the least of what is tried; not optimistic."""
    if row.separation[0] > FARTHEST:
        return np.ones(len(epsilons))
    step, positive = _step(row, 0, target, tail), epsilons > 0
    found = np.ones(len(epsilons))
    if positive.any():
        levels = epsilons[positive]
        # The same tilts whatever else is asked.
        ends = np.log([_LEAST_TILT * levels.min(), _MOST_TILT * levels.max()]) / np.log(_RATIO)
        tilts = _RATIO ** np.arange(np.ceil(ends[0]), ends[1])
        grid = _tried(step, _ways(tilts), levels, target, values)[1]
        # One ratio for all pairs, which is best where a reset follows.
        even = cut(step, levels, np.zeros(len(levels)))
        matrix, rest = _matrix(step, even, np.arange(len(levels)), levels, target)
        found[positive] = np.minimum(grid, matrix.times(values.reshape(-1)) + rest)
    return found
