"""Which rows are in the sums: a private multiset of salted digests, one a row."""

import dataclasses
import hashlib
import secrets

import numpy as np

SALT_BYTES = 32
# Two different rows share a digest with a chance below N^2 / 2^128 among N rows.
_DIGEST_BYTES = 16


def new_salt() -> bytes:
    """A fresh private key for digests."""
    return secrets.token_bytes(SALT_BYTES)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RowIndex:
    """A multiset of rows, known by keyed 128-bit digests of their whole numbers. Private.

    A digest is a keyed hash (BLAKE2b) of a row's fixed-point features and target. Without the salt
    nobody can test whether a row is there; the index holds the salt, so it is as private as the
    rows.

    Args:
      salt: 32 random bytes.
      high: uint64 `[m]`, the first halves of the m different digests.
      low: uint64 `[m]`, the second halves. The pairs (high, low) strictly increase.
      counts: int64 `[m]`, how many rows have each digest, at least 1.
      others: indexes of rows that were collected apart, each under another salt.

    Raises:
      ValueError: if the arrays are not of that form.
    """

    salt: bytes
    high: np.ndarray
    low: np.ndarray
    counts: np.ndarray
    others: tuple["RowIndex", ...] = ()

    def __post_init__(self) -> None:
        """Checks the arrays, and makes them read-only."""
        arrays = (("high", np.uint64), ("low", np.uint64), ("counts", np.int64))
        for name, dtype in arrays:
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1 or len(array) != len(self.high):
                raise ValueError(f"{name} must be {np.dtype(dtype)} of shape [{len(self.high)}]")
            view = array.view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        if len(self.salt) != SALT_BYTES:
            raise ValueError(f"salt must have {SALT_BYTES} bytes, got {len(self.salt)}")
        if not _increase(self.high, self.low).all():
            raise ValueError("the digests must strictly increase")
        if (self.counts < 1).any():
            raise ValueError("counts must be at least 1")
        if len({each.salt for each in self.parts}) != len(self.parts):
            raise ValueError("others must have other salts, each its own")

    def __repr__(self) -> str:
        """Nothing of what is in it."""
        return "RowIndex(<private>)"

    @classmethod
    def empty(cls, salt: bytes) -> "RowIndex":
        """An index of no rows."""
        none = np.zeros(0, np.uint64)
        return cls(salt, none, none, np.zeros(0, np.int64))

    @property
    def parts(self) -> tuple["RowIndex", ...]:
        """The index and its others, in the order of the digests' columns."""
        return self, *self.others

    @property
    def rows(self) -> int:
        """How many rows there are, copies counted."""
        return sum(int(part.counts.sum()) for part in self.parts)

    def digests(self, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The rows' digests.

        Args:
          rows: int32 `[n, d]`.
          targets: int64 `[n]` or `[n, columns]`.

        Returns:
          uint64 `[n, 2 * parts]`: the halves of each row's digest, under the salt of each part.
        """
        return np.hstack([part._own_digests(rows, targets) for part in self.parts])

    def _own_digests(self, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        columns = targets.shape[1] if targets.ndim > 1 else 1
        parts = (rows.astype("<i4", copy=False), targets.reshape(-1, columns).astype("<i8"))
        # A row's bytes lie together; all rows have the same number of them.
        together = np.hstack([np.ascontiguousarray(part).view(np.uint8) for part in parts])
        length, whole = together.shape[1], together.reshape(-1).data
        fresh = hashlib.blake2b(key=self.salt, digest_size=_DIGEST_BYTES)
        found = bytearray()
        for start in range(0, len(whole), length):
            digest = fresh.copy()
            digest.update(whole[start : start + length])
            found += digest.digest()
        return np.frombuffer(found, ">u8").astype(np.uint64).reshape(-1, 2)

    def with_rows(self, digests: np.ndarray) -> "RowIndex":
        """The index with these rows as well."""
        return self._own_merged(_collected(self.salt, digests[:, :2]))

    def merged(self, other: "RowIndex") -> "RowIndex":
        """The index of the rows of both."""
        found = {part.salt: part for part in self.parts}
        for part in other.parts:
            there = found.get(part.salt)
            found[part.salt] = part if there is None else there._own_merged(part)
        first, *others = (dataclasses.replace(part, others=()) for part in found.values())
        return dataclasses.replace(first, others=tuple(others))

    def _own_merged(self, other: "RowIndex") -> "RowIndex":
        """This index with the rows of another of the same salt, its others left out."""
        places, there = self._find(other.high, other.low)
        counts = self.counts.copy()
        counts[places[there]] += other.counts[there]
        new = ~there
        return dataclasses.replace(
            self,
            high=np.insert(self.high, places[new], other.high[new]),
            low=np.insert(self.low, places[new], other.low[new]),
            counts=np.insert(counts, places[new], other.counts[new]),
        )

    def without(self, digests: np.ndarray) -> "RowIndex":
        """The index without these rows.

        Raises:
          ValueError: naming the position of the first row that is not there, or not that often.
        """
        left = np.arange(len(digests))
        parts = []
        for number, part in enumerate(self.parts):
            own = digests[left, 2 * number : 2 * number + 2]
            there = part._own_rows(own)
            parts.append(part._own_without(own[there]))
            left = left[~there]
        if len(left):
            first = int(left[0])
            copies = self._copies(digests[first])
            held = "no such row" if copies == 0 else f"only {copies} of it"
            raise ValueError(
                f"row {first} cannot be removed: there is {held} among the rows collected; give "
                "features, target and map exactly as they were added; nothing was changed"
            )
        return dataclasses.replace(parts[0], others=tuple(parts[1:]))

    def _own_rows(self, digests: np.ndarray) -> np.ndarray:
        """Bool `[n]`: which of these rows, counting copies, are in this part."""
        order, starts = _grouped(digests)
        unique = digests[order[starts]]
        places, there = self._find(unique[:, 0], unique[:, 1])
        available = np.zeros(len(unique), np.int64)
        available[there] = self.counts[places[there]]
        sizes = np.diff(starts, append=len(order))
        # The sort is stable, so a row's place in its group counts the equal rows before it.
        earlier = np.arange(len(order)) - np.repeat(starts, sizes)
        found = np.zeros(len(order), bool)
        found[order] = earlier < np.repeat(available, sizes)
        return found

    def _own_without(self, digests: np.ndarray) -> "RowIndex":
        """This part without rows that are in it, others left out."""
        if not len(digests):
            return dataclasses.replace(self, others=())
        gone = _collected(self.salt, digests)
        places, _ = self._find(gone.high, gone.low)
        counts = self.counts.copy()
        counts[places] -= gone.counts
        left = counts > 0
        return RowIndex(self.salt, self.high[left], self.low[left], counts[left])

    def _copies(self, digest: np.ndarray) -> int:
        """How many rows have a digest, given as `digests` returns it."""
        copies = 0
        for part, own in zip(self.parts, digest.reshape(-1, 2), strict=True):
            places, there = part._find(own[:1], own[1:])
            copies += int(part.counts[places[0]]) if there[0] else 0
        return copies

    def _find(self, high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each digest is or would be inserted, and whether it is there."""
        places = np.searchsorted(self.high, high, "left")
        ends = np.searchsorted(self.high, high, "right")
        # Different digests share their first half with a chance of about N^2 / 2^65.
        for i in np.flatnonzero(ends > places):
            places[i] += np.searchsorted(self.low[places[i] : ends[i]], low[i], "left")
        there = places < ends
        there[there] = self.low[places[there]] == low[there]
        return places, there


def _collected(salt: bytes, digests: np.ndarray) -> RowIndex:
    order, starts = _grouped(digests)
    unique = digests[order[starts]]
    counts = np.diff(starts, append=len(order)).astype(np.int64)
    return RowIndex(salt, unique[:, 0].copy(), unique[:, 1].copy(), counts)


def _grouped(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A stable order that sorts digests, and where in it each group of equal ones starts."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    sorted_ = digests[order]
    new = np.ones(len(order), bool)
    new[1:] = (sorted_[1:] != sorted_[:-1]).any(axis=1)
    return order, np.flatnonzero(new)


def _increase(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
