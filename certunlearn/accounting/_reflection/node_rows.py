"""Rows of the reflection-coupling tables before their levels: nodes, windows and moments."""

import numpy as np

from certunlearn.accounting._reflection.kernel import Rows

# Gaps grow with the distance: they have doubled at this one, or at as many tails. So no window,
# which is up to four tails wide, has gaps that differ more than the proof allows.
_DOUBLED, _DOUBLED_TAILS = 40.0, 4.0
_WIDEST = 0.75
# What is left of the noise when nodes are looked out for, in squared gaps.
LOOKOUT = 0.5
# Nodes that are hit almost surely: those as near as this, in standard deviations of the distance.
_NEAR = 3.5
# Moments are worked out for so many windows to the left.
_MOMENTS = 2

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_POINTS, _WEIGHTS = (_POINTS + 1) / 2, _WEIGHTS / 2


def make_nodes(end: float, gap: float, tail: float = 0.0) -> np.ndarray:
    """Distances from 0 to `end` or just beyond, in units of the noise."""
    nodes, doubled = [0.0], max(_DOUBLED, _DOUBLED_TAILS * tail)
    while nodes[-1] < end:
        nodes.append(nodes[-1] + min(gap * (1 + nodes[-1] / doubled), _WIDEST))
    return np.array(nodes)


def make_rows(
    separations: np.ndarray,
    nodes: np.ndarray,
    size: int,
    window: int,
    tail: float,
    merged: bool,
    optimistic: bool,
) -> Rows:
    """Rows without levels and mirrors."""
    # At distance 0 nothing is read, and beyond the nodes everything is 1.
    separations = np.clip(separations, 1e-9, nodes[-1])
    near = last_near(nodes, separations)
    gap = nodes[near + 1] - nodes[near]  # the wider of the two cells beside the last near node
    time = np.ones_like(separations) if optimistic else 1 - LOOKOUT * gap**2
    right = np.searchsorted(nodes, separations + 2 * tail) + 1
    length = min(_MOMENTS * window, size)
    first = np.clip(right - length + 1, 0, max(len(nodes) - length, 0))
    empty = np.empty((len(separations), 0))  # for levels and mirrors
    return Rows(
        separations,
        time,
        near.astype(np.int32),
        first.astype(np.int32),
        _moments(separations, time, nodes, first, length, merged),
        empty,
        empty,
    )


def take_rows(rows: Rows, which: np.ndarray) -> Rows:
    """Some of the rows, by their numbers."""
    return Rows(*(field[which] for field in rows))


def _moments(
    separations: np.ndarray,
    time: np.ndarray,
    nodes: np.ndarray,
    first: np.ndarray,
    length: int,
    merged: bool,
) -> np.ndarray:
    """Integrals over cells that are the same for all levels, float64 `[rows, kinds, length]`.

    Against the density of a Brownian distance (of rate 4) at `time`: without a mirror's killing, of
    u^0 to u^4 over each cell, u from 0 to 1; with it, of the chance that a node is hit first of
    its cell's two, of that times half the time until then, and times an eighth of its square. In
    units of e^(-(r - rho)^2 / (8 time)) at a cell's first node or, with killing, at the node.
    """
    place = np.minimum(first[:, None] + np.arange(length), len(nodes) - 1)
    h = (nodes[np.minimum(place + 1, len(nodes) - 1)] - nodes[place])[..., None]
    distance = nodes[place][..., None] + h * _POINTS
    rho, t = separations[:, None, None], time[:, None, None]
    # Relative to the cell's first node, so that it does not underflow.
    density = np.exp(-h * _POINTS * (distance + nodes[place][..., None] - 2 * rho) / (8 * t))
    density = density * h * _WEIGHTS / (2 * np.sqrt(2 * np.pi * t))
    # Eight Gauss points integrate e^(k u) times such polynomials to this share of the result:
    # Trefethen (2008, Theorem 4.5) with the ellipse of radius 8, and room.
    k = h * (np.abs(nodes[place][..., None] - rho) + h) / (4 * t)
    error = 1e-8 * np.exp(np.minimum(2 * k, 200))
    if not merged:
        density = density * (1 + error)
        return np.stack([density @ _POINTS**i for i in range(5)], axis=1)
    # Where it would be too steep for that, killing is left out.
    steep = h * rho / (2 * t) > 4
    density = density * np.where(steep, 1.0, -np.expm1(-distance * rho / (2 * t)))
    h, error = h[..., 0], error[..., 0]
    lift = np.exp(h * (2 * (nodes[place] - separations[:, None]) + h) / (8 * time[:, None]))
    kinds = np.zeros((3, *place.shape))
    for u, upwards in ((_POINTS, True), (1 - _POINTS, False)):
        parts = (
            density @ u * (1 + error),
            density @ (u * (1 - u**2)) * h**2 / 24 * np.maximum(1 - error, 0),
            density @ (u * (u**4 / 120 - u**2 / 36 + 7 / 360)) * h**4 / 16 * (1 + error),
        )
        for kind, part in zip(kinds, parts, strict=True):
            if upwards:
                kind[:, 1:] += (part * lift)[:, :-1]
            else:
                kind += part
    return kinds.transpose(1, 0, 2)


def last_near(nodes: np.ndarray, separations: np.ndarray) -> np.ndarray:
    """The last node to be hit almost surely."""
    return np.clip(np.searchsorted(nodes, separations + 2 * _NEAR), 1, len(nodes) - 2)
