import decimal
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from certunlearn._numerics import safe_rounding

NUMBERS = st.floats(0, 1e300, allow_subnormal=False)


@hypothesis.given(NUMBERS, st.integers(1, 10))
def test_text_is_on_the_safe_side_and_as_near_as_its_digits_allow(value, digits):
    exact = decimal.Decimal(repr(value))
    up = decimal.Decimal(safe_rounding.rounded_up(value, digits))
    down = decimal.Decimal(safe_rounding.rounded_down(value, digits))
    assert down <= exact <= up
    if value:
        spacing = decimal.Decimal(10) ** (exact.adjusted() - digits + 1)
        assert up - exact < spacing
        assert exact - down < spacing


@hypothesis.given(st.floats(0, 1))
def test_per_cent_is_on_the_safe_side(share):
    shown = decimal.Decimal(safe_rounding.percent_up(share).removesuffix("%"))
    exact = 100 * decimal.Decimal(repr(share))
    assert exact <= shown
    assert shown - decimal.Decimal("0.1") < exact


@pytest.mark.parametrize("value", [0.99872, 0.10602, 1e-5 * (1 + 1e-6), 2.0001])
def test_claims_that_rounding_to_nearest_would_lessen(value):
    assert float(f"{value:.4g}") < value  # what must not be shown
    assert float(safe_rounding.rounded_up(value)) > value


def test_what_needs_no_rounding_stays_and_what_is_no_number_is_shown():
    assert safe_rounding.rounded_up(1e-5) == safe_rounding.rounded_down(1e-5) == "1e-05"
    assert safe_rounding.rounded_up(8) == "8"
    assert safe_rounding.rounded_up(math.inf) == "inf"
    assert safe_rounding.rounded_up(-0.99872) == "-0.9987"
