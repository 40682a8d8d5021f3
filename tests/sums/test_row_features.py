"""Features from a public network do not depend on the batch; public scales are public."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sums_helpers import features, labels, same_sums

from certunlearn import sums
from certunlearn.sums.row_batches import row_features

WEIGHTS = np.random.default_rng(3).normal(size=(300, 9)).astype(np.float32)
X = features(50, 300).astype(np.float32)
Y = labels(50)


def network(x):
    return jnp.tanh(x @ WEIGHTS / 17)


def of_pair(inputs):
    return network(inputs["a"]) + inputs["b"][:, None]


def test_batches_of_any_size_give_the_same_rows():
    whole = row_features(network, X, 64)
    assert whole.shape == (50, 9)
    np.testing.assert_allclose(whole, network(X), atol=1e-5)
    for size in (1, 3, 17, 50):
        part = row_features(network, X[:size], 64)
        np.testing.assert_array_equal(part, whole[:size])
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(row_features(network, X[order], 64), whole[order])


def test_rows_can_be_removed_through_the_network_in_other_company():
    stats = sums.collect(X, Y, feature_norm=3.0, apply_fn=network, batch_size=32)
    some = np.array([49, 3, 31])
    left = sums.remove(stats, X[some], Y[some], apply_fn=network, batch_size=32)
    kept = np.setdiff1d(np.arange(50), some)
    fresh = sums.collect(X[kept], Y[kept], feature_norm=3.0, apply_fn=network, batch_size=32)
    assert same_sums(left, fresh)
    again = sums.add(left, iter([(X[some], Y[some])]), apply_fn=network, batch_size=32)
    assert same_sums(again, stats)
    stored = row_features(network, X, 64)
    assert same_sums(sums.collect(stored, Y, feature_norm=3.0), stats)


def test_inputs_may_be_pytrees():
    inputs = {"a": X, "b": features(50, 1)[:, 0].astype(np.float32)}
    stats = sums.collect(inputs, Y, feature_norm=9.0, apply_fn=of_pair, batch_size=16)
    kept = jax.tree.map(lambda leaf: leaf[:20], inputs)
    gone = jax.tree.map(lambda leaf: leaf[20:], inputs)
    left = sums.remove(stats, gone, Y[20:], apply_fn=of_pair, batch_size=16)
    fresh = sums.collect(kept, Y[:20], classes=3, feature_norm=9.0, apply_fn=of_pair, batch_size=16)
    assert same_sums(left, fresh)


def test_labels_are_seen_whole_before_the_first_batch():
    y = np.zeros(50, int)
    y[-1] = 6
    assert sums.collect(X, y, apply_fn=network, batch_size=8).settings.classes == 7


def test_networks_that_return_no_rows_are_refused():
    for wrong in (lambda x: x.sum(), lambda x: x[0], lambda x: (x, x), lambda x: x[:, None]):
        with pytest.raises(ValueError, match=r"apply_fn must return an array \[1, d\]"):
            sums.collect(X, Y, apply_fn=wrong)
    with pytest.raises(ValueError, match="as many rows"):
        sums.collect(X, Y[:5], apply_fn=network)


# ------------------------------------------------------------------------------ public scales


def test_standardised_public_features_have_mean_zero_and_scale_one():
    public = features(400, 6) * np.array([1, 10, 1e-3, 1e6, 0, 0]) + np.array([0, 5, 1, 0, 1, 0])
    scaled = sums.standardization(public, quantile=0.9)
    z = scaled(public)
    np.testing.assert_allclose(z[:, :4].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(z[:, :4].std(0), 1)
    np.testing.assert_array_equal(z[:, 4:], public[:, 4:])  # constant ones stay: an intercept
    inside = (np.linalg.norm(z, axis=1) <= scaled.feature_norm).mean()
    assert 0.9 <= inside < 0.91


def test_rows_are_scaled_one_by_one_in_float64():
    scaled = sums.standardization(features(100, 300))
    whole = scaled(X)
    assert whole.dtype == np.float64
    for size in (1, 7):
        np.testing.assert_array_equal(scaled(X[:size]), whole[:size])
    np.testing.assert_array_equal(scaled(jnp.asarray(X)), whole)
    one = (np.float64(X[3, 5]) - scaled.mean[5]) / scaled.scale[5]
    assert whole[3, 5] == one
    odd = scaled(np.full((2, 300), np.inf))
    assert not sums.collect(odd, [0, 1]).gram.high.any()


def test_scales_are_checked():
    with pytest.raises(ValueError, match="public_features must be finite"):
        sums.standardization([[1.0, np.nan]])
    with pytest.raises(ValueError, match="not zero, got none"):
        sums.standardization(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="public_features must be of shape"):
        sums.standardization(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="quantile"):
        sums.standardization(np.ones((3, 2)), quantile=1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        sums.Standardization(np.zeros(2), np.array([1.0, 0.0]), 1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        sums.Standardization(np.zeros(2), np.ones(3), 1.0)
    with pytest.raises(ValueError, match="mean must be finite"):
        sums.Standardization(np.array([np.inf]), np.ones(1), 1.0)
    with pytest.raises(ValueError, match=r"features must be of shape \[n, 2\]"):
        sums.Standardization(np.zeros(2), np.ones(2), 1.0)(np.ones((3, 3)))
    with pytest.raises(ValueError, match="read-only"):
        sums.Standardization(np.zeros(2), np.ones(2), 1.0).mean[0] = 1
