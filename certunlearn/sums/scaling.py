"""Public constants that bring features to a common scale, computed on public data."""

import dataclasses

import numpy as np
from jax.typing import ArrayLike

from certunlearn._numerics import checks
from certunlearn.sums.fixed_point import on_host


@dataclasses.dataclass(frozen=True, eq=False)
class Standardization:
    """The map x -> (x - mean) / scale. Call it with features `[n, d]`.

    Args:
      mean: float64 `[d]`.
      scale: float64 `[d]`, positive: standard deviations.
      feature_norm: a norm that most public rows have after the map, for `cu.exact.collect`.

    Guarantee:
      Each number of the result is one correctly rounded subtraction and one correctly rounded
      division of float64 numbers: a function of that number and the constants alone, the same on
      every machine. The constants must be public: keep them beside the network.

    Raises:
      TypeError: if an argument is no array of real numbers.
      ValueError: if shapes differ, a number is not finite or a scale not positive.

    >>> Standardization(np.array([1.0, 0.0]), np.array([2.0, 1.0]), 3.0)(np.array([[5.0, 7.0]]))
    array([[2., 7.]])
    """

    mean: np.ndarray
    scale: np.ndarray
    feature_norm: float

    def __post_init__(self) -> None:
        """Checks the constants, and makes them read-only."""
        for name in ("mean", "scale"):
            array = on_host(name, getattr(self, name)).astype(np.float64)
            if array.ndim != 1 or not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite numbers [d], got {checks.shown(array)}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.mean.shape != self.scale.shape or not (self.scale > 0).all():
            raise ValueError(
                "scale must be positive numbers of the shape of mean, got shapes "
                f"{self.scale.shape} and {self.mean.shape}, least {self.scale.min(initial=np.inf)}"
            )
        object.__setattr__(self, "feature_norm", checks.positive("feature_norm", self.feature_norm))

    def __call__(self, features: ArrayLike) -> np.ndarray:
        """The features `[n, d]` on the common scale, float64.

        Raises:
          TypeError: if they are no real numbers.
          ValueError: if the shape is another.
        """
        array = on_host("features", features)
        if array.ndim != 2 or array.shape[1] != len(self.mean):
            raise ValueError(f"features must be of shape [n, {len(self.mean)}], got {array.shape}")
        with np.errstate(all="ignore"):  # rows that are not finite count as zeros in the sums
            return (array.astype(np.float64) - self.mean) / self.scale


def standardization(public_features: ArrayLike, *, quantile: float = 0.99) -> Standardization:
    """Mean and standard deviation of each feature, and a norm for most rows, of *public* data.

    A feature that is constant on the public data is left as it is, so that a column of ones stays
    one, for an intercept.

    Args:
      public_features: real numbers `[n, d]` of rows that will never have to be forgotten.
      quantile: share of the public rows whose norm is at most `feature_norm` after the map.

    Returns:
      The map. It is a function of the public data, and so may stay as rows are removed.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if there are no rows, a number is not finite, or all rows become zero.

    >>> scaled = standardization(np.array([[0.0, 1.0], [4.0, 1.0]]))
    >>> scaled.mean, scaled.scale, scaled(np.array([[6.0, 1.0]]))
    (array([2., 0.]), array([2., 1.]), array([[2., 1.]]))
    """
    array = on_host("public_features", public_features).astype(np.float64)
    quantile = checks.open_unit("quantile", quantile)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"public_features must be of shape [n, d], got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("public_features must be finite, got NaN or an infinity")
    constant = array.min(axis=0) == array.max(axis=0)
    mean, scale = np.where(constant, 0.0, array.mean(axis=0)), np.where(constant, 1.0, array.std(0))
    norms = np.linalg.norm((array - mean) / scale, axis=1)
    norm = float(np.quantile(norms, quantile, method="higher"))
    if norm == 0:
        raise ValueError("public_features must have rows that are not zero, got none")
    return Standardization(mean, scale, norm)
