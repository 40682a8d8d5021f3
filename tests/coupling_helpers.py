"""What the tests of the coupling accountant share."""

import numpy as np

from certunlearn.accounting import _gaussian, _taut_string
from certunlearn.accounting._attack import best_loss
from certunlearn.accounting._reflection import blocks, node_tables, solution


def game(distance, contraction, shift, noise, steps=None):
    shape = np.broadcast_shapes(np.shape(contraction), np.shape(shift), np.shape(noise), steps or 1)
    per_step = (np.broadcast_to(np.asarray(x, float), shape) for x in (contraction, shift, noise))
    return solution.Steps(distance, *per_step)


def solve(steps, delta, length=None, merged=None, columns=64, tilted=False, **options):
    run = blocks.blocks(steps, length)
    if merged is not None:
        run = run._replace(merged=np.full(len(run.noise), merged))
    tables = node_tables.Resolution(0.15, columns, tilted)
    return node_tables.solve(run, delta, tables, **options)


def uncapped(steps, delta, **options):
    """The recursion's own epsilon: not capped by interpolation, which would hide its errors."""
    solved = solve(steps, delta, **options)
    return solution._epsilon(solved, delta, 3 * by_interpolation(steps, delta))


def by_interpolation_noise(steps):
    mu = _taut_string.gdp_mu(steps.distance, steps.contraction, steps.shift, steps.noise)
    return mu / _gaussian.mu(1.0, 1e-5)


def by_interpolation(steps, delta):
    mu = _taut_string.gdp_mu(steps.distance, steps.contraction, steps.shift, steps.noise)
    return float(_gaussian.epsilon(mu, delta))


def by_attack(steps, delta):
    return best_loss.epsilon(steps.distance, *steps[1:4], delta)


def at_nominal(distance, contraction, shift, steps, epsilon, delta):
    """The game with the noise at which interpolation certifies `epsilon`."""
    unit = game(distance, contraction, shift, 1.0, steps)
    mu = _taut_string.gdp_mu(unit.distance, unit.contraction, unit.shift, unit.noise)
    return unit._replace(noise=unit.noise * (mu / _gaussian.mu(epsilon, delta)))
