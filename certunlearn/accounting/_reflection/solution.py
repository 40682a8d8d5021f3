"""Epsilon, delta, noise scale and curve by reflection coupling, with every error on the safe side.

docs/theory/coupling.md proves all of it. What the code relies on:

- Updates are memoryless: given the batches, both runs are moved by the same function. So pairs that
  have met stay together, and V_k(L, 0) = 0 for L >= 0.
- V_k(L, r) bounds a_k(x) - e^L a_k(y) for every test a, k steps before the end, and all |x - y| <=
  r. delta(epsilon) is at most V_T(epsilon, initial distance). V falls in L, rises in r, and is
  convex in e^L.
- Points at distance r are at most c r + s apart after an update, with any c >= 0. At c = 0 both
  runs forget what came before.
- Any pairing of positive with negative mass is valid, along the line of the two points only: noise
  across it is shared. Which mirror is chosen, and how much noise is used, never matters for
  soundness.
- Steps may be merged into blocks, all shifts first; the last block is one Gaussian, as nothing is
  observed inside it.
- Pairs are stopped at the nodes of tables. The slope of L within a cell may have either sign.
- Shifted interpolation caps every number.
"""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from certunlearn.accounting import _gaussian, _taut_string
from certunlearn.accounting._reflection import node_tables
from certunlearn.accounting._reflection.blocks import (
    BLOCKS,
    Steps,
    affordable,
    affordable_length,
    alike,
    last_of_alike,
    variants,
)
from certunlearn.accounting._reflection.node_tables import Solved
from certunlearn.accounting._reflection.noise_search import Search, search
from certunlearn.accounting.accountant_base import LEAST_NOISE_SCALE

_REFINEMENTS = 3
# How near the search for a noise scale is to end, in its logarithm: with the coarser tables, with
# coarse ones and with fine ones, where it must hold.
_ROUGH, _GUESS, _NEAR = (-0.09, 0.09), (-0.03, 0.03), (1e-4, 0.006)
# How far below interpolation's noise it begins.
_BELOW = 0.5
# Gaps of coarser and of coarse tables, as multiples of the usual, and their levels.
_COARSER, _COARSE = (2.8, 56), (1.6, 96)
# What coarse tables gain over the coarser, mostly; what fine ones gain, as a share of that, and at
# most, at this gap. Measured on runs of 40 to 10,000 steps; only where searches begin rests on it.
_USUAL_GAIN, _SHARE, _MOST, _GAIN_GAP = 0.057, 0.25, 0.0235, 0.15
_FAR = 30.0  # logarithms of ratios of delta beyond this all count as this

# Below it float64's smallest numbers are no longer small beside it; interpolation is asked alone.
LEAST_DELTA = 1e-100

# Epsilons that are read at a time.
_COLUMNS = 64
_EXACT, _NEARLY = 1e-5, 1e-3  # how near they are to the next, as a share
# Of a curve: numbers of steps that are worked out by themselves; of those read from one solution,
# the most, and the least as a share of the largest; how many solutions.
_POINTS = 6
_READ, _LEAST, _SOLVED = 128, 4.0, 6


def delta(steps: Steps, epsilon: float, delta_scale: float = 1e-5) -> float:
    """An upper bound on the delta of a run at `epsilon`.

    Args:
      steps: the run.
      epsilon: at least 0.
      delta_scale: the size of delta that the tables are made for; any value is safe.

    Returns:
      delta, at most that of shifted interpolation.
    """
    if steps.distance == 0 or _mu(steps) == 0:
        return 0.0  # one start, one law; or nothing is left to hide
    capped = float(_gaussian.delta(epsilon, _mu(steps)))
    if math.isinf(_mu(steps)) or delta_scale < LEAST_DELTA:
        return capped
    return min(capped, _profile(_solved(steps, delta_scale), epsilon))


def epsilon(steps: Steps, delta: float) -> float:
    """An upper bound on the epsilon of a run at `delta`, at most that of shifted interpolation."""
    if steps.distance == 0:
        return 0.0
    capped = float(_gaussian.epsilon(_mu(steps), delta))
    if math.isinf(capped) or capped == 0 or delta < LEAST_DELTA:
        return capped
    return min(_epsilon(solved, delta, capped) for solved in _solved(steps, delta))


def bracket(steps: Steps, delta: float, tolerance: float) -> tuple[float, float]:
    """Epsilon by the same recursion with every rounding to the one side, and to the other.

    Tables are refined until the two are within `tolerance` of each other (as a share of the
    larger), or `_REFINEMENTS` times.
    """
    if steps.distance == 0:
        return 0.0, 0.0
    capped = float(_gaussian.epsilon(_mu(steps), delta))
    if math.isinf(capped) or capped == 0 or delta < LEAST_DELTA:
        return capped, capped
    found = [_bracket(each, delta, tolerance, capped) for each in variants(steps)]
    return min(found, key=lambda ends: ends[1])


def _bracket(steps: Steps, delta: float, tolerance: float, capped: float) -> tuple[float, float]:
    """The same of the run as it is, all its noise used."""
    run, tables = affordable(steps, delta)
    low, high = 0.0, capped
    for _ in range(_REFINEMENTS + 1):
        solved = node_tables.solve(run, delta, tables)
        other = node_tables.solve(run, delta, tables, solved.policies, optimistic=True)
        high = min(high, _epsilon(solved, delta, capped))
        low = min(_epsilon(other, delta, capped), high)
        if high - low <= tolerance * high:
            break
        tables = tables._replace(gap=tables.gap / 1.5, columns=tables.columns * 3 // 2)
    return low, high


def noise_scale(steps: Steps, epsilon: float, delta: float, progress: bool = False) -> float:
    """A factor for `steps.noise` at which the run is certified for (epsilon, delta).

    Not the least to the last digit: the search stops within about 0.5% of what this proves,
    or on something larger that it has confirmed. `progress` shows a bar, if tqdm is there.
    """
    return _noise_scale_once(*_hashable(steps), epsilon, delta, progress)


@functools.lru_cache(maxsize=64)
def _noise_scale_once(
    distance: float,
    contraction: bytes,
    shift: bytes,
    noise: bytes,
    epsilon: float,
    delta: float,
    progress: bool,
) -> float:
    steps = Steps(distance, *map(np.frombuffer, (contraction, shift, noise)))
    largest = _mu(steps) / _gaussian.mu(epsilon, delta)  # what interpolation asks for
    if steps.distance == 0 or largest == 0:  # one start, one law; or nothing is left to hide
        return LEAST_NOISE_SCALE
    # At the noise that will do: which of it is of use depends on its scale.
    run, fine = affordable(steps._replace(noise=steps.noise * largest), delta)
    if len(run.noise) == 1 or delta < LEAST_DELTA:
        return largest
    top = math.log(largest)
    with _bar(progress) as advance:

        @functools.cache
        def excess(log_scale: float, wider: float = 1.0, columns: int | None = None) -> float:
            solved = []
            for each in variants(steps._replace(noise=steps.noise * math.exp(log_scale))):
                scaled, tables = affordable(each, delta)
                if columns is not None:
                    tables = tables._replace(gap=tables.gap * wider, columns=columns)
                solved.append(node_tables.solve(scaled, delta, tables, advance=advance))
            found = _profile(solved, epsilon)
            return min(max(math.log(max(found, 1e-300) / delta), -_FAR), _FAR)

        # Coarse tables tell where to begin: where they hold, less what finer ones gain.
        slope = _gaussian_slope(epsilon, delta)
        start = Search(top - _BELOW, slope, top)
        rough = search(lambda at: excess(at, *_COARSER), start, _ROUGH)
        rough_root = rough.at - excess(rough.at, *_COARSER) / rough.slope
        # Secants through distant points are too steep; near ones bear out the guess.
        start = Search(min(rough_root - _USUAL_GAIN, top), (rough.slope + slope) / 2, top)
        coarse = search(lambda at: excess(at, *_COARSE), start, _GUESS)
        root = coarse.at - excess(coarse.at, *_COARSE) / coarse.slope
        gain = min(_SHARE * max(rough_root - root, 0.0), _MOST) * fine.gap / _GAIN_GAP
        # To the middle of what is near enough, so that mostly one fine solution will do.
        start = Search(min(root - gain + sum(_NEAR) / 2, top), coarse.slope, top)
        # A little room, for the last digits of a recomputation.
        found = search(excess, start, _NEAR)
    return min(largest, math.exp(found.best) * (1 + 1e-12))


def _gaussian_slope(epsilon: float, delta: float) -> float:
    """By how much the logarithm of delta falls with that of the noise of one Gaussian, and some.

    As a first guess; it is steeper where noise serves several ends.
    """
    mu = _gaussian.mu(epsilon, delta)
    return 1.08 * math.log(float(_gaussian.delta(epsilon, mu * (1 - 1e-4))) / delta) / 1e-4


@contextlib.contextmanager
def _bar(progress: bool) -> Iterator[Callable[[int], object]]:
    if not progress or importlib.util.find_spec("tqdm") is None:
        yield lambda blocks: None
        return
    from tqdm import tqdm

    with tqdm(desc="calibrating the noise", unit="block") as bar:
        yield bar.update


def epsilon_curve(steps: Steps, delta: float) -> np.ndarray:
    """float64 `[steps + 1]`: epsilon of the run stopped after each step; infinity at 0.

    Numbers of steps in between, which are not worked out, get the epsilon of the last before: what
    follows is post-processing.
    """
    count = len(steps.noise)
    mu = _taut_string.gdp_mu_curve(steps.distance, steps.contraction, steps.shift, steps.noise)
    curve = np.asarray(_gaussian.epsilon(mu, delta))
    same = alike(steps)
    if steps.distance == 0 or delta < LEAST_DELTA or steps.noise[0] == 0:
        same = 0
    _lower_alike(curve, _first(steps, same), delta)
    for stop in np.unique(np.geomspace(1, count, _POINTS).round().astype(int)).tolist():
        if stop > same:
            curve[stop - 1] = min(curve[stop - 1], epsilon(_first(steps, stop), delta))
    return np.concatenate([[np.inf], np.minimum.accumulate(curve)])


def _lower_alike(curve: np.ndarray, steps: Steps, delta: float) -> None:
    """Lowers a curve of interpolation to what tables say of steps that are all alike.

    Those of the last blocks of a run are those of the run of so many blocks, so one solution serves
    many numbers of steps: to `_LEAST` of the largest, below which blocks should be shorter.
    """
    most = len(steps.noise)
    least = max(_LEAST, (most / BLOCKS) ** (1 / _SOLVED))
    while most > 0 and math.isfinite(curve[most - 1]):
        length, run, tables = affordable_length(_first(steps, most), delta)
        kept: list[node_tables.Table] = []
        solved = node_tables.solve(run, delta, tables, kept=kept)
        curve[most - 1] = _epsilon(solved, delta, float(curve[most - 1]))
        below = 0 if length == 1 else min(int(BLOCKS / least) * length, most // 2)
        best = math.inf
        numbers = np.geomspace(below // length + 1, max((most - 1) // length, 1), _READ)
        for number in np.unique(numbers.round().astype(int)).tolist():
            stopped = last_of_alike(run, number)
            remaining = len(stopped.noise) - 1
            # The last table kept is in units of the first block, which may be shorter.
            if not 1 <= remaining < len(kept):
                continue
            read = solved._replace(blocks=stopped, table=kept[remaining - 1])
            best = min(best, float(curve[number * length - 1]))
            curve[number * length - 1] = best = _epsilon(read, delta, best, _NEARLY)
        most = below


def _first(steps: Steps, count: int) -> Steps:
    return Steps(steps.distance, *(part[:count] for part in steps[1:]))


def _mu(steps: Steps) -> float:
    return _taut_string.gdp_mu(steps.distance, steps.contraction, steps.shift, steps.noise)


def _solved(steps: Steps, delta: float) -> tuple[Solved, ...]:
    return _solved_once(*_hashable(steps), delta)


def _hashable(steps: Steps) -> tuple[float, bytes, bytes, bytes]:
    contraction, shift, noise = (np.asarray(part, np.float64).tobytes() for part in steps[1:])
    return steps.distance, contraction, shift, noise


@functools.lru_cache(maxsize=16)
def _solved_once(
    distance: float,
    contraction: bytes,
    shift: bytes,
    noise: bytes,
    delta: float,
) -> tuple[Solved, ...]:
    steps = Steps(distance, *map(np.frombuffer, (contraction, shift, noise)))
    found = []
    for each in variants(steps):
        run, tables = affordable(each, delta)
        found.append(node_tables.solve(run, delta, tables))
    return tuple(found)


def _profile(solved: Sequence[Solved], epsilon: float) -> float:
    """The least delta at `epsilon` of several solutions."""
    return min(float(node_tables.profile(each, np.array([epsilon]))[0]) for each in solved)


def _epsilon(solved: Solved, delta: float, highest: float, near: float = _EXACT) -> float:
    """Where the profile falls to delta, from above, and by `near` of it at most; or `highest`."""
    low, high = 0.0, highest
    for _ in range(4):
        grid = np.linspace(low, high, _COLUMNS)
        holds = np.flatnonzero(node_tables.profile(solved, grid) <= delta)
        if not len(holds):
            return high
        first = int(holds[0])
        if first == 0:
            return float(grid[0])
        low, high = float(grid[first - 1]), float(grid[first])
        if high - low <= near * high:
            break
    return high
