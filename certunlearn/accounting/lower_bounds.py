"""What no accountant can go below: the epsilon that the best attack known reaches.

The attack and its numerics are in `_attack`; docs/theory/attack.md says why its numbers are lower
bounds.
"""

import numpy as np

from certunlearn._numerics import checks
from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.accounting import accountant_base, interpolation
from certunlearn.accounting._attack import best_loss
from certunlearn.accounting.coupling import COUPLED_MU
from certunlearn.mechanisms import Mechanism
from certunlearn.mechanisms.plain_separations import Run, with_noise

# Most steps for which plans and certificates work out `epsilon_lower_bound`: a few seconds.
MOST_ATTACKED = 2000
# In multiplications a round: some ten seconds. Constant steps and usual schedules take 1e9 at most.
_MOST_ATTACK_WORK = 3e9
# The same where the attack is asked for by itself: half a minute, for some 12,000 constant steps.
_MOST_ASKED_WORK = 8e9


def epsilon_lower_bound(
    mechanism: Mechanism, *, noise_scale: ScalarOrSchedule, delta: float
) -> float:
    """An epsilon that the true one is not below: what the best attack known reaches.

    Arguments and errors as for `epsilon`. The truth lies between this and any accountant's epsilon,
    so it says how much a better accountant could still gain. The attack is one of memoryless
    updates without a diameter; for a mechanism with memory it is a lower bound, too.

    Returns:
      epsilon >= 0, rounded down; at most 300.

    Raises:
      ValueError: if no attack is known on such a mechanism, an argument is out of range, or the
        attack would take minutes, as on more than some 12,000 steps, or on noise whose scales
        differ by thousands. It says so before any work begins.

    Source:
      An adversary's choice of loss, found by policy iteration: see docs/theory/attack.md.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> round(epsilon_lower_bound(m, noise_scale=5.0, delta=1e-5), 3)
    0.176
    """
    delta = checks.open_unit("delta", delta)
    scale = accountant_base.checked_noise(mechanism, noise_scale)
    if not mechanism.attackable:
        raise ValueError(
            f"epsilon_lower_bound knows no attack on {type(mechanism).__name__}: what its "
            "assumptions exclude an attack would have to respect"
        )
    game = _game(mechanism, scale)
    share = best_loss.work(*game, delta) / _MOST_ASKED_WORK
    if share > 1:
        raise ValueError(
            f"epsilon_lower_bound would take {share:.3g} times as long as the half minute that it "
            f"may; steps must be fewer than {mechanism.steps}, or their noise more alike"
        )
    return best_loss.epsilon(*game, delta)


def affordable_lower_bound(
    mechanism: Mechanism, *, noise_scale: ScalarOrSchedule, delta: float
) -> float | None:
    """`epsilon_lower_bound`, or None if there is none or it would take long.

    It would for more than `MOST_ATTACKED` steps, a mu above `COUPLED_MU`, or noise whose scales
    differ so much from step to step that grids need very many nodes.
    """
    scale = accountant_base.checked_noise(mechanism, noise_scale)
    stated = mechanism.separations()
    if mechanism.steps > MOST_ATTACKED or not mechanism.attackable or stated is None:
        return None
    if interpolation.mu_curve(stated, scale)[-1] > COUPLED_MU:
        return None  # an epsilon in the hundreds: what the attack reaches is of no use
    delta = checks.open_unit("delta", delta)
    if best_loss.work(*_game(mechanism, scale), delta) > _MOST_ATTACK_WORK:
        return None
    return epsilon_lower_bound(mechanism, noise_scale=scale, delta=delta)


def _game(mechanism: Mechanism, scale: PerStep) -> Run:
    """The run as the attack reads it: noise on the starts is a first step that does nothing."""
    stated = accountant_base.separations(mechanism)
    run = with_noise(stated, scale)
    if stated.init_noise_scale == 0:
        return run
    return Run(
        run.initial_distance,
        np.insert(run.contraction, 0, 1.0),
        np.insert(run.shift, 0, 0.0),
        np.insert(run.noise, 0, stated.init_noise_scale),
    )
