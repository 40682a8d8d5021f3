"""The random words: published answers, JAX's own function, and keys that do not meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from certunlearn._numerics import random_keys, threefry
from certunlearn._numerics.threefry import Purpose

# Of Random123, `kat_vectors`: counters, key, result, of 20 rounds.
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


def as_words(pair):
    return tuple(map(jnp.uint32, pair))


@pytest.mark.parametrize(("counters", "key", "expected"), KNOWN)
def test_published_answers(counters, key, expected):
    out = threefry.words(as_words(key), *as_words(counters))
    assert tuple(int(word) for word in out) == expected


def test_the_same_words_as_those_of_jax():
    key, first, second = np.random.default_rng(0).integers(2**32, size=(3, 500), dtype=np.uint32)
    ours = threefry.words(as_words(key[:2]), first, second)
    theirs = threefry_2x32(jnp.asarray(key[:2]), jnp.concatenate([first, second]))
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


def test_rounds_are_written_out():
    zero = jnp.uint32(0)
    lowered = jax.jit(lambda x: threefry.words((zero, zero), x, x)).lower(jnp.zeros(8, jnp.uint32))
    assert "while" not in lowered.as_text()


def test_keys_of_no_two_purposes_or_numbers_are_equal_and_none_is_a_word_of_noise():
    key = as_words((3, 4))
    numbers = jnp.arange(100, dtype=jnp.uint32)
    derived = [np.stack(threefry.derived(key, purpose, numbers), 1) for purpose in Purpose]
    # The counters of noise are a step below 2^31 and a coordinate.
    steps = [0, 1, 2**31 - 1]
    noise = [np.stack(threefry.words(key, step, numbers), 1) for step in steps]
    rows = np.concatenate(derived + noise)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert min(Purpose) == 2**31


@pytest.mark.parametrize("impl", ["rbg", pytest.param("unsafe_rbg", marks=pytest.mark.slow)])
def test_keys_of_other_kinds_are_hashed(impl):
    keys = jax.random.split(jax.random.key(5, impl=impl), 20)
    alone = np.stack([random_keys.words_of(key) for key in keys])
    assert alone.shape == (20, 2)
    assert len(np.unique(alone, axis=0)) == 20
    np.testing.assert_array_equal(jax.vmap(random_keys.words_of)(keys), alone)
    # Every word of the key counts.
    words = jnp.asarray([1, 2, 3, 4], jnp.uint32)
    others = [words] + [words.at[i].add(1) for i in range(4)]
    hashed = [random_keys.words_of(jax.random.wrap_key_data(w, impl=impl)) for w in others]
    assert len(np.unique(np.stack(hashed), axis=0)) == 5


def test_threefry_keys_are_their_own_words():
    key = jax.random.key(2**40 + 7)
    np.testing.assert_array_equal(random_keys.words_of(key), jax.random.key_data(key))
    np.testing.assert_array_equal(
        random_keys.words_of(jax.random.key_data(key)), jax.random.key_data(key)
    )


def test_keys_of_a_run_are_threefry_keys():
    keys = random_keys.split_key(jax.random.key(1, impl="rbg"))
    assert {str(jax.random.key_impl(key)) for key in keys} == {"threefry2x32"}
    same = random_keys.split_key(jax.random.key(1)).noise
    assert jax.random.key_data(same).tolist() == [507451445, 1853169794]  # as ever
