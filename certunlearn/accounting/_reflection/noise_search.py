"""The search for a noise scale, in its logarithm, with few solutions of a run's tables."""

import math
from collections.abc import Callable
from typing import NamedTuple

# The longest steps towards more noise and towards less, and what is added to a step as a share.
_STRIDE, _LONGEST, _MARGIN = 0.5, 1.0, 0.08
# The flattest slope that is believed, as a share of that at the start: tables are not smooth.
_FLATTEST = 1 / 3
MOST_SOLUTIONS = 8


class Search(NamedTuple):
    """Where a search stands, in logarithms of the noise scale.

    Attributes:
      at: where to look next, or where it ended.
      slope: of the excess there, negative.
      best: the least that holds, of those looked at.
    """

    at: float
    slope: float
    best: float


def search(excess: Callable[[float], float], start: Search, enough: tuple[float, float]) -> Search:
    """To where `excess` holds (is not positive) with as much room, in noise, as is `enough`.

    Secants, always between what has failed and what has not, and through both where there are such.

    Args:
      excess: logarithm of delta over what it may be, which mostly falls; need not be smooth.
      start: where to begin, with something that holds as `best`: there is nothing to find above it.
      enough: the least room and the most; negative where it need not hold.

    Returns:
      where it ended, after `MOST_SOLUTIONS` at most. `best` holds, or is that of the start.
    """
    at, slope, best = start
    failed, before = -math.inf, math.nan
    values: dict[float, float] = {}
    for _ in range(MOST_SOLUTIONS):
        value = values[at] = excess(at)
        if value <= min(enough[0] * slope, 0.0):
            best, across = at, failed
        else:
            failed, across = at, best
        other = across if across in values else before
        if other in values and other != at:
            slope = min((value - values[other]) / (at - other), start.slope * _FLATTEST)
        before = at
        near = enough[0] <= value / slope <= enough[1]
        if near and value <= 0:
            best = at  # also where a steeper slope had just asked for more room
        if near or best - failed < enough[1]:
            break
        # To the middle of what is enough, and rather too much noise than too little: that is vain.
        step = -value / slope
        at += max(-_LONGEST, min(_STRIDE, step + sum(enough) / 2 + _MARGIN * abs(step)))
        if not failed < at < best:
            at = (best + max(failed, best - _STRIDE)) / 2
    return Search(before, slope, best)
