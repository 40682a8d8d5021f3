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
are mirror images in (1 - theta) z*, 0 <= theta < 1; of several theta the best is taken for each
(L, rho). Positive mass at z* + y then has a partner at distance D = 2 theta z* + 2 y and

    L' = L + (1 - theta) z* (D - rho) + log((1 - e^(-rho (y + 2 theta z*))) / (1 - e^(-rho y))).

**Smaller separations need no maximum.** Let C be the functions a with a(v) - g a(v') <= V(L,
|v - v'|) for all pairs, V nondecreasing in r. For rho' < rho the kernel v -> c v + sqrt(1 - c^2) Z,
c = rho' / rho, maps N(+-rho/2, 1) to N(+-rho'/2, 1), and averaging a member of C over it (the same
Z at all points) gives a member of C, since distances shrink. So the best value at rho' is at most
that at rho, hence at most the value of any pairing at rho. If V is not monotone, the argument holds
for its lower envelope inf over r' >= r of V(L, r'), which is valid and not above V.

**The head of a long run** is merged into one step. N_v W(L, r) = sup over a in C_W of the integral
against the two Gaussians of variance v at distance r; A_s W(L, r) = W(L, r + s). If W is
nondecreasing in r and W(L + L', r + r') <= W(L, r) + e^L W(L', r'), as holds for the exact bounds
(insert a point between), then N_v A_s W <= A_s N_v W: *displacing early is the worst that an
adversary can do*. Proof: let a be optimal on the left. Raise it right of z* to the largest values
that the pairs across z* allow, then lower it left of z* to the least; this does not lower the
integral. Now a is nondecreasing and, by the inequality for W, pairs on one side of z* obey W
without s. Move the right part right by s/2 and the left part left by s/2, and fill the gap by the
least extension: the new function obeys W, is nowhere below a(v) at v + s/2 nor above a(v) at
v - s/2, and so has at least the same integral for Gaussians s further apart. A contraction c
commutes with noise exactly (variance v becomes c^2 v). So k steps are bounded by one displacement,
contraction prod c and shift sum w s, followed by k noises of variances (w sigma)^2, w the product
of the later contractions. Those k noises are one Brownian motion, mirrored at a plane that does not
move while it runs: the pair keeps its mirror at (1 - theta) z*, meets with probability
e^(-rho D / 2) given the distance D at the end, and has L' = L + (1 - theta) z* (D - rho).
(The gain in L' above is for one noise only: N_v N_v' may be larger than N_(v + v').)

**Between the nodes.** Bounds are stored for separations rho_n of displaced points, which noise has
smoothed: a(x) = E b(x + Z). By the inequality of the means, N(alpha h, 1) <= e^(alpha (1 - alpha)
h^2 / 2) ((1 - alpha) e^(c0) N(0, 1) + alpha e^(c1) N(h, 1)) pointwise if (1 - alpha) c0 + alpha c1
= 0. So a pair between two nodes costs at most hat-function weights on the nodes, times e^(h^2/8),
with L lowered by h^2/8 and by c0, c1; these are chosen so that the node's L is that of the pairing
at the node itself. The masses under hats are integrals of exponentials once e^(-t^2/2) is bounded
by 1 above and by e^(-h^2/2) below. Mass outside the grid counts as 1.

**Cost.** What interpolating costs adds up over the steps and is quadratic in the gaps, so gaps must
shrink as steps are added: time grows like the square of their number, a second for 4 steps and
about ten for 16, and the last `LONGEST` alone are kept apart. Where noise is plentiful and steps
many, most of the gain over interpolation is lost by that; it is never worse.

Source: ours. Reflection coupling is due to Lindvall & Rogers (1986); privacy profiles and their
discretisation by chords, to Doroshenko et al. (2022).
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from certunlearn.accounting import coupling_kernel, gaussian, interpolation

# Mirrors that are tried: theta above.
THETAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7)
# Steps kept apart; those before them are merged into one.
LONGEST = 24

_COLUMNS = 33
_POINTS = 6  # of a curve that are worked out
_LEAST_CONTRACTION = 1e-6


class Steps(NamedTuple):
    """A run as the recursion sees it, one number per step, in parameter units.

    Attributes:
      distance: of the two starts.
      contraction: float64 `[steps]`.
      shift: float64 `[steps]`.
      noise: float64 `[steps]`, standard deviations.
      merged: whether the first step stands for several.
    """

    distance: float
    contraction: np.ndarray
    shift: np.ndarray
    noise: np.ndarray
    merged: bool


class Resolution(NamedTuple):
    """How fine the tables are: node gaps in units of the noise, and levels of L for each node."""

    gap: float
    levels: int


class _Choice(NamedTuple):
    """The best mirror by separation and level, found on a coarse grid."""

    separations: np.ndarray
    thetas: np.ndarray


class _Solved(NamedTuple):
    steps: Steps
    table: coupling_kernel.Table
    window: int
    tail: float
    choices: list[_Choice]


def delta(steps: Steps, epsilon: float, delta_scale: float = 1e-5) -> float:
    """An upper bound on the delta of a run at `epsilon`.

    Args:
      steps: the run.
      epsilon: at least 0.
      delta_scale: the size of delta that the tables are made for; any value is safe.

    Returns:
      delta, at most that of shifted interpolation.
    """
    if steps.distance == 0:
        return 0.0  # one start, one law
    steps = shorten(steps)
    capped = float(gaussian.delta(epsilon, _mu(steps)))
    if len(steps.noise) == 1:
        return capped
    solved = _solved(steps, delta_scale)
    return min(capped, float(_profile(solved, np.array([epsilon]))[0]))


def epsilon(steps: Steps, delta: float) -> float:
    """An upper bound on the epsilon of a run at `delta`, at most that of shifted interpolation."""
    if steps.distance == 0:
        return 0.0
    steps = shorten(steps)
    capped = float(gaussian.epsilon(_mu(steps), delta))
    if len(steps.noise) == 1 or capped == 0:
        return capped
    return _epsilon(_solved(steps, delta), delta, capped)


def noise_scale(steps: Steps, epsilon: float, delta: float) -> float:
    """A factor for `steps.noise` at which the run is certified for (epsilon, delta).

    Not the least to the last digit: the search stops within about 0.5% of what this proves,
    or on something larger that it has confirmed.
    """
    unit = shorten(steps)
    largest = _mu(unit) / gaussian.mu(epsilon, delta)  # what interpolation asks for
    if len(unit.noise) == 1:
        return largest

    def excess(log_scale: float, resolution: Resolution) -> float:
        scaled = unit._replace(noise=unit.noise * math.exp(log_scale))
        solved = _solve(scaled, delta, resolution)
        return math.log(float(_profile(solved, np.array([epsilon]))[0]) / delta)

    fine = _resolution(unit)
    coarse = Resolution(fine.gap * 2, fine.levels // 2)
    high = math.log(largest)
    low = high - math.log(4)
    while excess(low, coarse) < 0:
        high, low = low, low - math.log(4)
    if high == math.log(largest) and excess(high, coarse) > 0:
        return largest
    guess = optimize.brentq(excess, low, high, args=(coarse,), xtol=3e-3)
    slope = (excess(guess + 0.02, coarse) - excess(guess - 0.02, coarse)) / 0.04
    best, at = high, guess
    for _ in range(4):
        value = excess(at, fine)
        if value <= 1e-4 * slope:  # a hair of room, for the last digits of a recomputation
            best = min(best, at)
            if value > 0.004 * slope:
                break
        at -= (value - 0.001 * slope) / slope
    return math.exp(best) * (1 + 1e-12)


def epsilon_curve(steps: Steps, delta: float) -> np.ndarray:
    """float64 `[steps + 1]`: epsilon of the run stopped after each step; infinity at 0.

    Numbers of steps in between, which are not worked out, get the epsilon of the last before: what
    follows is post-processing.
    """
    count = len(steps.noise)
    mu = interpolation.gdp_mu_curve(steps.distance, steps.contraction, steps.shift, steps.noise)
    curve = gaussian.epsilon(mu, delta)
    for stop in np.unique(np.geomspace(1, count, _POINTS).round().astype(int)).tolist():
        first = steps._replace(
            contraction=steps.contraction[:stop], shift=steps.shift[:stop], noise=steps.noise[:stop]
        )
        curve[stop - 1] = min(curve[stop - 1], epsilon(first, delta))
    return np.concatenate([[np.inf], np.minimum.accumulate(curve)])


def shorten(steps: Steps, longest: int = LONGEST) -> Steps:
    """The run with everything but its last steps merged into one; see the module's docstring."""
    # A contraction to a point would have no nodes; a slightly weaker one is safe.
    steps = steps._replace(contraction=np.maximum(steps.contraction, _LEAST_CONTRACTION))
    head = len(steps.noise) - longest
    if head < 1:
        return steps
    contraction, shift, variance = 1.0, 0.0, 0.0
    for t in range(head + 1):
        c, sigma = float(steps.contraction[t]), float(steps.noise[t])
        contraction, shift = c * contraction, c * shift + float(steps.shift[t])
        variance = c * c * variance + sigma * sigma
    return Steps(
        steps.distance,
        np.insert(steps.contraction[head + 1 :], 0, max(contraction, _LEAST_CONTRACTION)),
        np.insert(steps.shift[head + 1 :], 0, shift),
        np.insert(steps.noise[head + 1 :], 0, math.sqrt(variance)),
        True,
    )


def _resolution(steps: Steps) -> Resolution:
    # What interpolating costs adds up over the steps, and is quadratic in the gap.
    return Resolution(max(0.03, min(0.05, 0.24 / math.sqrt(len(steps.noise)))), 96)


def _mu(steps: Steps) -> float:
    return interpolation.gdp_mu(steps.distance, steps.contraction, steps.shift, steps.noise)


def _solved(steps: Steps, delta: float) -> _Solved:
    return _solved_once(
        steps.distance,
        tuple(steps.contraction.tolist()),
        tuple(steps.shift.tolist()),
        tuple(steps.noise.tolist()),
        steps.merged,
        delta,
    )


@functools.lru_cache(maxsize=16)
def _solved_once(
    distance: float,
    contraction: tuple[float, ...],
    shift: tuple[float, ...],
    noise: tuple[float, ...],
    merged: bool,
    delta: float,
) -> _Solved:
    steps = Steps(distance, np.array(contraction), np.array(shift), np.array(noise), merged)
    return _solve(steps, delta, _resolution(steps))


def _solve(
    steps: Steps, delta: float, resolution: Resolution, choices: list[_Choice] | None = None
) -> _Solved:
    """The table after the first step's noise: all that a profile needs."""
    count = len(steps.noise)
    if choices is None and resolution.levels > 40:
        choices = _solve(steps, delta, Resolution(resolution.gap * 3, 24)).choices
    tail = float(-special.ndtri(delta * 1e-3 / count))
    grids = _grids(steps, resolution, tail)
    nodes = _rounded_up(max(len(grid) for grid in grids))
    window = 0
    for t in range(count - 1):
        distances = _distances(steps, grids[t + 1], t)
        reached = np.searchsorted(distances, distances + 4 * tail) - np.arange(len(distances))
        window = max(window, int(reached.max()) + 3)
    window = min(_rounded_up(window), nodes)
    highest = float(-special.ndtri(delta * 1e-3))

    found: list[_Choice] = []
    table = None
    for t in range(count - 1, 0, -1):
        separations = grids[t]
        mu = _remaining_mu(steps, t, separations)
        top = np.maximum(mu * highest + mu * mu / 2, 1e-9)
        levels = top[:, None] * np.linspace(0, 1, resolution.levels + 1)
        with np.errstate(divide="ignore"):
            values = gaussian.delta(levels, separations[:, None])
        if table is not None:
            thetas = _thetas(separations, levels.shape, choices, count - 2 - t)
            rows = slice(1, None) if separations[0] == 0 else slice(None)  # no distance, no bound
            improved, best = coupling_kernel.advance(
                _padded(separations[rows], nodes),
                _padded(levels[rows], nodes),
                np.stack([_padded(theta[rows], nodes) for theta in thetas]),
                table,
                window,
                tail,
            )
            size = len(separations[rows])
            values[rows] = np.minimum(values[rows], improved[:size])
            if choices is None:
                chosen = np.take_along_axis(thetas[:, rows], best[None, :size], axis=0)[0]
                found.append(_Choice(separations[rows], chosen))
        distances = _distances(steps, separations, t - 1)
        gaps = np.diff(separations)
        wider = np.maximum(np.append(gaps, 0), np.insert(gaps, 0, 0))
        spacing = top / resolution.levels
        table = coupling_kernel.Table(
            _padded(values, nodes),
            _padded(spacing, nodes),
            _padded(1 / np.expm1(spacing), nodes),
            np.append(distances, distances[-1] + np.arange(1, nodes - len(distances) + 1)),
            _padded(wider**2 / 8, nodes),
            len(separations),
        )
    assert table is not None
    return _Solved(steps, table, window, tail, found)


def _profile(solved: _Solved, epsilons: np.ndarray) -> np.ndarray:
    """Upper bounds on delta at each epsilon; a fixed number is computed at a time."""
    steps = solved.steps
    separation = (steps.contraction[0] * steps.distance + steps.shift[0]) / steps.noise[0]
    levels = np.full((1, _COLUMNS), epsilons[-1])
    levels[0, : len(epsilons)] = epsilons
    thetas = np.broadcast_to(np.array(THETAS)[:, None, None], (len(THETAS), 1, _COLUMNS))
    values, _ = coupling_kernel.advance(
        np.array([separation]),
        levels,
        thetas,
        solved.table,
        solved.window,
        solved.tail,
        merged=steps.merged,
    )
    return np.minimum(values[0, : len(epsilons)], gaussian.delta(epsilons, separation))


def _epsilon(solved: _Solved, delta: float, capped: float) -> float:
    low, high = 0.0, capped
    for _ in range(4):
        grid = np.linspace(low, high, _COLUMNS)
        holds = np.flatnonzero(_profile(solved, grid) <= delta)
        if not len(holds):
            return high
        first = int(holds[0])
        if first == 0:
            return float(grid[0])
        low, high = float(grid[first - 1]), float(grid[first])
    return high


def _grids(steps: Steps, resolution: Resolution, tail: float) -> list[np.ndarray]:
    """Separations of displaced points at each step, from what the shift alone gives, in its noise.

    Gaps grow like the square root of the distance: the loss then matters equally everywhere.
    """
    grids: list[np.ndarray] = []
    reach, variance, before = steps.distance, 0.0, math.inf
    for t in range(len(steps.noise)):
        c, s, sigma = (float(part[t]) for part in steps[1:4])
        reach, variance = c * reach + s, c * c * variance
        end = (reach + 2 * tail * math.sqrt(variance)) / sigma
        finest = min(1.0, c * before / sigma)  # the noise before must be resolved too
        nodes = [s / sigma]
        while nodes[-1] < end:
            gap = resolution.gap * math.sqrt(max(nodes[-1] - nodes[0], 2) / 2)
            nodes.append(nodes[-1] + min(gap, 0.8) * finest)
        grids.append(np.array(nodes))
        variance, before = variance + sigma * sigma, sigma
    return grids


def _distances(steps: Steps, separations: np.ndarray, t: int) -> np.ndarray:
    """Distances after the noise of step t, in its units, that lead to the next separations."""
    after = separations * steps.noise[t + 1] - steps.shift[t + 1]
    distances = after / (steps.contraction[t + 1] * steps.noise[t])
    distances[0] = 0.0
    return distances


def _remaining_mu(steps: Steps, t: int, separations: np.ndarray) -> np.ndarray:
    """About the mu of interpolation from each separation at step t on: it only sizes the table."""
    length, variance = separations * steps.noise[t], float(steps.noise[t]) ** 2
    best = np.asarray(separations)
    for k in range(t + 1, len(steps.noise)):
        length = length * steps.contraction[k] + steps.shift[k]
        variance = variance * float(steps.contraction[k]) ** 2 + float(steps.noise[k]) ** 2
        best = np.minimum(best, length / math.sqrt(variance))
    return best


def _thetas(
    separations: np.ndarray, shape: tuple[int, ...], choices: list[_Choice] | None, index: int
) -> np.ndarray:
    """float64 `[choices, rows, columns]`: all mirrors, or the one best on a coarse grid."""
    if choices is None:
        every = np.array(THETAS)[:, None, None]
        return np.broadcast_to(every, (len(THETAS), *shape))
    coarse = choices[index]
    row = np.searchsorted(coarse.separations, separations).clip(0, len(coarse.separations) - 1)
    share = np.linspace(0, coarse.thetas.shape[1] - 1, shape[1])
    return coarse.thetas[row][:, np.rint(share).astype(int)][None]


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1), mode="edge")


def _rounded_up(size: int) -> int:
    return -(-size // 64) * 64
