"""The noise itself: its scale, and tails that plain float32 normals do not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from certunlearn._numerics import normal_draws, threefry

DRAWS = 200_000
KEY = jax.random.key(11)


def test_distribution_is_normal_and_other_scales_are_told_apart():
    draws = np.asarray(normal_draws.standard_normal(jax.random.key(1), (DRAWS,)), np.float64)
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-3
    for wrong in (0.97, 1.03):
        assert scipy.stats.kstest(draws * wrong, "norm").pvalue < 1e-4
    assert abs(np.mean(draws)) < 5 / np.sqrt(DRAWS)
    assert abs(np.mean(draws > 0) - 0.5) < 2.5 / np.sqrt(DRAWS)


def words_around(sigmas):
    """All magnitudes n with P(|Z| > sigmas) near the (n + 1/2) / 2^63, as the two words."""
    n = int(2 * scipy.stats.norm.sf(sigmas) * 2**63)
    numbers = [max(int(n * factor), 0) for factor in np.linspace(0.97, 1.03, 2001)]
    high = np.array([m >> 31 for m in numbers], np.uint32)
    low = np.array([(m & (2**31 - 1)) << 1 for m in numbers], np.uint32)
    return np.array(numbers, dtype=object), jnp.asarray(high), jnp.asarray(low)


@pytest.mark.parametrize(
    ("sigmas", "rtol"), [(1, 1e-4), (4, 1e-4), (6, 1e-4), (8, 1e-3), (8.5, 1e-2)]
)
def test_exactly_the_right_share_of_words_lies_beyond(sigmas, rtol):
    numbers, high, low = words_around(sigmas)
    magnitudes = np.asarray(normal_draws.normal_from_words(high, low), np.float64)
    assert np.all(np.diff(magnitudes) <= 1e-6)
    # Magnitude falls with n, so P(|Z| > sigmas) is the first n that falls short, over 2^63.
    beyond = int(numbers[np.argmax(magnitudes <= sigmas)]) / 2**63
    resolution = 0.06 / 2000 * beyond
    exact = 2 * scipy.stats.norm.sf(sigmas)
    # A float32 near `sigmas` moves the tail by up to sigmas * spacing.
    slack = sigmas * np.spacing(np.float32(sigmas)) * exact * 4
    assert abs(beyond - exact) <= rtol * exact + resolution + slack


@pytest.mark.slow
def test_draws_beyond_eight_sigmas_have_the_right_law():
    # Condition on a tail: a high word of zero has probability 2^-32, i.e. |Z| > 6.4. There,
    # draws must follow the normal law conditioned on it, and pass 8 as often as they should.
    low = jax.random.bits(jax.random.key(2), (DRAWS,), jnp.uint32)
    draws = np.asarray(normal_draws.normal_from_words(jnp.zeros_like(low), low), np.float64)
    share = 2 * scipy.stats.norm.sf(np.abs(draws)) * 2.0**32
    assert scipy.stats.kstest(share, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(share * 0.97, "uniform").pvalue < 1e-4
    # Deeper: fix the low word's top 15 bits too, and a normal ends up beyond 8 with certainty.
    deep = np.asarray(normal_draws.normal_from_words(jnp.zeros_like(low), low >> 18), np.float64)
    assert np.min(np.abs(deep)) > 8.0
    share = 2 * scipy.stats.norm.sf(np.abs(deep)) * 2.0**50
    assert scipy.stats.kstest(share, "uniform").pvalue > 1e-4
    assert abs(np.mean(deep > 0) - 0.5) < 2.5 / np.sqrt(DRAWS)


def test_plain_float32_normals_have_no_such_tails():
    # The largest uniform below one that jax.random.normal inverts, and where it lands.
    top = np.nextafter(np.float32(1), np.float32(0))
    plain_end = float(np.sqrt(2) * jax.lax.erf_inv(top))
    assert plain_end < 5.5
    zero = jnp.zeros((), jnp.uint32)
    assert float(normal_draws.normal_from_words(zero, zero)) > 9.1
    assert float(normal_draws.normal_from_words(zero, zero + 1)) < -9.1


def test_all_words_give_finite_numbers():
    edges = jnp.array([0, 1, 2, 2**24, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)
    high, low = jnp.meshgrid(edges, edges)
    assert bool(jnp.all(jnp.isfinite(normal_draws.normal_from_words(high, low))))


@pytest.mark.slow
def test_float64_draws_resolve_the_same_words_finer():
    words = jax.random.bits(jax.random.key(3), (2, 1000), jnp.uint32)
    narrow = np.asarray(normal_draws.normal_from_words(*words))
    with jax.enable_x64(True):
        wide = np.asarray(normal_draws.normal_from_words(*words, jnp.float64))
        assert (
            normal_draws.standard_normal(jax.random.key(0), (2,), jnp.float64).dtype == jnp.float64
        )
    assert wide.dtype == np.float64
    np.testing.assert_allclose(narrow, wide, rtol=1e-5, atol=1e-6)
    n = (np.asarray(words[0], np.float64) * 2**31) + np.asarray(words[1] >> 1, np.float64)
    exact = -scipy.special.ndtri((n + 0.5) / 2**64)
    np.testing.assert_allclose(np.abs(wide), exact, rtol=1e-9, atol=1e-9)


def test_steps_and_coordinates_have_draws_of_their_own():
    draw = lambda step: normal_draws.standard_normal(KEY, (50, 40), step=step)  # noqa: E731
    out = np.stack([draw(0), draw(1), draw(2**31 - 2)])
    assert len(np.unique(np.abs(out))) > 0.999 * out.size
    assert np.max(np.abs(np.corrcoef(out.reshape(3, -1)) - np.eye(3))) < 6 / np.sqrt(2000)


@pytest.mark.parametrize(
    "shape", [(4, 4), (2, 3, 4), (5, 16), (3, 1, 2, 8), (16,), (16, 16, 1), ()]
)
def test_no_two_coordinates_share_their_counters(shape):
    most = 16  # in place of 2^32
    split = normal_draws.upper_axes(shape, most)
    assert np.prod(shape[split:]) <= most
    rows = shape[:split] + (1,) * (len(shape) - split)
    upper = normal_draws._numbers(rows, range(split), None)
    lower = normal_draws._numbers(shape, range(split, len(shape)), None)
    pairs = np.stack([np.broadcast_to(upper, shape).ravel(), np.asarray(lower).ravel()])
    assert np.max(lower, initial=0) < most
    assert len(np.unique(pairs, axis=1).T) == np.prod(shape)


@pytest.mark.parametrize("shape", [(2**33,), (2, 2**32 + 1), (2**20, 2**20, 2**20), (3, 2**33, 1)])
def test_coordinates_that_would_repeat_are_refused(shape):
    with pytest.raises(ValueError, match=r"axes of at most 4294967296 numbers, got the shape \("):
        normal_draws.standard_normal(KEY, shape)


def test_a_leaf_of_more_than_two_to_the_32_coordinates():
    # A part of 2^34 numbers. The compiler works out no more than what is asked for.
    shape, rows = (2**14, 2**20), [0, 2**12, 2**13, 2**14 - 1]  # 2^12 rows fill a counter

    @jax.jit
    def part(words):
        whole = normal_draws.draws((words[0], words[1]), jnp.uint32(3), shape, jnp.float32)
        return jnp.stack([whole[row, -50:] for row in rows])

    words = jax.random.key_data(KEY)
    compiled = part.lower(words).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
    out = np.asarray(compiled(words))
    assert len(np.unique(out)) == out.size
    last = threefry.derived(tuple(words), threefry.Purpose.UPPER_COORDINATE, 2**14 - 1)
    counters = jnp.arange(2**20 - 50, 2**20, dtype=jnp.uint32)
    expected = jax.jit(normal_draws.normal_from_words)(*threefry.words(last, 3, counters))
    np.testing.assert_array_equal(out[-1], expected)


def test_draws_are_the_same_however_they_are_made():
    shape = (7, 33)  # of odd size, so that the last numbers are not worked out as vectors
    draw = lambda step: normal_draws.standard_normal(KEY, shape, step=step)  # noqa: E731
    steps = jnp.arange(3)
    eager = np.stack([draw(step) for step in range(3)])
    _, scanned = jax.lax.scan(lambda carry, step: (carry, draw(step)), 0, steps)
    keys = jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(lambda key: normal_draws.standard_normal(key, shape, step=5)))(keys)
    for row in range(3):
        np.testing.assert_array_equal(jax.jit(lambda row=row: draw(row))(), eager[row])
        alone = normal_draws.standard_normal(keys[row], shape, step=5)
        np.testing.assert_array_equal(mapped[row], alone)
    np.testing.assert_array_equal(scanned, eager)
    np.testing.assert_array_equal(jax.vmap(draw)(steps), eager)


def test_draws_are_one_loop_that_stores_nothing():
    draw = lambda words: normal_draws.standard_normal(words, (1000, 100))  # noqa: E731
    compiled = jax.jit(draw).lower(jax.random.key_data(KEY)).compile()
    assert "while" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 1000


def test_same_key_same_draws_and_other_keys_others():
    draw = lambda seed: normal_draws.standard_normal(jax.random.key(seed), (1000,))  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.any(np.asarray(draw(0)) == np.asarray(draw(1)))
    assert abs(np.corrcoef(draw(0), draw(1))[0, 1]) < 0.15


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32])
def test_narrow_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="float32 or float64"):
        normal_draws.standard_normal(jax.random.key(0), (3,), dtype)
