"""Argument checks that all subpackages use: errors name the argument, its value and the remedy."""

import math
import operator
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from certunlearn._numerics import recognition

# A number per step: one value for all steps, or a tuple with one value for each.
PerStep = float | tuple[float, ...]
# What callers may give for it: a number, `[steps]` numbers, or an Optax schedule.
ScalarOrSchedule = float | Sequence[float] | np.ndarray | jax.Array | Callable[[Any], Any]

# Step numbers are int32 on devices. The last int32 stands for "before the first step".
MOST_STEPS = 2**31 - 2
# Other counts: the largest int64, which a file or an array can hold.
_LARGEST_COUNT = 2**63 - 1
# Length of a value in an error message.
_SHOWN_CHARACTERS = 80
# Longer whole numbers are not shown: Python refuses to print very long ones.
_SHOWN_BITS = 200
# NumPy's kinds of real numbers: signed, unsigned and floating.
_NUMERIC_KINDS = "iuf"


def shown(value: Any) -> str:
    """`value` for an error message: one line of at most about 80 characters, whatever it is.

    Numbers, text and short flat collections of them are shown. Of arrays, states, keys and other
    objects only the kind is shown, as they may be secret.

    >>> shown(list(range(1000))), shown(np.zeros((2, 3)))
    ('[0, 1, 2, 3, 4, 5, ...]', 'an array of float64 of shape (2, 3)')
    """
    if _is_huge(value):
        text = f"a whole number of {value.bit_length()} bits"
    elif _is_plain(value):
        text = reprlib.repr(value)
    elif isinstance(value, np.ma.MaskedArray):
        text = f"a masked array of shape {value.shape}"
    elif recognition.is_shaped(value):
        text = f"an array of {value.dtype} of shape {tuple(value.shape)}"
    elif isinstance(value, type):
        text = f"the class {value.__name__}"
    elif type(value) in (list, tuple, set, dict):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        flat = all(_is_plain(part) and not _is_huge(part) for part in parts)
        text = reprlib.repr(value) if flat else f"a {type(value).__name__} of {len(value)} items"
    else:
        text = f"an object of type {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float | complex | str | bytes | np.generic)


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > _SHOWN_BITS


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
    """Returns `value` as a float, or raises if it is not one real number.

    Numbers of Python and NumPy and arrays of no dimension are real numbers; bools and text are not.

    Raises:
      TypeError: if `value` is not a real number.
      ValueError: if it is beyond float64.
    """
    if not _is_number(value):
        raise TypeError(f"{name} must be one real number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must fit a float64, got {shown(value)}") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be one real number, got {shown(value)}") from error


def flag(name: str, value: Any) -> bool:
    """Returns `value` as a bool, or raises TypeError if it is not True or False (or NumPy's).

    >>> flag("progress", np.True_)
    True
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def positive_int(name: str, value: Any) -> int:
    """Returns `value` as an int, or raises if it is not a whole number of at least one.

    Raises:
      TypeError: if `value` is not a whole number; a float never is.
      ValueError: if it is below 1, or beyond int64.
    """
    return _whole(name, value, 1, _LARGEST_COUNT, "a whole number")


def steps(name: str, value: Any) -> int:
    """`positive_int` for numbers of steps, which must fit the int32 that devices count with."""
    return _whole(name, value, 1, MOST_STEPS, "a whole number")


def optional_count(name: str, value: Any) -> int | None:
    """Returns None or `value` as an int, or raises if it is not a whole number of at least zero.

    Raises:
      TypeError: if `value` is neither None nor a whole number.
      ValueError: if it is negative, or beyond int64.
    """
    return (
        None if value is None else _whole(name, value, 0, _LARGEST_COUNT, "a whole number or None")
    )


def open_unit(name: str, value: Any) -> float:
    """Returns `value` as a float, or raises ValueError if it is not strictly between 0 and 1."""
    number = real(name, value)
    if not 0 < number < 1:
        raise ValueError(f"{name} must be strictly between 0 and 1, got {number!r}")
    return number


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Returns `value`, or raises ValueError if it is not one of `allowed`."""
    if not (isinstance(value, str) and value in allowed):
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}"
        )
    return value


def numbers(name: str, value: Any) -> Any:
    """Returns `value` as an array of real numbers or bools: itself, if it is one (traced or not).

    Raises:
      TypeError: for anything else: ragged lists, text, complex numbers, objects, sparse matrices,
        iterators, and masked arrays, whose masks would be lost.
    """
    wanted = f"{name} must be an array of real numbers, got {shown(value)}"
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{wanted}: fill the masked values first")
    array = value
    if not recognition.is_convertible(value):
        try:
            array = np.asarray(value)
        except Exception as error:  # whatever another library's conversion raises
            raise TypeError(wanted) from error
    if recognition.kind_of(array.dtype) not in (*_NUMERIC_KINDS, "b", "V"):
        raise TypeError(wanted)
    return array


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
    array = _numbers(name, value, steps)
    wrong = ~np.isfinite(array) | ((array < 0) if zero_allowed else (array <= 0))
    if np.any(wrong):
        bound = "at least 0" if zero_allowed else "positive"
        at = "" if array.ndim == 0 else f" at step {int(np.argmax(wrong))}"
        bad = float(array) if array.ndim == 0 else float(array[wrong][0])
        raise ValueError(f"{name} must be {bound} and finite, got {bad!r}{at}")
    return float(array) if array.ndim == 0 else tuple(array.tolist())


def known(value: ScalarOrSchedule | None) -> PerStep:
    """A field that `per_step` has normalised: a number or numbers, and no schedule any more.

    Raises:
      TypeError: if it has not.
    """
    if isinstance(value, float | tuple):
        return value
    raise TypeError(f"a number or numbers are needed here, got {shown(value)}")


def _is_number(value: Any) -> bool:
    """Whether it may be one real number: not text, a bool, a complex number or an array of more."""
    if type(value) in (float, int):  # by far the most, in schedules of many steps
        return True
    if value is None or isinstance(value, bool | str | bytes | complex | np.ma.MaskedArray):
        return False
    dtype = recognition.dtype_of(value)
    if dtype is not None:
        # "V": the narrow floats of machine learning, which NumPy does not know by kind.
        return recognition.kind_of(dtype) in (*_NUMERIC_KINDS, "V") and np.ndim(value) == 0
    return recognition.is_real_scalar(value)


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple) or (
        recognition.is_shaped(value) and len(value.shape) != 0
    )


def _whole(name: str, value: Any, least: int, most: int, kind: str) -> int:
    wanted = f"{name} must be {kind}"
    if not _is_number(value):
        raise TypeError(f"{wanted}, got {shown(value)}")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{wanted}, got {shown(value)}") from error
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(number)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(number)}")
    return number


def _numbers(name: str, value: Any, steps: int) -> np.ndarray:
    """float64, of no dimension or `[steps]`."""
    kinds = f"{name} must be a number, numbers or a schedule"
    if _is_number(value):
        return np.asarray(real(name, value))
    length = f"{name} must be one number or have one for each of the {steps} steps"
    if isinstance(value, list | tuple):
        if len(value) != steps:
            raise ValueError(f"{length}, got {len(value)} numbers")
        if all(type(each) is float for each in value):
            return np.array(value)
        # One by one: NumPy would read a None as NaN, text and bools as numbers.
        for t, each in enumerate(value):
            if _several(each):
                raise ValueError(f"{length}, got {shown(each)} at step {t}")
            if not _is_number(each):
                raise TypeError(f"{kinds}, got {shown(each)} at step {t}")
        return np.array([real(name, each) for each in value])
    try:
        array = None if isinstance(value, np.ma.MaskedArray) else np.asarray(value)
    except Exception as error:  # whatever another library's conversion raises
        raise TypeError(f"{kinds}, got {shown(value)}") from error
    if array is None or array.dtype.kind not in _NUMERIC_KINDS:
        raise TypeError(f"{kinds}, got {shown(value)}")
    if array.shape != (steps,):
        raise ValueError(f"{length}, got an array of shape {array.shape}")
    return array.astype(np.float64)


def _evaluate(name: str, schedule: Callable[[Any], Any], steps: int) -> np.ndarray:
    """The schedule's values at 0, ..., steps - 1, in one call where the schedule allows it."""

    def at(step: int) -> float:
        value = schedule(step)
        if not _is_number(value):
            if _several(value):
                raise ValueError(
                    f"{name}, a schedule, must return one number for each step, got {shown(value)}"
                )
            raise TypeError(f"{name}, a schedule, must return numbers, got {shown(value)}")
        return real(name, value)

    probes = sorted({0, steps // 2, steps - 1})
    at_probes = [at(t) for t in probes]
    try:
        values = np.asarray(schedule(np.arange(steps)), dtype=np.float64)
    except Exception:  # a schedule with Python control flow takes one step at a time
        values = np.empty(0)
    if values.shape == (steps,) and all(
        values[t] == v for t, v in zip(probes, at_probes, strict=True)
    ):
        return values
    return np.asarray([at(t) for t in range(steps)])
