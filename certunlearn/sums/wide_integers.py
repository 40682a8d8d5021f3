"""Arrays of whole numbers of up to 95 bits, in two int64 words each."""

import dataclasses
from collections.abc import Iterator

import numpy as np

# A value is high * 2^WORD_BITS + low with 0 <= low < 2^WORD_BITS.
WORD_BITS = 32
_WORD = 2**WORD_BITS
_MASK = _WORD - 1
# The largest magnitude that `plus` and `minus` take.
MOST_SUMMAND = 2**62
# Numbers worked on at a time: few enough for a processor's cache.
_PIECE = 2**15


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WideIntegers:
    """An array of whole numbers v with -2^95 <= v < 2^95. Immutable.

    Args:
      high: int64, floor(v / 2^32).
      low: int64 of the same shape, v mod 2^32: at least 0 and less than 2^32.

    Every v has exactly one such pair, so equal numbers are equal arrays, whatever sums they came
    from.

    Raises:
      ValueError: if the arrays are not of that form.

    >>> wide = WideIntegers.zeros((2,)).plus(np.array([3, -1]), shift=40)
    >>> wide.to_objects().tolist() == [3 * 2**40, -(2**40)]
    True
    """

    high: np.ndarray
    low: np.ndarray

    def __post_init__(self) -> None:
        """Checks the words, and makes them read-only."""
        if self.high.dtype != np.int64 or self.low.dtype != np.int64:
            raise ValueError(
                f"high and low must be int64, got {self.high.dtype} and {self.low.dtype}"
            )
        if self.high.shape != self.low.shape:
            raise ValueError(
                f"high and low must have one shape, got {self.high.shape} and {self.low.shape}"
            )
        if self.low.size and not (self.low.min() >= 0 and self.low.max() <= _MASK):
            raise ValueError("low must be at least 0 and below 2^32 everywhere")
        for name, array in (("high", self.high), ("low", self.low)):
            view = np.ascontiguousarray(array).reshape(array.shape).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    def __repr__(self) -> str:
        """The shape only: the numbers may be private."""
        return f"WideIntegers(<{' x '.join(map(str, self.shape))} whole numbers>)"

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "WideIntegers":
        """Zeros of a shape."""
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    @classmethod
    def from_objects(cls, values: np.ndarray) -> "WideIntegers":
        """The numbers of an array of Python integers.

        Raises:
          OverflowError: if one is not in [-2^95, 2^95).
        """
        values = np.asarray(values, dtype=object)
        high, low = values >> WORD_BITS, values & _MASK
        if any(not -(2**63) <= value < 2**63 for value in high.flat):
            raise OverflowError(_TOO_LARGE)
        return cls(high.astype(np.int64), low.astype(np.int64))

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.high.shape

    def plus(self, array: np.ndarray, shift: int = 0) -> "WideIntegers":
        """These numbers plus `array * 2^shift`, exactly.

        Args:
          array: int64 of the same shape, of magnitudes below 2^62.
          shift: a whole number from 0 to 93.

        Raises:
          OverflowError: if a magnitude is 2^62 or more, or a result is not in [-2^95, 2^95).
          ValueError: if dtype, shape or shift are others.
        """
        return self._sum(array, shift, 1)

    def minus(self, array: np.ndarray, shift: int = 0) -> "WideIntegers":
        """These numbers minus `array * 2^shift`, exactly: see `plus`."""
        return self._sum(array, shift, -1)

    def __add__(self, other: "WideIntegers") -> "WideIntegers":
        """The sums, number by number; OverflowError if one is not in [-2^95, 2^95)."""
        return self._combined(other, 1)

    def __sub__(self, other: "WideIntegers") -> "WideIntegers":
        """The differences, number by number; OverflowError if one is not in [-2^95, 2^95)."""
        return self._combined(other, -1)

    def to_float(self) -> np.ndarray:
        """The numbers as float64: correctly rounded below 2^85, and else within 2^-52 of |v|.

        Below 2^85 `high` has at most 53 bits, so that only the sum is rounded. Else the conversion
        of `high` is rounded as well, each time by at most 2^-53 of the result.
        """
        return self.high.astype(np.float64) * float(_WORD) + self.low

    def to_objects(self) -> np.ndarray:
        """The numbers as an array of Python integers. Slow: meant for tests and for few numbers."""
        return self.high.astype(object) * _WORD + self.low.astype(object)

    def digits(self, bits: int) -> list[np.ndarray]:
        """The numbers in base 2^bits, with digits from -2^(bits-1) to 2^(bits-1) - 1.

        v = sum_k digits[k] * 2^(bits * k). There are as many arrays as the number of most digits
        needs, and at least one.

        Args:
          bits: a whole number from 2 to 32.

        Returns:
          float64 arrays of whole numbers, the least digit first.
        """
        if not 2 <= bits <= WORD_BITS:
            raise ValueError(f"bits must be from 2 to {WORD_BITS}, got {bits}")
        base = 2**bits
        high, low = self.high, self.low
        found: list[np.ndarray] = []
        while not found or high.any() or low.any():
            digit = low & (base - 1)
            digit = digit - base * (digit >= base // 2)
            found.append(digit.astype(np.float64))
            # v - digit is a multiple of the base; it may have reached 2^32 in the low word.
            low = (low - digit >> bits) + ((high & (base - 1)) << (WORD_BITS - bits))
            high = (high >> bits) + (low >> WORD_BITS)
            low = low & _MASK
        return found

    def is_zero(self) -> bool:
        """Whether all numbers are zero."""
        return not (self.high.any() or self.low.any())

    def equals(self, other: "WideIntegers") -> bool:
        """Whether shape and all numbers are the same."""
        return np.array_equal(self.high, other.high) and np.array_equal(self.low, other.low)

    def _sum(self, array: np.ndarray, shift: int, sign: int) -> "WideIntegers":
        if array.dtype != np.int64 or array.shape != self.shape:
            raise ValueError(
                f"array must be int64 of shape {self.shape}, got {array.dtype} of {array.shape}"
            )
        if not 0 <= shift < WORD_BITS + 62:
            raise ValueError(f"shift must be from 0 to {WORD_BITS + 61}, got {shift}")
        # Of array * 2^shift, the high word must be an int64 as well.
        most = min(MOST_SUMMAND, 2 ** (62 + WORD_BITS - shift))
        if array.size and not (array.min() > -most and array.max() < most):
            raise OverflowError(
                f"array must hold magnitudes below 2^{most.bit_length() - 1} at shift {shift}"
            )
        high, low, flat = self._empty_words(np.ascontiguousarray(array))
        for piece in _pieces(flat.size):
            part = flat[piece] if sign > 0 else -flat[piece]
            if shift >= WORD_BITS:
                part_high, part_low = part << (shift - WORD_BITS), np.zeros_like(part)
            else:
                part_high = part >> (WORD_BITS - shift)
                part_low = (part & (2 ** (WORD_BITS - shift) - 1)) << shift
            self._add(piece, part_high, part_low, high, low)
        return WideIntegers(high.reshape(self.shape), low.reshape(self.shape))

    def _combined(self, other: "WideIntegers", sign: int) -> "WideIntegers":
        if other.shape != self.shape:
            raise ValueError(f"the shapes must be the same, got {self.shape} and {other.shape}")
        high, low, flat = self._empty_words(other.high)
        other_low = other.low.reshape(-1)
        for piece in _pieces(flat.size):
            part_high, part_low = flat[piece], other_low[piece]
            if sign < 0:
                # -(h 2^32 + l) = (-h - 1) 2^32 + (2^32 - l), and ~h = -h - 1 has no overflow.
                part_high, part_low = ~part_high, _WORD - part_low
            self._add(piece, part_high, part_low, high, low)
        return WideIntegers(high.reshape(self.shape), low.reshape(self.shape))

    def _empty_words(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        flat = array.reshape(-1)
        return np.empty(flat.size, np.int64), np.empty(flat.size, np.int64), flat

    def _add(
        self,
        piece: slice,
        part_high: np.ndarray,
        part_low: np.ndarray,
        high: np.ndarray,
        low: np.ndarray,
    ) -> None:
        """Writes the sum with (part_high, part_low) to a piece of `high` and `low`."""
        old = self.high.reshape(-1)[piece]
        lows = self.low.reshape(-1)[piece] + part_low  # at most 2^33
        carry = lows >> WORD_BITS  # 0 or 1
        # int64 sums wrap around. The first has done so if its sign is that of neither summand; the
        # second if it fell. Where both have, -2^63 - 1 + 1, the result is right again.
        partial = old + part_high
        total = partial + carry
        wrapped = ((old ^ partial) & (part_high ^ partial)) < 0
        if (wrapped ^ (total < partial)).any():
            raise OverflowError(_TOO_LARGE)
        high[piece], low[piece] = total, lows & _MASK


_TOO_LARGE = "a sum must be at least -2^95 and below 2^95; split the rows into two collections"


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, size, _PIECE))
