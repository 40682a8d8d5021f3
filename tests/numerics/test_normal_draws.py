"""The noise itself: its scale, and tails that plain float32 normals do not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from certunlearn._numerics import normal_draws

DRAWS = 200_000


def test_distribution_is_normal_and_other_scales_are_told_apart():
    draws = np.asarray(normal_draws.standard_normal(jax.random.key(1), (DRAWS,)), np.float64)
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-3
    for wrong in (0.97, 1.03):
        assert scipy.stats.kstest(draws * wrong, "norm").pvalue < 1e-4
    assert abs(np.mean(draws)) < 5 / np.sqrt(DRAWS)
    assert abs(np.mean(draws > 0) - 0.5) < 2.5 / np.sqrt(DRAWS)


def test_the_inverse_is_accurate_out_to_its_end():
    # p/2 from 1/2 down to 2^-65, as the words produce it.
    probability = np.concatenate([0.5 * 2.0 ** -np.linspace(0.01, 64, 4001), [2.0**-65]])
    ours = -np.asarray(jax.scipy.special.ndtri(probability.astype(np.float32)), np.float64)
    exact = -scipy.special.ndtri(probability.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-7)


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


def test_same_key_same_draws_and_other_keys_others():
    draw = lambda seed: normal_draws.standard_normal(jax.random.key(seed), (1000,))  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.any(np.asarray(draw(0)) == np.asarray(draw(1)))
    assert abs(np.corrcoef(draw(0), draw(1))[0, 1]) < 0.15


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32])
def test_narrow_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="float32 or float64"):
        normal_draws.standard_normal(jax.random.key(0), (3,), dtype)
