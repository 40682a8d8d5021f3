"""What is kept between deletions, so that the next head costs O(k d^2 + a few d^2 outputs)."""

import dataclasses
from typing import overload

import numpy as np
import scipy  # its parts load when they are first used
from jax.typing import ArrayLike

from certunlearn._numerics import checks
from certunlearn.sums import exact_solution, systems
from certunlearn.sums.exact_solution import Point, System
from certunlearn.sums.row_batches import ApplyFn, Features, feature_batches
from certunlearn.sums.statistics import Statistics, changed

# The inverse is worked out anew when so large a share of the weight is gone since.
_MOST_DRIFT = 0.01
# Rows taken together, so that products with them are exact; and the share of the number of features
# beyond which a new inverse is sooner made than the old one updated.
_MOST_ROWS, _MOST_SHARE = 4096, 0.25


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Kept:
    """Sums, an inverse for them, and a solution with its exact residual. All of it is private.

    Like the sums, it holds traces of every row until that row is removed from it, and its float64
    numbers hold rounding errors of rows that were removed. None of that reaches a head.

    Attributes:
      stats: the sums.
      l2: weight of the L2 term.
      inverse: float64 `[d, d]`, about (A + lambda I)^-1 but for the drift of lambda.
      drift: how much lambda has changed since the inverse was worked out, in its units.
      point: a solution of the equations of some earlier sums; its residual is for the present ones.
    """

    stats: Statistics
    l2: float
    inverse: np.ndarray
    drift: float
    point: Point

    def __repr__(self) -> str:
        """What is public of it."""
        return f"Kept({self.stats.settings}, l2={self.l2!r}, <private>)"


def keep(stats: Statistics, l2: float = 1e-3) -> Kept:
    """Works out what makes later deletions cheap: O(d^3), once.

    Args:
      stats: the sums.
      l2: as for `ridge`.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if `l2` is out of range, or there are no rows.

    >>> import numpy as np
    >>> from certunlearn import exact
    >>> features, targets = np.eye(3, dtype=np.float32), np.array([1.0, 0.5, -1.0])
    >>> kept = exact.keep(exact.collect(features, targets), l2=0.1)
    >>> kept = exact.remove(kept, features[:1], targets[:1])
    >>> print(exact.ridge(kept))
    [ 0.          0.41666666 -0.8333333 ]
    """
    system = systems.ridge_system(stats, l2)
    return _kept(stats, l2, system, exact_solution.origin(system))


@overload
def add(
    stats: Statistics,
    features: Features,
    targets: ArrayLike | None = ...,
    *,
    apply_fn: ApplyFn | None = ...,
    batch_size: int = ...,
    on_device: bool = ...,
) -> Statistics: ...
@overload
def add(
    stats: Kept,
    features: Features,
    targets: ArrayLike | None = ...,
    *,
    apply_fn: ApplyFn | None = ...,
    batch_size: int = ...,
    on_device: bool = ...,
) -> Kept: ...
def add(
    stats: Statistics | Kept,
    features: Features,
    targets: ArrayLike | None = None,
    *,
    apply_fn: ApplyFn | None = None,
    batch_size: int = 1024,
    on_device: bool = False,
) -> Statistics | Kept:
    """The sums over the rows of `stats` and these.

    Args:
      stats: what `collect`, `empty` or `keep` returned; it stays as it is.
      features: as in `collect`.
      targets: as in `collect`.
      apply_fn: as in `collect`.
      batch_size: as in `collect`.
      on_device: as in `collect`.

    Returns:
      What `stats` was: sums, or what is kept of them.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a shape or a target is wrong, or the total weight exceeds 2^44.

    >>> from certunlearn import exact
    >>> stats = exact.collect(np.eye(3), np.array([0, 1, 2]))
    >>> more = add(stats, np.ones((2, 3)), np.array([2, 2]))
    >>> stats.rows, more.rows
    (3, 5)
    """
    return _either(stats, 1, features, targets, apply_fn, batch_size, on_device)


@overload
def remove(
    stats: Statistics,
    features: Features,
    targets: ArrayLike | None = ...,
    *,
    apply_fn: ApplyFn | None = ...,
    batch_size: int = ...,
) -> Statistics: ...
@overload
def remove(
    stats: Kept,
    features: Features,
    targets: ArrayLike | None = ...,
    *,
    apply_fn: ApplyFn | None = ...,
    batch_size: int = ...,
) -> Kept: ...
def remove(
    stats: Statistics | Kept,
    features: Features,
    targets: ArrayLike | None = None,
    *,
    apply_fn: ApplyFn | None = None,
    batch_size: int = 1024,
) -> Statistics | Kept:
    """The sums over the rows of `stats` without these. What was derived before must be redone.

    Args:
      stats: what `collect`, `add`, `merge` or `keep` returned. It stays as it is, with the traces
        of the rows removed: delete it, and its files.
      features: as in `collect`: the same numbers as when the rows were added.
      targets: as in `collect`, likewise.
      apply_fn: as in `collect`, the same network on the same machine.
      batch_size: as in `collect`, the same size.

    Returns:
      The same sums, bit for bit, as if the rows had never been added; or what is kept of them. All
      rows may be removed from sums.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a row is not there, or not as often as it is to be removed, naming the position
        of the first such row. Without an index such a row is noticed only if the sums could then
        belong to no rows at all: it is at your word that the rows were added.

    >>> from certunlearn import exact
    >>> stats = exact.collect(np.eye(2), np.array([0, 1]))
    >>> remove(stats, np.eye(2)[:1], np.array([1]))
    Traceback (most recent call last):
    ValueError: row 0 cannot be removed: there is no such row among the rows collected; ...
    """
    return _either(stats, -1, features, targets, apply_fn, batch_size, False)


def _either(
    stats: Statistics | Kept,
    sign: int,
    features: Features,
    targets: ArrayLike | None,
    apply_fn: ApplyFn | None,
    batch_size: int,
    on_device: bool,
) -> Statistics | Kept:
    found = feature_batches(features, targets, apply_fn, batch_size)
    on_device = checks.flag("on_device", on_device)
    if not isinstance(stats, Kept):
        return changed(stats, found, sign, on_device)
    batches = list(found)  # they are needed twice
    after = changed(stats.stats, iter(batches), sign, on_device)
    if not batches:
        return stats
    rows, numbers = (np.concatenate(each) for each in zip(*batches, strict=True))
    return _changed(stats, after, rows, numbers, sign)


def _changed(
    kept: Kept, stats: Statistics, rows: np.ndarray, targets: np.ndarray, sign: int
) -> Kept:
    """What is kept, for sums that rows were added to (sign 1) or removed from (sign -1)."""
    settings, l2 = stats.settings, kept.l2
    new, old = systems.ridge_system(stats, l2), systems.ridge_system(kept.stats, l2)
    point, inverse = kept.point, kept.inverse
    drift = kept.drift + new.ridge - old.ridge
    renew = abs(drift) > _MOST_DRIFT * new.ridge
    residual = point.residual - point.values * (new.diagonal - old.diagonal)
    for first in range(0, len(rows), _MOST_ROWS):
        some = settings.feature_rows(rows[first : first + _MOST_ROWS]).astype(np.float64)
        whole = settings.target_rows(targets[first : first + _MOST_ROWS])
        weights, wanted = systems.weights_and_targets(settings, whole)
        gained = _gained(point, some, sign * weights, wanted)
        residual = residual + gained * (1 << new.binary_places)
        renew = renew or len(some) > _MOST_SHARE * len(inverse)
        if not renew:
            inverse = _updated(inverse, some, sign * weights)
            renew = not np.all(np.isfinite(inverse))
    point = point._replace(residual=residual)
    return _kept(stats, l2, new, point) if renew else Kept(stats, l2, inverse, drift, point)


def _updated(inverse: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """About the inverse after rows of these weights, negative if removed, were added.

    Woodbury: (M + U W U^T)^-1 = Z - Z U (W^-1 + U^T Z U)^-1 U^T Z. NaN where that fails.
    """
    reached = inverse @ rows.T
    middle = rows @ reached + np.diag(1.0 / weights)
    try:
        change: np.ndarray = reached @ np.linalg.solve(middle, reached.T)
    except np.linalg.LinAlgError:
        return np.full_like(inverse, np.nan)
    return inverse - change


def _gained(point: Point, rows: np.ndarray, weights: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """What rows add to b - A w at the point, in units of 2^-places, exactly.

    It is the sum of weight * row * (target - row . w).
    """
    fits = systems.product_with(rows, point.values)  # [k, outputs]
    units = np.array([1 << int(places) for places in point.places], dtype=object)
    misses = (wanted * units - fits) * weights.astype(np.int64).astype(object)[:, None]
    return systems.product_with(np.ascontiguousarray(rows.T), misses)


def _kept(stats: Statistics, l2: float, system: System, start: Point) -> Kept:
    factor = scipy.linalg.cho_factor(
        exact_solution.dense(system), lower=True, overwrite_a=True, check_finite=False
    )
    # LAPACK's own inverse takes a third of what solving for every unit vector takes.
    lower, _ = scipy.linalg.lapack.dpotri(factor[0], lower=True)
    inverse = np.tril(lower) + np.tril(lower, -1).T
    point = exact_solution.refined(system, start, lambda right: inverse @ right)
    return Kept(stats, l2, inverse, 0.0, point)
