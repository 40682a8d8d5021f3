"""A lower bound on the true epsilon: the best attack that is known, evaluated on the safe side.

Two runs start at +initial_distance/2 and -initial_distance/2 and play, in one dimension,

    x <- c_t x + u_t(x) + N(0, sigma_t^2),    |u_t(x)| <= shift_t / 2,

with memoryless policies u_t of an adversary's choice, who then guesses which run it was. Plain SGD
on a loss of the adversary's choice is one such game, so no sound accountant may certify less.

docs/theory/attack.md proves it. What the code relies on:

- Any policy and any test make an attack. Policies here push up right of a threshold and down left
  of it; the best thresholds are where P_t = e^epsilon Q_t, so one sweep forward finds them all.
- `node_grid` evaluates the attack with errors on the safe side.
- A step without noise is folded into the next, which is exact.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import ArrayLike

from certunlearn._numerics import checks
from certunlearn.accounting import _gaussian, _taut_string
from certunlearn.accounting._attack import node_grid

# Beyond this epsilon nothing is attempted: e^epsilon and its inverse must stay well inside float64.
MAX_EPSILON = 300.0

NODES = 5.0  # nodes for the standard deviation of a step, in what is reported
_COARSE = 2.5  # the same while the policy is still being looked for
_TINY = 1e-16  # where no delta is given, what is left out must be small beside this one


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


class _Run(NamedTuple):
    """A run as it was given, by the game of its noisy steps, noiseless ones folded in."""

    game: node_grid.Game
    starts_group: np.ndarray  # bool [given steps + 1]: whether a threshold is chosen here
    decay: np.ndarray  # the contraction as given: where no threshold is chosen, it follows the last
    mu: float  # what shifted interpolation certifies


def epsilon(
    initial_distance: float,
    contraction: ArrayLike,
    shift: ArrayLike,
    noise_scale: ArrayLike,
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
      violate (epsilon, delta). Infinity without noise; at most `MAX_EPSILON` otherwise; 0 where
      distances grow too far for float64.

    Raises:
      TypeError: if something is not a number.
      ValueError: if it is out of range, or the lengths differ.

    Source:
      Policy iteration for threshold policies, above. Mechanism: Koloskova et al. (ICML 2025).

    >>> round(epsilon(2.0, 1.0, [0.5] * 4, 7.4612632696, 1e-5), 4)  # interpolation: 1
    0.6266
    """
    delta, rounds = checks.open_unit("delta", delta), checks.positive_int("rounds", rounds)
    run = _run(initial_distance, contraction, shift, noise_scale)
    if not len(run.game.noise_scale):
        return math.inf if run.mu > 0 else 0.0
    highest = float(_gaussian.epsilon(run.mu, delta))
    if highest in (0.0, math.inf) or not node_grid.fits(run.game):
        return 0.0  # also where numbers are beyond float64, of which nothing is claimed
    highest = min(highest, MAX_EPSILON)
    reach = _reach(run, highest, delta)
    best, low, high, guess, nodes = 0.0, 0.0, highest, 0.0, _COARSE
    for left in reversed(range(rounds)):
        if left == 0:
            nodes = NODES
        played = node_grid.play(run.game, guess, nodes, reach)
        found = _largest_epsilon(played, delta, highest)
        best = max(best, found) if nodes == NODES else best
        low = max(low, found)
        # A gain of g in this round leaves one of the order of g^2.
        if found == highest or abs(found - guess) <= 1e-3 * min(1.0, found):
            if nodes == NODES:
                break
            nodes, guess = NODES, found
            continue
        if node_grid.value(played, guess) < delta:
            high = min(high, guess)
        guess = max(low, _newton(played, guess, delta))
        guess = guess if guess < high else (low + high) / 2
    return best


def work(
    initial_distance: float,
    contraction: ArrayLike,
    shift: ArrayLike,
    noise_scale: ArrayLike,
    delta: float,
) -> float:
    """About how many multiplications one round of `epsilon` takes; arguments as there."""
    run = _run(initial_distance, contraction, shift, noise_scale)
    highest = float(_gaussian.epsilon(run.mu, delta))
    if highest in (0.0, math.inf) or not node_grid.fits(run.game):
        return 0.0
    return node_grid.work(run.game, NODES, _reach(run, min(highest, MAX_EPSILON), delta))


def delta(
    initial_distance: float,
    contraction: ArrayLike,
    shift: ArrayLike,
    noise_scale: ArrayLike,
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
    run = _run(initial_distance, contraction, shift, noise_scale)
    if not len(run.game.noise_scale):
        return float(run.mu > 0)
    if run.mu in (0.0, math.inf) or not node_grid.fits(run.game):
        return 0.0
    if checks.real("epsilon", epsilon) > MAX_EPSILON:
        return 0.0
    return attack(initial_distance, contraction, shift, noise_scale, epsilon, nodes=nodes).delta


def attack(
    initial_distance: float,
    contraction: ArrayLike,
    shift: ArrayLike,
    noise_scale: ArrayLike,
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
    run = _run(initial_distance, contraction, shift, noise_scale)
    epsilon = checks.real("epsilon", epsilon)
    if not 0 <= epsilon <= MAX_EPSILON:
        raise ValueError(f"epsilon must be from 0 to {MAX_EPSILON:g}, got {epsilon!r}")
    if not nodes >= 2:
        raise ValueError(f"nodes must be at least 2, got {nodes!r}")
    if run.mu in (0.0, math.inf):
        raise ValueError(
            "needs noise, and runs that can be told apart; got "
            f"initial_distance={initial_distance!r}, noise_scale={noise_scale!r}"
        )
    played = node_grid.play(run.game, epsilon, nodes, _reach(run, epsilon, _TINY))
    half = played.densities.shape[1] // 2
    last = (node_grid.best_cut(played.densities, epsilon) - half) * played.spacing
    thresholds = np.zeros(len(run.starts_group))
    upcoming = iter([*played.thresholds, last])
    for t, chooses in enumerate(run.starts_group):
        thresholds[t] = next(upcoming) if chooses else run.decay[t - 1] * thresholds[t - 1]
    grid = (np.arange(2 * half + 1) - half) * played.spacing
    value = max(0.0, node_grid.value(played, epsilon))
    return Attack(epsilon, value, thresholds, grid, played.densities)


def _run(
    initial_distance: float, contraction: ArrayLike, shift: ArrayLike, noise_scale: ArrayLike
) -> _Run:
    mu = _taut_string.gdp_mu(initial_distance, contraction, shift, noise_scale)  # checks them too
    given = np.broadcast_arrays(*np.atleast_1d(contraction, shift, noise_scale))
    c, s, sigma = (np.asarray(a, np.float64) for a in given)
    folded, carried = [], (1.0, 0.0)
    for c_t, s_t, sigma_t in zip(c.tolist(), s.tolist(), sigma.tolist(), strict=True):
        carried = (c_t * carried[0], c_t * carried[1] + s_t) if c_t > 0 else (0.0, s_t)
        if sigma_t > 0:
            folded.append((*carried, sigma_t))
            carried = (1.0, 0.0)
    if carried == (0.0, 0.0) or initial_distance == 0:
        mu = 0.0  # what noiseless steps at the end leave is one point, the same for both
    steps = np.array(folded).reshape(-1, 3).T
    starts_group = np.concatenate([[True], sigma > 0])
    game = node_grid.Game(float(initial_distance), *steps)
    return _Run(game, starts_group, c, mu)


def _reach(run: _Run, epsilon: float, delta: float) -> float:
    """Standard deviations beyond which nothing matters beside delta, even times e^epsilon."""
    allowed = node_grid.ERROR / (8 * len(run.game.shift))
    log_tail = math.log(allowed) + math.log(delta) - epsilon  # their product may underflow
    return float(scipy.optimize.brentq(lambda r: scipy.special.log_ndtr(-r) - log_tail, 0.0, 60.0))


def _largest_epsilon(played: node_grid.Played, delta: float, highest: float) -> float:
    """Where this policy's own curve comes down to delta, or `highest` if that comes first."""
    above = lambda epsilon: node_grid.value(played, epsilon) - delta  # noqa: E731
    if above(0.0) <= 0:
        return 0.0
    if above(highest) >= 0:
        return highest
    return float(scipy.optimize.brentq(above, 0.0, highest, xtol=1e-14, rtol=1e-13))


def _newton(played: node_grid.Played, epsilon: float, delta: float) -> float:
    """Where the best delta at every epsilon seems to come down to `delta`; infinity if unclear.

    A step of Newton's method for the normal quantile of delta, almost linear in epsilon. Because
    the policy is the best at `epsilon`, the slope of delta there is that for a fixed policy.
    """
    value, (_, q) = node_grid.value(played, epsilon), node_grid.accepted(played, epsilon)
    if not (0 < value < 1 and q > 0):
        return math.inf
    z = float(scipy.special.ndtri(value))
    slope = math.exp(epsilon) * q / float(node_grid.normal(np.array(z), 1.0))
    return epsilon + (z - float(scipy.special.ndtri(delta))) / slope
