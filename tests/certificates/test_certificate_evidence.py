"""What a certificate is issued on: counted steps, finite parameters, sizes that fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from certificate_helpers import MECHANISM, PARAMS, SIGMA, issue

from certunlearn import accounting
from certunlearn._numerics import files
from certunlearn.certificates import issuing
from certunlearn.certificates.record import Certificate, record_digest
from certunlearn.certificates.verification import verify
from certunlearn.mechanisms import DPSGD, ProjectedNoisySGD, RewindToDelete
from certunlearn.mechanisms.noisy_optimizer import noisy_sgd
from certunlearn.unlearning.loop import unlearn


def run_of(mechanism, gradients, wrap=lambda tx: tx):
    """The state and parameters of a hand-written loop over these gradients."""
    tx = wrap(noisy_sgd(mechanism, SIGMA, key=jax.random.key(0)))
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return {"params": params, "state": state, "epsilon": None}


GOOD = jax.tree.map(jnp.ones_like, PARAMS)
BAD = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), PARAMS)


def test_the_optimizer_state_is_evidence_of_the_steps():
    whole = issue(**run_of(MECHANISM, [GOOD] * 9), steps_run=None)
    assert (whole.steps_run, whole.evidence) == (9, "optimizer state")
    assert issue().evidence == "word of the issuer"
    assert "steps known by      optimizer state" in verify(whole).summary
    early = run_of(MECHANISM, [GOOD] * 4)
    with pytest.raises(ValueError, match="has counted 4 noisy steps"):
        issue(**early, steps_run=None)
    with pytest.raises(ValueError, match="steps_run is 9, but state has counted 4"):
        issue(**early, steps_run=9)
    assert issue(**early, steps_run=4).steps_run == 4


def test_without_evidence_nothing_is_issued():
    with pytest.raises(ValueError, match="state must be the state of noisy_sgd"):
        issue(steps_run=None)


@pytest.mark.parametrize(
    ("wrap", "gradients"),
    [
        (lambda tx: optax.apply_if_finite(tx, 10), [GOOD] * 4 + [BAD] * 5),
        (
            lambda tx: optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite),
            [GOOD] * 4 + [BAD] * 5,
        ),
        (
            lambda tx: optax.conditionally_transform(tx, lambda step, **extra: step < 4),
            [GOOD] * 9,
        ),
    ],
)
def test_updates_that_a_wrapper_left_out_are_not_certified(wrap, gradients):
    with pytest.raises(ValueError, match="has counted 4 noisy steps"):
        issue(**run_of(MECHANISM, gradients, wrap), steps_run=None)


def test_a_dropped_step_that_should_have_contracted_is_not_certified():
    m = ProjectedNoisySGD(
        initial_distance=0.5, learning_rate=0.1, strong_convexity=1.0, smoothness=4.0, steps=9
    )
    assert issue(mechanism=m, **run_of(m, [GOOD] * 9), steps_run=None)
    with pytest.raises(ValueError, match="1 gradients that were not finite"):
        issue(mechanism=m, **run_of(m, [GOOD] * 8 + [BAD]), steps_run=None)


@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
def test_parameters_that_are_not_finite_are_not_certified(wrong):
    with pytest.raises(ValueError, match="params must be finite"):
        issue(params=PARAMS | {"b": jnp.array([0.0, wrong])})


def test_parameters_too_large_for_the_noise_are_neither_certified_nor_verified():
    large = {"w": jnp.full(3, 1e8)}  # float32 numbers there are 8 apart
    with pytest.raises(ValueError, match="noise_scale must be at least 32"):
        issue(params=large)
    record = dataclasses.asdict(issue(params={"w": jnp.ones(3)}))
    record["params_digest"] = files.params_digest(large)
    record["record_digest"] = record_digest(record)
    outcome = verify(Certificate(**record), large)
    assert not outcome
    assert "noise_scale must be at least 32" in outcome.problems[0]


REWIND = RewindToDelete(
    learning_rate=0.1,
    smoothness=1.0,
    gradient_bound=1.0,
    training_learning_rate=0.1,
    trained_steps=2,
    steps=2,
    size=100,
    deletions=1,
)
PRIVATE = DPSGD(
    clip_norm=1.0, learning_rate=0.5, steps=3, sampling_rate=1.0, batch_size=50, deletions=1
)


@pytest.mark.parametrize(
    ("mechanism", "good", "bad"),
    [
        (REWIND, (99, 1), (99, 50)),
        (REWIND, (None, None), (3, 97)),
        (PRIVATE, (None, 1), (None, 49)),
        (PRIVATE, (None, None), (50, None)),  # its number of examples is private
    ],
)
def test_sizes_that_contradict_the_mechanism_are_refused(mechanism, good, bad):
    arguments = {"mechanism": mechanism, "noise_scale": 8.0, "epsilon": None, "accountant": None}
    honest = issue(**arguments, retain_size=good[0], forget_size=good[1])
    assert verify(honest)
    with pytest.raises(ValueError):  # noqa: PT011
        issue(**arguments, retain_size=bad[0], forget_size=bad[1])
    record = dataclasses.asdict(honest) | {"retain_size": bad[0], "forget_size": bad[1]}
    record["record_digest"] = record_digest(record)
    assert not verify(Certificate(**record))


def test_numpy_scalars_become_numbers(tmp_path):
    m = dataclasses.replace(MECHANISM, init_radius=np.float32(1), steps=np.int64(9))
    c = issue(
        mechanism=m,
        noise_scale=np.float32(6),
        delta=np.float64(1e-5),
        epsilon=None,
        steps_run=np.int64(9),
        retain_size=np.int32(9),
        forget_size=np.int64(1),
        finetune_steps=np.uint8(2),
    )
    c.save(tmp_path / "c.json")
    assert verify(Certificate.load(tmp_path / "c.json"))


def test_coupling_is_not_claimed_where_epsilon_is_in_the_hundreds():
    claim = {"noise_scale": 0.01, "epsilon": None, "accountant": "coupling"}
    with pytest.raises(ValueError, match="accountant must be another than coupling"):
        issue(**claim)
    # A run that was calibrated within that, and stopped where it was not yet.
    long = dataclasses.replace(MECHANISM, learning_rate=0.02, weight_decay=0.5, steps=400)
    sigma = accounting.mu(long, noise_scale=1.0) / 19.0
    assert accounting.mu(long.first(2), noise_scale=sigma) > 20
    early = issue(mechanism=long, **claim | {"noise_scale": sigma}, steps_run=2)
    assert early.accountant == "interpolation"
    assert verify(early)


def test_frozen_paths_in_any_script_but_not_of_any_kind(tmp_path):
    params = {"w": jnp.ones(2), "größe/权重": jnp.ones(3)}
    c = issue(params=params, frozen=["größe/权重", "größe/权重"])  # named twice, counted once
    assert c.coverage["frozen_parameters"] == 3
    c.save(tmp_path / "c.json")
    outcome = verify(Certificate.load(tmp_path / "c.json"), params)
    assert outcome
    assert outcome.summary.isascii()
    for path in ("a\nb", "a\u202eb", "x" * 3000):
        with pytest.raises(ValueError, match="coverage must hold lines of printable text"):
            issue(params={"w": jnp.ones(2), path: jnp.ones(3)}, frozen=[path])
    assert issue(frozen=(name for name in ["b"])).coverage["frozen"] == ["b"]
    for wrong in ("b", [3], [None, "b"], {"b": True, "w": False}, 3):
        with pytest.raises(TypeError, match="frozen must be a list of paths"):
            issue(frozen=wrong)


def steady(steps, learning_rate=0.1):
    return dataclasses.replace(MECHANISM, learning_rate=learning_rate, steps=steps)


@pytest.mark.parametrize(
    ("mechanism", "scale", "frozen", "words"),
    [
        (steady(2_000_000), 1.0, [], "from 1 to 1000000 steps"),
        (steady(50_000, np.linspace(0.1, 0.2, 50_000)), 1.0, [], "at most 1000000 bytes"),
        (steady(9), 1.0, ["x" * 90 + str(i) for i in range(20_000)], "at most 1000000 bytes"),
        (steady(9), 1e80, [], "between 1e-300 and 1e\\+60"),
        (dataclasses.replace(MECHANISM, clip_norm=1e70), 1.0, [], "between 1e-300 and 1e\\+60"),
        (dataclasses.replace(PRIVATE, deletions=20_000), 1.0, [], "deletions must be at most"),
    ],
)
def test_what_cannot_be_certified_is_known_before_the_run(mechanism, scale, frozen, words):
    with pytest.raises(ValueError, match=words):
        issuing.check_plan(mechanism, scale, frozen, None)
    issuing.check_plan(MECHANISM, SIGMA, [], None)


def test_unlearn_refuses_before_the_first_step_what_cannot_be_certified():
    def loss(params, batch):
        return jnp.mean((batch - params) ** 2)

    retain = jnp.ones((4, 2))
    rates = np.linspace(0.1, 0.2, 50_000)
    with pytest.raises(ValueError, match="no such run can be certified"):
        unlearn(loss, jnp.zeros(2), retain, steady(50_000, rates), noise_scale=90.0, **LOOP)


LOOP = {"delta": 1e-5, "batch_size": 2, "progress": False, "accountant": "interpolation"}
