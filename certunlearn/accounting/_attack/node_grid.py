"""Playing a game of thresholds on a grid, so that what is reported is not above the truth.

The game is that of `best_loss`, whose policies move the state x by +shift_t/2 right of a threshold
and by -shift_t/2 left of it. The thresholds for one epsilon are found in a single sweep, while the
two densities are carried along.

docs/theory/attack.md says why the number is a lower bound. What the code relies on:

- Errors in placing thresholds do no harm, only those in evaluating them do.
- Sums over an even grid are exact beyond float64 away from a cut; at the cut, 16 weights integrate
  the interpolating polynomial. `ERROR` of delta is subtracted for it, float64's rounding, and the
  probability beyond `reach` standard deviations, also e^epsilon times.
- Raising noise that would need too many nodes only makes the attack weaker.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy  # its parts load when they are first used

ERROR = 1e-7  # of delta, allowed for quadrature; ten times what has been seen

_STEEP = 4.0  # tails fall by at most e^(_STEEP / nodes) from node to node
_HALF = 8  # nodes on either side of a cut that its weights use
_USUAL_REACH = 10.0
_MAX_WIDTH = 2500.0  # standard deviations from the centre out to there, before noise is raised
_ROUNDING = 1e-15  # of the probability accepted, for each step
_CHUNK = 64  # target nodes at a time where grids do not match
_FARTHEST = 1e100  # in parameter units: what states and noise may grow to
_MOST_NODES = 500_000  # of a grid, where work is to be affordable
_REGRIDDED = 4.0  # what a node costs there, as a multiple of where they do


class Game(NamedTuple):
    """Steps of the form x <- c_t x + u_t(x) + noise, each with some noise.

    Attributes:
      distance: of the two starts.
      contraction: float64 `[steps]`: c_t.
      shift: float64 `[steps]`: u_t is at most half of it.
      noise_scale: float64 `[steps]`, positive: standard deviations.
    """

    distance: float
    contraction: np.ndarray
    shift: np.ndarray
    noise_scale: np.ndarray


class Played(NamedTuple):
    """A policy and the two densities it leads to.

    Attributes:
      thresholds: one for each step.
      spacing: of the nodes of
      densities: float64 `[2, nodes]`, the middle node at 0.
      left_out: probability that the grid and the kernels may miss.
    """

    thresholds: list[float]
    spacing: float
    densities: np.ndarray
    left_out: float


class _Part(NamedTuple):
    """What lies on one side of a threshold."""

    values: np.ndarray  # [2, nodes], times the cut's weights
    first: int  # the first of its nodes, counted from the centre
    push: float


def play(game: Game, epsilon: float, nodes: float, reach: float) -> Played:
    """Finds the best policy at epsilon and plays it.

    Args:
      game: with at least one step.
      epsilon: what thresholds and test are best for.
      nodes: grid nodes for the standard deviation of a step's noise, at least 2.
      reach: standard deviations out to which grids and kernels go.
    """
    sigma, width, allowed = _plan(game, nodes, reach)
    spacing = float(allowed[0])
    half = math.ceil(width[0] / spacing)
    grid = (np.arange(2 * half + 1) - half) * spacing
    start = (game.contraction[0] * game.distance + game.shift[0]) / 2
    densities = np.stack([normal(grid - start, sigma[0]), normal(grid + start, sigma[0])])
    thresholds = [0.0]
    for t in range(1, len(sigma)):
        cut = best_cut(densities, epsilon)
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
    left_out = 4 * len(sigma) * float(scipy.special.ndtr(-reach))
    return Played(thresholds, spacing, densities, left_out)


def fits(game: Game) -> bool:
    """Whether all states stay within float64."""
    mean, spread = game.distance, 0.0
    for c, s, sigma in zip(game.contraction, game.shift, game.noise_scale, strict=True):
        mean, spread = c * mean + s, c * spread + sigma
        if not mean + spread < _FARTHEST:
            return False
    return True


def work(game: Game, nodes: float, reach: float) -> float:
    """About how many multiplications `play` takes; infinity for grids of too many nodes."""
    sigma, width, allowed = _plan(game, nodes, reach)
    if not np.all(width <= _MOST_NODES / 2 * allowed):
        return math.inf
    spacing, total = float(allowed[0]), 0.0
    for t in range(1, len(sigma)):
        scaled = float(game.contraction[t]) * spacing
        new = scaled if 2 * scaled > allowed[t] else float(allowed[t])
        if not 2 * float(width[t]) <= _MOST_NODES * new:
            return math.inf
        kernel = 2 * reach * float(sigma[t])
        if new == scaled:
            total += 2 * float(width[t - 1]) / spacing * (kernel / new)
        else:
            source = 2 * float(width[t - 1]) / spacing
            near = min(source, (kernel + _CHUNK * new) / scaled) if scaled > 0 else source
            total += _REGRIDDED * 2 * float(width[t]) / new * near
        spacing = new
    return total


def accepted(played: Played, epsilon: float) -> tuple[float, float]:
    """P and Q of the best last test."""
    weights = _weights(best_cut(played.densities, epsilon), played.densities.shape[1])
    p, q = played.densities @ weights * played.spacing
    return float(p), float(q)


def value(played: Played, epsilon: float) -> float:
    """What the best last test reaches, less what may be wrong with it."""
    p, q = accepted(played, epsilon)
    factor = math.exp(epsilon)
    rounding = _ROUNDING * len(played.thresholds) * p
    return (1 - ERROR) * (p - factor * q) - (1 + factor) * played.left_out - rounding


def best_cut(densities: np.ndarray, epsilon: float) -> float:
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


def normal(x: np.ndarray, sigma: float) -> np.ndarray:
    """The density of N(0, sigma^2) at x."""
    return np.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def _plan(game: Game, nodes: float, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def _add_convolved(
    moved: np.ndarray, spacing: float, part: _Part, sigma: float, reach: float
) -> None:
    """Adds a part, pushed and smoothed, to densities on a grid of the same spacing and centre."""
    low = math.ceil((part.push - reach * sigma) / spacing)
    high = math.floor((part.push + reach * sigma) / spacing)
    kernel = normal(np.arange(low, high + 1) * spacing - part.push, sigma)
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
        kernel = normal(source[near, None] - there, sigma)
        moved[:, start : start + _CHUNK] += part.values[:, near] @ kernel


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
