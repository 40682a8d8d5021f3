"""Features and targets in fixed point, by public rules that look at one row at a time."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.typing import ArrayLike

from certunlearn._numerics import checks, norms

# What the proofs of exactness are for; `Settings` refuses more.
MOST_BITS = 20
MOST_FEATURES = 2**14
MOST_OUTPUTS = 2**12
MOST_CLASS_WEIGHT = 255
# Bits of a target's whole number, its sign left out.
TARGET_BITS = 31
# Rows worked on at a time: their copies stay in a processor's cache.
_PIECE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How rows become whole numbers. Public: chosen without looking at any private row.

    Args:
      num_features: d, the number of features of a row, at most 2^14.
      feature_norm: B, the largest L2 norm of a row's features; longer rows are scaled down to it.
      bits: bits of a feature, its sign included: 2 to 20.
      classes: number of classes, if targets are labels 0 to classes - 1; else None.
      target_norm: the largest magnitude of a regression target.
      outputs: number of columns of regression targets `[n, outputs]`; None for targets `[n]` or
        labels.
      class_weights: a whole number from 1 to 255 for each class, by which its rows count; None: 1.

    Guarantee:
      A row's whole numbers are a function of that row's numbers and these settings alone. Equal
      rows give equal whole numbers on every machine, in every batch: only exact arithmetic comes
      after one scaling by a power of two. The norm of a stored row, in exact arithmetic, is at most
      `feature_norm`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if it is out of range.

    >>> settings = Settings(num_features=2, feature_norm=1.0, bits=8)
    >>> settings.feature_unit, settings.feature_rows(np.array([[0.6, 0.7], [3.0, -4.0]]))
    (0.0078125, array([[ 77,  90],
           [ 76, -102]], dtype=int32))
    """

    num_features: int
    feature_norm: float = 1.0
    bits: int = MOST_BITS
    classes: int | None = None
    target_norm: float = 1024.0
    outputs: int | None = None
    class_weights: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Checks the numbers, and makes them Python's own."""
        for name in ("feature_norm", "target_norm"):
            norms.check_norm(name, getattr(self, name))
            object.__setattr__(self, name, checks.positive(name, getattr(self, name)))
        _within("num_features", self.num_features, 1, MOST_FEATURES)
        _within("bits", self.bits, 2, MOST_BITS)
        if self.classes is not None:
            _within("classes", self.classes, 2, MOST_OUTPUTS)
        if self.outputs is not None:
            _within("outputs", self.outputs, 1, MOST_OUTPUTS)
            if self.classes is not None:
                raise ValueError(
                    "outputs is for regression and classes for labels; give one of them, got "
                    f"outputs={self.outputs} and classes={self.classes}"
                )
        for name in ("num_features", "bits", "classes", "outputs"):
            number = getattr(self, name)
            object.__setattr__(self, name, None if number is None else int(number))
        if self.class_weights is not None:
            object.__setattr__(self, "class_weights", self._checked_weights())

    def _checked_weights(self) -> tuple[int, ...]:
        rule = f"class_weights must be whole numbers from 1 to {MOST_CLASS_WEIGHT}, one a class"
        if self.classes is None:
            raise ValueError(f"{rule}; targets that are no labels have none: leave it None")
        try:
            weights = tuple(self.class_weights)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(f"{rule}, got {checks.shown(self.class_weights)}") from error
        if len(weights) != self.classes:
            raise ValueError(f"{rule}: {self.classes} are needed, got {len(weights)}")
        for label, weight in enumerate(weights):
            _within(f"class_weights[{label}]", weight, 1, MOST_CLASS_WEIGHT)
        return tuple(int(weight) for weight in weights)

    @property
    def feature_exponent(self) -> int:
        """The binary exponent of `feature_unit`."""
        return _ceil_log2(self.feature_norm) - (self.bits - 1)

    @property
    def feature_unit(self) -> float:
        """What a feature's whole number counts: q stands for q * feature_unit, a power of two.

        The magnitude of q is at most 2^(bits - 1).
        """
        return math.ldexp(1.0, self.feature_exponent)

    @property
    def norm_in_units(self) -> int:
        """b, the largest norm of a row of whole numbers: floor(feature_norm / feature_unit)."""
        return math.floor(math.ldexp(self.feature_norm, -self.feature_exponent))

    @property
    def target_exponent(self) -> int:
        """The binary exponent of `target_unit`."""
        return _ceil_log2(self.target_norm) - TARGET_BITS

    @property
    def target_unit(self) -> float:
        """What a regression target's whole number counts, a power of two.

        The magnitude of the whole number is at most 2^31.
        """
        return math.ldexp(1.0, self.target_exponent)

    @property
    def columns(self) -> int:
        """Columns of the cross sums: classes, or outputs, or 1."""
        return self.classes or self.outputs or 1

    def feature_rows(self, features: ArrayLike) -> np.ndarray:
        """The features in fixed point.

        A row x becomes rint(x / feature_unit). If its largest entry exceeds B it is first scaled by
        a power of two, so that this entry is in (B/2, B]. If it was scaled so, or its squared norm
        s in units exceeds b^2, every q becomes sign(q) floor(|q| b / ceil(sqrt(s))). A row with a
        NaN or an infinity becomes zeros.

        Args:
          features: real numbers `[n, num_features]`, of any dtype. Whole numbers beyond 2^53 are
            rounded to float64 first.

        Returns:
          int32 `[n, num_features]`.

        Guarantee:
          *One row at a time, the same bits everywhere.* Scaling by a power of two is exact (where
          it underflows, the entry is far below half a unit and becomes 0 either way); `rint` of a
          float64 is exact arithmetic; q^2 <= 2^38, so the sum of at most 2^14 squares is a whole
          number of at most 2^52, which float64 adds without rounding in any order; the square root
          is corrected in whole numbers; |q| b <= 2^38.
          *Strict.* sum floor(|q| b / c)^2 <= s b^2 / c^2 <= b^2 for c = ceil(sqrt(s)), and
          b * feature_unit <= feature_norm.

        Raises:
          TypeError: if they are no real numbers.
          ValueError: if the shape is another.
        """
        array = on_host("features", features)
        if array.ndim != 2 or array.shape[1] != self.num_features:
            raise ValueError(
                f"features must be of shape [n, {self.num_features}], got {array.shape}"
            )
        rows = np.empty(array.shape, np.int32)
        for start in range(0, len(array), _PIECE):
            piece = slice(start, start + _PIECE)
            rows[piece] = self._fixed(np.array(array[piece], dtype=np.float64, order="C"))
        return rows

    def _fixed(self, x: np.ndarray) -> np.ndarray:
        """Whole float64 numbers from float64 rows, which are overwritten."""
        largest = np.abs(x).max(axis=1)
        unusable = ~np.isfinite(largest)
        x[unusable] = 0.0
        long = (largest > self.feature_norm) & ~unusable
        if long.any():
            x[long] = np.ldexp(x[long], -_halvings(largest[long], self.feature_norm)[:, None])
        x *= math.ldexp(1.0, -self.feature_exponent)
        q = np.rint(x, out=x)
        squares = np.einsum("ij,ij->i", q, q)
        bound = self.norm_in_units
        long |= squares > bound**2
        if long.any():
            whole = q[long].astype(np.int64)
            divisor = _ceil_sqrt(squares[long].astype(np.int64))[:, None]
            q[long] = np.sign(whole) * (np.abs(whole) * bound // divisor)
        return q

    def target_rows(self, targets: ArrayLike, *, first_row: int = 0) -> np.ndarray:
        """The targets as whole numbers.

        Args:
          targets: labels `[n]`, whole numbers from 0 to classes - 1; or real numbers `[n]` or
            `[n, outputs]` of magnitude at most `target_norm`, which become rint(y / target_unit).
          first_row: the position of the first one, for error messages.

        Returns:
          int64 `[n]` labels, or int64 `[n, columns]` of magnitudes at most 2^31.

        Raises:
          TypeError: if they are no real numbers.
          ValueError: if the shape is another, or a target is out of range, naming the first such
            row.
        """
        array = on_host("targets", targets)
        wanted = (self.outputs,) if self.outputs else ()
        if array.ndim != 1 + len(wanted) or array.shape[1:] != wanted:
            shape = f"[n, {self.outputs}]" if wanted else "[n]"
            raise ValueError(f"targets must be of shape {shape}, got {array.shape}")
        # Whole numbers beyond 2^53 would be rounded, and are out of range in any case.
        values = array.astype(np.float64)
        if self.classes is not None:
            wrong = ~((values >= 0) & (values < self.classes) & (values == np.floor(values)))
            rule = f"labels, whole numbers from 0 to {self.classes - 1}"
        else:
            wrong = ~(np.abs(values) <= self.target_norm)
            rule = f"of magnitude at most target_norm, {self.target_norm:g}"
        if wrong.any():
            first = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
            row, value = first_row + int(first[0]), float(values[first])
            raise ValueError(f"targets must be {rule}, got {value!r} at row {row}")
        if self.classes is not None:
            return values.astype(np.int64)
        whole = np.rint(np.ldexp(values, -self.target_exponent))
        return whole.astype(np.int64).reshape(len(whole), self.columns)

    def row_weights(self, targets: np.ndarray) -> np.ndarray | None:
        """int64 `[n]`: the weight of each row, given what `target_rows` returned; None if all 1."""
        if self.class_weights is None:
            return None
        return np.asarray(self.class_weights, np.int64)[targets]


def on_host(name: str, value: ArrayLike) -> np.ndarray:
    """An array of real numbers as NumPy's, in its own dtype.

    Raises:
      TypeError: if it is none, or one that JAX is tracing.
    """
    array = checks.numbers(name, value)
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{name} must be numbers, not an array that JAX is tracing: exact sums are made on the "
            "host, outside jit, vmap and shard_map"
        )
    return np.asarray(array)


def _within(name: str, value: object, least: int, most: int) -> None:
    number = checks.positive_int(name, value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {number}")


def _ceil_log2(number: float) -> int:
    """The least whole number e with number <= 2^e."""
    mantissa, exponent = math.frexp(number)
    return exponent - 1 if mantissa == 0.5 else exponent


def _halvings(largest: np.ndarray, norm: float) -> np.ndarray:
    """How often to halve each number, to bring it into (norm / 2, norm]."""
    mantissas, exponents = np.frexp(largest)
    mantissa, exponent = math.frexp(norm)
    return exponents - exponent + (mantissas > mantissa)


def _ceil_sqrt(squares: np.ndarray) -> np.ndarray:
    """The least whole numbers whose squares are at least these, which are from 1 to 2^52."""
    # Rounding moves a root by less than 1, so the whole root is one of three.
    root = np.maximum(np.sqrt(squares.astype(np.float64)).astype(np.int64) - 1, 1)
    for _ in range(2):
        root += root * root < squares
    return root
