"""Runs whose noisy steps are taken together: each is its single run, with noise of its own."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bound_helpers import exact_norm
from feed_helpers import Source
from loop_helpers import BATCH, CONVEX, PARAMS, loss_fn, same
from replica_helpers import clipping, prepare
from scipy import stats

import certunlearn as cu
from certunlearn import unlearning
from certunlearn.unlearning import compiled_steps, kept_steps, replicas

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _calls_of_four_steps(monkeypatch):
    """So that six steps are a whole call and a part of one."""
    monkeypatch.setattr(compiled_steps, "longest_call", lambda params, convolutions: 4)


def dropping(params, batch, key):
    kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return loss_fn(params, batch | {"x": batch["x"] * kept})


# Each makes run number i anew, so that it can be run together and alone.
RUNS = {
    "every number": lambda i: prepare(
        clipping(i),
        key=i,
        noise_scale=0.5 + i,
        params=jax.tree.map(lambda x: x + i, PARAMS),
        center=CENTER,
    ),
    "schedules": lambda i: prepare(
        clipping(i, learning_rate=np.linspace(0.1, 0.2 + i, 6), weight_decay=0.0),
        key=i,
        noise_scale=np.linspace(1.0, 2.0 + i, 6),
        frozen={"w": False, "b": True},
        center={"w": jnp.full(3, 0.1 * i), "b": jnp.ones(())},
    ),
    "examples, and a random loss": lambda i: prepare(
        clipping(i), key=i, loss=dropping, per_example=True, microbatch_size=4
    ),
    "microbatches": lambda i: prepare(clipping(i), key=i, microbatch_size=2),
    "momentum": lambda i: prepare(
        clipping(i, memoryless=False), key=i, before_clip=optax.scale_by_adam()
    ),
    "samples": lambda i: prepare(
        cu.DPSGD(
            **{"clip_norm": 0.5 + i, "learning_rate": 0.1 * (i + 1), "steps": 6},
            **{"sampling_rate": 0.25, "batch_size": BATCH, "deletions": 1},
        ),
        key=i,
        accountant="dp-accounting",
    ),
    "clipped models": lambda i: prepare(
        cu.ModelClipping(
            init_radius=1.0 + i, learning_rate=0.1 * (i + 1), steps=6, model_radius=0.5 + i
        ),
        key=i,
    ),
    "convex": lambda i: prepare(
        cu.ProjectedNoisySGD(**CONVEX, radius=0.5 + i), key=i, noise_scale=0.5 + i
    ),
    "source": lambda i: prepare(clipping(i), key=i, data=SOURCE),
}
SOURCE, CENTER = Source(), {"w": jnp.full(3, 0.1), "b": jnp.ones(())}


@slow
def test_a_second_sweep_compiles_nothing_and_shared_arrays_are_not_copied(monkeypatch):
    cu.unlearning.clear_compiled_steps()
    compiled, axes = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    monkeypatch.setattr(
        replicas,
        "_stacked",
        lambda trees, real=replicas._stacked: axes.append(real(trees)) or axes[-1],
    )
    unlearning.run_replicas([RUNS["every number"](i) for i in range(2)])
    compiled.clear()
    unlearning.run_replicas([RUNS["every number"](i + 1) for i in range(2)])
    assert compiled == []
    (varied, own), (batches, _) = axes[-3:-1]
    assert all(varied.update.center[name] is CENTER[name] for name in CENTER)
    assert own.count(None) == len(CENTER)
    assert batches[0]["x"].shape[0] == 2
    assert any(key[0] == "replicas" for key in kept_steps._kept)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "every number" else slow) for k in RUNS]
)
def test_each_replica_is_its_single_run(kind):
    runs, alone = ([RUNS[kind](i) for i in range(2)] for _ in range(2))
    noisy = unlearning.run_replicas(runs)
    for run, mine, one in zip(runs, noisy, alone, strict=True):
        theirs = unlearning.run_noisy_steps(one)
        assert mine.step == theirs.step == 6
        assert mine.start is run.start
        # Keys and counts are exact; of sums of a batch the order is XLA's.
        for a, b in zip(*map(jax.tree.leaves, (mine.carry, theirs.carry)), strict=True):
            exact = jnp.issubdtype(a.dtype, jnp.integer)
            np.testing.assert_allclose(a, b, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
        for a, b in zip(mine.stats, theirs.stats, strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), a, b)
            assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
        results = [
            unlearning.release(r, n, unlearning.run_finetuning(r, n))
            for r, n in ((run, mine), (one, theirs))
        ]
        own = {"created", "record_digest", "params_digest"}
        records = [dataclasses.asdict(result.certificate) for result in results]
        for name in records[0].keys() - own:
            assert records[0][name] == records[1][name], name
        assert cu.verify(results[0].certificate, results[0].params)
        assert len(results[0].history.losses) == 6
    # Replicas do differ.
    assert not same(noisy[0].trainable, noisy[1].trainable)


# ------------------------------------------------------------------------------ bounds and noise


def flat(params, batch):
    return 0.0 * jnp.sum(params["w"]) + 0.0 * jnp.sum(batch["x"])


def test_noise_is_that_of_single_runs_bit_for_bit_independent_and_of_the_right_size():
    size, sigmas = 20_000, (0.5, 1.0, 3.0)
    make = lambda i, steps=2: prepare(  # noqa: E731
        dataclasses.replace(clipping(1, weight_decay=0.0), steps=steps),
        key=i,
        loss=flat,
        params={"w": jnp.zeros(size)},
        noise_scale=sigmas[i],
    )
    noisy = unlearning.run_replicas([make(i) for i in range(3)])
    first = unlearning.run_replicas([make(i, 1) for i in range(3)])
    steps = []
    for i, (mine, one) in enumerate(zip(noisy, first, strict=True)):
        alone = unlearning.run_noisy_steps(make(i))
        assert same((mine.trainable, mine.carry), (alone.trainable, alone.carry))
        moved = [
            np.float64(one.trainable["w"]),
            np.float64(mine.trainable["w"] - one.trainable["w"]),
        ]
        steps += [move / sigmas[i] for move in moved]
    low, high = np.sqrt(stats.chi2.ppf([1e-6, 1 - 1e-6], size) / size)
    assert 0.9 < low < high < 1.1  # so noise that is off by a tenth is noticed
    for noise in steps:
        assert low < np.sqrt(np.mean(noise**2)) < high
    # No two replicas, nor two steps, share any of it.
    correlations = np.corrcoef(steps)[np.triu_indices(len(steps), 1)]
    assert np.max(np.abs(correlations)) < 5.5 / np.sqrt(size)


@pytest.mark.parametrize("per_example", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize(
    "slope", [pytest.param(slope, marks=slow) for slope in (1e-2, 1e20, np.nan)] + [1.0, 1e36]
)
def test_the_clip_of_each_replica_is_strict_as_it_is_compiled(per_example, slope):
    slopes = {"x": jnp.full((BATCH, 37), slope, jnp.float32) * jnp.arange(1, 38)}
    norms = (0.3, 0.7, 2.0)

    def steep(params, batch):
        return jnp.mean(batch["x"] @ params["w"])

    def make(norm, key):
        return prepare(
            cu.GradientClipping(init_radius=1.0, clip_norm=norm, learning_rate=1.0, steps=1),
            key=key,
            loss=steep,
            data=slopes,
            params={"w": jnp.zeros(37)},
            per_example=per_example,
        )

    runs = [make(norm, key) for key, norm in enumerate(norms)]
    alone = make(norms[0], 0)
    assert alone.longest > 1  # so that this is the clip inside of a loop of steps
    found = unlearning.run_replicas(list(map(quiet, runs)))
    found.append(unlearning.run_noisy_steps(quiet(alone)))
    for run, noisy in zip([*runs, alone], found, strict=True):
        length = exact_norm(-noisy.trainable["w"])
        norm = run.mechanism.clip_norm
        assert length <= norm
        # That of no other replica, and tight.
        if np.isnan(slope):
            assert length == 0
        elif slope >= 1:
            assert length > 0.999 * norm


def quiet(run):
    """The same without noise: a step from zero with a rate of 1 ends at the clipped gradient."""
    steps = copy.copy(run.noisy)
    update = steps.varied.update
    silent = update._replace(noise=(jnp.zeros_like(update.noise[0]), None))
    steps.varied = steps.varied._replace(update=silent)
    return dataclasses.replace(run, noisy=steps)


# ------------------------------------------------------------------------------ ends


def test_replicas_that_are_stopped_can_be_resumed_alone():
    counted = []
    runs = [RUNS["every number"](i) for i in range(2)]
    with pytest.warns(UserWarning, match="stopped after 4 of 6") as warned:
        noisy = unlearning.run_replicas(
            runs, interrupted=lambda: sum(counted) >= 4, advance=counted.append
        )
    assert len(warned) == 1
    assert [each.step for each in noisy] == [4, 4]
    assert counted == [4]
    result = unlearning.release(runs[1], noisy[1])
    assert result.certificate.steps_run == 4
    whole = unlearning.run_noisy_steps(RUNS["every number"](1))
    more = {
        "noise_scale": 1.5,
        "params": jax.tree.map(lambda x: x + 1, PARAMS),
        "center": CENTER,
    }
    later = prepare(clipping(1), resume=result.history.state, **more)
    # Of one state no two go on together.
    twins = [prepare(clipping(1), resume=result.history.state, **more) for _ in range(2)]
    with pytest.raises(ValueError, match="must have a noise key of its own"):
        unlearning.run_replicas(twins)
    resumed = unlearning.run_noisy_steps(later)
    for a, b in zip(*map(jax.tree.leaves, (resumed.carry, whole.carry)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@slow
def test_before_any_noise_nothing_can_be_stopped():
    late = cu.Separations(
        initial_distance=1.0, contraction=[1.0] * 6, shift=[0.1] * 6, noisy=[False] * 5 + [True]
    )
    runs = [prepare(late, key=i) for i in range(2)]
    with pytest.raises(KeyboardInterrupt, match="before any noise"):
        unlearning.run_replicas(runs, interrupted=lambda: True)


@slow
def test_an_error_says_which_replica_it_is_about():
    def overflowing(params, batch):
        return jnp.where(params["b"] > 1e3, jnp.nan, 1.0) * loss_fn(params, batch)

    def make(i):
        far = {"w": jnp.zeros(3), "b": jnp.asarray(0.0 if i < 2 else 2e3)}
        mechanism = cu.ProjectedNoisySGD(**CONVEX, radius=1e4)
        return prepare(mechanism, key=i, loss=overflowing, params=far, noise_scale=10.0)

    runs = [make(i) for i in range(3)]
    with pytest.raises(FloatingPointError, match="not finite at step 0, batch 0 of") as raised:
        unlearning.run_replicas(runs)
    assert raised.value.__notes__ == ["raised for prepared[2]; no replica of this call is released"]
    with pytest.raises(RuntimeError, match="was run already"):
        unlearning.run_noisy_steps(runs[0])
