"""Reflection coupling: what plain SGD needs, with every error on the safe side.

**The quantity.** Updates are memoryless: the parameters after step t are x + u_t(x) + noise with
one function u_t for both runs (given the batches, which both share). For a test a_0 with values in
[0, 1] let a_k(x) be its expectation with k steps to go from x. All that an accountant needs is a
function V_k(L, r) with

    a_k(x) - e^L a_k(y) <= V_k(L, r)    whenever |x - y| <= r, for every test and updates,

for then delta(epsilon) <= V_T(epsilon, initial distance). V_0 = 1 for r > 0, and V_k(L, 0) = 0
for L >= 0. For L < 0 the complement of the test gives V(L) = 1 - e^L + e^L V(-L). In g = e^L both
sides are linear for fixed points, so a chord in g between two upper bounds is an upper bound.

**One step.** In units of the step's noise let the displaced points be rho apart, p = N(rho/2, 1)
and q = N(-rho/2, 1) along the line through them. Then a_k(x) - g a_k(y) is the integral of a_{k-1}
against p - g q, which is positive right of z* = L / rho. *Any* pairing of its positive mass w with
negative mass n proves a bound: the integral of w V_{k-1}(log(n/w), distance of the pair). Pairs
are mirror images in m = (1 - theta) z*, 0 <= theta < 1; of several theta the best is taken for
each (L, rho). A pair at distance D, of which the positive one is at m + D / 2, has

    L' = L + m (D - rho) + log((1 - e^(-rho (D + D*) / 2)) / (1 - e^(-rho (D - D*) / 2)))

and positive mass p (1 - e^(-rho (D - D*) / 2)), where D* = 2 theta z* is where that begins.

**Smaller separations need no maximum.** Let C be the functions a with a(v) - g a(v') <= V(L,
|v - v'|) for all pairs, V nondecreasing in r. For rho' < rho the kernel v -> c v + sqrt(1 - c^2) Z,
c = rho' / rho, maps N(+-rho/2, 1) to N(+-rho'/2, 1), and averaging a member of C over it (the same
Z at all points) gives a member of C, since distances shrink. So the best value at rho' is at most
that at rho, hence at most the value of any pairing at rho. If V is not monotone, the argument holds
for its lower envelope inf over r' >= r of V(L, r'), which is valid and not above V.

**Brownian pairs.** A single noise, or several with no shift between them, is one Brownian motion.
A pair with mirror m moves as x = W_t and y = 2 m t - W_t. Its distance D is a Brownian motion of
rate 4 and drift -2 m, and by Girsanov's theorem L moves along a line, L + m (D - rho). If it meets,
at L' >= 0, it is worth V(L', 0) = 0. It may be stopped at any stopping time: for what is left of
the noise both move alike, which keeps V. Under the positive measure, alive pairs at time t have
density e^(-m (D - rho) / 2 - m^2 t / 2) (phi(D - rho) - phi(D + rho)), where phi is that of
variance 4 t; with the logarithm above, which is for one noise only, phi(D - rho)
(1 - e^(-rho (D - D*) / (2 t))) takes the place of the difference.

**Steps of a long run** are merged into blocks: all shifts first, then all noise, in one motion.
Drive two pairs by the same noise with the same m, the one displaced step by step as an adversary
likes, the other by the most there can be at once. Their L are the same, as it moves with the noise
only. The second is farther apart by at least what is outstanding; so it does not meet sooner, and
ends at least as far apart. The first meets at L' >= 0 since m <= z* for the larger separation.
(Contraction changes nothing: in units in which it is 1, shifts and noise grow.) So a block of k
steps is bounded by contraction prod c and shift sum w s, followed by Brownian pairs in noise of
variance sum (w sigma)^2, w the product of the later contractions. Blocks whose shift is small go
without the logarithm, too, as it gains little there. In the first steps, while the two are too far
apart to meet, both move alike, and the noise is not used.

**Between the nodes nothing is interpolated.** Bounds are stored at some distances only, so each
pair is stopped at one: from time t = 1 - eta on, when it reaches a node. From u of the way between
two nodes h apart it reaches the upper one first with weight e^(-m h (1 - u) / 2) sinh(m h u / 2) /
sinh(m h / 2), which is a hat function but for the tilt that belongs to L. What is lost is noise, a
share of at most eta, however many steps there are. A pair that has no node by the time 1 is counted
*in addition*, as far apart as the upper node: it is so with a chance below 4 min(u, 1 - u) times
e^-x / (1 - e^-8x), x = 2 pi^2 eta / h^2. (The series for a Brownian motion in an interval, with
sin(k pi u) <= k sin(pi u) <= k pi min(u, 1 - u); its tilt has the factor e^(-m^2 eta / 2), which is
below what the sinh is short of the hat by, if eta >= h^2 / 12.) With the logarithm, L on the way to
either node is a chord below it: it is convex, so nodes take the least of the tangents in the
middles of their two cells. 1 - e^(...) is concave and counts as its tangent; exponentials of the
tilt count as quadratics above them. From D* to the next node everything counts as at that node.
Mass beyond the tables or a state's window counts as 1 (left of the window, that of positive
distances); L beyond the highest level, as that level.

**Optimistic** values take every one of these to the other side: nodes are reached after the time 1,
by extra noise; nothing is missed or beyond; chords and tangents change places; values between
levels are geometric means, which are below V where it is log-concave in L, as it is for Gaussians.
They are not a bound on the truth, and that they are below the exact recursion is shown by argument
and comparison with finer tables, not proved. They say what finer tables could still gain.

**Cost.** The same for 50 steps as for a million: blocks are few, a step is a sparse matrix, and
equal steps share one. Where weight decay forgets, blocks must be short against its memory, and
are more.

Source: ours. Reflection coupling is due to Lindvall & Rogers (1986); privacy profiles and their
discretisation by chords, to Doroshenko et al. (2022).
"""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from certunlearn.accounting import _gaussian, _taut_string
from certunlearn.accounting._reflection import node_tables
from certunlearn.accounting._reflection.blocks import Steps, affordable
from certunlearn.accounting._reflection.node_tables import Resolution, Solved
from certunlearn.accounting.accountant import LEAST_NOISE_SCALE

_REFINEMENTS = 3
# A search for a noise scale, in logarithms of it: its longest step towards more noise, the share of
# a step towards less that it dares, and when it is content, on coarse tables and on fine ones.
_STRIDE, _SHORT, _GUESS, _NEAR = 0.5, 0.92, 0.03, 0.006
_SOLUTIONS = 8  # on either tables, at most
_FAR = 30.0  # logarithms of ratios of delta beyond this all count as this

# Below it the windows of tables outgrow what the proof allows; interpolation is asked alone.
LEAST_DELTA = 1e-20

_COLUMNS = 16
_POINTS = 6  # of a curve that are worked out


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
    solved = _solved(steps, delta_scale)
    return min(capped, float(node_tables.profile(solved, np.array([epsilon]))[0]))


def epsilon(steps: Steps, delta: float) -> float:
    """An upper bound on the epsilon of a run at `delta`, at most that of shifted interpolation."""
    if steps.distance == 0:
        return 0.0
    capped = float(_gaussian.epsilon(_mu(steps), delta))
    if math.isinf(capped) or capped == 0 or delta < LEAST_DELTA:
        return capped
    return _epsilon(_solved(steps, delta), delta, capped)


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
    run, tables = affordable(steps, delta)
    low, high = 0.0, capped
    for _ in range(_REFINEMENTS + 1):
        solved = node_tables.solve(run, delta, tables)
        other = node_tables.solve(run, delta, tables, solved.policies, optimistic=True)
        high = min(high, _epsilon(solved, delta, capped))
        low = min(_epsilon(other, delta, capped), high)
        if high - low <= tolerance * high:
            break
        tables = Resolution(tables.gap / 1.5, tables.columns * 3 // 2)
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
    coarse = Resolution(fine.gap * 2, 56)
    top = math.log(largest)
    with _bar(progress) as advance:

        @functools.cache
        def excess(log_scale: float, tables: Resolution) -> float:
            scaled, usual = affordable(
                steps._replace(noise=steps.noise * math.exp(log_scale)), delta
            )
            # As the claim will be derived again, or coarser.
            used = tables if tables.gap > usual.gap else usual
            solved = node_tables.solve(scaled, delta, used, advance=advance)
            found = float(node_tables.profile(solved, np.array([epsilon]))[0])
            return min(max(math.log(max(found, 1e-300) / delta), -_FAR), _FAR)

        # Coarse tables tell where to begin and the slope there.
        start = _Search(top - _STRIDE, _gaussian_slope(epsilon, delta), top)
        coarsely = _search(lambda at: excess(at, coarse), start, (-_GUESS, _GUESS))
        start = _Search(coarsely.at, coarsely.slope, top)
        # A hair of room, for the last digits of a recomputation.
        found = _search(lambda at: excess(at, fine), start, (1e-4, _NEAR))
    return min(largest, math.exp(found.best) * (1 + 1e-12))


class _Search(NamedTuple):
    """Where a search for a root stands, in logarithms of the noise scale.

    Attributes:
      at: where to look next.
      slope: of the excess there, negative.
      best: the least that holds, of those looked at.
    """

    at: float
    slope: float
    best: float


def _search(
    excess: Callable[[float], float], start: _Search, enough: tuple[float, float]
) -> _Search:
    """To where `excess` holds (is not positive) with as much room, in noise, as is `enough`.

    Secants, always between what has failed and what has not.
    """
    at, slope, best = start
    failed, before, value_before = -math.inf, math.nan, math.nan
    for _ in range(_SOLUTIONS):
        value = excess(at)
        if value <= min(enough[0] * slope, 0.0):
            best = at
        else:
            failed = at
        if not math.isnan(before) and before != at:
            slope = min((value - value_before) / (at - before), -1.0)
        before, value_before = at, value
        if enough[0] <= value / slope <= enough[1] or best - failed < enough[1]:
            break
        # Rather a little too much noise than a little too little, for that is in vain.
        step = -value / slope
        at += max(-1.0, _SHORT * step) if step < 0 else min(_STRIDE, step + 0.2 * enough[1])
        if not failed < at < best:
            at = (best + max(failed, best - _STRIDE)) / 2
    return _Search(at, slope, best)


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
    curve = _gaussian.epsilon(mu, delta)
    for stop in np.unique(np.geomspace(1, count, _POINTS).round().astype(int)).tolist():
        first = steps._replace(
            contraction=steps.contraction[:stop], shift=steps.shift[:stop], noise=steps.noise[:stop]
        )
        curve[stop - 1] = min(curve[stop - 1], epsilon(first, delta))
    return np.concatenate([[np.inf], np.minimum.accumulate(curve)])


def _mu(steps: Steps) -> float:
    return _taut_string.gdp_mu(steps.distance, steps.contraction, steps.shift, steps.noise)


def _solved(steps: Steps, delta: float) -> Solved:
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
) -> Solved:
    steps = Steps(distance, *map(np.frombuffer, (contraction, shift, noise)))
    run, tables = affordable(steps, delta)
    return node_tables.solve(run, delta, tables)


def _epsilon(solved: Solved, delta: float, highest: float) -> float:
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
    return high
