"""Numbers per step as the transforms read them: constants, tables and Optax schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from certunlearn._numerics.checks import ScalarOrSchedule


class Lookup:
    """A table `[steps]` as an Optax schedule; the last value stands for all later steps."""

    def __init__(self, values: jax.Array | np.ndarray) -> None:
        """`values`: an array `[steps]`, traced or not."""
        self.values = values

    def __call__(self, count: ArrayLike) -> jax.Array:
        """The value at step `count`."""
        return jnp.asarray(self.values)[jnp.minimum(count, len(self.values) - 1)]

    def rounded_up(self, count: ArrayLike, dtype: DTypeLike) -> jax.Array:
        """The value at `count` as the next number of `dtype` that is not below it."""
        values = self.values if is_traced(self.values) else round_up(self.values, dtype)
        return Lookup(values)(count)


class NoiseTable(Lookup):
    """Standard deviations of steps, rounded up to the precisions that they may be needed in.

    The numbers may be traced: rounding takes place before, on the host.
    """

    def __init__(self, values: jax.Array, wide: jax.Array | None) -> None:
        """`values`: float32 `[steps]`, or `[1]` for all; `wide`: float64, or None without it."""
        super().__init__(values)
        self.wide = wide

    @staticmethod
    def rounded(values: ArrayLike) -> tuple[jax.Array, jax.Array | None]:
        """The arguments of `NoiseTable` for a number or `[steps]` numbers."""
        exact = np.atleast_1d(np.asarray(values, np.float64))
        wide = jnp.asarray(exact)
        narrow = jnp.asarray(round_up(exact, np.float32), np.float32)
        return narrow, wide if wide.dtype == np.float64 else None

    def rounded_up(self, count: ArrayLike, dtype: DTypeLike) -> jax.Array:
        """The value at `count` as the next number of `dtype` that is not below it."""
        if jnp.dtype(dtype) == np.float32:
            return Lookup(self.values)(count)
        assert self.wide is not None
        return Lookup(self.wide)(count)


def scalar_or_lookup(values: Any) -> Any:
    """A number as it is, `[steps]` numbers as a schedule."""
    if np.ndim(values) == 0:
        return values
    return Lookup(values if is_traced(values) else np.asarray(values))


def value_at(value: ScalarOrSchedule, count: ArrayLike) -> Any:
    """A schedule's value at `count`, or the constant."""
    return value(count) if callable(value) else value


def round_up(values: ArrayLike, dtype: DTypeLike) -> np.ndarray:
    """The nearest numbers of `dtype` that are not below `values`."""
    exact = np.asarray(values, np.float64)
    rounded = exact.astype(dtype)
    return np.where(rounded < exact, np.nextafter(rounded, np.asarray(np.inf, dtype)), rounded)


def is_traced(value: object) -> bool:
    """Whether a value is not yet known, inside a transformed function."""
    return isinstance(value, jax.core.Tracer)
