"""One step of the coupling recursion against the best pairing that there is: a linear program.

Two steps: the runs are `separation` apart before the first noise, 1, and the second leads from
distance D to d = contraction * D + shift before a noise of 1. So V_1(L, D) is exactly the
divergence of two Gaussians d apart, and what is certified at L is one pairing of the first noise's
positive mass with its negative mass.

The dual of the best pairing is a test a: as large as may be where p - e^L q is positive, as small
where it is negative, with a(v) - e^l a(v') <= V_1(l, |v - v'|) for all l, v on the positive side
and v' on the other. For Gaussians "for all l" is Phi^-1(a(v)) <= Phi^-1(a(v')) + d. *Every* such
test has an integral against p - e^L q that no pairing is below: integrate its inequality over the
pairs. The linear program finds a good one on 30 cells; `_lower_bound` makes it feasible on 1,600,
where distances are the least between cells, and integrates that. So the bound holds for every
pairing, of whatever family, and however good the program's answer is.
"""

import numpy as np
import pytest
import scipy.optimize
from coupling_helpers import game
from scipy.special import ndtr, ndtri

from certunlearn.accounting import _gaussian
from certunlearn.accounting._reflection import blocks, node_tables

_CELLS, _FINE, _TANGENTS = 15, 800, 120  # of either side


def _masses(separation, level, edges):
    """Of p - e^L q between edges, in order: positive right of z* = L / separation."""
    p, q = (np.diff(ndtr(edges + side * separation / 2)) for side in (-1, 1))
    return p - np.exp(level) * q


def _either_side(separation, level, edges):
    """Positive and negative masses of cells at such distances from z*, both positive numbers."""
    star = level / separation
    right = _masses(separation, level, star + edges)
    left = _masses(separation, level, star - edges[::-1])[::-1]
    return right, -left


def _program(separation, level, contraction, shift):
    """The least value of a pairing of 30 cells' middles, and the test on the left of z*.

    Returns:
      the value, the middles' distances from z*, and Phi^-1 of the test there.
    """
    edges = np.append(4 * np.linspace(0, 1, _CELLS) ** 1.3, 5.0)
    middles = (edges[1:] + edges[:-1]) / 2
    right, left = _either_side(separation, level, np.append(edges[:-1], np.inf))
    apart = contraction * (middles[:, None] + middles) + shift
    # a(v) <= V_1(l) + e^l a(v'): tangents of a concave function of a(v'), some of them.
    touched = np.linspace(-7, 1, _TANGENTS)
    ratios = np.maximum(-apart[..., None] * (apart[..., None] / 2 + touched), 0)
    least = _gaussian.delta(ratios, apart[..., None])
    rows, each = np.zeros((_CELLS, _CELLS, _TANGENTS, 2 * _CELLS)), np.arange(_CELLS)
    rows[each, :, :, each] = 1
    rows[:, each, :, _CELLS + each] = -np.exp(ratios.transpose(1, 0, 2))
    found = scipy.optimize.linprog(
        np.append(-right, left),
        A_ub=rows.reshape(-1, 2 * _CELLS),
        b_ub=least.reshape(-1),
        bounds=(0, 1),
    )
    assert found.status == 0
    return -found.fun, middles, ndtri(np.clip(found.x[_CELLS:], 1e-14, 1 - 1e-14))


def _lower_bound(separation, level, contraction, shift, middles, test):
    """What no pairing is below: the integral of a feasible test near the program's."""
    edges = np.append(np.linspace(0, 7, _FINE), np.inf)
    nearest = edges[:-1]
    slope = min(0.0, (test[-1] - test[-2]) / (middles[-1] - middles[-2]))
    on_left = np.interp(nearest, middles, test)
    on_left += slope * np.maximum(nearest - middles[-1], 0)
    # The least distance of two cells: what is feasible there is feasible for all their points.
    apart = contraction * (nearest[:, None] + nearest) + shift
    on_right = (on_left + apart).min(axis=1)
    on_left = (on_right[:, None] - apart).max(axis=0)  # as small as it may be
    right, left = _either_side(separation, level, edges)
    return float(right @ ndtr(on_right) - left @ ndtr(on_left))


def best_pairing(separation, level, contraction, shift):
    """A linear program's value of the best pairing, and a bound that none is below."""
    value, middles, test = _program(separation, level, contraction, shift)
    return value, _lower_bound(separation, level, contraction, shift, middles, test)


@pytest.mark.parametrize(("separation", "level"), [(1.0, 1.0), (2.0, 2.0), (2.0, 0.0)])
def test_the_best_pairing_of_two_noises_without_a_shift_is_the_exact_gaussian(separation, level):
    exact = float(_gaussian.delta(level, separation / 2**0.5))
    value, bound = best_pairing(separation, level, 1.0, 0.0)
    assert bound <= exact <= 1.03 * bound
    assert value == pytest.approx(exact, rel=0.01)
    # A shift, or less contraction, would be told apart.
    assert best_pairing(separation, level, 1.0, 0.1)[1] > exact
    assert best_pairing(separation, level, 0.9, 0.0)[0] < bound


def certified(separation, level, contraction, shift, tilted):
    steps = game(separation, [1.0, contraction], [0.0, shift], [1.0, 1.0])
    tables = node_tables.Resolution(0.08, 64, tilted)
    solved = node_tables.solve(blocks.blocks(steps, 1), 1e-5, tables)
    return float(node_tables.profile(solved, np.array([level]))[0])


# Contraction, shift, separation and level, and how far above the bound mirrors and tilted pairs may
# be: as much as they are, and a little. Of that the bound itself is 1% to 2%.
GAMES = [
    (1.0, 0.1, 1.0, 1.0, 1.03, 1.03),
    (1.0, 0.3, 2.0, 2.0, 1.03, 1.025),
    (0.9, 0.3, 1.0, 1.0, 1.035, 1.025),
    (0.5, 0.3, 1.0, 1.0, 1.07, 1.035),
    (0.5, 0.3, 2.5, 2.0, 1.04, 1.025),
    (1.0, 1.0, 2.0, 4.0, 1.08, 1.04),
    (0.2, 0.3, 1.0, 1.0, 1.65, 1.07),
    (0.05, 0.5, 2.0, 1.0, 1.6, 1.04),
    (0.05, 1.0, 1.0, 1.0, 1.85, 1.045),
]


@pytest.mark.slow
@pytest.mark.parametrize(("contraction", "shift", "separation", "level", "mirrors", "tilts"), GAMES)
def test_a_step_is_never_below_the_best_pairing_and_as_near_as_known(
    contraction, shift, separation, level, mirrors, tilts
):
    game = (separation, level, contraction, shift)
    value, bound = best_pairing(*game)
    assert 0.95 * value < bound < value  # so the program's answer is no accident
    assert bound <= certified(*game, tilted=False) <= mirrors * bound
    assert bound <= certified(*game, tilted=True) <= tilts * bound
