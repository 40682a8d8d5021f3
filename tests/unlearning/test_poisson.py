"""The samples of private training: their room, what is counted, and what a cut costs."""

import itertools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from loop_helpers import arguments
from scipy import stats

import certunlearn as cu
from certunlearn._numerics import batches, binomial
from certunlearn.accounting import subsampled
from certunlearn.accounting._subsampled import profile

SIZE = 40
MECHANISM = cu.DPSGD(
    clip_norm=1.0, learning_rate=1e-6, steps=4, sampling_rate=0.25, batch_size=10, deletions=1
)
DATA = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(SIZE, 3)), jnp.float32)}
START = {"w": np.zeros(3, np.float32)}


def exact_tail(most, size, rate):
    """P(Binomial(size, rate) > most), summed in mpmath."""
    with mpmath.workdps(40):
        rate = mpmath.mpf(rate)
        first = mpmath.binomial(size, most + 1) * rate ** (most + 1)
        term = first * (1 - rate) ** (size - most - 1)
        total = mpmath.mpf(0)
        for drawn in range(most + 1, size + 1):
            total += term
            if term < total * mpmath.mpf(10) ** -25:
                break
            term *= mpmath.mpf(size - drawn) / (drawn + 1) * rate / (1 - rate)
        return total


# The room


@pytest.mark.parametrize("chance", [1e-3, 1e-20, 1e-30, 1e-100])
@pytest.mark.parametrize(
    ("size", "rate"),
    [(1000, 0.05), (60_000, 0.01), (50_000, 0.001), (10**6, 1e-4), (10**6, 1e-9), (3000, 0.7)],
)
def test_the_quantile_is_the_least_number_with_so_small_a_tail(size, rate, chance):
    most = binomial.quantile(size, rate, chance)
    assert 0 < most + 1 < size
    assert exact_tail(most, size, rate) <= chance
    assert most == 0 or exact_tail(most - 1, size, rate) > chance * (1 - 1e-5)


def test_quantiles_at_the_ends():
    assert binomial.quantile(0, 0.5, 1e-20) == 0
    assert binomial.quantile(50, 1e-30, 1e-20) == 0
    assert binomial.quantile(20, 0.5, 1e-20) == 20  # 2^-20 is more
    assert binomial.quantile(20, 1.0, 1e-20) == 20


@pytest.mark.parametrize(
    ("size", "rate"), [(1000, 0.05), (60_000, 0.01), (50_000, 0.001), (10**6, 1e-4)]
)
def test_the_room_is_near_the_mean_sample(size, rate):
    mean = size * rate
    room = batches.poisson_capacity(size, rate)
    assert exact_tail(room, size, rate) <= batches.OVERFLOW_CHANCE
    assert mean + 5 * math.sqrt(mean) < room < mean + 16 * math.sqrt(mean) + 10


def test_the_room_holds_everybody_where_all_may_be_drawn():
    assert batches.poisson_capacity(20, 0.5) == 20
    assert batches.poisson_capacity(20, 1.0) == 20
    assert batches.poisson_capacity(1000, 0.9999, deletions=5) == 1000
    assert batches.poisson_capacity(5, 1e-300) == 1


def test_the_room_has_places_for_the_deleted_and_whole_microbatches():
    plain = batches.poisson_capacity(60_000, 0.01)
    assert batches.poisson_capacity(60_000, 0.01, deletions=7) == plain + 7
    for unit in (1, 7, 64, 5000):
        room = batches.poisson_capacity(60_000, 0.01, microbatch_size=unit)
        assert room % unit == 0
        assert plain <= room < plain + unit


# What a cut costs


def divergence(p_means, p_weights, q_means, q_weights, sigma, epsilon):
    """Of one mixture of Gaussians from another at e^epsilon, summed over a fine line."""
    x = np.linspace(-12.0, 12.0, 40_001)
    density = lambda means, weights: sum(  # noqa: E731
        w * stats.norm.pdf(x, m, sigma) for m, w in zip(means, weights, strict=True)
    )
    gap = density(p_means, p_weights) - math.exp(epsilon) * density(q_means, q_weights)
    return float(np.maximum(gap, 0).sum() * (x[1] - x[0]))


def cut_sums(gradients, rate, room):
    """Values of a step's sum of the first `room` of those drawn, and their chances."""
    found = {}
    for drawn in itertools.product([False, True], repeat=len(gradients)):
        chance = math.prod(rate if d else 1 - rate for d in drawn)
        taken = [g for g, d in zip(gradients, drawn, strict=True) if d][:room]
        found[sum(taken)] = found.get(sum(taken), 0.0) + chance
    return list(found), list(found.values())


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_cut_costs_its_chance_and_no_more(monkeypatch, place):
    """Six examples that pull down and one that pulls up, in one step that cuts one in fifty."""
    monkeypatch.setattr(batches, "OVERFLOW_CHANCE", 0.02)
    rate, sigma, others = 0.3, 1.0, [-1.0] * 6
    everyone = [*others[:place], 1.0, *others[place:]]
    room, less = (batches.poisson_capacity(n, rate, deletions=1) for n in (7, 6))
    assert less < 6 or room < 7  # something is cut
    p, q = cut_sums(everyone, rate, room), cut_sums(others, rate, less)
    for epsilon in (0.0, 0.5, 2.0, 5.0, 9.0):
        truth = max(divergence(*p, *q, sigma, epsilon), divergence(*q, *p, sigma, epsilon))
        assert truth <= profile.delta(sigma, rate, 1, 1, epsilon) + batches.OVERFLOW_CHANCE


def test_without_that_chance_a_cut_would_not_be_covered(monkeypatch):
    monkeypatch.setattr(batches, "OVERFLOW_CHANCE", 0.02)
    # Two rooms, as a larger and a smaller data set have: a hundred drawn in the one only.
    p, q = cut_sums([-1.0] * 6 + [1.0], 0.9, 1), cut_sums([-1.0] * 6, 0.9, 6)
    assert divergence(*p, *q, 1.0, 2.0) > 5 * profile.delta(1.0, 0.9, 1, 1, 2.0)


def test_certificates_carry_the_cut_and_nothing_that_grows_with_epsilon():
    scale = MECHANISM.noise_scale(2.0)
    run = (2.0, 0.25, 4, 1)
    for epsilon in (0.0, 1.0, 30.0):
        added = cu.delta(MECHANISM, noise_scale=scale, epsilon=epsilon)
        assert added == pytest.approx(
            profile.delta(*run, epsilon) + 4 * batches.OVERFLOW_CHANCE, rel=1e-9, abs=0
        )
    everyone = cu.DPSGD(
        clip_norm=1.0, learning_rate=1.0, steps=4, sampling_rate=1.0, batch_size=10, deletions=1
    )
    assert subsampled._cut(everyone) == 0


def test_a_delta_that_is_all_for_the_cut_is_refused():
    with pytest.raises(ValueError, match=r"delta must be above 4e-30 .*, got 1e-30"):
        cu.noise_scale(MECHANISM, epsilon=1.0, delta=1e-30)
    assert math.isinf(cu.epsilon(MECHANISM, noise_scale=1.0, delta=1e-30))


@pytest.mark.parametrize("epsilon", [10.0, 100.0, 1000.0])
def test_large_epsilons_are_no_cause_to_refuse(epsilon):
    scale = cu.noise_scale(MECHANISM, epsilon=epsilon, delta=1e-5)
    assert 0.5 * epsilon < cu.epsilon(MECHANISM, noise_scale=scale, delta=1e-5) <= epsilon


# What a run records


def drawn(key, steps=MECHANISM.steps, rate=MECHANISM.sampling_rate, size=SIZE):
    """Bool `[steps, size]`: who is in the sample of each step of `unlearn` with this key."""
    sampling = cu.split_key(key).data
    return np.stack(
        [
            np.asarray(jax.random.uniform(jax.random.fold_in(sampling, t), (size,)) < rate)
            for t in range(steps)
        ]
    )


def trained(loss, data=DATA, mechanism=MECHANISM, key=0, **rest):
    return cu.unlearn(
        loss,
        START,
        data,
        mechanism,
        delta=1e-5,
        batch_size=mechanism.batch_size,
        noise_scale=1e-7,
        key=jax.random.key(key),
        progress=False,
        **arguments(**rest),
    )


def steep(params, batch):
    """Three for an example of ones, and a gradient that is always clipped."""
    return jnp.mean(jnp.sum((jnp.ones_like(batch["x"]) * params["w"] - 1.0) ** 2, -1))


def own(params, batch):
    """Each example's first number, with a gradient of norm 1.5 where it is positive, else 0.5."""
    x = batch["x"][:, 0]
    return jnp.mean(x + (0.5 + (x > 0) + 0 * x) * params["w"][0])


@pytest.mark.parametrize("microbatch_size", [None, 7])
@pytest.mark.slow
def test_averages_are_of_the_examples_taken(microbatch_size):
    result = trained(own, microbatch_size=microbatch_size)
    x = np.asarray(DATA["x"][:, 0])
    who = drawn(jax.random.key(0))
    assert np.all(who.sum(1) > 1)
    for t in range(MECHANISM.steps):
        assert result.history.losses[t] == pytest.approx(x[who[t]].mean(), abs=1e-4)
        assert result.history.clip_fractions[t] == pytest.approx((x[who[t]] > 0).mean(), abs=1e-6)
    assert result.history.nonfinite == 0


@pytest.mark.slow
def test_microbatches_change_nothing_but_memory():
    plain, cut = trained(own), trained(own, microbatch_size=16)
    np.testing.assert_allclose(plain.params["w"], cut.params["w"], atol=1e-9)
    assert plain.certificate.epsilon == cut.certificate.epsilon


@pytest.mark.slow
def test_a_microbatch_larger_than_the_data():
    result = trained(steep, microbatch_size=100)
    np.testing.assert_allclose(result.history.losses, 3.0, rtol=1e-3)
    np.testing.assert_allclose(result.history.clip_fractions, 1.0)


def test_an_example_that_was_not_taken_is_neither_counted_nor_felt():
    """Empty places repeat the first example, whose gradient is NaN here."""
    broken = {"x": DATA["x"].at[0].set(jnp.nan)}
    key = next(k for k in range(50) if 1 <= drawn(jax.random.key(k))[:, 0].sum() <= 2)
    who = drawn(jax.random.key(key))
    result, sound = trained(own, broken, key=key), trained(own, key=key)
    assert result.history.nonfinite == who[:, 0].sum()
    x = np.asarray(DATA["x"][:, 0])
    for t in range(MECHANISM.steps):
        others = who[t] & (np.arange(SIZE) > 0)
        assert result.history.losses[t] == pytest.approx(x[others].mean(), abs=1e-4)
    # One gradient of norm 1 at most less, in each step in which it was drawn.
    gap = np.abs(result.params["w"] - sound.params["w"]).max()
    assert 1e-9 < gap <= who[:, 0].sum() * 1e-7 * (1 + 1e-3)


def test_a_sample_with_nobody_adds_noise_only():
    rare = cu.DPSGD(
        clip_norm=1.0, learning_rate=1.0, steps=4, sampling_rate=1e-6, batch_size=10, deletions=1
    )
    assert not drawn(jax.random.key(0), rate=1e-6).any()
    result = cu.unlearn(
        steep,
        START,
        DATA,
        rare,
        delta=1e-5,
        batch_size=10,
        noise_scale=1e-7,
        key=jax.random.key(0),
        progress=False,
    )
    assert result.history.losses.tolist() == [0.0] * 4
    assert result.history.clip_fractions.tolist() == [0.0] * 4
    assert 0 < np.abs(result.params["w"]).max() < 2e-6


@pytest.mark.slow
def test_a_sample_too_large_for_its_room_is_cut(monkeypatch):
    monkeypatch.setattr(batches, "OVERFLOW_CHANCE", 0.9)
    data, cut = {"i": jnp.arange(SIZE)}, 0
    room = batches.poisson_capacity(SIZE, 0.25, deletions=1)
    assert room < 12
    for key in jax.random.split(jax.random.key(1), 20):
        (examples, taken), factor = MECHANISM.poisson_sampling().sample(data, key)
        who = np.flatnonzero(np.asarray(jax.random.uniform(key, (SIZE,))) < 0.25)
        assert examples["i"].shape == taken.shape == (room,)
        assert examples["i"][taken].tolist() == who[:room].tolist()
        assert factor == room / 10
        cut += len(who) > room
    assert 0 < cut < 20
