"""A lower bound on the true epsilon: the best attack that is known, evaluated on the safe side.

Two runs start at +initial_distance/2 and -initial_distance/2 and play, in one dimension,

    x <- c_t x + u_t(x) + N(0, sigma_t^2),    |u_t(x)| <= shift_t / 2,

with memoryless policies u_t of an adversary's choice, who then guesses which run it was: with P_t
and Q_t the laws of the two states, delta(epsilon) is the most of P_T(A) - e^epsilon Q_T(A). Plain
SGD on a loss of the adversary's choice is one such game (a policy is what the clipped gradient
does), so no sound accountant may certify less than this.

**The policy.** Policy iteration moves x, wherever P_t > e^epsilon Q_t, to where the rest of the
game makes acceptance likeliest, and elsewhere to where it is least likely; every round is an attack
at least as good as the last. Take all policies of the form u_t(x) = +shift_t/2 right of a threshold
and -shift_t/2 left of it. Then x -> c_t x + u_t(x) is increasing, which keeps the likelihood ratio
P_t/Q_t increasing in x, and so does Gaussian noise; P_t > e^epsilon Q_t is a half-line; and the
chance of acceptance increases in x whatever the later thresholds are. So a round of policy
iteration yields such thresholds again, namely the points where P_t = e^epsilon Q_t, which depend on
the earlier thresholds only. So there is one fixed point, it is the best of all threshold policies
(a round would improve any other), and **one sweep forward finds it**: no backward pass, no choice
of a start. For a target delta, Newton's method looks for the epsilon where the sweep's delta comes
down to it; what is reported is where the last policy's own curve does, valid wherever that stops.

**Why the number is a lower bound.** Any thresholds make an attack, so errors in *placing* them do
no harm, only those in *evaluating* it do. With K the kernel of N(0, sigma_t^2),

    P_{t+1}(y) = int_{x > theta} P_t(x) K(y - c x - s/2) dx
               + int_{x < theta} P_t(x) K(y - c x + s/2) dx

and both integrands are entire functions, of width sigma at least, cut at theta. Far from the cut
the sum over an even grid is exact beyond float64 (its error falls like exp(-(2 pi sigma / h)^2 / 4)
in the spacing h); at the cut the weights integrate the interpolating polynomial through 16 nodes.
Everything but those few weights is positive, so that tails keep their *relative* accuracy, which
e^epsilon Q needs. At `NODES` nodes a standard deviation the relative error of delta is below 1e-8
(seen against Gauss-Legendre quadrature, finer grids, and exact values where shift = 0); `_ERROR` of
delta is subtracted for it, and float64's rounding of the probability accepted. The noise and the
states that are left out, beyond `reach` standard deviations, have probability 4 T Phi(-reach) at
most; e^epsilon times that is subtracted, too.

**Two reductions, both exact or on the safe side.** A step without noise is folded into the next.
Noise so small that it would need too many nodes is raised: the game with more noise is a mixture,
over the extra noise n_t as public randomness, of games with the original noise in which the
adversary plays u_t(x + m_t), m_{t+1} = c_t m_t + n_t, so the best of those is at least as good.

In dimension d the adversary plays this game along a line. The method is ours; the mechanism is that
of Koloskova et al. (ICML 2025).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special

from certunlearn import checks
from certunlearn.accounting import gaussian, interpolation

# Beyond this epsilon nothing is attempted: e^epsilon and its inverse must stay well inside float64.
MAX_EPSILON = 300.0

NODES = 5.0  # nodes for the standard deviation of a step, in what is reported
_COARSE = 2.5  # the same while the policy is still being looked for
_STEEP = 4.0  # tails fall by at most e^(_STEEP / nodes) from node to node
_HALF = 8  # nodes on either side of a cut that its weights use
_USUAL_REACH = 10.0
_MAX_WIDTH = 2500.0  # standard deviations from the centre out to there, before noise is raised
_ERROR = 1e-7  # of delta, allowed for quadrature; ten times what has been seen
_ROUNDING = 1e-15  # of the probability accepted, for each step
_TINY = 1e-16  # where no delta is given, what is left out must be small beside this one
_CHUNK = 64  # target nodes at a time where grids do not match


class Attack(NamedTuple):
    """One concrete attack and what it reaches; see `attack`.

    Attributes:
      epsilon: that of the hockey-stick divergence.
      delta: P(accept) - e^epsilon Q(accept), rounded down.
      thresholds: float64 `[steps + 1]`: at step t the state moves by +shift_t/2 if it lies right of
        `thresholds[t]` and by -shift_t/2 if not; the test accepts right of the last one.
      grid: float64 `[nodes]`, where the last densities are given.
      densities: float64 `[2, nodes]`: those of the last noisy state of the run that started at
        +initial_distance/2 and of the other.
    """

    epsilon: float
    delta: float
    thresholds: np.ndarray
    grid: np.ndarray
    densities: np.ndarray


class _Played(NamedTuple):
    """A policy and the two densities it leads to."""

    thresholds: list[float]
    spacing: float  # of the nodes of
    densities: np.ndarray  # [2, nodes], the middle node at 0
    left_out: float  # probability that the grid and the kernels may miss


class _Part(NamedTuple):
    """What lies on one side of a threshold."""

    values: np.ndarray  # [2, nodes], times the cut's weights
    first: int  # the first of its nodes, counted from the centre
    push: float


class _Game(NamedTuple):
    """The steps that have noise, noiseless ones folded in, and what is left after the last."""

    distance: float
    contraction: np.ndarray
    shift: np.ndarray
    noise_scale: np.ndarray
    starts_group: np.ndarray  # bool [given steps + 1]: whether a threshold is chosen here
    decay: np.ndarray  # the contraction as given: where no threshold is chosen, it follows the last
    mu: float  # what shifted interpolation certifies


def epsilon(
    initial_distance: float,
    contraction: Any,
    shift: Any,
    noise_scale: Any,
    delta: float,
    *,
    rounds: int = 12,
) -> float:
    """A lower bound on the true epsilon of a memoryless run: the best attack found.

    Args:
      initial_distance: distance of the two starts, in parameter units.
      contraction: float array `[steps]` (or a number): c_t >= 0.
      shift: float array `[steps]` (or a number): s_t >= 0; an update moves by s_t / 2 at most.
      noise_scale: float array `[steps]` (or a number): standard deviation sigma_t >= 0.
      delta: strictly between 0 and 1.
      rounds: the most policies to try; fewer are tried where they stop gaining.

    Returns:
      epsilon >= 0, rounded down: at anything smaller some memoryless updates within the separations
      violate (epsilon, delta). Infinity without noise; at most `MAX_EPSILON` otherwise.

    Raises:
      TypeError: if something is not a number.
      ValueError: if it is out of range, or the lengths differ.

    Source:
      Policy iteration for threshold policies, above. Mechanism: Koloskova et al. (ICML 2025).

    >>> round(epsilon(2.0, 1.0, [0.5] * 4, 7.4612632696, 1e-5), 4)  # interpolation: 1
    0.6266
    """
    delta, rounds = checks.open_unit("delta", delta), checks.positive_int("rounds", rounds)
    game = _game(initial_distance, contraction, shift, noise_scale)
    highest = float(gaussian.epsilon(game.mu, delta))
    if highest in (0.0, math.inf):
        return highest
    highest = min(highest, MAX_EPSILON)
    reach = _reach(game, highest, delta)
    best, low, high, guess, nodes = 0.0, 0.0, highest, 0.0, _COARSE
    for left in reversed(range(rounds)):
        if left == 0:
            nodes = NODES
        played = _play(game, guess, nodes, reach)
        found = _largest_epsilon(played, delta, highest)
        best = max(best, found) if nodes == NODES else best
        low = max(low, found)
        # A gain of g in this round leaves one of the order of g^2.
        if found == highest or abs(found - guess) <= 1e-3 * min(1.0, found):
            if nodes == NODES:
                break
            nodes, guess = NODES, found
            continue
        if _value(played, guess) < delta:
            high = min(high, guess)
        guess = max(low, _newton(played, guess, delta))
        guess = guess if guess < high else (low + high) / 2
    return best


def delta(
    initial_distance: float,
    contraction: Any,
    shift: Any,
    noise_scale: Any,
    epsilon: float,
    *,
    nodes: float = NODES,
) -> float:
    """A lower bound on the true delta at `epsilon` of a memoryless run.

    Arguments, errors and source as for `attack`, except that an epsilon above `MAX_EPSILON` gets
    the bound 0, and that runs which cannot be told apart, or have no noise, get 0 and 1.

    >>> print(f"{delta(2.0, 1.0, [0.5] * 4, 7.4612632696, 0.6266):.3g}")
    1e-05
    """
    mu = _game(initial_distance, contraction, shift, noise_scale).mu
    if mu in (0.0, math.inf) or checks.real("epsilon", epsilon) > MAX_EPSILON:
        return float(mu == math.inf)
    return attack(initial_distance, contraction, shift, noise_scale, epsilon, nodes=nodes).delta


def attack(
    initial_distance: float,
    contraction: Any,
    shift: Any,
    noise_scale: Any,
    epsilon: float,
    *,
    nodes: float = NODES,
) -> Attack:
    """The best threshold policies and test at `epsilon`, to look at or to play.

    Args:
      initial_distance: positive.
      contraction: as for the function `epsilon`.
      shift: likewise.
      noise_scale: likewise, but not 0 throughout.
      epsilon: from 0 to `MAX_EPSILON`.
      nodes: grid nodes for the standard deviation of a step's noise.

    Returns:
      An `Attack`. If noise had to be raised, it belongs to the game with the raised noise.

    Raises:
      TypeError: if something is not a number.
      ValueError: if it is out of range, or the lengths differ.

    Source:
      As for `epsilon`.

    >>> found = attack(2.0, 1.0, [0.5, 0.5], 4.0, 1.0)
    >>> found.thresholds.round(2).tolist()
    [0.0, 6.4, 12.38]
    """
    game = _game(initial_distance, contraction, shift, noise_scale)
    epsilon = checks.real("epsilon", epsilon)
    if not 0 <= epsilon <= MAX_EPSILON:
        raise ValueError(f"epsilon must be from 0 to {MAX_EPSILON:g}, got {epsilon!r}")
    if not nodes >= 2:
        raise ValueError(f"nodes must be at least 2, got {nodes!r}")
    if game.mu in (0.0, math.inf):
        raise ValueError(
            "needs noise, and runs that can be told apart; got "
            f"initial_distance={initial_distance!r}, noise_scale={noise_scale!r}"
        )
    played = _play(game, epsilon, nodes, _reach(game, epsilon, _TINY))
    half = played.densities.shape[1] // 2
    last = (_cut(played.densities, epsilon) - half) * played.spacing
    thresholds = np.zeros(len(game.starts_group))
    upcoming = iter([*played.thresholds, last])
    for t, chooses in enumerate(game.starts_group):
        thresholds[t] = next(upcoming) if chooses else game.decay[t - 1] * thresholds[t - 1]
    grid = (np.arange(2 * half + 1) - half) * played.spacing
    value = max(0.0, _value(played, epsilon))
    return Attack(epsilon, value, thresholds, grid, played.densities)


def _game(initial_distance: float, contraction: Any, shift: Any, noise_scale: Any) -> _Game:
    mu = interpolation.gdp_mu(initial_distance, contraction, shift, noise_scale)  # checks them too
    given = np.broadcast_arrays(*np.atleast_1d(contraction, shift, noise_scale))
    c, s, sigma = (np.asarray(a, np.float64) for a in given)
    folded, carried = [], (1.0, 0.0)
    for c_t, s_t, sigma_t in zip(c.tolist(), s.tolist(), sigma.tolist(), strict=True):
        carried = (c_t * carried[0], c_t * carried[1] + s_t)
        if sigma_t > 0:
            folded.append((*carried, sigma_t))
            carried = (1.0, 0.0)
    if carried == (0.0, 0.0) or initial_distance == 0:
        mu = 0.0  # what noiseless steps at the end leave is one point, the same for both
    steps = np.array(folded).reshape(-1, 3).T
    starts_group = np.concatenate([[True], sigma > 0])
    return _Game(float(initial_distance), steps[0], steps[1], steps[2], starts_group, c, mu)


def _reach(game: _Game, epsilon: float, delta: float) -> float:
    """Standard deviations beyond which nothing matters beside delta, even times e^epsilon."""
    log_tail = math.log(_ERROR * delta / (8 * len(game.shift))) - epsilon
    return float(optimize.brentq(lambda r: special.log_ndtr(-r) - log_tail, 0.0, 60.0))


def _plan(game: _Game, nodes: float, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise of each step; half-width and largest spacing of the grid after it."""
    sigma = game.noise_scale.copy()
    width, spacing = np.empty_like(sigma), np.empty_like(sigma)
    mean, spread = game.distance / 2, 0.0
    for t, (c, s) in enumerate(zip(game.contraction, game.shift, strict=True)):
        mean, spread = c * mean + s / 2, c * spread
        sigma[t] = max(sigma[t], (mean + _USUAL_REACH * spread) / _MAX_WIDTH)
        spread = math.hypot(spread, sigma[t])
        width[t] = mean + reach * spread
        # A grid must resolve the noise just added, and how steep tails get within its reach.
        spacing[t] = min(sigma[t] / nodes, _STEEP * spread / (nodes * reach))
    # Once contracted, it must resolve what comes, too.
    for t in reversed(range(len(spacing) - 1)):
        if game.contraction[t + 1] * spacing[t] > spacing[t + 1]:
            spacing[t] = spacing[t + 1] / game.contraction[t + 1]
    return sigma, width, spacing


def _play(game: _Game, epsilon: float, nodes: float, reach: float) -> _Played:
    """Finds the best policy at epsilon and plays it."""
    sigma, width, allowed = _plan(game, nodes, reach)
    spacing = float(allowed[0])
    half = math.ceil(width[0] / spacing)
    grid = (np.arange(2 * half + 1) - half) * spacing
    start = (game.contraction[0] * game.distance + game.shift[0]) / 2
    densities = np.stack([_normal(grid - start, sigma[0]), _normal(grid + start, sigma[0])])
    thresholds = [0.0]
    for t in range(1, len(sigma)):
        cut = _cut(densities, epsilon)
        thresholds.append((cut - half) * spacing)
        right = _weights(cut, densities.shape[1])
        first, last = int(cut) + 1 - _HALF, int(cut) + 1 + _HALF
        parts = (
            _Part(densities[:, first:] * right[first:], first - half, game.shift[t] / 2),
            _Part(densities[:, :last] * (1 - right[:last]), -half, -game.shift[t] / 2),
        )
        # Contract the grid with the states, so that the kernel depends on differences of nodes
        # only, until it is twice as fine as need be.
        scaled = float(game.contraction[t]) * spacing
        new = scaled if 2 * scaled > allowed[t] else float(allowed[t])
        half = math.ceil(width[t] / new)
        moved = np.zeros((2, 2 * half + 1))
        for part in parts:
            if new == scaled:
                _add_convolved(moved, new, part, float(sigma[t]), reach)
            else:
                _add_regridded(moved, new, part, scaled, float(sigma[t]), reach)
        densities, spacing = moved * spacing, new
    left_out = 4 * len(sigma) * float(special.ndtr(-reach))
    return _Played(thresholds, spacing, densities, left_out)


def _add_convolved(
    moved: np.ndarray, spacing: float, part: _Part, sigma: float, reach: float
) -> None:
    """Adds a part, pushed and smoothed, to densities on a grid of the same spacing and centre."""
    low = math.ceil((part.push - reach * sigma) / spacing)
    high = math.floor((part.push + reach * sigma) / spacing)
    kernel = _normal(np.arange(low, high + 1) * spacing - part.push, sigma)
    start = part.first + low + moved.shape[1] // 2  # where the result begins
    end = start + part.values.shape[1] + len(kernel) - 1
    inside = slice(max(start, 0), max(min(end, moved.shape[1]), 0))
    for row, values in zip(moved, part.values, strict=True):
        row[inside] += np.convolve(values, kernel)[inside.start - start : inside.stop - start]


def _add_regridded(
    moved: np.ndarray, spacing: float, part: _Part, scaled: float, sigma: float, reach: float
) -> None:
    """The same for a part whose own nodes lie `scaled` apart."""
    source = (np.arange(part.values.shape[1]) + part.first) * scaled + part.push
    target = (np.arange(moved.shape[1]) - moved.shape[1] // 2) * spacing
    for start in range(0, len(target), _CHUNK):
        there = target[start : start + _CHUNK]
        ends = np.searchsorted(source, [there[0] - reach * sigma, there[-1] + reach * sigma])
        near = slice(*ends.tolist())
        kernel = _normal(source[near, None] - there, sigma)
        moved[:, start : start + _CHUNK] += part.values[:, near] @ kernel


def _normal(x: np.ndarray, sigma: float) -> np.ndarray:
    return np.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def _cut(densities: np.ndarray, epsilon: float) -> float:
    """Where P = e^epsilon Q, counted in nodes: what lies right of it sums to the most."""
    excess = densities[0] - math.exp(epsilon) * densities[1]
    after = int(np.argmax(np.cumsum(excess[::-1])[::-1]))
    after = min(max(after, _HALF), len(excess) - _HALF)
    around, fraction = densities[:, after - 2 : after + 2], 0.0
    if np.all(around > 0):
        ratios = (np.log(around[0]) - np.log(around[1]) - epsilon).tolist()
        if ratios[0] < ratios[1] < ratios[2] < ratios[3]:  # inverse interpolation
            for i, position in enumerate((-1.0, 0.0, 1.0, 2.0)):
                others = [r for j, r in enumerate(ratios) if j != i]
                fraction += position * math.prod(r / (r - ratios[i]) for r in others)
    # Short of one, so that the node after the cut stays the node after it.
    return after - 1 + min(max(fraction, 0.0), 1 - 1e-9)


def _antiderivatives() -> np.ndarray:
    """`[degree + 1, nodes]`: those, from 0, of the Lagrange basis on -_HALF + 1, ..., _HALF."""
    nodes = np.arange(1 - _HALF, _HALF + 1)
    columns = []
    for node in nodes:
        others = nodes[nodes != node]
        basis = np.polynomial.polynomial.polyfromroots(others) / np.prod(float(node) - others)
        columns.append(np.polynomial.polynomial.polyint(basis))
    return np.stack(columns, axis=1)


_INTEGRALS = _antiderivatives()
_CELL = np.sum(_INTEGRALS, axis=0)  # over the whole cell from 0 to 1


def _weights(cut: float, count: int) -> np.ndarray:
    """Weights, in units of the spacing, for the integral right of the cut.

    Each cell is integrated by the polynomial through the 2 * _HALF nodes around it, the cell with
    the cut from the cut on. Far to the right these sum to 1.
    """
    before = int(cut)
    powers = (cut - before) ** np.arange(len(_INTEGRALS))
    weights = np.zeros(count)
    weights[before + 1 - _HALF : before + 1 + _HALF] = np.cumsum(_CELL) - powers @ _INTEGRALS
    weights[before + 1 + _HALF :] = 1.0
    return weights


def _accepted(played: _Played, epsilon: float) -> tuple[float, float]:
    """P and Q of the best last test."""
    weights = _weights(_cut(played.densities, epsilon), played.densities.shape[1])
    p, q = played.densities @ weights * played.spacing
    return float(p), float(q)


def _value(played: _Played, epsilon: float) -> float:
    """What the best last test reaches, less what may be wrong with it."""
    p, q = _accepted(played, epsilon)
    factor = math.exp(epsilon)
    rounding = _ROUNDING * len(played.thresholds) * p
    return (1 - _ERROR) * (p - factor * q) - (1 + factor) * played.left_out - rounding


def _largest_epsilon(played: _Played, delta: float, highest: float) -> float:
    """Where this policy's own curve comes down to delta, or `highest` if that comes first."""
    above = lambda epsilon: _value(played, epsilon) - delta  # noqa: E731
    if above(0.0) <= 0:
        return 0.0
    if above(highest) >= 0:
        return highest
    return float(optimize.brentq(above, 0.0, highest, xtol=1e-14, rtol=1e-13))


def _newton(played: _Played, epsilon: float, delta: float) -> float:
    """Where the best delta at every epsilon seems to come down to `delta`; infinity if unclear.

    A step of Newton's method for the normal quantile of delta, almost linear in epsilon. Because
    the policy is the best at `epsilon`, the slope of delta there is that for a fixed policy.
    """
    value, (_, q) = _value(played, epsilon), _accepted(played, epsilon)
    if not (0 < value < 1 and q > 0):
        return math.inf
    z = float(special.ndtri(value))
    slope = math.exp(epsilon) * q / float(_normal(np.array(z), 1.0))
    return epsilon + (z - float(special.ndtri(delta))) / slope
