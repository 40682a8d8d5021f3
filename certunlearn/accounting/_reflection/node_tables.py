"""Tables of the coupling recursion, step by step from the end; see docs/theory/coupling.md."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy  # its parts load when they are first used

from certunlearn.accounting import _gaussian
from certunlearn.accounting._reflection import kernel, node_levels, node_rows, tilted
from certunlearn.accounting._reflection.kernel import Rows, Target
from certunlearn.accounting._reflection.node_levels import Table

# Mirrors that are tried: theta.
THETAS = np.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65])

# Lengths of tables, so that steps repeat: powers of this.
_STRETCH = 1.4
# What is charged in the dark, as a share of delta: beyond the tables, and beyond the windows.
_FLOOR, _TAIL = 5e-3, 5e-4
# A mirror is chosen for every so many rows and levels; between them the choice is interpolated.
_ROWS_APART, _LEVELS_APART = 4, 8
# And is kept for so many steps, as a share of those before; where tilts are tried, for fewer.
_GROWTH, _TILTED_GROWTH = 0.3, 0.15
# What another of the same steps takes, as a share of the first.
_REPEATED = 0.1
# Of one step's matrix, per level, where work is to be affordable: 3 kB each.
_MOST_ENTRIES = 140_000


class Blocks(NamedTuple):
    """A run as the recursion sees it: one number per block of steps, in parameter units.

    Attributes:
      distance: of the two starts.
      contraction: float64 `[blocks]`.
      shift: float64 `[blocks]`.
      noise: float64 `[blocks]`, standard deviations, positive.
      merged: bool `[blocks]`: whether pairs are gone once they meet, without the gain.
      several: bool `[blocks]`: whether the noise is that of several steps; those are all merged.
    """

    distance: float
    contraction: np.ndarray
    shift: np.ndarray
    noise: np.ndarray
    merged: np.ndarray
    several: np.ndarray


class Resolution(NamedTuple):
    """How fine the tables are.

    Attributes:
      gap: between nodes, in units of the noise.
      columns: levels of L for each node, a multiple of 8: functions compiled for tables then serve
        to choose mirrors and to read results, too.
      tilted: whether tilted pairs are tried beside the mirrors, in blocks of one noise.
    """

    gap: float
    columns: int
    tilted: bool


class Solved(NamedTuple):
    """All that a profile needs.

    Attributes:
      blocks: the run.
      delta: that the tables were made for.
      table: after the first block's noise; none if there is one block only.
      policies: the mirrors that were chosen, in the order in which they were.
      size: nodes of the padded tables.
      window: see `kernel.Rows`.
      tilted: as in `Resolution`.
    """

    blocks: Blocks
    delta: float
    optimistic: bool
    table: Table | None
    policies: list[np.ndarray]
    size: int
    window: int
    tilted: bool


def solve(
    blocks: Blocks,
    delta: float,
    resolution: Resolution,
    policies: list[np.ndarray] | None = None,
    optimistic: bool = False,
    advance: Callable[[int], object] = lambda blocks: None,
    kept: list[Table] | None = None,
) -> Solved:
    """Tables from the last block to the first.

    Args:
      blocks: the run.
      delta: what the tables are made for; any value is safe.
      resolution: how fine; any is safe.
      policies: of an earlier solution with the same resolution: the mirrors are not chosen again.
      optimistic: every rounding to the other side.
      advance: is told how many blocks have been done, as they are.
      kept: gets every table, that before the last block first, to be read for runs of fewer blocks
        from the same start: each reaches far enough for all of those.
    """
    count = len(blocks.noise)
    if count == 1:
        return Solved(blocks, delta, optimistic, None, [], 0, 0, resolution.tilted)
    tail = tail_of(delta, count)
    grids = _grids(blocks, resolution.gap, tail, from_any_block=kept is not None)
    # Few different shapes, as each is compiled.
    size = 2 ** math.ceil(math.log2(max(len(grid) for grid in grids)))
    window = min(size, -(-max(_reach(grid, tail) for grid in grids) // 32) * 32)
    reach = 2 * tail

    # Before the last block's noise the bound is exact.
    nodes = grids[-1]
    separations = _separations(blocks, count - 1, nodes)
    top = node_levels.gaussian_top(separations, delta * _FLOOR)
    table = Table(nodes, top, np.empty((len(nodes), resolution.columns)))
    table = node_levels.met(
        table._replace(values=_gaussian.delta(table.levels, separations[:, None]))
    )

    if kept is not None:
        kept.append(table)
    chosen: list[np.ndarray] = []
    t, since = count - 2, 0
    made: dict[tuple[int, bool, bytes], Rows] = {}
    while t > 0:
        # The table stands after the noise of block t; a step leads to after that of t - 1.
        nodes = grids[t - 1]
        separations = _separations(blocks, t, nodes)
        top = node_levels.needed(table, separations, delta * _FLOOR)
        same = _repeats(blocks, grids, t)
        again = max(1, min(same, _kept(since, resolution)))
        if again > 1:
            top = np.maximum(top, node_levels.needed(table, nodes, delta * _FLOOR))
            table = node_levels.at_levels(table, top)
        key = (id(table.nodes), bool(blocks.merged[t]), separations.tobytes())
        if key not in made:
            made = {
                key: node_rows.make_rows(
                    separations, table.nodes, size, window, tail, key[1], optimistic
                )
            }
        rows = made[key]
        levels = top[:, None] * np.linspace(0, 1, resolution.columns)
        target = _target(table, size)
        values = _missed(table, size, window, tail, bool(blocks.merged[t]), optimistic)
        if policies is None:
            thetas = _choose(rows, levels, target, window, reach, values, bool(blocks.merged[t]))
        else:
            thetas = policies[len(chosen)]
        chosen.append(thetas)
        rows = rows._replace(levels=levels, thetas=thetas)
        step = kernel.operator(rows, target, window, reach, bool(blocks.merged[t]), optimistic)
        near, pooled = np.array([], int), None
        if resolution.tilted and not blocks.several[t]:
            unmerged = _missed(table, size, window, tail, False, optimistic)
            near, pooled = tilted.operator(rows, target, tail, unmerged, optimistic)
        for repeat in range(again):
            if repeat:
                values = _missed(table, size, window, tail, bool(blocks.merged[t]), optimistic)
            found = step(values).reshape(levels.shape)
            if pooled is not None:
                unmerged = _missed(table, size, window, tail, False, optimistic)
                found[near] = np.fmin(found[near], pooled(unmerged).reshape(len(near), -1))
            found[separations > target.nodes[target.size - 1]] = 1
            table = node_levels.met(Table(nodes, top, np.minimum(found, 1)))
            if kept is not None:
                kept.append(table)
        t, since = t - again, since + again
        advance(again)
        del step, pooled  # before the next is made: they are the largest there is
    return Solved(blocks, delta, optimistic, table, chosen, size, window, resolution.tilted)


def profile(solved: Solved, epsilons: np.ndarray) -> np.ndarray:
    """Bounds on delta at each epsilon, float64 `[epsilons]`."""
    blocks, table = solved.blocks, solved.table
    separation = float(blocks.contraction[0] * blocks.distance + blocks.shift[0])
    separation /= float(blocks.noise[0])
    exact = _gaussian.delta(epsilons, separation)
    if table is None or separation == 0 or separation > table.nodes[-1]:
        return np.asarray(exact)
    tail, merged = tail_of(solved.delta, len(blocks.noise)), bool(blocks.merged[0])
    row = node_rows.make_rows(
        np.array([separation]),
        table.nodes,
        solved.size,
        solved.window,
        tail,
        merged,
        solved.optimistic,
    )
    # As many at a time as tables have columns.
    most = table.values.shape[1] // len(THETAS)
    pieces = -(-len(epsilons) // most)
    levels = np.resize(epsilons, (pieces, most, 1))
    shape = (pieces, most, len(THETAS))
    step = kernel.operator(
        node_rows.take_rows(row, np.zeros(pieces, int))._replace(
            levels=np.broadcast_to(levels, shape).reshape(pieces, -1),
            thetas=np.broadcast_to(THETAS, shape).reshape(pieces, -1),
        ),
        _target(table, solved.size),
        solved.window,
        2 * tail,
        merged,
        solved.optimistic,
    )
    values = _missed(table, solved.size, solved.window, tail, merged, solved.optimistic)
    found = step(values).reshape(shape).min(axis=-1).reshape(-1)[: len(epsilons)]
    if solved.tilted and not blocks.several[0]:
        values = _missed(table, solved.size, solved.window, tail, False, solved.optimistic)
        pooled = tilted.least(row, _target(table, solved.size), tail, values, epsilons)
        found = np.fmin(found, pooled)
    return np.asarray(np.minimum(found, exact))


def work(blocks: Blocks, delta: float, resolution: Resolution) -> float:
    """About how long `solve` takes, in states times nodes that each leads to, all per level.

    Infinity for tables that take hundreds of megabytes.
    """
    count = len(blocks.noise)
    if count == 1:
        return 0.0
    tail = tail_of(delta, count)
    grids = _grids(blocks, resolution.gap, tail)
    window = max(_reach(grid, tail) for grid in grids)
    if max(map(len, grids)) * window > _MOST_ENTRIES:
        return math.inf
    done, t, since = 0.0, count - 2, 0
    while t > 0:
        again = max(1, min(_repeats(blocks, grids, t), _kept(since, resolution)))
        done += len(grids[t - 1]) * window * (1 + _REPEATED * again)
        t, since = t - again, since + again
    return done


def _choose(
    rows: Rows,
    levels: np.ndarray,
    target: Target,
    window: int,
    reach: float,
    values: np.ndarray,
    merged: bool,
) -> np.ndarray:
    """float64 `[rows, columns]`: the best mirrors, of every few states, interpolated."""
    count, columns = levels.shape
    some = np.unique(np.append(np.arange(0, count, _ROWS_APART), count - 1))
    at = np.arange(0, columns, _LEVELS_APART)
    shape = (len(some), len(at), len(THETAS))
    tried = node_rows.take_rows(rows, some)._replace(
        levels=np.broadcast_to(levels[some][:, at, None], shape).reshape(len(some), -1),
        thetas=np.broadcast_to(THETAS, shape).reshape(len(some), -1),
    )
    found = kernel.operator(tried, target, window, reach, merged, False)(values)
    best = THETAS[found.reshape(shape).argmin(axis=-1)]
    by_row = np.stack([np.interp(np.arange(count), some, part) for part in best.T], axis=1)
    place = np.arange(columns) / _LEVELS_APART
    left = np.minimum(place.astype(int), len(at) - 2)
    share = np.minimum(place - left, 1)
    return np.asarray(by_row[:, left] * (1 - share) + by_row[:, left + 1] * share)


def _grids(
    blocks: Blocks, gap: float, tail: float, from_any_block: bool = False
) -> list[np.ndarray]:
    """Nodes after each block's noise but the last's, as far out as it and those before reach.

    `from_any_block`: or only some of those before, the first of them at the start's distance.
    """
    grids: list[np.ndarray] = []
    reach, variance, farthest = blocks.distance, 0.0, 0.0
    made: dict[int, np.ndarray] = {}
    for c, s, sigma in zip(*(part[:-1].tolist() for part in blocks[1:4]), strict=True):
        reach, variance = c * reach + s, c * c * variance + sigma * sigma
        end = min((reach + 2 * tail * math.sqrt(variance)) / sigma, node_levels.FARTHEST)
        # Of steps that are alike, the last of fewer reach as far as earlier ones of more.
        farthest = max(farthest, end)
        end = farthest if from_any_block else end
        power = math.ceil(math.log(end) / math.log(_STRETCH))
        if power not in made:
            made[power] = node_rows.make_nodes(_STRETCH**power, gap, tail)
        grids.append(made[power])
    return grids


def _separations(blocks: Blocks, t: int, nodes: np.ndarray) -> np.ndarray:
    """In units of block t's noise, from distances in units of that of the block before."""
    absolute = nodes * blocks.noise[t - 1]
    return np.asarray((blocks.contraction[t] * absolute + blocks.shift[t]) / blocks.noise[t])


def _kept(since: int, resolution: Resolution) -> int:
    """For how many steps mirrors are kept, after so many."""
    return math.ceil((_TILTED_GROWTH if resolution.tilted else _GROWTH) * since)


def _repeats(blocks: Blocks, grids: list[np.ndarray], t: int) -> int:
    """How many steps from block t on, towards the start, are the same in every respect."""
    if grids[t - 1] is not grids[t]:
        return 1
    count = 1
    while (
        t - count > 0
        and grids[t - count - 1] is grids[t]
        and all(part[t - count] == part[t] for part in blocks[1:])
        and blocks.noise[t - count - 1] == blocks.noise[t]
    ):
        count += 1
    return count if blocks.noise[t - 1] == blocks.noise[t] else 1


def _missed(
    table: Table, size: int, window: int, tail: float, merged: bool, optimistic: bool
) -> np.ndarray:
    """Values with what it costs that a node may be missed, float64 `[2, size, columns]`.

    First where nodes are hit almost surely, then where they need not be (docs/theory/coupling.md).
    """
    values = _padded(table.values, size)
    if optimistic:
        return np.stack([values, values])
    # At the node's own levels, but as far apart as the next node.
    levels, spacing = table.levels[:-1], table.top[1:, None] / (table.values.shape[1] - 1)
    beyond = np.append(
        node_levels.chord(table.values[1:], levels, spacing), table.values[-1:], axis=0
    )
    # The widest cell of a row's window against that which its lookout is made for.
    gaps = np.diff(table.nodes)
    near = np.maximum(
        node_rows.last_near(table.nodes, table.nodes) - 1, 0
    )  # separations are between nodes
    far = np.maximum(np.searchsorted(table.nodes, table.nodes + 2 * tail) + 2, window)
    widest = float((gaps[np.minimum(far, len(gaps) - 1)] / gaps[near]).max())
    if widest**2 > 12 * node_rows.LOOKOUT:
        raise AssertionError(f"cells in one window differ by {widest}, more than the proof allows")
    parts = []
    for wider in (1.0, widest):
        exponent = 2 * math.pi**2 * node_rows.LOOKOUT / wider**2
        chance = 4 * math.exp(-exponent) / -math.expm1(-8 * exponent)
        cost = beyond if merged else table.values + beyond
        parts.append(_padded(table.values + chance * cost, size))
    return np.stack(parts)


def _target(table: Table, size: int) -> Target:
    nodes = np.append(table.nodes, table.nodes[-1] + np.arange(1, size - len(table.nodes) + 1))
    columns = table.values.shape[1]
    return Target(nodes, _padded(table.top / (columns - 1), size), len(table.nodes), columns)


def tail_of(delta: float, count: int) -> float:
    """Deviations of the noise beyond which everything counts as 1."""
    return float(-scipy.special.ndtri(delta * _TAIL / count))


def _reach(nodes: np.ndarray, tail: float) -> int:
    """The most nodes that the noise can lead to from one separation."""
    either = np.searchsorted(nodes, nodes + 2 * tail) - np.searchsorted(nodes, nodes - 2 * tail)
    return int(either.max()) + 4


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1), mode="edge")
