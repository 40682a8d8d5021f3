"""No certificate takes long to answer, whatever it claims: the costliest that were found."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import run

from certunlearn import accounting
from certunlearn.accounting import _gaussian, _taut_string, product
from certunlearn.accounting._attack import best_loss
from certunlearn.accounting._reflection import blocks, node_tables, solution
from certunlearn.certificates import Certificate, certify
from certunlearn.certificates.record import record_digest
from certunlearn.certificates.verification import verify
from certunlearn.mechanisms import (
    DPSGD,
    GradientClipping,
    ModelClipping,
    ProjectedNoisySGD,
    to_record,
)

PARAMS = {"w": jnp.arange(4.0)}
CLIPPED = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=9)
MODELS = ModelClipping(init_radius=1.0, model_radius=1.0, learning_rate=0.1, steps=9)


def with_mu(mechanism, shape, mu):
    """Noise in these proportions with which interpolation gives this mu."""
    unit = accounting.mu(mechanism, noise_scale=shape)
    return (np.asarray(shape) * unit / mu).tolist()


def varied(steps, spread, decay=0.5):
    """A run in which every step is another."""
    rng = np.random.default_rng(1)
    rates = np.exp(rng.normal(size=steps) * spread) / steps**0.5
    mechanism = GradientClipping(
        init_radius=1.0,
        clip_norm=1.0,
        learning_rate=rates,
        weight_decay=rng.uniform(0, decay, steps) ** 4 / rates,
        steps=steps,
    )
    return mechanism, np.exp(rng.normal(size=steps) * spread)


def decaying(steps, decay):
    mechanism = GradientClipping(
        init_radius=1.0, clip_norm=1.0, learning_rate=1.0, weight_decay=decay, steps=steps
    )
    return mechanism, 1.0


def coupled(mechanism, scale):
    noise = np.broadcast_to(scale, mechanism.steps).astype(float)
    return solution.Steps(mechanism.start_distance, mechanism.contraction, mechanism.shift, noise)


COSTLY = {
    "all steps differ": (varied(71, 0.5), 19.9),
    "scales far apart": (varied(71, 4.0), 19.9),
    "starts far apart": (varied(60, 4.0), 0.3),
    "hundreds of blocks": (decaying(3_000, 1e-2), 19.9),
}


@pytest.mark.parametrize("delta", [1e-5, 1e-12, solution.LEAST_DELTA])
@pytest.mark.parametrize("name", COSTLY)
def test_tables_of_costly_runs_are_coarser(name, delta):
    (mechanism, shape), mu = COSTLY[name]
    steps = coupled(mechanism, with_mu(mechanism, shape, mu))
    run, tables = blocks.affordable(steps, delta)
    usual = blocks.blocks(steps)
    assert node_tables.work(usual, delta, blocks.resolution(usual, delta)) > (blocks.MOST_WORK)
    assert node_tables.work(run, delta, tables) <= blocks.MOST_WORK
    assert 1 < len(run.noise) <= len(usual.noise)


@pytest.mark.parametrize("steps", [2, 20, 48, 100, 1_000])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_tables_of_usual_schedules_stay_as_they_are(steps, epsilon):
    mechanism = GradientClipping(
        init_radius=1.0,
        clip_norm=1.0,
        learning_rate=(1 + np.cos(np.linspace(0, 3, steps))) / steps,
        steps=steps,
    )
    noise = accounting.noise_scale(
        mechanism, epsilon=epsilon, delta=1e-5, accountant="interpolation"
    )
    run, tables = blocks.affordable(coupled(mechanism, 0.6 * noise), 1e-5)
    usual = blocks.blocks(coupled(mechanism, 0.6 * noise))
    assert len(run.noise) == len(usual.noise)
    assert tables == blocks.resolution(usual, 1e-5)


@pytest.mark.parametrize("delta", [solution.LEAST_DELTA / 2, 1e-200, 1e-300])
def test_coupling_at_a_tiny_delta_is_interpolation(delta):
    mechanism, shape = varied(71, 0.5)
    scale = with_mu(mechanism, shape, 0.3)
    claim = {"noise_scale": scale, "delta": delta}
    expected = accounting.epsilon(mechanism, **claim, accountant="interpolation")
    assert accounting.epsilon(mechanism, **claim, accountant="coupling") == expected
    assert accounting.total_variation(mechanism, **claim, accountant="coupling") <= 1


def test_no_attack_is_tried_on_noise_of_very_different_scales():
    steps = 300
    constant = dataclasses.replace(CLIPPED, steps=steps, learning_rate=1 / steps)
    for shape, tried in (
        (np.ones(steps), True),
        (np.linspace(1, 0.3, steps), True),
        (np.tile([1.0, 1e-6], steps // 2), False),
        (np.exp(np.random.default_rng(0).normal(size=steps) * 4), False),
    ):
        scale = with_mu(constant, shape, 1.0)
        found = accounting.affordable_lower_bound(constant, noise_scale=scale, delta=1e-5)
        assert (found is not None) == tried
    args = (2.0, 1.0, 0.01, np.tile([1.0, 1e-12], 50), 1e-300)
    assert best_loss.work(*args) > 1e11


def test_a_run_longer_than_the_product_counts_is_no_better_for_it(monkeypatch):
    monkeypatch.setattr(product, "_MOST_STEPS", 5)
    claim = {"noise_scale": 0.9, "delta": 1e-5, "accountant": "product"}
    found = accounting.epsilon(MODELS, **claim)
    assert found == pytest.approx(
        accounting.epsilon(dataclasses.replace(MODELS, steps=5), **claim), rel=1e-12
    )
    monkeypatch.undo()
    assert 0 < accounting.epsilon(MODELS, **claim) < found


def test_runs_with_a_diameter_start_after_fewer_steps_where_they_are_many():
    assert len(_taut_string._starts(1_000)) > 90
    for steps in (10**5, 10**6):
        walked = sum(steps - start for start in _taut_string._starts(steps))
        assert walked < 2 * _taut_string._MOST_STARTED


SPOILT = {
    "a mechanism of another kind": ("dp-accounting", CLIPPED),
    "a mechanism without separations": ("coupling", None),
    "a mechanism without a diameter": ("product", CLIPPED),
    "no formula": ("closed-form", MODELS),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_accountant_that_is_not_for_the_mechanism_is_a_problem(name):
    accountant, mechanism = SPOILT[name]
    mechanism = mechanism or DPSGD(
        clip_norm=1.0, learning_rate=1.0, steps=2, sampling_rate=1.0, batch_size=1, deletions=1
    )
    issued = certify(
        mechanism,
        noise_scale=9.0,
        delta=1e-5,
        params=PARAMS,
        steps_run=mechanism.steps,
        accountant=accounting.supported_names(mechanism)[0],
    )
    record = dataclasses.asdict(issued) | {"accountant": accountant}
    record["record_digest"] = record_digest(record)
    outcome = verify(Certificate(**record))
    assert len(outcome.problems) == 1


def forged(mechanism, scale, accountant, delta, **claim):
    """A certificate with such a claim, with no derivation when it is made."""
    base = certify(
        CLIPPED,
        noise_scale=9.0,
        delta=1e-5,
        params=PARAMS,
        steps_run=1,
        accountant="interpolation",
    )
    planned = to_record(mechanism)
    record = dataclasses.asdict(base) | {
        "mechanism": planned,
        "noise_scale": scale,
        "accountant": accountant,
        "delta": delta,
        "steps_run": mechanism.steps,
        "assumptions": list(mechanism.assumptions),
        "mu": accounting.mu(mechanism, noise_scale=scale),
        **claim,
    }
    record["record_digest"] = record_digest(record)
    return json.dumps(record)


VERIFIED = """
import sys
from certunlearn.certificates import Certificate
from certunlearn.certificates import verify
outcome = verify(Certificate.load(sys.argv[1]))
assert not outcome, "epsilon is a forgery"
print(peak() / 1024, outcome.problems[0])
"""
LONG = {
    "coupling, all steps differ": lambda: (*varied(71, 0.5), 19.9, "coupling", 1e-5),
    "coupling, a million steps": lambda: (*decaying(10**6, 1e-3), 19.9, "coupling", 1e-5),
    "product, a million steps": lambda: (
        dataclasses.replace(MODELS, steps=10**6),
        1.0,
        19.0,
        "product",
        1e-5,
    ),
    "projected, a million steps": lambda: (
        ProjectedNoisySGD(
            initial_distance=1.0,
            learning_rate=1e-6,
            strong_convexity=1.0,
            smoothness=1.0,
            steps=10**6,
            radius=0.5,
        ),
        1.0,
        0.5,
        "interpolation",
        1e-5,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_the_costliest_are_answered_within_a_gigabyte(name, tmp_path):
    mechanism, shape, mu, accountant, delta = LONG[name]()
    scale = with_mu(mechanism, shape, mu)
    path = tmp_path / "certificate.json"
    # An epsilon above the true one would be refused as soon as that is derived; so is this.
    path.write_text(forged(mechanism, scale, accountant, delta, epsilon=0.0))
    megabytes, problem = run(VERIFIED, path).split(maxsplit=1)
    assert "epsilon is recorded as" in problem or float(_gaussian.epsilon(mu, delta)) == 0
    assert float(megabytes) < 1_000
