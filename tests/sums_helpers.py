"""Exact sums derived once more, in Python's fractions and integers, and data to sum."""

import math
from fractions import Fraction

import numpy as np


def fixed_row(row, norm, bits):
    """A row's whole numbers by the rule of `Settings.feature_rows`, in fractions."""
    if not all(math.isfinite(value) for value in row):
        return [0] * len(row)
    norm, values = Fraction(norm), [Fraction(value) for value in row]
    unit = Fraction(1)
    while unit < norm:
        unit *= 2
    while unit / 2 >= norm:
        unit /= 2
    unit /= 2 ** (bits - 1)
    scaled = False
    while max(map(abs, values)) > norm:
        values, scaled = [value / 2 for value in values], True
    whole = [round(value / unit) for value in values]  # of two equally near, the even one
    bound, squares = norm // unit, sum(q * q for q in whole)
    if scaled or squares > bound**2:
        root = math.isqrt(squares - 1) + 1
        whole = [int(math.copysign(1, q)) * (abs(q) * bound // root) for q in whole]
    assert sum(q * q for q in whole) * unit**2 <= norm**2
    return whole


def python_sums(settings, rows, targets):
    """gram and cross in Python's integers, from int32 rows and int64 targets."""
    d, columns = settings.num_features, settings.columns
    gram, cross = np.zeros((d, d), object), np.zeros((d, columns), object)
    for q, y in zip(rows.astype(object), targets, strict=True):
        weight = 1
        if settings.classes is not None:
            weight = settings.class_weights[y] if settings.class_weights else 1
            y = np.eye(settings.classes, dtype=int)[y]
        gram += weight * np.outer(q, q)
        cross += weight * np.outer(q, np.asarray(y).astype(object))
    return gram, cross


def features(count=60, d=5, seed=0):
    return np.random.default_rng(seed).normal(size=(count, d))


def labels(count=60, classes=3, seed=1):
    return np.random.default_rng(seed).integers(0, classes, count)


def same_sums(a, b):
    """Whether everything but the index is equal."""
    counts = (a.class_counts is None) == (b.class_counts is None) and (
        a.class_counts is None or np.array_equal(a.class_counts, b.class_counts)
    )
    return (
        (a.settings, a.rows, a.weight) == (b.settings, b.rows, b.weight)
        and counts
        and a.gram.equals(b.gram)
        and a.cross.equals(b.cross)
    )


def solved(matrix, ridge, right):
    """The exact solution by Gauss-Jordan elimination with fractions."""
    rows = [
        [Fraction(int(a)) + (Fraction(ridge) if i == j else 0) for j, a in enumerate(row)]
        + [Fraction(int(b)) for b in right[i]]
        for i, row in enumerate(matrix)
    ]
    for i, pivot in enumerate(rows):
        pivot[:] = [x / pivot[i] for x in pivot]
        for j, row in enumerate(rows):
            if j != i and row[i]:
                row[:] = [x - row[i] * y for x, y in zip(row, pivot, strict=True)]
    return [row[len(matrix) :] for row in rows]
