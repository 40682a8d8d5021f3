"""Integer sums over examples, from which an example can be subtracted without a trace."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator

import numpy as np

from certunlearn.sums import block_products, device_products
from certunlearn.sums.block_products import BLOCK_ROWS
from certunlearn.sums.fixed_point import Settings
from certunlearn.sums.row_index import RowIndex
from certunlearn.sums.wide_integers import WideIntegers

# The largest total weight. Sums of q q^T are then at most 2^44 2^38 = 2^82, and those of q y at
# most 2^44 2^19 2^31 = 2^94: within the 95 bits of `WideIntegers`.
MOST_WEIGHT = 2**44
# Blocks are summed in int64 up to this weight: at most 2^23 2^38 = 2^61, below the 2^62 that
# `WideIntegers.plus` takes.
_MOST_PENDING_WEIGHT = 2**23


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Statistics:
    """Exact sums over rows. Private: they hold the traces of every row until it is removed.

    With q the whole numbers of a row's features, y its target and w its weight:

    Attributes:
      settings: how rows become whole numbers. Public.
      rows: number of rows.
      class_counts: int64 `[classes]`, rows of each class; None for regression.
      weight: sum of w; the number of rows where there are no class weights.
      gram: sum of w q q^T, `[d, d]`.
      cross: sum of w q y, `[d, outputs or 1]`; for labels, sum of w q over each class,
        `[d, classes]`.
      index: which rows there are, to refuse the removal of others; or None.

    Guarantee:
      Whole numbers, added without rounding or overflow for a total weight of up to 2^44. So they
      are a function of the multiset of rows alone: the same, bit for bit, in whatever order,
      batches, and on whatever machine rows were added, removed or merged.
    """

    settings: Settings
    rows: int
    class_counts: np.ndarray | None
    weight: int
    gram: WideIntegers
    cross: WideIntegers
    index: RowIndex | None

    def __post_init__(self) -> None:
        """Makes the counts read-only, as the sums are."""
        if self.class_counts is not None:
            view = self.class_counts.view()
            view.flags.writeable = False
            object.__setattr__(self, "class_counts", view)

    def __repr__(self) -> str:
        """Nothing that depends on a row."""
        return f"Statistics({self.settings.num_features} features, <private>)"


def no_rows(settings: Settings, salt: bytes | None) -> Statistics:
    """The sums over no rows, with an index if there is a salt."""
    d = settings.num_features
    return Statistics(
        settings=settings,
        rows=0,
        class_counts=None if settings.classes is None else np.zeros(settings.classes, np.int64),
        weight=0,
        gram=WideIntegers.zeros((d, d)),
        cross=WideIntegers.zeros((d, settings.columns)),
        index=None if salt is None else RowIndex.empty(salt),
    )


def digest(stats: Statistics) -> str:
    """SHA-256 (hexadecimal) of settings, counts and sums: equal for equal rows, however collected.

    Index and salt do not enter. It shows whether two parties have the same sums; whoever guesses
    all rows can confirm the guess with it.
    """
    about = {
        "format": "certunlearn exact sums 1",
        "settings": dataclasses.asdict(stats.settings),
        "rows": stats.rows,
        "weight": stats.weight,
        "class_counts": None if stats.class_counts is None else stats.class_counts.tolist(),
    }
    found = hashlib.sha256(json.dumps(about, sort_keys=True, allow_nan=False).encode())
    for sums in (stats.gram, stats.cross):
        found.update(np.ascontiguousarray(sums.high.astype("<i8", copy=False)).data)
        found.update(np.ascontiguousarray(sums.low.astype("<u4")).data)
    return found.hexdigest()


class _Changing:
    """Sums in the making, of which nobody else holds the arrays."""

    def __init__(self, stats: Statistics, sign: int, on_device: bool) -> None:
        self.stats, self.sign = stats, sign
        self.multiply = device_products.products if on_device else block_products.products
        self.gram, self.cross = stats.gram, stats.cross
        self.rows, self.weight = 0, 0
        self.counts = np.zeros(stats.settings.classes or 0, np.int64)
        self.digests: list[np.ndarray] = []
        self._forget_pending()

    def _forget_pending(self) -> None:
        self.pending: block_products.Products | None = None
        self.pending_weight = 0

    def take(self, rows: np.ndarray, targets: np.ndarray) -> None:
        """Counts some rows, at most a block of them."""
        settings = self.stats.settings
        weights = settings.row_weights(targets)
        weight = len(rows) if weights is None else int(weights.sum())
        self.rows, self.weight = self.rows + len(rows), self.weight + weight
        if self.sign > 0:
            check_weight(self.stats.weight + self.weight)
        # If more is to be removed than there is, `finish` says which row was not there.
        if self.sign > 0 or self.weight <= self.stats.weight:
            self._sum(rows, targets, weight)
        if settings.classes is not None:
            self.counts += np.bincount(targets, minlength=settings.classes)
        if self.stats.index is not None:
            self.digests.append(self.stats.index.digests(rows, targets))

    def _sum(self, rows: np.ndarray, targets: np.ndarray, weight: int) -> None:
        if self.pending_weight + weight > _MOST_PENDING_WEIGHT:
            self._flush()
        gram, cross = self.multiply(self.stats.settings, rows, targets)
        if self.pending is None:
            self.pending = gram, cross
        else:
            np.add(self.pending[0], gram, out=self.pending[0])
            for shift, part in cross.items():
                self.pending[1][shift] += part
        self.pending_weight += weight

    def _flush(self) -> None:
        if self.pending is None:
            return
        gram, cross = self.pending
        self.gram = self.gram.plus(gram) if self.sign > 0 else self.gram.minus(gram)
        for shift, part in cross.items():
            total = self.cross
            self.cross = total.plus(part, shift) if self.sign > 0 else total.minus(part, shift)
        self._forget_pending()

    def finish(self) -> Statistics:
        """The new sums; ValueError if a row was to be removed that is not there."""
        index, old_counts = self.stats.index, self.stats.class_counts
        if index is not None and self.digests:
            digests = np.concatenate(self.digests)
            index = index.with_rows(digests) if self.sign > 0 else index.without(digests)
        self._flush()
        result = dataclasses.replace(
            self.stats,
            rows=self.stats.rows + self.sign * self.rows,
            class_counts=None if old_counts is None else old_counts + self.sign * self.counts,
            weight=self.stats.weight + self.sign * self.weight,
            gram=self.gram,
            cross=self.cross,
            index=index,
        )
        problem = None if self.sign > 0 else sums_problem(result)
        if problem is not None:
            raise ValueError(
                f"these rows cannot be removed: {problem}, so that some of them were never added; "
                "nothing was changed"
            )
        return result


def changed(
    stats: Statistics,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    sign: int,
    on_device: bool,
) -> Statistics:
    """The sums with (sign 1) or without (sign -1) some rows; `stats` stays as it is.

    Raises:
      ValueError: if a row is wrong, or is to be removed and is not there.
    """
    changing = _Changing(stats, sign, on_device)
    for features, targets in batches:
        first = changing.rows
        # All of a batch's targets are checked before its first row counts.
        whole = stats.settings.target_rows(targets, first_row=first)
        for start in range(0, len(whole), BLOCK_ROWS):
            piece = slice(start, start + BLOCK_ROWS)
            rows = stats.settings.feature_rows(features[piece])
            changing.take(rows, whole[piece])
    return changing.finish()


def check_weight(weight: int) -> None:
    """Raises ValueError if rows of this total weight have sums that are not proved to fit."""
    if weight > MOST_WEIGHT:
        raise ValueError(
            f"the total weight of the rows must be at most 2^44, got {weight}; beyond it the sums "
            "are not proved to fit"
        )


def sums_problem(stats: Statistics) -> str | None:
    """Why no rows can have these sums, as far as that is quickly seen; None if nothing shows."""
    settings, counts = stats.settings, stats.class_counts
    if stats.rows < 0 or stats.weight < 0 or (counts is not None and (counts < 0).any()):
        return "fewer than no rows would be left"
    diagonal = WideIntegers(
        *(np.diagonal(word).copy() for word in (stats.gram.high, stats.gram.low))
    ).to_objects()
    if (diagonal < 0).any():
        return "a sum of squares would be negative"
    # A row adds at most w b^2 to the trace.
    if diagonal.sum() > stats.weight * settings.norm_in_units**2:
        return "the sums of squares would be too large for the rows that are left"
    if stats.rows == 0 and not (stats.gram.is_zero() and stats.cross.is_zero()):
        return "no row would be left, and sums that are not zero"
    return None
