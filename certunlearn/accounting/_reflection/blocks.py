"""Steps of a run merged into blocks for the reflection-coupling tables, and what those cost."""

import math
from typing import NamedTuple

import numpy as np

from certunlearn.accounting._reflection import node_tables
from certunlearn.accounting._reflection.node_tables import Blocks, Resolution

# Blocks that a run, or as much of it as weight decay remembers, is divided into.
BLOCKS = 48
# What weight decay remembers, in steps over its contraction's distance from 1.
_MEMORY = 1.5
# Most blocks, if weight decay forgets.
MOST_BLOCKS = 400
# In runs of more blocks than this, shifts below this share of the noise are taken to be small.
_FEW_BLOCKS, _SMALL_SHIFT = 24, 0.1
# Runs of more blocks than this share numbers, where those differ by less than the share.
_MANY_BLOCKS, _ALIKE = 72, 0.02
_LEAST_ALIKE, _MOST_ALIKE = 1e-3, 0.3

# Noise at separations beyond this many of its standard deviations is not used: both move alike.
_USELESS = 100.0
# Noise below this share of a later one's is of little use, unless the two are as near as this many.
_LITTLE, _NEAR = 0.15, 5.0

# Most work, in entries of tables for a level: about 15 seconds of one processor. Runs of 50 steps
# that all differ take 2.4 million.
MOST_WORK = 2_500_000
_FEWER = 0.8  # blocks or nodes that are tried next, as a share of those that take too long
_LEAST_GAP, _USUAL_GAP = 0.08, 0.15
# Tilted pairs are tried with the first of these gaps at which that takes no longer than so many
# entries for a level do; with the first only, unless blocks of one noise forget so much, on average
# over all: without forgetting fine tables gain more.
_TILTED_TABLES, _MUCH_FORGOTTEN = ((0.1, 200_000), (0.12, 200_000), (0.15, 900_000)), 0.015
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


def variants(steps: Steps) -> list[Steps]:
    """The run, and where some of its noise is of little use, the run without that noise.

    Each is safe by itself: noise that is not used is shared by both runs, a part of the update that
    is drawn for both, as batches are. Which of them gives less depends on the run.
    """
    used = _without_little_noise(steps)
    return [steps] if used is None else [steps, used]


def blocks(steps: Steps, length: int | None = None, alike: float = _ALIKE) -> Blocks:
    """The run with its noisy steps merged into blocks; see docs/theory/coupling.md.

    Args:
      steps: the run.
      length: noisy steps of each block; None for what the run's memory asks for.
      alike: how much neighbouring blocks of long runs may differ to share the worst of their
        numbers, relative.
    """
    noisy = np.flatnonzero(steps.noise > 0)
    if not len(noisy):
        raise ValueError("steps without any noise cannot be bounded")
    each = _merged(steps, noisy, _ends(steps, noisy, length))
    first = _first_near(steps.distance, each)
    if first > 0:  # noise before it is not used; the rest may be divided otherwise
        begin = int(each.first_noise[first]) if first < len(each.first_noise) else int(noisy[-1])
        noisy = noisy[noisy >= begin]
        each = _merged(steps, noisy, _ends(steps, noisy, length))
    parts = np.stack([each.contraction, each.shift, each.noise])
    if parts.shape[1] > _MANY_BLOCKS:
        parts = _envelope(parts, alike)
    contraction, shift, noise = parts
    # Where shifts are small the log gain is too, and a killed pair takes half the time.
    small = (len(noise) > _FEW_BLOCKS) & (shift < _SMALL_SHIFT * noise)
    return Blocks(steps.distance, contraction, shift, noise, each.several | small, each.several)


def affordable(steps: Steps, delta: float) -> tuple[Blocks, Resolution]:
    """The run in the usual blocks and tables, or in coarser ones where those would take long.

    Any are safe. Only runs whose steps all differ, with starts far apart in units of the noise,
    need coarser ones: first wider gaps, then more blocks that share their numbers, then longer
    blocks.
    """
    run = blocks(steps)
    tables, length, alike = resolution(run, delta), 1, _ALIKE
    tail = node_tables.tail_of(delta, len(run.noise))
    widest = _USUAL_GAP * max(1.0, tail / _USUAL_TAIL)
    while node_tables.work(run, delta, tables) > MOST_WORK:
        if tables.gap < widest:
            tables = tables._replace(gap=min(widest, tables.gap / _FEWER))
            continue
        if len(run.noise) > _MANY_BLOCKS and alike < _MOST_ALIKE:
            alike *= 2
            run = blocks(steps, None if length == 1 else length, alike)
            continue
        fewer = _FEWER * len(run.noise)
        length = max(length + 1, math.ceil(np.count_nonzero(steps.noise) / fewer))
        run = blocks(steps, length, alike)
    return run, tables


def alike(steps: Steps) -> int:
    """How many of the first steps have the same contraction, shift and noise."""
    other = np.any([part != part[0] for part in steps[1:]], axis=0)
    return int(other.argmax()) if other.any() else len(other)


def affordable_length(steps: Steps, delta: float) -> tuple[int, Blocks, Resolution]:
    """What `affordable` gives for steps that are all alike, and how many steps make a block."""
    run, tables = affordable(steps, delta)
    length = _length_of_alike(float(steps.contraction[0]), len(steps.noise))
    same = blocks(steps, length)
    while len(same.noise) > len(run.noise):
        length += 1
        same = blocks(steps, length)
    return length, same, tables


def last_of_alike(run: Blocks, most: int) -> Blocks:
    """As many of a run's last blocks, all like its very last, from the start of the run.

    Fewer where the two are far apart at first: there the noise is not used.
    """
    contraction, shift, noise = (float(part[-1]) for part in run[1:4])
    distance, count = run.distance, most
    while count > 1 and contraction * distance + shift >= _USELESS * noise:
        distance, count = contraction * distance + shift, count - 1
    return Blocks(distance, *(np.full(count, part[-1]) for part in run[1:]))


def resolution(run: Blocks, delta: float) -> Resolution:
    """How fine tables are: the fewer the blocks, the finer.

    Where steps forget, or are few, tilted pairs gain more than fine tables do, for about as much
    work.
    """
    if not run.several.all():
        forgotten = np.maximum(1 - run.contraction, 0)[~run.several].sum() / len(run.noise)
        for gap, most in _TILTED_TABLES if forgotten > _MUCH_FORGOTTEN else _TILTED_TABLES[:1]:
            tables = Resolution(gap, 128, tilted=True)
            if node_tables.work(run, delta, tables) < most:
                return tables
    gap = _USUAL_GAP * math.sqrt(len(run.noise) / BLOCKS)
    return Resolution(min(_USUAL_GAP, max(_LEAST_GAP, gap)), 128, tilted=False)


class _Merged(NamedTuple):
    """Blocks of a run: contraction, shift and noise as of one step, arrays `[blocks]`.

    Attributes:
      contraction: of the distance before the block.
      shift: in parameter units.
      noise: likewise.
      several: whether the noise is that of several steps.
      first_noise: the first step of each whose noise is used.
    """

    contraction: np.ndarray
    shift: np.ndarray
    noise: np.ndarray
    several: np.ndarray
    first_noise: np.ndarray


def _merged(steps: Steps, noisy: np.ndarray, ends: np.ndarray) -> _Merged:
    """All steps to the last of `ends`, with the noise of the steps `noisy` only."""
    starts = np.insert(ends[:-1] + 1, 0, 0)
    found: list[tuple[float, float, float, bool, int]] = []
    used = np.where(np.arange(len(steps.noise)) >= noisy[0], steps.noise, 0.0)
    each = [part.tolist() for part in (steps.contraction, steps.shift, used)]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        contraction, shift, variance = 1.0, 0.0, 0.0
        for c, s, sigma in zip(*(part[start : end + 1] for part in each), strict=True):
            # With c = 0, what came before in the block is forgotten.
            contraction, shift = c * contraction, c * shift + s
            variance = c * c * variance + sigma * sigma
        with_noise = np.flatnonzero(used[start : end + 1])
        several, first = len(with_noise) > 1, start + int(with_noise[0])
        found.append((contraction, shift, math.sqrt(variance), several, first))
    return _Merged(*(np.array(part) for part in zip(*found, strict=True)))


def _first_near(distance: float, each: _Merged) -> int:
    """The first block whose noise is of use: before it the two are far apart, if moved alike."""
    parts = zip(each.contraction.tolist(), each.shift.tolist(), each.noise.tolist(), strict=True)
    for number, (c, s, sigma) in enumerate(parts):
        distance = c * distance + s
        if distance < _USELESS * sigma:
            return number
    return len(each.noise)


def _ends(steps: Steps, noisy: np.ndarray, length: int | None) -> np.ndarray:
    """Last steps of the blocks. What follows the last noise is post-processing."""
    count = int(noisy[-1]) + 1
    if length is None and all(len(np.unique(part[:count])) == 1 for part in steps[1:]):
        length = _length_of_alike(float(steps.contraction[0]), len(noisy))
    if length is not None:
        return np.asarray(noisy[::-1][::length][::-1])
    forgotten = np.cumsum(np.maximum(1 - steps.contraction, 0))[noisy].tolist()
    least = math.ceil(len(noisy) / MOST_BLOCKS)
    at, ends = len(noisy) - 1, []
    while at >= 0:
        ends.append(at)
        size = least
        while size <= at and size < _usual_size(
            forgotten[at] - forgotten[at - size], size, len(noisy)
        ):
            size += 1
        at -= size
    return np.asarray(noisy[ends[::-1]])


def _usual_size(forgotten: float, size: int, noisy: int) -> int:
    """How many of `noisy` steps make a block, from what `size` of them forget."""
    remembered = min(noisy, _MEMORY * size / forgotten) if forgotten > 0 else noisy
    return round(remembered / BLOCKS)


def _length_of_alike(contraction: float, noisy: int) -> int:
    if contraction >= 1:
        return max(1, round(noisy / BLOCKS))
    remembered = min(noisy, _MEMORY / (1 - contraction))
    return max(1, round(remembered / BLOCKS), math.ceil(noisy / MOST_BLOCKS))


def _envelope(parts: np.ndarray, alike: float) -> np.ndarray:
    """Neighbours that differ little with the most contraction and shift of them, least noise.

    More distance and less noise are on the safe side, and blocks that are the same share a matrix.

    Args:
      parts: float64 `[3, blocks]`: contraction, shift and noise.
      alike: the most that they differ by, relative; contractions relative to what they forget.
    """
    sign = np.array([[1.0], [1.0], [-1.0]])
    worst, first = sign * parts, parts.shape[1] - 1
    high = low = parts[:, first]
    for at in range(parts.shape[1] - 1, -1, -1):
        higher, lower = np.maximum(high, parts[:, at]), np.minimum(low, parts[:, at])
        forgets = max(1 - higher[0], _LEAST_ALIKE)
        if np.any(higher - lower > alike * np.array([forgets, higher[1], higher[2]])):
            first, higher, lower = at, parts[:, at], parts[:, at]
        high, low = higher, lower
        worst[:, at : first + 1] = np.array([high[0], high[1], -low[2]])[:, None]
    return np.asarray(sign * worst)


def _without_little_noise(steps: Steps) -> Steps | None:
    """The run without noise that is small beside a later one and beside distances; None if none is.

    Of tables in units of such noise nothing would be left. It is at most `_LITTLE` of what it is
    left out for, together, and not where the two may be near, where the next shift may part them.
    """
    far, spread = [], steps.distance
    for c, s, sigma in zip(*(part.tolist() for part in steps[1:]), strict=True):
        separation = c * spread + s
        far.append(separation > _NEAR * sigma)
        spread = math.hypot(separation, 2 * sigma)
    noise, large, lost, later = steps.noise.copy(), 0.0, 0.0, 1.0
    for t in reversed(range(len(noise))):
        sigma = float(noise[t])
        weighed = lost + (later * sigma) ** 2
        if sigma > 0 and far[t] and weighed <= (_LITTLE * large) ** 2:
            noise[t], lost = 0.0, weighed
        elif sigma > 0:
            large, lost, later = sigma, 0.0, 1.0
        later *= max(float(steps.contraction[t]), 1.0)
    return None if np.array_equal(noise, steps.noise) else steps._replace(noise=noise)
