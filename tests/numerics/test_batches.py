import itertools

import jax
import numpy as np
import pytest

from certunlearn._numerics import batches, random_keys


def test_an_epoch_holds_every_example_once_and_epochs_differ():
    key = jax.random.key(3)
    drawn = [np.asarray(b) for b in batches.batch_indices(key, 12, 4, 6)]
    first, second = np.concatenate(drawn[:3]), np.concatenate(drawn[3:])
    assert sorted(first) == sorted(second) == list(range(12))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("size", [1, 2, 255, 1625, 1626, 40_000])
def test_the_order_is_that_of_a_permutation_by_jax(size):
    # 1,625 examples are sorted once, more are sorted twice.
    for seed, epoch in ((0, 0), (5, 3)):
        key = jax.random.key(seed)
        expected = jax.random.permutation(jax.random.fold_in(key, epoch), size)
        found = batches.epoch_order(key, epoch, size)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("partitionable", [True, False])
def test_whatever_the_generator(kind, partitionable):
    key = jax.random.key(1, impl=kind)
    with jax.threefry_partitionable(partitionable):
        expected = jax.random.permutation(jax.random.fold_in(key, 2), 1001)
        np.testing.assert_array_equal(batches.epoch_order(key, 2, 1001), expected)


def test_batches_from_a_later_step_are_those_of_a_whole_run():
    key = jax.random.key(0)
    whole = list(itertools.islice(batches.batches_from(key, 10, 3), 8))
    for first in range(8):
        rest = itertools.islice(batches.batches_from(key, 10, 3, first), 8 - first)
        np.testing.assert_array_equal(np.array(list(rest)), np.array(whole[first:]))


def test_a_remainder_is_left_out():
    drawn = np.concatenate(list(batches.batch_indices(jax.random.key(0), 10, 4, 2)))
    assert len(set(drawn.tolist())) == 8


def test_data_size():
    assert batches.data_size({"x": np.zeros((5, 2)), "y": np.zeros(5)}) == 5
    for wrong in ({}, {"x": np.zeros(())}, {"x": np.zeros(0)}, (np.zeros(3), np.zeros(4))):
        with pytest.raises(ValueError, match="retain_data must"):
            batches.data_size(wrong)


def test_batch_larger_than_data_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at most the number of examples, 3"):
        batches.check_batch_size(4, 3)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"key": 3}, TypeError, "key must be"),
        ({"size": "12"}, TypeError, "size must be a whole number"),
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"batch_size": 13}, ValueError, "batch_size must be at most"),
        ({"steps": 1.5}, TypeError, "steps must be a whole number"),
    ],
)
def test_odd_arguments_are_refused_by_the_call(change, kind, words):
    with pytest.raises(kind, match=words):
        batches.batch_indices(
            **{"key": jax.random.key(0), "size": 12, "batch_size": 4, "steps": 2} | change
        )


def test_system_keys_are_64_bit_and_never_alike():
    drawn = [random_keys.system_keys() for _ in range(20)]
    words = np.array([[jax.random.key_data(k) for k in keyset] for keyset in drawn])
    assert words.shape == (20, 3, 2)
    assert len({tuple(pair) for pair in words.reshape(-1, 2).tolist()}) == 60
    assert len(set(words[..., 0].ravel().tolist())) > 50  # both words vary
    assert len(set(words[..., 1].ravel().tolist())) > 50


def test_split_key_takes_typed_and_raw_keys_and_nothing_else():
    typed, raw = jax.random.key(5), jax.random.PRNGKey(5)
    for a, b in zip(random_keys.split_key(typed), random_keys.split_key(raw), strict=True):
        np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b))
    for wrong in (5, None, np.zeros(2, np.float32), jax.random.split(typed, 2)):
        with pytest.raises(TypeError, match="key must be"):
            random_keys.split_key(wrong)
