"""One step of the reflection-coupling recursion, compiled; `coupling` says what it is and why.

All lengths here are in units of the step's noise. Everything is float64, switched on locally.
"""

import concurrent.futures
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_INVERSE_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
# (e^-x - 1 + x) / x^2 = sum (-x)^k / (k + 2)!, good to 1e-7 for |x| <= 4.5.
_RAMP = [(-1) ** k / math.factorial(k + 2) for k in range(21)]
_RAMP_REACH = 4.5
# e^x - 1 from below.
_EXPM1 = [1 / math.factorial(k) for k in range(1, 10)]
# Covers the truncation of the first series and the rounding of every mass.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-14
# Above e^69 / 2: stands for an integral that is not worked out.
_MUCH = 1e30


class Table(NamedTuple):
    """Upper bounds on a_k(x) - e^L a_k(y), of displaced points, by separation and L.

    Attributes:
      values: float64 `[nodes, levels]`; level i of node n stands at L = i * spacing[n].
      spacing: float64 `[nodes]`.
      inverse: float64 `[nodes]`: 1 / (e^spacing - 1).
      distances: float64 `[nodes]`: the distance after the noise of the step before, in units of
        that noise, from which the node's separation follows; the first is 0.
      loss: float64 `[nodes]`: h^2 / 8, what interpolating between separations costs.
      size: int, nodes in use; those beyond only pad the arrays.
    """

    values: Any
    spacing: Any
    inverse: Any
    distances: Any
    loss: Any
    size: Any


def advance(
    separations: np.ndarray,
    levels: np.ndarray,
    thetas: np.ndarray,
    table: Table,
    window: int,
    tail: float,
    merged: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Values one step further from the end.

    Args:
      separations: float64 `[rows]`, positive.
      levels: float64 `[rows, columns]`: L >= 0 for each separation.
      thetas: float64 `[choices, rows, columns]`: mirrors to choose from.
      table: the bounds with one step less to go.
      window: how many nodes the noise can reach, all but a share Phi(-tail) on either side.
      tail: see window.
      merged: whether the noise is that of several steps.

    Returns:
      float64 values `[rows, columns]`, and which choice gave them (int).
    """
    # Rows are independent: half of them to each of two threads.
    half = -(-len(separations) // 2)
    halves = [slice(0, half), slice(half, None)]

    def run(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        # Both settings are the thread's own. An accountant runs on the host.
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            values, choice = _advance(
                separations[rows], levels[rows], thetas[:, rows], table, tail, merged, window=window
            )
            return np.asarray(values), np.asarray(choice)

    if half == len(separations):
        return run(halves[0])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(run, halves))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@functools.partial(jax.jit, static_argnames="window")
def _advance(
    separations: Any, levels: Any, thetas: Any, table: Table, tail: Any, merged: Any, *, window: int
) -> tuple[jax.Array, jax.Array]:
    def row(args: Any) -> tuple[jax.Array, jax.Array]:
        rho, row_levels, row_thetas = args
        # The nodes in reach from anywhere in the row. Beyond them everything is charged at 1.
        lowest = rho - 2 * jnp.max(row_levels) / rho - 2 * tail
        first = jnp.searchsorted(table.distances, lowest) - 1
        first = jnp.clip(first, 0, jnp.maximum(table.size - window, 0))
        last = jnp.minimum(table.size - 1 - first, window - 1)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=window)
        values, spacing, inverse, distances, loss = map(cut, table[:-1])
        near = Table(values, spacing, inverse, distances, loss, last)
        one = functools.partial(_mirror, near, first > 0, tail, merged, rho)
        bounds = jax.vmap(jax.vmap(one), in_axes=(None, 0))(row_levels, row_thetas)
        return jnp.min(bounds, axis=0), jnp.argmin(bounds, axis=0)

    values, choice = jax.lax.map(row, (separations, levels, jnp.swapaxes(thetas, 0, 1)))
    return jnp.minimum(values, 1.0), choice


def _mirror(
    near: Table,
    cut: Any,
    tail: Any,
    merged: Any,
    rho: jax.Array,
    level: jax.Array,
    theta: jax.Array,
) -> jax.Array:
    """The bound by the mirror at (1 - theta) z*, for one separation and one L.

    `near` holds the nodes in reach, its `size` is the last one's number; `cut` says whether there
    are nodes before them.
    """
    z = level / rho
    mirror = (1 - theta) * z
    # A pair that met on the way is gone; without a way, what is positive begins at z*.
    z, theta = jnp.where(merged, mirror, z), jnp.where(merged, 0.0, theta)
    last, distance = near.size, near.distances
    place = jnp.arange(len(distance))
    gap = jnp.diff(distance) / 2  # of positions: a distance is twice the way to the mirror
    right, left = jnp.append(gap, 1.0), jnp.insert(gap, 0, 1.0)

    position = mirror + distance / 2
    y = position - z
    u = position - rho / 2
    density = jnp.exp(-u * u / 2) * _INVERSE_SQRT_2PI
    decay = jnp.exp(-rho * jnp.maximum(y, 0))  # e^L q / p at the node
    begun = y >= 0
    has_right = begun & (place < last)
    has_left = jnp.insert(begun[:-1], 0, False) & (place <= last)

    line = level + mirror * (distance - rho) + _log_gain(rho, z, theta, y, decay, right)
    slope = jnp.diff(line) / gap
    slope_right, slope_left = jnp.append(slope, 0.0), jnp.insert(slope, 0, 0.0)
    mass_right = _above(u - slope_right, right) - decay * _below(u + rho - slope_right, right)
    mass_left = _above(slope_left - u, left) - decay * _below(slope_left - u - rho, left)
    mass = jnp.where(has_right, jnp.maximum(mass_right, 0), 0) + jnp.where(
        has_left, jnp.maximum(mass_left, 0), 0
    )
    cost = density * mass * jnp.exp(near.loss) * _lookup(near, place, line - near.loss)
    # Nodes that the noise cannot reach; what it has beyond `tail` counts as 1, below.
    total = jnp.sum(jnp.where((place <= last) & (jnp.abs(u) <= tail + 2), cost, 0))

    # The positive mass begins at z*, between two nodes: up to the next node it counts as there.
    start = jnp.minimum(jnp.sum(~begun), len(y) - 1)
    width = jnp.maximum(y[start], 0)
    peak = jnp.exp(-((z - rho / 2 + jnp.clip(rho / 2 - z, 0, width)) ** 2) / 2)
    at_start = jnp.maximum(level + mirror * (2 * theta * z - rho), 0)
    first = peak * _INVERSE_SQRT_2PI * rho * width**2 / 2 * _lookup(near, start, at_start)
    total += jnp.where(begun[0], 0, jnp.where(begun[last], first, 1.0))

    above = jax.scipy.special.ndtr(rho / 2 - position[last])
    below = jnp.where(cut & (y[0] > 0), jax.scipy.special.ndtr(position[0] - rho / 2), 0.0)
    beyond = 2 * jax.scipy.special.ndtr(-tail)
    return (total + above + below + beyond) * (1 + _RELATIVE) + _ABSOLUTE


def _log_gain(
    rho: jax.Array,
    z: jax.Array,
    theta: jax.Array,
    y: jax.Array,
    decay: jax.Array,
    right: jax.Array,
) -> jax.Array:
    """Node values whose chords lie below the gain in L'.

    psi(y) = log((1 - e^(-rho (y + 2 theta z))) / (1 - e^(-rho y))) is convex, so its tangent in the
    middle of an interval lies below it; a node takes the lesser of its two intervals' tangents.
    """
    middle = decay * jnp.exp(-rho * right / 2)
    shrink = jnp.exp(-2 * rho * theta * z)
    more, less = 1 - middle * shrink, jnp.maximum(1 - middle, 1e-300)
    psi = jnp.log(more / less)
    fall = rho * middle * (1 / less - shrink / more) * right / 2
    from_left = jnp.insert(jnp.where(y >= 0, psi - fall, jnp.inf)[:-1], 0, jnp.inf)
    gain = jnp.maximum(jnp.minimum(psi + fall, from_left), 0)
    return jnp.where((theta > 0) & (y >= 0), gain, 0)


def _ramp(x: jax.Array) -> jax.Array:
    """(e^-x - 1 + x) / x^2."""
    total = jnp.full_like(x, _RAMP[-1])
    for coefficient in _RAMP[-2::-1]:
        total = total * x + coefficient
    return total


def _above(rate: jax.Array, width: jax.Array) -> jax.Array:
    """At least the integral of (1 - t / width) e^(-rate t - t^2 / 2) over 0 < t < width."""
    x = rate * width
    # Far up the integral only falls; far down nothing sensible is asked for.
    ramp = _ramp(jnp.clip(x, -_RAMP_REACH, _RAMP_REACH))
    return width * jnp.where(x < -_RAMP_REACH, _MUCH, ramp)


def _below(rate: jax.Array, width: jax.Array) -> jax.Array:
    """At most the integral of (1 - t / width) e^(-rate t - t^2 / 2) over 0 < t < width."""
    x = rate * width
    ramp = jnp.where(jnp.abs(x) > _RAMP_REACH, 0, _ramp(x))
    return jnp.exp(-width * width / 2) * width * ramp


def _lookup(table: Table, n: jax.Array, level: jax.Array) -> jax.Array:
    """The chord in e^L between levels; for L < 0 by symmetry, 1 - g + g V(-L) with g = e^L."""
    size, spacing = jnp.abs(level), table.spacing[n]
    columns = table.values.shape[1]
    i = jnp.minimum((size / spacing).astype(jnp.int32), columns - 2)
    # Rounded down, for the values fall: the truncated series stays below e^x - 1.
    share = _expm1(jnp.minimum(size - i * spacing, spacing)) * table.inverse[n]
    share = jnp.clip(share, 0, 1)
    flat, at = table.values.reshape(-1), n * columns + i
    low, high = flat[at], flat[at + 1]
    value = low + (high - low) * share
    return jnp.where(level < 0, 1 - jnp.exp(-size) * (1 - value), value)


def _expm1(x: jax.Array) -> jax.Array:
    total = jnp.full_like(x, _EXPM1[-1])
    for coefficient in _EXPM1[-2::-1]:
        total = total * x + coefficient
    return total * x
