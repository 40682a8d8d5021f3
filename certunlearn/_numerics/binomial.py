"""Quantiles of the binomial distribution far out in its upper tail."""

import scipy  # its parts load when they are first used

# Largest relative error of scipy's `sf`. The largest that was seen is 5e-12, at a chance of 1e-100
# and a size of 1e9.
_SF_RELATIVE_ERROR = 1e-6


def quantile(size: int, rate: float, chance: float) -> int:
    """The least m with P(Binomial(size, rate) > m) <= chance.

    By bisection on `sf`: scipy's `isf` asks `ppf` for 1 - chance, which is 1 for a chance below
    1e-16, and answers `size`.

    Args:
      size: at least 0.
      rate: in [0, 1].
      chance: positive.

    Returns:
      m between 0 and `size`; more than the least only where `sf` is within 1e-6 of the chance.

    >>> quantile(1000, 0.05, 1e-20)
    125
    """
    low, high = -1, size  # P(more than low) > chance >= P(more than high)
    while high - low > 1:
        middle = (low + high) // 2
        if float(scipy.stats.binom.sf(middle, size, rate)) * (1 + _SF_RELATIVE_ERROR) <= chance:
            high = middle
        else:
            low = middle
    return high
