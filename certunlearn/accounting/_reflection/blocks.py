"""Steps of a run merged into blocks for the reflection-coupling tables, and what those cost."""

import math
from typing import NamedTuple

import numpy as np

from certunlearn.accounting._reflection import node_tables
from certunlearn.accounting._reflection.node_tables import Blocks, Resolution

# Blocks that a run, or as much of it as weight decay remembers, is divided into.
BLOCKS = 48
# Most blocks, if all steps are the same and weight decay forgets.
MOST_BLOCKS = 400
# In runs of more blocks than this, shifts below this share of the noise are taken to be small.
_FEW_BLOCKS, _SMALL_SHIFT = 24, 0.1

# Noise at separations beyond this many of its standard deviations is not used: both move alike.
_USELESS = 100.0

# Most work, in entries of tables for a level: about 15 seconds of one processor. Runs of 50 steps
# that all differ take 2.4 million.
MOST_WORK = 2_500_000
_FEWER = 0.8  # blocks or nodes that are tried next, as a share of those that take too long
_LEAST_GAP, _USUAL_GAP = 0.08, 0.15
# Where delta is so small that windows are wider than so many deviations, gaps may be wider, too.
_USUAL_TAIL = 10.5


class Steps(NamedTuple):
    """A run, one number per step, in parameter units.

    Attributes:
      distance: of the two starts.
      contraction: float64 `[steps]`.
      shift: float64 `[steps]`.
      noise: float64 `[steps]`, standard deviations.
    """

    distance: float
    contraction: np.ndarray
    shift: np.ndarray
    noise: np.ndarray


def blocks(steps: Steps, length: int | None = None) -> Blocks:
    """The run with every `length` noisy steps merged into a block; see docs/theory/coupling.md."""
    noisy = np.flatnonzero(steps.noise > 0)
    if not len(noisy):
        raise ValueError("steps without any noise cannot be bounded")
    first = _first_near(steps)
    noisy = noisy[min(int(np.searchsorted(noisy, first)), len(noisy) - 1) :]
    count = int(noisy[-1]) + 1  # what follows the last noise is post-processing
    length = length or _block_length(steps, count, len(noisy))
    ends = noisy[::-1][::length][::-1]
    starts = np.insert(ends[:-1] + 1, 0, 0)
    found: list[tuple[float, float, float, bool]] = []
    used = np.where(np.arange(len(steps.noise)) >= noisy[0], steps.noise, 0.0)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        contraction, shift, variance = 1.0, 0.0, 0.0
        for t in range(start, end + 1):
            # With c = 0, what came before in the block is forgotten.
            c, sigma = float(steps.contraction[t]), float(used[t])
            contraction, shift = c * contraction, c * shift + float(steps.shift[t])
            variance = c * c * variance + sigma * sigma
        noise = math.sqrt(variance)
        several = np.count_nonzero(used[start : end + 1]) > 1
        # Where shifts are small the log gain is too, and a killed pair takes half the time.
        small = len(ends) > _FEW_BLOCKS and shift < _SMALL_SHIFT * noise
        found.append((contraction, shift, noise, bool(several or small)))
    return Blocks(steps.distance, *(np.array(part) for part in zip(*found, strict=True)))


def affordable(steps: Steps, delta: float) -> tuple[Blocks, Resolution]:
    """The run in the usual blocks and tables, or in coarser ones where those would take long.

    Any are safe. Only runs whose steps all differ, with starts far apart in units of the noise,
    need coarser ones: first wider gaps, then longer blocks.
    """
    run = blocks(steps)
    tables, length = resolution(run), 1
    tail = node_tables.tail_of(delta, len(run.noise))
    widest = _USUAL_GAP * max(1.0, tail / _USUAL_TAIL)
    while node_tables.work(run, delta, tables) > MOST_WORK:
        if tables.gap < widest:
            tables = tables._replace(gap=min(widest, tables.gap / _FEWER))
            continue
        fewer = _FEWER * len(run.noise)
        length = max(length + 1, math.ceil(np.count_nonzero(steps.noise) / fewer))
        run = blocks(steps, length)
    return run, tables


def resolution(run: Blocks) -> Resolution:
    """How fine tables are: the fewer the blocks, the finer."""
    gap = _USUAL_GAP * math.sqrt(len(run.noise) / BLOCKS)
    return Resolution(min(_USUAL_GAP, max(_LEAST_GAP, gap)), 128)


def _first_near(steps: Steps) -> int:
    """The first step whose noise is of use: before it the two are far apart, if moved alike."""
    distance = steps.distance
    for t, (c, s, sigma) in enumerate(zip(*(part.tolist() for part in steps[1:]), strict=True)):
        distance = c * distance + s
        if distance < _USELESS * sigma:
            return t
    return len(steps.noise)


def _block_length(steps: Steps, count: int, noisy: int) -> int:
    contraction = steps.contraction[0]
    alike = all(len(np.unique(part[:count])) == 1 for part in steps[1:])
    if alike and contraction < 1:
        remembered = min(noisy, 1.5 / (1 - contraction))
        return max(1, round(remembered / BLOCKS), math.ceil(noisy / MOST_BLOCKS))
    return max(1, round(noisy / BLOCKS))
