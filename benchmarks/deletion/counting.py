"""Operations of the exact system, counted as it runs rather than modelled.

How many corrections a head takes, and whether float64 decides all its numbers, depends on the data.
So what works on matrices is wrapped while one run is counted; such runs are not timed. Python's
integers count as one operation each, as do additions to the sums of a pair of 64-bit numbers.
"""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import scipy.linalg

from certunlearn.sums import exact_solution, fast_solution, kept, systems
from certunlearn.sums.wide_integers import WideIntegers

_MOST_REFINEMENTS = 4


def operations(run: Callable[[], object], changed: int, d: int, outputs: int) -> float:
    """Operations of one run of an exact route.

    Args:
      run: the route.
      changed: rows that it adds to the sums, or takes from them.
      d: features.
      outputs: numbers that a row's target is.
    """
    # Products of the rows, and their addition to sums of two numbers each.
    total = changed * (2 * d**2 + 2 * d * outputs) + 4 * d**2

    def count(flops: float) -> None:
        nonlocal total
        total += flops

    def wrapped(module: Any, name: str, cost: Callable[..., float]) -> Any:
        original = getattr(module, name)

        def counting(*args: Any, **settings: Any) -> Any:
            count(cost(*args))
            return original(*args, **settings)

        return mock.patch.object(module, name, counting)

    with contextlib.ExitStack() as stack:
        square, cube = d**2, d**3
        for each in (
            wrapped(scipy.linalg, "cho_factor", lambda matrix: cube / 3),
            wrapped(scipy.linalg, "cho_solve", lambda _, right: 2 * square * right.shape[1]),
            wrapped(scipy.linalg.lapack, "dpotri", lambda lower: 2 * cube / 3),
            wrapped(np.linalg, "solve", lambda a, b: 2 * len(a) ** 3 / 3 + 2 * len(a) * b.size),
            wrapped(fast_solution, "multiplied", lambda _, right: 2 * square * right.shape[1]),
            wrapped(fast_solution, "_blocked", lambda _, right: 2 * square * right.shape[1]),
            # Norms of the matrix, and the matrix in float64 and in digits.
            wrapped(fast_solution, "_expected_open", lambda *_: 2 * square),
            wrapped(fast_solution, "corrected", lambda *_: 2 * square),
            wrapped(WideIntegers, "to_float", lambda whole: 3 * whole.high.size),
            wrapped(WideIntegers, "digits", lambda whole, _: 20 * whole.high.size),
            wrapped(
                exact_solution,
                "exact_product",
                lambda digits, right: len(digits) * 2 * square * right.shape[1],
            ),
            # A new inverse refines the solution by products that nothing else counts.
            wrapped(kept, "_kept", lambda *_: _MOST_REFINEMENTS * 2 * square * outputs),
            wrapped(systems, "product_with", _whole_product),
            # Products with the rows, on either side, and the change of the inverse.
            wrapped(kept, "_updated", lambda _, rows, w: rows.size * (4 * d + 2 * len(rows))),
        ):
            stack.enter_context(each)
        run()
    return float(total)


def _whole_product(left: np.ndarray, right: np.ndarray) -> float:
    """Whole numbers times Python integers, digit by digit."""
    digits = 1 if left.size <= systems._FEW else len(exact_solution.digits_of(right))
    return 2.0 * digits * left.size * right.shape[1]
