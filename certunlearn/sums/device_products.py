"""Products of blocks of whole-number rows on an accelerator: 8-bit factors, 32-bit sums."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from certunlearn.sums.block_products import BLOCK_ROWS, Products
from certunlearn.sums.fixed_point import Settings

# A factor is a sum of digits from -64 to 63 times powers of 2^DIGIT_BITS.
DIGIT_BITS = 7
_BASE = 2**DIGIT_BITS
# |q| <= 2^19 and |y| <= 2^31, so that three digits and five are enough: those of the largest
# numbers reach 63 (2^14 + 2^7 + 1) > 2^19 and 63 (2^28 + ... + 1) > 2^31.
_FEATURE_DIGITS = 3
_TARGET_DIGITS = 5


def products(settings: Settings, rows: np.ndarray, targets: np.ndarray) -> Products:
    """What `block_products.products` returns, by JAX's default device.

    Guarantee:
      Exact on every device that multiplies 8-bit integers into 32-bit sums, whatever the order: a
      digit has a magnitude of at most 2^6, so sums over a block of 2^12 rows are at most 2^24. The
      sums of digits' products are put together on the host, in int64: below 2^50 a block, as there.
    """
    if settings.class_weights is None:
        return _products(settings, rows, targets)
    weights = np.asarray(settings.class_weights, np.int64)
    gram = np.zeros((rows.shape[1],) * 2, np.int64)
    cross = np.zeros((rows.shape[1], settings.columns), np.int64)
    of_rows = weights[targets]
    for weight in np.unique(of_rows):
        some = of_rows == weight
        one, parts = _products(settings, rows[some], targets[some])
        gram += weight * one
        cross += weight * parts[0]
    return gram, {0: cross}


def _products(settings: Settings, rows: np.ndarray, targets: np.ndarray) -> Products:
    padded = np.zeros((BLOCK_ROWS, rows.shape[1]), np.int32)
    padded[: len(rows)] = rows  # one shape, so that one program is compiled; zeros add nothing
    if settings.classes is None:
        parts = np.zeros((_TARGET_DIGITS, BLOCK_ROWS, settings.columns), np.int8)
        parts[:, : len(rows)] = _target_digits(targets)
    else:
        labels = np.full(BLOCK_ROWS, -1, np.int32)  # no class
        labels[: len(rows)] = targets
        parts = _one_hot(settings.classes, labels)
    squares, mixed = jax.device_get(_digit_products(padded, parts))
    gram = np.zeros((rows.shape[1],) * 2, np.int64)
    for (i, j), part in zip(_pairs(), squares, strict=True):
        scaled = part.astype(np.int64) << (DIGIT_BITS * (i + j))
        gram += scaled if i == j else scaled + scaled.T
    cross = {
        DIGIT_BITS * place: sum(
            (part.astype(np.int64) << (DIGIT_BITS * i) for i, part in enumerate(parts)),
            start=np.zeros((rows.shape[1], settings.columns), np.int64),
        )
        for place, parts in enumerate(mixed)
    }
    return gram, cross


def _pairs() -> list[tuple[int, int]]:
    return list(itertools.combinations_with_replacement(range(_FEATURE_DIGITS), 2))


@functools.partial(jax.jit, static_argnums=0)
def _one_hot(classes: int, labels: jax.Array) -> jax.Array:
    return jax.nn.one_hot(labels, classes, dtype=jnp.int8)[None]


@jax.jit
def _digit_products(
    rows: jax.Array, parts: jax.Array
) -> tuple[list[jax.Array], list[list[jax.Array]]]:
    digits = []
    for _ in range(_FEATURE_DIGITS):
        digit = (rows + _BASE // 2) % _BASE - _BASE // 2  # `%` takes the divisor's sign
        digits.append(digit.astype(jnp.int8))
        rows = (rows - digit) // _BASE
    squares = [_product(digits[i], digits[j]) for i, j in _pairs()]
    return squares, [[_product(digit, part) for digit in digits] for part in parts]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b, int32."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _target_digits(targets: np.ndarray) -> np.ndarray:
    digits = []
    for _ in range(_TARGET_DIGITS):
        digit = (targets + _BASE // 2) % _BASE - _BASE // 2
        digits.append(digit.astype(np.int8))
        targets = (targets - digit) >> DIGIT_BITS
    return np.stack(digits)
