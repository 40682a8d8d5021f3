"""`unlearn` and `certify` with `Retraining`: from the public start, on retain data, recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_helpers import BATCH, DATA, PARAMS, SIZE, arguments, loss_fn, same

import certunlearn as cu
from certunlearn._numerics import batches, random_keys

START = {"w": jnp.array([0.1, 0.2, -0.3]), "b": jnp.array(-0.5)}
STEPS = 7
TRAINING = (optax.adam(1e-2), STEPS)


def run(params=PARAMS, key=7, **changes):
    given = {
        "center": START,
        "finetune": TRAINING,
        "batch_size": BATCH,
        "progress": False,
        "key": None if key is None else jax.random.key(key),
    }
    return cu.unlearn(loss_fn, params, DATA, cu.Retraining(), **arguments(**(given | changes)))


def by_hand(start, key=7):
    """The same training, written out."""
    order_key, optimizer = random_keys.split_key(jax.random.key(key)).finetune, TRAINING[0]
    params, state = start, optimizer.init(start)
    for step in range(STEPS):
        epoch, position = divmod(step, SIZE // BATCH)
        order = batches.epoch_order(order_key, epoch, SIZE)
        rows = order[position * BATCH : (position + 1) * BATCH]
        batch = jax.tree.map(lambda x, rows=rows: x[rows], DATA)
        updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_it_trains_from_the_centre_on_retain_data_and_certifies_it():
    result = run()
    expected = by_hand(START)
    for name in START:
        np.testing.assert_allclose(result.params[name], expected[name], rtol=1e-5)
    certificate = result.certificate
    verified = cu.verify(certificate, result.params)
    assert verified, verified.problems
    assert certificate.epsilon == certificate.delta == certificate.noise_scale == 0
    assert certificate.mu == certificate.total_variation == certificate.steps_run == 0
    assert certificate.accountant == "exact"
    assert certificate.finetune_steps == STEPS
    assert certificate.retain_size == SIZE
    assert len(result.history.finetune_losses) == STEPS
    assert len(result.history.losses) == 0
    assert "trained from a public start on retain data only" in verified.summary
    assert "noise scale" not in verified.summary


def test_the_trained_parameters_never_enter():
    ours = run()
    far = jax.tree.map(lambda leaf: 1e6 * leaf + 3, PARAMS)
    assert same(run(far).params, ours.params)
    assert not same(run(center=jax.tree.map(lambda leaf: leaf + 1, START)).params, ours.params)


def test_frozen_leaves_are_the_centre_s():
    result = run(frozen={"w": False, "b": True})
    assert float(result.params["b"]) == -0.5
    assert result.certificate.coverage["frozen"] == ["b"]
    assert cu.verify(result.certificate, result.params)


def test_a_centre_of_another_precision_is_taken_in_that_of_the_parameters():
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), START)
    assert same(run(center=wide).params, run().params)


def test_zero_is_all_that_may_be_asked_for():
    result = run(delta=0.0, noise_scale=0.0)
    assert result.certificate.delta == 0
    assert run(epsilon=0.0, accountant="exact").certificate.epsilon == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"center": None}, "center must be the public start"),
        ({"finetune": None}, "finetune must be given for Retraining"),
        ({"batch_size": None}, "batch_size must be given for Retraining"),
        ({"delta": 1e-5}, "delta must be 0 or None"),
        ({"epsilon": 1.0}, "epsilon must be 0 or None"),
        ({"noise_scale": 0.1}, "noise_scale must be 0 or None"),
        ({"accountant": "interpolation"}, r"Retraining is exact without any; use 'exact'"),
        ({"per_example": True}, "needs a clip norm"),
        ({"stop_after": 1}, "stop_after, resume and before_clip must be None"),
        ({"before_clip": optax.scale(0.5)}, "stop_after, resume and before_clip must be None"),
        ({"center": {"w": START["w"]}}, "center must be structured like params"),
        ({"center": START | {"b": jnp.array(jnp.nan)}}, "center must be finite"),
        ({"solver": lambda *given: None}, "solver and gradient_allowance must be None"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        run(**changes)


def test_training_can_be_looked_at_in_private():
    result = run(evaluate=lambda params: float(params["b"]), evaluate_every=3)
    assert [step for step, _ in result.history.evaluations] == [0, 3, 6, 7]
    assert result.history.evaluations[0][1] == -0.5
    assert result.history.before_noise is None
    assert result.history.state is None


def test_an_exact_head_may_be_the_start():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(SIZE, 3)) / 4, np.arange(SIZE) % 2
    head = cu.exact.ridge(cu.exact.collect(x, y))
    result = cu.unlearn(
        lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2),
        np.full(3, 9.0, np.float32),
        (x.astype(np.float32), y.astype(np.float32)),
        cu.Retraining(),
        center=np.asarray(head),
        finetune=(optax.sgd(0.1), 2),
        batch_size=BATCH,
        progress=False,
    )
    assert np.linalg.norm(result.params - np.asarray(head)) < 0.2
    assert cu.verify(result.certificate, result.params)
    assert any("such as an exact head" in each for each in result.certificate.assumptions)


# ------------------------------------------------------------------------------ a loop of one's own


def test_a_loop_of_ones_own_is_recorded():
    params = by_hand(START)
    certificate = cu.certify(
        cu.Retraining(), params=params, finetune_steps=STEPS, retain_size=SIZE, forget_size=3
    )
    assert cu.verify(certificate, params)
    assert certificate.evidence == "word of the issuer"
    assert certificate.steps_run == 0
    again = cu.certify(cu.Retraining(), noise_scale=0, delta=0, epsilon=0, params=params)
    assert cu.verify(again, params)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": 1e-5}, "delta must be 0 or None"),
        ({"noise_scale": 1.0}, "noise_scale must be 0 or None"),
        ({"noise_scale": [0.0]}, "noise_scale must be one real number"),
        ({"epsilon": 0.5}, "epsilon must be 0 or None"),
        ({"accountant": "coupling"}, "use 'exact'"),
        ({"steps_run": 1}, "state and steps_run must be None"),
        ({"steps_run": True}, "state and steps_run must be None"),
        ({"state": {"a": jnp.zeros(3)}}, "state and steps_run must be None"),
        ({"params": {"w": np.array([np.nan], np.float32)}}, "finite"),
    ],
)
def test_a_record_of_retraining_claims_nothing_else(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        cu.certify(cu.Retraining(), **({"params": START} | changes))


def test_noisy_mechanisms_still_need_noise_and_delta():
    clipping = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=2)
    given = {"params": START, "steps_run": 2}
    with pytest.raises(TypeError, match="delta must be one real number for Grad"):
        cu.certify(clipping, noise_scale=1.0, **given)
    with pytest.raises(TypeError, match="noise_scale must be given for GradientClipping"):
        cu.certify(clipping, delta=1e-5, **given)
    for noise, delta in ((0.0, 1e-5), (1.0, 0.0)):
        with pytest.raises(ValueError, match="must be"):
            cu.certify(clipping, noise_scale=noise, delta=delta, **given)
    with pytest.raises(TypeError, match="delta must be one real number"):
        cu.unlearn(loss_fn, PARAMS, DATA, clipping, noise_scale=1.0, batch_size=BATCH)


def test_no_optimizer_adds_noise_for_it():
    with pytest.raises(ValueError, match="mechanism must have noisy steps, got Retraining"):
        cu.noisy_sgd(cu.Retraining(), 0.0, key=jax.random.key(0))
