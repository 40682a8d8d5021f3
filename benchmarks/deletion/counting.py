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

from certunlearn.sums import exact_solution, kept, systems


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

    def counted_solver(*args: Any) -> Any:
        solve = solver(*args)
        share = abs(args[0].drift) / args[1].ridge
        terms = 1 if share == 0 else max(1, int(np.ceil(np.log(kept._FOLLOWED) / np.log(share))))

        def counting(right: np.ndarray) -> np.ndarray:
            count(terms * 2 * d**2 * right.shape[1])
            return solve(right)

        return counting

    solver = kept._solver
    with contextlib.ExitStack() as stack:
        for each in (
            wrapped(scipy.linalg, "cho_factor", lambda matrix: len(matrix) ** 3 / 3),
            wrapped(scipy.linalg, "cho_solve", lambda _, right: 2 * d**2 * right.shape[1]),
            wrapped(np.linalg, "solve", lambda a, b: 2 * len(a) ** 3 / 3 + 2 * len(a) * b.size),
            # To float64, a norm, and the product itself.
            wrapped(kept, "_blocked", lambda matrix, right: 2 * d**2 * right.shape[1]),
            wrapped(kept, "_corrected", lambda *_: 5 * d**2),
            wrapped(
                exact_solution,
                "exact_product",
                lambda digits, right: len(digits) * 2 * d**2 * right.shape[1],
            ),
            # The digits of the whole matrix are worked out before.
            wrapped(exact_solution, "refined", lambda *_: 20 * d**2),
            wrapped(systems, "product_with", _whole_product),
            # Products with the rows, on either side, and the change of the inverse.
            wrapped(kept, "_updated", lambda _, rows, w: rows.size * (4 * d + 2 * len(rows))),
            mock.patch.object(kept, "_solver", counted_solver),
        ):  # fmt: skip
            stack.enter_context(each)
        run()
    return float(total)


def _whole_product(left: np.ndarray, right: np.ndarray) -> float:
    """Whole numbers times Python integers, digit by digit."""
    digits = 1 if left.size <= systems._FEW else len(exact_solution.digits_of(right))
    return 2.0 * digits * left.size * right.shape[1]
