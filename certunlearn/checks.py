"""Argument checks shared by every room: each error names the argument, its value and the remedy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

# A number per step: one value for all steps, or a tuple with one value for each.
PerStep = float | tuple[float, ...]


def positive(name: str, value: Any) -> float:
    """Returns `value` as a float, or raises if it is not a finite number above zero.

    Raises:
      TypeError: if `value` is not a real number.
      ValueError: if it is not finite and positive.
    """
    number = real(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, got {number!r}")
    return number


def real(name: str, value: Any) -> float:
    """Returns `value` as a float, or raises TypeError if it is not one real number."""
    if isinstance(value, bool | str | bytes | complex) or np.ndim(value) != 0:
        raise TypeError(f"{name} must be one real number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be one real number, got {value!r}") from error


def positive_int(name: str, value: Any) -> int:
    """Returns `value` as an int, or raises if it is not a whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def optional_count(name: str, value: Any) -> int | None:
    """Returns None or `value` as an int, or raises if it is not a whole number of at least zero.

    Raises:
      TypeError: if `value` is neither None nor a whole number.
      ValueError: if it is negative.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number or None, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return int(value)


def open_unit(name: str, value: Any) -> float:
    """Returns `value` as a float, or raises ValueError if it is not strictly between 0 and 1."""
    number = real(name, value)
    if not 0 < number < 1:
        raise ValueError(f"{name} must be strictly between 0 and 1, got {number!r}")
    return number


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Returns `value`, or raises ValueError if it is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def per_step(name: str, value: Any, steps: int, *, zero_allowed: bool = False) -> PerStep:
    """Normalises a scalar, an array `[steps]` or an Optax schedule to floats.

    A schedule is called with the step numbers 0, ..., steps - 1 and recorded by its values, so that
    the accountant and the optimizer read the very same numbers.

    Args:
      name: the argument's name, for error messages.
      value: a number, a sequence of `steps` numbers, or a callable from step number to number.
      steps: how many steps there are.
      zero_allowed: whether zeros are accepted; negative and non-finite numbers never are.

    Returns:
      A float, or a tuple of `steps` floats.

    Raises:
      TypeError: if the values are not real numbers.
      ValueError: if the length is not `steps`, or a value is out of range.
    """
    if callable(value):
        value = _evaluate(name, value, steps)
    try:
        if value is None or isinstance(value, bool | str | bytes):
            raise TypeError
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, numbers or a schedule, got {value!r}") from error
    if array.ndim > 1 or (array.ndim == 1 and len(array) != steps):
        raise ValueError(
            f"{name} must be one number or have one for each of the {steps} steps, "
            f"got an array of shape {array.shape}"
        )
    wrong = ~np.isfinite(array) | ((array < 0) if zero_allowed else (array <= 0))
    if np.any(wrong):
        bound = "at least 0" if zero_allowed else "positive"
        at = "" if array.ndim == 0 else f" at step {int(np.argmax(wrong))}"
        bad = float(array) if array.ndim == 0 else float(array[wrong][0])
        raise ValueError(f"{name} must be {bound} and finite, got {bad!r}{at}")
    return float(array) if array.ndim == 0 else tuple(array.tolist())


def _evaluate(name: str, schedule: Callable[[Any], Any], steps: int) -> np.ndarray:
    """The schedule's values at 0, ..., steps - 1, in one call where the schedule allows it."""
    probes = sorted({0, steps // 2, steps - 1})
    at_probes = [np.asarray(schedule(t)) for t in probes]
    if any(value.ndim != 0 for value in at_probes):
        raise ValueError(f"{name}, a schedule, must return one number for each step")
    try:
        values = np.asarray(schedule(np.arange(steps)), dtype=np.float64)
    except Exception:  # a schedule with Python control flow takes one step at a time
        values = np.empty(0)
    if values.shape == (steps,) and all(
        values[t] == v for t, v in zip(probes, at_probes, strict=False)
    ):
        return values
    return np.asarray([float(schedule(t)) for t in range(steps)])
