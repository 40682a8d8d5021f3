"""Heads: right by an independent derivation, and the same bits by every route."""

import os
import subprocess
import sys
from decimal import Decimal, getcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums_helpers import solved

from certunlearn import exact
from certunlearn.sums import exact_solution, fast_solution, systems


def bits_of(head):
    return np.asarray(head).view(np.int32)


def same(found, expected):
    np.testing.assert_array_equal(bits_of(found), bits_of(expected))


def rows_of(seed=0, n=120, d=6, classes=4):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)) / 2
    labels = rng.integers(0, classes, n)
    return features.astype(np.float32), labels


def stored(stats, features):
    """The features as they are stored, in float64, exactly."""
    return stats.settings.feature_rows(features) * stats.settings.feature_unit


# ------------------------------------------------------------------------------ what a head is


@pytest.mark.parametrize("l2", [1e-6, 1e-3, 1.0])
def test_ridge_minimises_what_it_says(l2):
    features, _ = rows_of()
    targets = np.random.default_rng(1).normal(size=(len(features), 3))
    stats = exact.collect(features, targets)
    x = stored(stats, features)
    gram = x.T @ x / len(x) + l2 * np.eye(x.shape[1])
    expected = np.linalg.solve(gram, x.T @ targets / len(x))
    head = exact.ridge(stats, l2)
    assert head.dtype == np.float32
    np.testing.assert_allclose(head, expected, rtol=1e-5, atol=1e-6)


def test_targets_of_one_column_give_a_vector():
    features, _ = rows_of()
    targets = features @ np.arange(6.0)
    head = exact.ridge(exact.collect(features, targets), 1e-3)
    assert head.shape == (6,)
    two = exact.ridge(exact.collect(features, np.stack([targets, targets], 1)), 1e-3)
    same(two[:, 0], head)
    same(two[:, 1], head)


def test_labels_become_one_against_all():
    features, labels = rows_of()
    signs = np.where(np.arange(4) == labels[:, None], 1.0, -1.0)
    by_labels = exact.ridge(exact.collect(features, labels, classes=4), 1e-2)
    same(by_labels, exact.ridge(exact.collect(features, signs), 1e-2))


def test_two_classes_have_one_output():
    features, labels = rows_of(classes=2)
    head = exact.ridge(exact.collect(features, labels, classes=2), 1e-2)
    same(head, exact.ridge(exact.collect(features, 2.0 * labels - 1), 1e-2))


def test_class_weights_count_rows_several_times():
    features, labels = rows_of(n=60, classes=3)
    weights = (3, 1, 2)
    copies = np.repeat(np.arange(60), np.array(weights)[labels])
    weighted = exact.collect(features, labels, classes=3, class_weights=weights)
    copied = exact.collect(features[copies], labels[copies], classes=3)
    same(exact.ridge(weighted, 1e-3), exact.ridge(copied, 1e-3))
    for found, expected in zip(exact.lda(weighted), exact.lda(copied), strict=True):
        same(found, expected)
    kept = exact.keep(weighted, 1e-3)
    kept = exact.remove(kept, features[:7], labels[:7])
    rest = exact.collect(features[7:], labels[7:], classes=3, class_weights=weights)
    same(exact.ridge(kept), exact.ridge(rest, 1e-3))


def test_lda_is_lda():
    features, labels = rows_of(n=300)
    stats = exact.collect(features, labels, classes=4)
    x = stored(stats, features)
    means = np.stack([x[labels == c].mean(0) for c in range(4)])
    spread = x - means[labels]
    covariance = spread.T @ spread / len(x)
    weights = np.linalg.solve(covariance + 1e-2 * np.eye(6), means.T)
    bias = -np.sum(means.T * weights, 0) / 2 + np.log(np.bincount(labels) / len(labels))
    found = exact.lda(stats, 1e-2)
    np.testing.assert_allclose(found.weights, weights, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(found.bias, bias, rtol=2e-4, atol=2e-4)


def test_biases_of_lda_are_rounded_from_sixty_digits():
    features, labels = rows_of(n=50, classes=2)
    stats = exact.collect(features, labels, classes=2)
    found = exact.lda(stats, 1e-2)
    rows = stats.settings.feature_rows(features).astype(object)
    getcontext().prec = 80
    for c in range(2):
        count = int(np.sum(labels == c))
        sums = rows[labels == c].sum(0)
        mean = [Fraction(int((2 * s + count) // (2 * count))) for s in sums]
        unit = Fraction(stats.settings.feature_unit)
        product = sum(
            m * unit * Fraction(float(w)) for m, w in zip(mean, found.weights[:, c], strict=True)
        )
        share = (Decimal(count) / Decimal(50)).ln()
        expected = -Decimal(product.numerator) / Decimal(product.denominator) / 2 + share
        assert abs(Decimal(float(found.bias[c])) - expected) <= Decimal(2) ** -24 * abs(expected)


def test_a_head_is_an_array_that_knows_its_recipe():
    features, labels = rows_of()
    head = exact.ridge(exact.collect(features, labels, classes=4), 1e-2)
    assert (head.recipe.kind, head.recipe.l2) == ("ridge", 1e-2)
    assert (features @ head).shape == (120, 4)
    assert (head * 1).recipe is None
    assert head[:2].recipe is None
    with pytest.raises(ValueError, match="read-only"):
        head[0] = 1


# ------------------------------------------------------------------------------ one answer


@pytest.mark.parametrize("k", [1, 3, 60])
@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_every_route_gives_the_bits_of_retraining(k, kind):
    features, labels = rows_of(n=200)
    targets = labels if kind == "labels" else features @ np.arange(12.0).reshape(6, 2)
    options = {"classes": 4} if kind == "labels" else {}
    stats = exact.collect(features, targets, **options)
    kept = exact.keep(stats, 1e-3)
    gone = np.random.default_rng(k).permutation(200)[:k]
    rest = np.setdiff1d(np.arange(200), gone)
    expected = exact.ridge(exact.collect(features[rest], targets[rest], **options), 1e-3)
    same(exact.ridge(exact.remove(stats, features[gone], targets[gone]), 1e-3), expected)
    same(exact.ridge(exact.remove(kept, features[gone], targets[gone])), expected)
    chain = kept
    for row in gone:
        chain = exact.remove(chain, features[row : row + 1], targets[row : row + 1])
        chain_head = exact.ridge(chain)
    same(chain_head, expected)
    back = exact.add(
        exact.remove(kept, features[gone], targets[gone]), features[gone], targets[gone]
    )
    same(exact.ridge(back), exact.ridge(stats, 1e-3))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_requests_ends_at_the_same_head(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    n, d = data.draw(st.integers(4, 12)), data.draw(st.integers(1, 4))
    features = rng.integers(-2, 3, (n, d)) / 4  # many ties, zeros and equal rows
    labels = rng.integers(0, 2, n)
    kept = exact.keep(exact.collect(features, labels, classes=2), 0.25)
    alive = list(range(n))
    while len(alive) > 1 and data.draw(st.booleans()):
        row = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
        kept = exact.remove(kept, features[row : row + 1], labels[row : row + 1])
    expected = exact.ridge(exact.collect(features[alive], labels[alive], classes=2), 0.25)
    same(exact.ridge(kept), expected)


def test_long_chains_do_not_drift():
    features, labels = rows_of(n=900, d=12)
    kept = exact.keep(exact.collect(features, labels, classes=4), 1e-5)
    for first in range(0, 800, 20):
        kept = exact.remove(kept, features[first : first + 20], labels[first : first + 20])
    rest = exact.collect(features[800:], labels[800:], classes=4)
    same(exact.ridge(kept), exact.ridge(rest, 1e-5))


@pytest.mark.parametrize("spoil", ["useless", "slightly wrong", "of another problem"])
def test_a_wrong_inverse_costs_time_only(spoil):
    features, labels = rows_of()
    kept = exact.keep(exact.collect(features, labels, classes=4), 1e-3)
    kept = exact.remove(kept, features[:5], labels[:5])
    other = np.random.default_rng(0).normal(size=kept.inverse.shape)
    inverse = {
        "useless": 0 * kept.inverse,
        "slightly wrong": kept.inverse * (1 + 1e-3 * other),
        "of another problem": other @ other.T,
    }[spoil]
    wrong = exact.Kept(kept.stats, kept.l2, inverse, kept.drift, kept.point)
    same(exact.ridge(wrong), exact.ridge(kept))


@pytest.mark.parametrize("l2", [2.0**-26, 1e-3])
def test_float64_bounds_what_it_leaves(l2, monkeypatch):
    """Every enclosure that decides holds the exact solution, also where products round a lot."""
    rng = np.random.default_rng(0)
    features = rng.integers(-99, 100, (400, 1)) / 99 + rng.integers(-9, 10, (400, 5)) / 9e3
    targets = rng.integers(-99, 100, (400, 2)) / 7
    kept = exact.keep(exact.collect(features, targets, feature_norm=4.0), l2)
    kept = exact.remove(kept, features[:1], targets[:1])
    system = systems.ridge_system(kept.stats, l2)
    ridge = Fraction(system.diagonal, 1 << system.binary_places)
    exact_heads = np.array(solved(system.matrix.to_objects(), ridge, system.right), dtype=object)
    unit = Fraction(2) ** system.exponent
    seen = []
    enclosed = exact_solution.enclosed

    def spying(values, radius):
        seen.append((values, radius))
        return enclosed(values, radius)

    point, ahead = kept.point, fast_solution.further(kept, system, kept.point.left(system), 1e-12)
    monkeypatch.setattr(exact_solution, "enclosed", spying)
    fast_solution.corrected(kept, system, point, ahead, kept.stats.gram.to_float())
    assert seen
    for values, radius in seen:
        near = [[Fraction(v) for v in row] for row in values.tolist()]
        distance = np.abs((exact_heads * unit - near).astype(np.float64))
        assert np.all(distance <= radius + np.abs(values) * 2.0**-52)


def test_features_that_never_occur_have_weight_zero():
    features, labels = rows_of()
    features[:, 2] = 0
    stats = exact.collect(features, labels, classes=4)
    head = exact.ridge(stats, 1e-3)
    assert not bits_of(head)[2].any()
    kept = exact.remove(exact.keep(stats, 1e-3), features[:1], labels[:1])
    assert not bits_of(exact.ridge(kept))[2].any()


# What every machine must find.
PINNED = "582bbcf48a51af052b0ded1d5a18a6086911aca7d308c084fe50d1dbc3c2f58c"


# Other numbers of threads and other processors' routines add up in other orders.
MACHINES = {
    "one thread": {"OPENBLAS_NUM_THREADS": "1"},
    "two threads": {"OPENBLAS_NUM_THREADS": "2"},
    "an old processor": {"OPENBLAS_CORETYPE": "Prescott"},
}


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_bits_do_not_depend_on_the_machine(machine):
    script = (
        "import numpy as np; from certunlearn import exact\n"
        "rng = np.random.default_rng(0)\n"
        "x, y = rng.integers(-99, 100, (3000, 150)) / 999, rng.integers(0, 5, 3000)\n"
        "kept = exact.keep(exact.collect(x, y, classes=5), 1e-4)\n"
        "kept = exact.remove(kept, x[:9], y[:9])\n"
        "head = exact.ridge(kept)\n"
        "assert head.tobytes() == exact.ridge(kept.stats, 1e-4).tobytes()\n"
        "import hashlib; print(hashlib.sha256(head.tobytes()).hexdigest())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | MACHINES[machine]
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == PINNED


# ------------------------------------------------------------------------------ bad input


def test_bad_arguments_are_named():
    features, labels = rows_of()
    stats = exact.collect(features, labels, classes=4)
    with pytest.raises(ValueError, match="l2 must be at least"):
        exact.ridge(stats, 1e-12)
    with pytest.raises(ValueError, match="l2 must be positive"):
        exact.ridge(stats, 0.0)
    with pytest.raises(ValueError, match=r"l2 must be .* as keep got it"):
        exact.ridge(exact.keep(stats, 1e-3), 1e-2)
    with pytest.raises(TypeError, match="stats must be exact"):
        exact.ridge(features)
    with pytest.raises(ValueError, match="at least one row"):
        exact.ridge(exact.remove(stats, features, labels))
    with pytest.raises(ValueError, match="must be of labels"):
        exact.lda(exact.collect(features, features[:, 0]))
    with pytest.raises(ValueError, match="none of class 4"):
        exact.lda(exact.collect(features, labels, classes=5))
