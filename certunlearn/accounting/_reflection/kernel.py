"""Weights of one step of the reflection-coupling recursion, compiled.

docs/theory/coupling.md says why.

All lengths here are in units of the step's noise, and m is the slope of L along a pair's way:
L + m (D - rho) at distance D. Everything is float64, switched on locally.
"""

import concurrent.futures
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # its parts load when they are first used

# A gain in L beyond this is given away; it keeps the series for e^x in reach.
_MOST_GAIN = 3.9
# Covers the series, the quadrature and the rounding of every weight, and numbers that underflow.
# No step of a weight cancels, so there is no error that is large beside a small delta.
_RELATIVE, _ABSOLUTE = 1e-7, 1e-290
# The same of the mass left of a window, a difference that cancels by a factor of 1e4 at most.
_DIFFERENCE = 1e-10
_CHUNK = 32
# Columns are taken in so many parts, each with a window of nodes of its own: with L, where the
# noise leads moves to the left.
PARTS = 4
_THREADS = 2


class Target(NamedTuple):
    """Where a step's noise leads: nodes, padded to a common size, and their levels.

    Attributes:
      nodes: float64 `[nodes]`: distances after the noise; the first is 0.
      spacing: float64 `[nodes]`: level i of node n stands at L = i * spacing[n].
      size: int, nodes in use; those beyond only pad the arrays.
      columns: int, levels of each node, with that at 0.
    """

    nodes: np.ndarray
    spacing: np.ndarray
    size: int
    columns: int


class Rows(NamedTuple):
    """States before the step, by the separation of the displaced points.

    Attributes:
      separation: float64 `[rows]`, positive.
      time: float64 `[rows]`: the share of the noise after which nodes are looked out for.
      near: int32 `[rows]`: the last node to be hit almost surely in what is left of it.
      first: int32 `[rows]`: the first node of the moments.
      moments: float64 `[rows, kinds, moments]`: see `node_rows._moments`.
      levels: float64 `[rows, columns]`: L >= 0.
      thetas: float64 `[rows, columns]`: where the mirror stands.
    """

    separation: np.ndarray
    time: np.ndarray
    near: np.ndarray
    first: np.ndarray
    moments: np.ndarray
    levels: np.ndarray
    thetas: np.ndarray


class Entries(NamedTuple):
    """Entries of a step's matrix, two for each: at a level of a node, and at the node's next.

    Attributes:
      low: float64 `[states, entries]`: weights of the values at the level; all the weight, if
        values are interpolated geometrically.
      high: float64 `[states, entries]`: of those at the next; or the share of the next.
      place: int32 `[states, entries]`: which of the flattened values is that at the level.
    """

    low: np.ndarray
    high: np.ndarray
    place: np.ndarray

    def times(self, values: np.ndarray, geometric: bool = False) -> np.ndarray:
        """float64 `[states]`, from values float64 `[places]`."""
        if geometric:
            logs = np.log(np.maximum(values, 1e-300))
            low, high = logs[self.place], logs[self.place + 1]
            return np.asarray(np.sum(self.low * np.exp(low + (high - low) * self.high), axis=1))
        return _product(self.low, self.place, values) + _product(self.high, self.place, values[1:])


def _product(weights: np.ndarray, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    states, entries = places.shape
    ends = np.arange(states + 1, dtype=np.int32) * entries
    parts = (weights.reshape(-1), places.reshape(-1), ends)
    return np.asarray(scipy.sparse.csr_matrix(parts, shape=(states, len(values))) @ values)


_Arrays = tuple[jax.Array, jax.Array, jax.Array]  # `Entries`, as compiled


class Operator(NamedTuple):
    """A step as a matrix: values before it are `matrix @ values after it + rest`.

    Attributes:
      matrix: for some states each, all their entries. Values after the step are
        `[2, nodes, columns]`: at nodes that are hit almost surely, and at those that may be missed.
      rest: float64 `[rows * columns]`: mass that no node stands for, counted as 1.
      geometric: whether values between two levels are interpolated geometrically.
    """

    matrix: tuple[tuple[Entries, ...], ...]
    rest: np.ndarray
    geometric: bool

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """float64 `[rows * columns]`."""
        flat = values.reshape(-1)

        def times(parts: tuple[Entries, ...]) -> np.ndarray:
            return np.asarray(sum(part.times(flat, self.geometric) for part in parts))

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            return np.concatenate(list(pool.map(times, self.matrix))) + self.rest


def operator(
    rows: Rows, target: Target, window: int, reach: float, merged: bool, optimistic: bool
) -> Operator:
    """The step from `rows` to `target`.

    Args:
      rows: where from.
      target: where to.
      window: how many nodes each state can lead to, at most as many as there are moments; what
        leads elsewhere is mass that no node stands for.
      reach: how far the window goes to the right of where the noise leads on average.
      merged: whether the noise is that of several steps.
      optimistic: every rounding to the other side.
    """
    count = len(rows.separation)
    inverse = 1 / np.expm1(target.spacing)

    def run(start: int) -> tuple[tuple[Entries, ...], np.ndarray]:
        # The same number of rows at a time, so that one compiled function serves all.
        take = np.minimum(np.arange(start, start + _CHUNK), count - 1)
        # Both settings are the thread's own. An accountant runs on the host.
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            found, rest = _weights(
                Rows(*(field[take] for field in rows)),
                target.nodes,
                target.spacing,
                inverse,
                target.size,
                target.columns,
                reach,
                window=window,
                merged=merged,
                optimistic=optimistic,
            )
        used = count - start
        parts = tuple(
            Entries(*(np.asarray(x)[:used].reshape(-1, x.shape[-1]) for x in part))
            for part in found
        )
        return parts, np.asarray(rest)[:used].reshape(-1)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        matrix, rests = zip(*pool.map(run, range(0, count, _CHUNK)), strict=True)
    return Operator(matrix, np.concatenate(rests), geometric=optimistic)


@functools.partial(jax.jit, static_argnames=("window", "merged", "optimistic"))
def _weights(
    rows: Rows,
    nodes: Any,
    spacing: Any,
    inverse: Any,
    size: Any,
    columns: Any,
    reach: Any,
    *,
    window: int,
    merged: bool,
    optimistic: bool,
) -> tuple[list[_Arrays], jax.Array]:
    """Per row: entries `[columns, window]`, for steps not merged also others, and the rest."""
    length = rows.moments.shape[-1]

    def one(row: Any) -> Any:
        ahead = jax.lax.dynamic_slice_in_dim(nodes, row.first, length)

        def part(levels: jax.Array, thetas: jax.Array) -> Any:
            slope = (1 - thetas) * levels / row.separation
            edge = row.separation - 2 * jnp.min(slope) * row.time + reach
            offset = jnp.clip(jnp.sum(ahead < edge) + 1 - window, 0, length - window)
            moments = jax.lax.dynamic_slice_in_dim(row.moments, offset, window, axis=1)
            first = row.first + offset
            return states(
                row._replace(first=first, moments=moments, levels=levels, thetas=thetas), slope
            )

        shape = (PARTS, -1)
        found = jax.vmap(part)(row.levels.reshape(shape), row.thetas.reshape(shape))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    def states(row: Any, slope: jax.Array) -> tuple[list[_Arrays], jax.Array]:
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=row.first, slice_size=window
        )
        r = cut(nodes)
        last = jnp.minimum(size - 1 - row.first, window - 1)
        number = row.first + jnp.arange(window)
        base = (number + jnp.where(number > row.near, len(nodes), 0)) * columns
        node = _Node(cut(spacing), cut(inverse), base.astype(jnp.int32))
        if merged:
            line = row.levels[:, None] + slope[:, None] * (r - row.separation)
            weight = _killed(row, slope, last, optimistic)
        else:
            weight, line, begin, at_start, extra = _paired(row, slope, r, last, optimistic)
        # Moments are in units of the density at the node; this is it, tilted.
        away = r - row.separation + 2 * slope[:, None] * row.time
        weight = weight * jnp.exp(-(away**2) / (8 * row.time))
        entries = [_entries(weight, line, node, columns, optimistic)]
        if not merged:  # the mass between z* and the next node
            at = _Node(*(field[begin] for field in node))
            more = _entries(extra, at_start, at, columns, optimistic)
            entries.append((more[0][:, None], more[1][:, None], more[2][:, None]))
        if optimistic:
            return entries, jnp.zeros_like(slope)
        return entries, _ABSOLUTE + _outside(row, slope, r, last)

    found: tuple[list[_Arrays], jax.Array] = jax.lax.map(one, rows)
    return found


class _Node(NamedTuple):
    """What entries need of a node: its spacing, 1 / (e^spacing - 1), and its level 0's place."""

    spacing: jax.Array
    inverse: jax.Array
    base: jax.Array


def _entries(
    weight: jax.Array, line: jax.Array, node: _Node, columns: jax.Array, optimistic: bool
) -> _Arrays:
    """Weights at L = `line` of a node each, shared by the levels around it."""
    level = jnp.clip((line / node.spacing).astype(jnp.int32), 0, columns - 2)
    over = jnp.clip(line - level * node.spacing, 0, node.spacing)
    place = (node.base + level).astype(jnp.int32)
    if optimistic:
        return weight, over / node.spacing, place
    # The chord in e^L; rounded down, for values fall and the truncated series is below e^x - 1.
    share = jnp.clip((over + over**2 / 2 + over**3 / 6) * node.inverse, 0, 1)
    weight = (1 + _RELATIVE) * weight
    return weight * (1 - share), weight * share, place


def _outside(row: Rows, slope: jax.Array, r: jax.Array, last: jax.Array) -> jax.Array:
    """Mass beyond the window's nodes, on either side."""
    deviation = jnp.sqrt(row.time)
    middle = row.separation / 2 - slope * row.time  # of half the distance
    above = jax.scipy.special.ndtr((middle - r[last] / 2) / deviation)
    # Pairs on the left that have not met: those at distances from 0 to the window's first. As a
    # difference of the smaller tails: of the larger ones nothing would be left of a small one.
    end, start = (r[0] / 2 - middle) / deviation, -middle / deviation
    near = jnp.where(start > 0, -start, end)
    far = jnp.where(start > 0, -end, start)
    more, less = jax.scipy.special.ndtr(near), jax.scipy.special.ndtr(far)
    left = jnp.maximum(more - less, 0) + _DIFFERENCE * more
    return above + jnp.where(r[0] > 0, left, 0)


def _killed(row: Rows, slope: jax.Array, last: jax.Array, optimistic: bool) -> jax.Array:
    """Weights at nodes, without the tilt, of a pair that is gone once it meets."""
    hat, time, squared = row.moments
    square = (slope**2)[:, None]
    # E e^(-x) of the time until the node is hit: 1 - E x, or with E x^2 / 2.
    weight = hat - square * time + (0 if optimistic else square**2 * squared)
    return jnp.where(jnp.arange(len(hat)) <= last, jnp.maximum(weight, 0), 0)


def _paired(
    row: Rows, slope: jax.Array, r: jax.Array, last: jax.Array, optimistic: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Weights at nodes without the tilt, L at nodes, and the piece from z* to the first node.

    The piece: at which node it counts, L there, and its mass.
    """
    window, t = len(r), row.time
    level, theta = row.levels[:, None], row.thetas[:, None]
    rate = row.separation / (2 * t)
    h = jnp.append(jnp.diff(r), 1.0)
    star = 2 * theta * level * t / row.separation  # positive mass begins at this distance
    begun = r >= star
    cell = begun & (jnp.arange(window) < last)
    lost = -jnp.expm1(-2 * rate * star)
    # In the middle of a cell: 1 - e^L q / p, that quotient, and 1 less its share that is not lost.
    less = jnp.maximum(-jnp.expm1(-rate * jnp.maximum(r + h / 2 - star, 0)), 1e-12)
    middle = 1 - less
    more = less + middle * lost

    # 1 - e^L q / p is concave: below its tangent in the middle of a cell, above its chord.
    if optimistic:
        node = jnp.exp(-rate * jnp.maximum(r - star, 0))
        start, rise = 1 - node, node - _next(node)
        gain = jnp.log((1 - node * (1 - lost)) / jnp.maximum(1 - node, 1e-12))
    else:
        rise = rate * h * middle
        start = less - rise / 2
        # The gain is convex: chords of these node values lie below its tangents.
        tangent = jnp.log(more / less)
        fall = rate * h / 2 * middle * lost / (less * more)
        # Where a tangent ends below 0 the cell goes without: a raised end would lift the chord.
        gains = cell & (tangent >= fall)
        before = jnp.where(cell, jnp.where(gains, tangent - fall, 0.0), jnp.inf)
        after = jnp.where(cell, jnp.where(gains, tangent + fall, 0.0), jnp.inf)
        gain = jnp.minimum(after, _previous(before, jnp.inf))
    gain = jnp.where((theta > 0) & begun, jnp.clip(gain, 0, _MOST_GAIN), 0)

    # With u from 0 to 1 along a cell: e^(x u) <= 1 + x u + k u^2 on the way down to its first
    # node, and e^(-x (1 - u)) <= 1 - x (1 - u) + k (1 - u)^2 on the way up to its second.
    x = (_next(gain) - gain) / 2
    m0, m1, m2, m3, m4 = row.moments
    k, k_up = _quadratic(x, optimistic), _quadratic(-x, optimistic)
    down = start * (m0 + (x - 1) * m1 + (k - x) * m2 - k * m3) + rise * (
        m1 + (x - 1) * m2 + (k - x) * m3 - k * m4
    )
    b1, b2 = 1 - x + k_up, x - 2 * k_up
    up = start * (b1 * m1 + b2 * m2 + k_up * m3) + rise * (b1 * m2 + b2 * m3 + k_up * m4)
    # Moments are in units of the density at a cell's first node.
    up = up * jnp.exp(h * (2 * (r - row.separation) + h) / (8 * t))
    if optimistic:  # the way to the node takes time
        bend = (slope[:, None] * h / 2 + x) ** 2 / 6
        up, down = up * jnp.maximum(1 - bend, 0), down * jnp.maximum(1 - bend, 0)
    weight = jnp.where(cell, jnp.maximum(down, 0), 0) + _previous(
        jnp.where(cell, jnp.maximum(up, 0), 0), 0.0
    )
    line = level + slope[:, None] * (r - row.separation) + gain

    # Between z* and the next node everything counts as at that node.
    begin = jnp.minimum(jnp.sum(~begun, axis=1), window - 1)
    star = star[:, 0]
    width = jnp.maximum(r[begin] - star, 0)
    v = slope * t + star / 2 - row.separation / 2
    v = v + jnp.clip(-v, 0, width / 2)
    peak = jnp.exp(-v * v / (2 * t)) / (2 * jnp.sqrt(2 * jnp.pi * t))
    extra = jnp.where(begun[:, 0], 0, peak * rate * width**2 / 2)
    if optimistic:
        extra = jnp.zeros_like(extra)
    at_start = jnp.maximum(row.levels + slope * (star - row.separation), 0)
    return weight, jnp.asarray(line), begin, at_start, extra


def _quadratic(x: jax.Array, lower: bool) -> jax.Array:
    """k with e^(x u) <= 1 + x u + k u^2 for 0 <= u <= 1 (>= if `lower`), |x| < 2."""
    half = x * x / 2
    if lower:
        return jnp.where(x > 0, half, half * jnp.maximum(1 + x / 3, 0))
    return jnp.where(x > 0, half / (1 - jnp.minimum(x, 2) / 3), half)


def _next(values: jax.Array) -> jax.Array:
    return jnp.concatenate([values[:, 1:], values[:, -1:]], axis=1)


def _previous(values: jax.Array, first: float) -> jax.Array:
    return jnp.concatenate([jnp.full_like(values[:, :1], first), values[:, :-1]], axis=1)
