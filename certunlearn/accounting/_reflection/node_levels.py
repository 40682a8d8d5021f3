"""Tables of the coupling recursion: values at nodes and levels, and which levels are needed."""

import math
from typing import NamedTuple

import numpy as np
import scipy  # its parts load when they are first used

# Beyond this distance everything is charged at 1.
FARTHEST = 300.0
# Levels go no higher than this multiple of where one Gaussian is below the floor.
_ROOM = 2.0


class Table(NamedTuple):
    """Upper bounds on a_k(x) - e^L a_k(y) after a block's noise.

    Attributes:
      nodes: float64 `[nodes]`: distances, in units of that noise; the first is 0.
      top: float64 `[nodes]`: the highest L.
      values: float64 `[nodes, levels + 1]`, at L = top * i / levels.
    """

    nodes: np.ndarray
    top: np.ndarray
    values: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        """float64 `[nodes, levels + 1]`."""
        return self.top[:, None] * np.linspace(0, 1, self.values.shape[1])


def chord(values: np.ndarray, levels: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Values at other levels of the same nodes, by chords in e^L."""
    last = values.shape[1] - 1
    i = np.minimum((levels / spacing).astype(int), last - 1)
    over = np.clip(levels - i * spacing, 0, spacing)
    share = np.clip(np.expm1(over) / np.expm1(spacing) - 1e-12, 0, 1)
    low, high = (np.take_along_axis(values, j, axis=1) for j in (i, i + 1))
    return np.asarray(low + (high - low) * share)


def at_levels(table: Table, top: np.ndarray) -> Table:
    """The same table with other highest levels."""
    spacing = table.top[:, None] / (table.values.shape[1] - 1)
    other = table._replace(top=top)
    return other._replace(values=chord(table.values, other.levels, spacing))


def needed(table: Table, separations: np.ndarray, floor: float) -> np.ndarray:
    """How high L must go at each separation: to where values fall below `floor`."""
    rows = np.arange(len(table.top))
    low = table.values <= floor
    first = np.where(low.any(axis=1), low.argmax(axis=1), table.values.shape[1] - 1)
    before = np.maximum(first - 1, 0)
    levels = table.levels
    above = np.log(np.maximum(table.values[rows, before], 1e-300))
    below = np.log(np.maximum(table.values[rows, first], 1e-300))
    fall = np.maximum(above - below, 1e-12)
    share = np.where(low.any(axis=1), np.clip((above - math.log(floor)) / fall, 0, 1), 1.0)
    top = levels[rows, before] + share * (levels[rows, first] - levels[rows, before])
    # It grows like the square of the distance at most. What seems to grow faster is the end of the
    # tables, which is charged at any L.
    squares = np.maximum(table.nodes, 1e-9) ** 2
    top[1:] = np.minimum.accumulate(top[1:] / squares[1:]) * squares[1:]
    top[0] = top[1]
    top = np.maximum.accumulate(np.maximum(top, 1e-6))
    found = np.interp(separations, table.nodes, top)
    # After a reset separations are small beside the distances that the noise leads to, and the one
    # noise alone brings values below the floor at much lower L: there levels must be.
    return np.asarray(np.minimum(found, _ROOM * gaussian_top(separations, floor)))


def gaussian_top(separations: np.ndarray, floor: float) -> np.ndarray:
    """L at which the divergence of two Gaussians so far apart is below `floor`."""
    sized = np.minimum(separations, FARTHEST)
    highest = float(-scipy.special.ndtri(floor))
    return np.asarray(np.maximum(sized * highest + sized**2 / 2, 1e-6))


def met(table: Table) -> Table:
    """The same with value 0 at distance 0."""
    table.values[0] = 0
    return table
