"""Products of blocks of whole-number rows, exact because no partial sum leaves 53 bits."""

import numpy as np
import scipy  # its parts load when they are first used

from certunlearn.sums.fixed_point import Settings

# Rows multiplied at a time.
BLOCK_ROWS = 2**12
# Regression targets of 32 bits are multiplied in two parts: y = high * 2^LIMB_BITS + low.
LIMB_BITS = 16

# The products of some rows: int64 `[d, d]` for the features with themselves, and the parts of the
# features with the targets, each int64 `[d, columns]`, under the shift that it is summed with.
Products = tuple[np.ndarray, dict[int, np.ndarray]]


def products(settings: Settings, rows: np.ndarray, targets: np.ndarray) -> Products:
    """Sums of weight q q^T and weight q y over a block of rows.

    Args:
      settings: how the rows were made.
      rows: int32 `[n, d]` with n at most `BLOCK_ROWS`.
      targets: int64 `[n]` labels or `[n, columns]`.

    Guarantee:
      Exact, whatever order the matrix products add in, and whether they fuse products with sums:
      |q| <= 2^19, so the terms of q q^T are whole numbers of at most 2^38 and sums over any part of
      a block are at most 2^12 2^38 = 2^50. Parts of targets are at most 2^16: sums are at most
      2^12 2^19 2^16 = 2^47. float64 holds all whole numbers up to 2^53, which leaves room for
      algorithms that add entries before they multiply. With a weight of at most 255 < 2^8 the
      results are below 2^58.
    """
    floats = rows.astype(np.float64)
    if settings.classes is None:
        low = targets & (2**LIMB_BITS - 1)  # 0 to 2^16 - 1
        parts = {0: low, LIMB_BITS: targets >> LIMB_BITS}  # the other from -2^15 to 2^15
        cross = {
            shift: (floats.T @ part.astype(np.float64)).astype(np.int64)
            for shift, part in parts.items()
        }
        return (floats.T @ floats).astype(np.int64), cross
    ones = (np.ones(len(rows)), (targets, np.arange(len(rows))))
    members = scipy.sparse.csr_array(ones, shape=(settings.classes, len(rows)))
    cross = {0: (members @ floats).T.astype(np.int64)}
    if settings.class_weights is None:
        return (floats.T @ floats).astype(np.int64), cross
    weights = np.asarray(settings.class_weights, np.int64)
    gram = np.zeros((rows.shape[1],) * 2, np.int64)
    of_rows = weights[targets]
    for weight in np.unique(of_rows):
        some = floats[of_rows == weight]
        gram += weight * (some.T @ some).astype(np.int64)
    return gram, {0: cross[0] * weights}
