"""Numbers of a claim as text: rounded to the side on which the claim stays true.

A number is taken as Python writes it: 1e-05 stays 1e-05, though the double next to it is larger.
"""

import decimal
import math


def rounded_up(value: float, digits: int = 4) -> str:
    """`value` with that many significant digits, for what is said to hold "at most".

    >>> rounded_up(0.10602), rounded_up(0.5), rounded_up(1e-05), rounded_up(2.71421)
    ('0.1061', '0.5', '1e-05', '2.715')
    """
    return _rounded(value, digits, decimal.ROUND_CEILING)


def rounded_down(value: float, digits: int = 4) -> str:
    """`value` with that many significant digits, for what is said to hold "at least".

    >>> rounded_down(0.96279)
    '0.9627'
    """
    return _rounded(value, digits, decimal.ROUND_FLOOR)


def percent_up(share: float) -> str:
    """A share in per cent with one decimal, for what is said to hold "at most".

    >>> percent_up(0.0799), percent_up(0.08), percent_up(0.08001)
    ('8.0%', '8.0%', '8.1%')
    """
    exact = 100 * decimal.Decimal(repr(float(share)))
    return f"{exact.quantize(decimal.Decimal('0.1'), rounding=decimal.ROUND_CEILING)}%"


def _rounded(value: float, digits: int, direction: str) -> str:
    value = float(value)
    if not math.isfinite(value):
        return f"{value:g}"
    context = decimal.Context(prec=digits, rounding=direction)
    return f"{float(context.create_decimal(repr(value))):.{digits}g}"
