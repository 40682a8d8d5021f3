"""Whatever happens after noise was added, the run can go on, or its result is there."""

import contextlib
import os
import pickle
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_helpers import CONVEX, DATA, MECHANISM, handler, run, same

import certunlearn as cu
from certunlearn.unlearning import compiled_steps, interrupts, resuming

TUNED = {"finetune": (optax.sgd(0.05), 3)}
SLOW = pytest.mark.slow
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@pytest.fixture(scope="module")
def whole():
    return run(**TUNED)


def fails_at(call):
    """An `evaluate` that raises at one of its calls."""
    calls = iter(range(100))

    def evaluate(params):
        if next(calls) == call:
            raise RuntimeError("disk full")
        return 0.0

    return evaluate


# ------------------------------------------------------------------------------ exceptions


@pytest.mark.parametrize("step", [1, pytest.param(6, marks=SLOW), 7, pytest.param(9, marks=SLOW)])
def test_an_evaluation_that_fails_leaves_a_state_that_goes_on(whole, step):
    with pytest.raises(
        cu.unlearning.UnlearningFailed, match=f"disk full; at step {min(step, 6)}"
    ) as caught:
        run(evaluate=fails_at(step), evaluate_every=1, **TUNED)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.state.step == min(step, 6)
    assert same(run(resume=caught.value.state, **TUNED).params, whole.params)


def test_before_the_first_step_nothing_is_there_to_lose():
    with pytest.raises(RuntimeError, match="disk full") as caught:
        run(evaluate=fails_at(0))
    assert not isinstance(caught.value, cu.unlearning.UnlearningFailed)


def test_fine_tuning_that_fails_goes_on_with_another_optimizer(whole):
    def explode(grads, state, params=None):
        scale = jnp.where(state < 1, 0.05, jnp.inf)
        return jax.tree.map(lambda g: -scale * g, grads), state + 1

    diverging = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), explode)
    with pytest.raises(
        cu.unlearning.UnlearningFailed, match="not finite after 3 fine-tuning"
    ) as caught:
        run(finetune=(diverging, 3))
    assert isinstance(caught.value.__cause__, FloatingPointError)
    resumed = run(resume=caught.value.state, **TUNED)
    assert same(resumed.params, whole.params)
    assert len(resumed.history.losses) == 0
    assert resumed.history.finetune_losses.shape == (3,)
    assert resumed.certificate.steps_run == 6
    assert cu.verify(resumed.certificate, resumed.params)


def test_the_state_after_all_noisy_steps_shows_the_end_of_their_phase_again():
    with pytest.raises(cu.unlearning.UnlearningFailed) as caught:
        run(evaluate=fails_at(1), evaluate_every=6, **TUNED)
    resumed = run(resume=caught.value.state, evaluate=lambda p: 1, evaluate_every=100, **TUNED)
    assert resumed.history.evaluations == [(6, 1), (9, 1)]


@pytest.mark.slow
def test_a_failing_certificate_or_progress_bar_loses_nothing(whole, monkeypatch):
    def refuse(*args, **kwargs):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("certunlearn.certificates.issuing.certify", refuse)
        with pytest.raises(cu.unlearning.UnlearningFailed, match="MemoryError: no room") as caught:
            run(**TUNED)
    assert same(run(resume=caught.value.state, **TUNED).params, whole.params)
    with monkeypatch.context() as patch:
        patch.setattr("tqdm.tqdm.update", refuse)
        assert same(run(progress=True, **TUNED).params, whole.params)


@SLOW
def test_a_compiled_step_that_fails_without_noise_loses_nothing(whole):
    def full(count):
        if count > 0:
            raise RuntimeError("device full")
        return count

    def update(grads, state, params=None):
        count = jax.pure_callback(full, jax.ShapeDtypeStruct((), jnp.int32), state)
        return jax.tree.map(lambda g: -0.05 * g * (count >= 0), grads), state + 1

    failing = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    with pytest.raises(cu.unlearning.UnlearningFailed, match="device full") as caught:
        run(finetune=(failing, 3))
    assert same(run(resume=caught.value.state, **TUNED).params, whole.params)


def test_no_state_is_made_of_what_a_failed_step_has_overwritten():
    carry = (jnp.ones(3), jnp.zeros(()))
    assert same(resuming.snapshot(carry), carry)
    jax.jit(lambda c: jax.tree.map(lambda x: x + 1, c), donate_argnums=0)(carry)
    assert resuming.snapshot(carry) is None
    with pytest.raises(ZeroDivisionError), interrupts.carrying(lambda: None):
        1 / 0  # noqa: B018


def test_exceptions_with_a_state_show_nothing_and_can_be_pickled():
    with pytest.raises(cu.unlearning.UnlearningFailed) as caught:
        run(evaluate=fails_at(1), evaluate_every=1)
    error = caught.value
    words = [str(word) for word in np.ravel(error.state.data_key)]
    for shown in (repr(error), str(error), repr(error.state)):
        assert "array" not in shown
        assert not any(word in shown for word in words)
    copy = pickle.loads(pickle.dumps(error))
    assert copy.state.step == 1
    assert same(copy.state.leaves, error.state.leaves)


# ------------------------------------------------------------------------------ signals


def pressing(number, at, count=1):
    """An `evaluate` that sends itself a signal at one call."""
    calls = iter(range(100))

    def evaluate(params):
        if next(calls) == at:
            for _ in range(count):
                os.kill(os.getpid(), number)
        return 0.0

    return evaluate


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_a_signal_stops_between_steps_with_an_honest_certificate(number, whole):
    with handler(number, DEFAULTS[number]):
        with pytest.warns(UserWarning, match="stopped after 4 of 6"):
            result = run(evaluate=pressing(number, 2), evaluate_every=2, **TUNED)
        assert signal.getsignal(number) is DEFAULTS[number]
    assert result.certificate.steps_run == 4
    truth = cu.epsilon(MECHANISM.first(4), noise_scale=1.0, delta=1e-5, accountant="interpolation")
    assert result.certificate.epsilon == pytest.approx(truth)
    assert same(run(resume=result.history.state, **TUNED).params, whole.params)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_the_run(number):
    with (
        handler(number, DEFAULTS[number]),
        pytest.raises(KeyboardInterrupt, match="before the first step") as caught,
    ):
        run(evaluate=pressing(number, 0), evaluate_every=2)
    assert not isinstance(caught.value, cu.unlearning.UnlearningInterrupted)


@pytest.mark.parametrize(("at", "tuned"), [(6, 0), pytest.param(8, 2, marks=SLOW)])
def test_a_signal_during_fine_tuning_ends_it_and_says_so(at, tuned, whole):
    with (
        handler(signal.SIGINT, signal.default_int_handler),
        pytest.warns(UserWarning, match=f"{tuned} of 3 fine-tuning steps"),
    ):
        result = run(evaluate=pressing(signal.SIGINT, at), evaluate_every=1, **TUNED)
    assert result.certificate.finetune_steps == tuned
    assert cu.verify(result.certificate, result.params)
    assert same(run(resume=result.history.state, **TUNED).params, whole.params)


def test_a_signal_after_the_last_step_does_no_more_than_warn(whole):
    with (
        handler(signal.SIGTERM, signal.SIG_DFL),
        pytest.warns(UserWarning, match="the run was complete by then"),
    ):
        result = run(evaluate=pressing(signal.SIGTERM, 9), evaluate_every=1, **TUNED)
    assert same(result.params, whole.params)
    assert result.history.state is None


@pytest.mark.parametrize("at", [pytest.param(3, marks=SLOW), 6, pytest.param(7, marks=SLOW)])
def test_a_second_signal_interrupts_and_the_state_is_there(at, whole):
    with (
        handler(signal.SIGINT, signal.default_int_handler),
        pytest.raises(KeyboardInterrupt) as caught,
    ):
        run(evaluate=pressing(signal.SIGINT, at, count=2), evaluate_every=1, **TUNED)
    assert isinstance(caught.value, cu.unlearning.UnlearningInterrupted)
    assert same(run(resume=caught.value.state, **TUNED).params, whole.params)


def test_a_recomputation_that_is_interrupted_loses_nothing(whole):
    def slow(params, data):
        raise KeyboardInterrupt

    with pytest.raises(cu.unlearning.UnlearningInterrupted) as caught:
        run(recompute_state=slow, **TUNED)
    resumed = run(recompute_state=lambda params, data: 5, resume=caught.value.state, **TUNED)
    assert resumed.model_state == 5
    assert same(resumed.params, whole.params)


@pytest.mark.slow
def test_where_nothing_can_be_released_yet_a_signal_leaves_the_state():
    mechanism = cu.DescentToDelete(**CONVEX)
    options = {"noise_scale": 0.1}
    expected = run(mechanism, **options)
    with (
        handler(signal.SIGINT, signal.default_int_handler),
        pytest.raises(cu.unlearning.UnlearningInterrupted, match="before any noise") as caught,
    ):
        run(mechanism, evaluate=pressing(signal.SIGINT, 2), evaluate_every=1, **options)
    assert caught.value.state.step == 2
    assert same(run(mechanism, resume=caught.value.state, **options).params, expected.params)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGINT, "ignored"),
        (signal.SIGTERM, "own"),
        pytest.param(signal.SIGINT, "own", marks=SLOW),
        pytest.param(signal.SIGTERM, "ignored", marks=SLOW),
    ],
)
def test_signals_that_are_ignored_or_handled_by_the_program_stay_so(number, kind):
    seen = []
    own = signal.SIG_IGN if kind == "ignored" else (lambda *_: seen.append(1))
    with handler(number, own):
        result = run(evaluate=pressing(number, 1), evaluate_every=3)
        assert signal.getsignal(number) is own
    assert result.certificate.steps_run == 6
    assert len(seen) == (kind == "own")


def test_handlers_are_put_back_after_an_error():
    with contextlib.ExitStack() as stack:
        for number, default in DEFAULTS.items():
            stack.enter_context(handler(number, default))
        with pytest.raises(ZeroDivisionError), interrupts.deferred_interrupts():
            1 / 0  # noqa: B018
        assert {number: signal.getsignal(number) for number in DEFAULTS} == DEFAULTS


# ------------------------------------------------------------------------------ what is not finite


def poisoned(index):
    return DATA | {"x": np.where(np.arange(24)[:, None] == index, np.nan, DATA["x"])}


@pytest.mark.parametrize(
    "mechanism",
    [cu.DescentToDelete(**CONVEX), cu.ProjectedNoisySGD(**CONVEX)],
    ids=["descent", "projected"],
)
@pytest.mark.parametrize("longest", [1, 32])
@SLOW
def test_a_step_that_must_contract_cannot_be_left_out(mechanism, longest, monkeypatch):
    monkeypatch.setattr(compiled_steps, "longest_call", lambda params, convolutions: longest)
    order = np.concatenate(list(cu.batch_indices(cu.split_key(jax.random.key(7)).data, 24, 8, 3)))
    data = poisoned(order[13])  # in the second batch
    with pytest.raises(FloatingPointError, match="at step 1, batch 1 of epoch 0"):
        run(mechanism, data=data, noise_scale=0.1)
    assert run(data=data).history.nonfinite == 2


@SLOW
def test_full_batches_of_rewinding_too():
    rewind = cu.RewindToDelete(
        learning_rate=0.1,
        smoothness=1.0,
        gradient_bound=2.0,
        training_learning_rate=0.1,
        trained_steps=4,
        steps=3,
        size=26,
        deletions=2,
    )
    options = {"noise_scale": 0.1, "batch_size": 24}
    with pytest.raises(FloatingPointError, match="at step 0, batch 0 of epoch 0"):
        run(rewind, data=poisoned(3), **options)


def test_parameters_that_are_not_finite_are_never_released():
    def steep(params, batch):
        return 1e38 * jnp.sum(params["w"]) * jnp.mean(batch["x"] ** 0)

    mechanism = cu.GradientClipping(init_radius=1.0, clip_norm=1e30, learning_rate=1e9, steps=2)
    with pytest.raises(FloatingPointError, match="not finite after noisy step"):
        run(mechanism, loss=steep, noise_scale=1e29)


@pytest.mark.parametrize(("swing", "fits"), [(1.0, True), (2000.0, False)])
def test_noise_is_held_against_the_largest_parameters_of_the_run(swing, fits):
    """Parameters go far and come back: rounding on the way counts where steps must contract."""
    first, second = cu.batch_indices(cu.split_key(jax.random.key(7)).data, 24, 12, 2)
    signs = np.zeros(24, np.float32)
    signs[first], signs[second] = -swing, swing
    options = {"data": {"s": signs}, "loss": lambda p, b: jnp.mean(b["s"]) * p, "batch_size": 12}
    mechanism = cu.DescentToDelete(**CONVEX | {"steps": 2})
    options |= {"params": jnp.array(1.0), "noise_scale": 1e-4, "accountant": "interpolation"}
    refused = pytest.raises(ValueError, match="noise_scale must be at least")
    with contextlib.nullcontext() if fits else refused as caught:
        result = run(mechanism, **options)
        assert cu.verify(result.certificate, result.params)
    assert fits or not isinstance(caught.value, cu.unlearning.UnlearningFailed)


def test_noise_below_the_spacing_at_the_start_is_refused_before_any_step():
    looks = []
    with pytest.raises(ValueError, match="noise_scale must be at least"):
        run(cu.DescentToDelete(**CONVEX), noise_scale=1e-9, evaluate=looks.append)
    assert not looks
