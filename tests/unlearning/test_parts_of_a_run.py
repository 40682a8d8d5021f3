"""The four parts of `unlearn`, called one by one, and what each refuses."""

import dataclasses
import inspect
import pickle

import jax
import numpy as np
import optax
import pytest
from loop_helpers import BATCH, DATA, MECHANISM, PARAMS, loss_fn, run, same

import certunlearn as cu
from certunlearn import unlearning
from certunlearn.unlearning import compiled_steps

TUNED = {"finetune": cu.Finetune(optax.sgd(0.05), 3)}
WATCHED = {"evaluate": lambda params: float(params["b"]), "evaluate_every": 2}


def prepare(key=7, finetune=None, **rarer):
    return unlearning.prepare(
        loss_fn,
        PARAMS,
        DATA,
        MECHANISM,
        noise_scale=1.0,
        delta=1e-5,
        batch_size=BATCH,
        key=None if key is None else jax.random.key(key),
        finetune=finetune,
        accountant="interpolation",
        options=cu.Options(**rarer),
        progress=False,
    )


@pytest.fixture(scope="module")
def whole():
    """By `unlearn`."""
    return run(**TUNED, **WATCHED, forget_size=2)


@pytest.fixture(scope="module")
def parts():
    """By hand: what was prepared, its noisy steps and its fine-tuning."""
    prepared = prepare(**TUNED, **WATCHED, forget_size=2)
    noisy = unlearning.run_noisy_steps(prepared)
    return prepared, noisy, unlearning.run_finetuning(prepared, noisy)


@pytest.fixture(scope="module")
def other():
    """The noisy steps of another run, with a key of its own."""
    prepared = prepare(key=8)
    return prepared, unlearning.run_noisy_steps(prepared)


def test_the_parts_are_the_whole(parts, whole):
    result = unlearning.release(*parts)
    assert same(result.params, whole.params)
    made = {"created", "record_digest"}
    mine, theirs = (dataclasses.asdict(each.certificate) for each in (result, whole))
    for name in mine.keys() - made:
        assert mine[name] == theirs[name], name
    assert cu.verify(result.certificate, result.params)
    assert result.history.evaluations == whole.history.evaluations
    assert [step for step, _ in result.history.evaluations] == [0, 2, 4, 6, 8, 9]
    for name in ("losses", "clip_fractions", "finetune_losses"):
        np.testing.assert_array_equal(
            getattr(result.history, name), getattr(whole.history, name), strict=True
        )
    assert result.history.state is whole.history.state is None


def test_a_release_without_the_fine_tuning_can_be_resumed(parts, whole):
    prepared, noisy, _ = parts
    early = unlearning.release(prepared, noisy)
    assert early.certificate.finetune_steps == 0
    assert early.certificate.epsilon == whole.certificate.epsilon
    assert same(early.params, prepared.split.merge(noisy.carry[0]))
    assert cu.verify(early.certificate, early.params)
    later = run(**TUNED, resume=early.history.state)
    assert same(later.params, whole.params)


def test_what_was_prepared_is_run_once(parts):
    with pytest.raises(RuntimeError, match="prepared was run already, and its noise is used up"):
        unlearning.run_noisy_steps(parts[0])


def test_a_run_that_failed_is_not_run_again():
    calls = iter(range(2))
    prepared = prepare(evaluate=lambda params: 1 // (1 - next(calls)), evaluate_every=1)
    with pytest.raises(unlearning.UnlearningFailed):
        unlearning.run_noisy_steps(prepared)
    with pytest.raises(RuntimeError, match="prepare another run"):
        unlearning.run_noisy_steps(prepared)


def test_parts_of_different_runs_do_not_mix(parts, other):
    prepared, noisy, finetuned = parts
    with pytest.raises(ValueError, match="noisy must come from the run of this prepared"):
        unlearning.run_finetuning(prepared, other[1])
    with pytest.raises(ValueError, match="noisy must come from the run of this prepared"):
        unlearning.release(prepared, other[1])
    with pytest.raises(ValueError, match="finetuned must come from the run of this prepared"):
        unlearning.release(*other, finetuned)
    with pytest.raises(ValueError, match="noisy must come from"):
        unlearning.release(other[0], noisy, finetuned)


@pytest.mark.parametrize("step", [5, 7])
def test_only_the_steps_that_the_state_has_counted_are_certified(parts, step):
    prepared, noisy, _ = parts
    claimed = dataclasses.replace(noisy, step=step)
    with pytest.raises(unlearning.UnlearningFailed, match="has counted 6 noisy steps"):
        unlearning.release(prepared, claimed)


def test_a_stopped_run_is_certified_for_what_was_run():
    prepared = prepare(**TUNED, stop_after=4)
    noisy = unlearning.run_noisy_steps(prepared)
    finetuned = unlearning.run_finetuning(prepared, noisy)
    assert finetuned.losses == []
    result = unlearning.release(prepared, noisy, finetuned)
    assert result.certificate.steps_run == 4
    truth = cu.epsilon(MECHANISM.first(4), noise_scale=1.0, delta=1e-5, accountant="interpolation")
    assert result.certificate.epsilon == pytest.approx(truth)
    assert result.history.state.step == 4


def test_interrupts_and_progress_are_the_callers(parts, monkeypatch):
    monkeypatch.setattr(compiled_steps, "longest_call", lambda params, convolutions: 1)
    prepared = prepare(**TUNED)
    counted = []
    with pytest.warns(UserWarning, match="stopped after 2 of 6"):
        noisy = unlearning.run_noisy_steps(
            prepared, interrupted=lambda: sum(counted) >= 2, advance=counted.append
        )
    assert noisy.step == sum(counted) == 2
    prepared, noisy, _ = parts
    counted.clear()
    with pytest.warns(UserWarning, match="2 of 3 fine-tuning steps"):
        finetuned = unlearning.run_finetuning(
            prepared, noisy, interrupted=lambda: sum(counted) >= 2, advance=counted.append
        )
    assert len(finetuned.losses) == 2


def test_nothing_secret_shows(parts):
    prepared, noisy, finetuned = parts
    assert repr(prepared) == "Prepared(GradientClipping, steps 0 to 6, <private>)"
    assert repr(noisy) == "Noisy(step=6, <private>)"
    assert repr(finetuned) == "Finetuned(steps=3, <private>)"
    assert "array" not in repr(prepared.examples)
    state = unlearning.release(prepared, noisy).history.state
    assert "UnlearningState(step=6, <private>)" in repr(cu.Options(resume=state))
    assert "array" not in repr(cu.Options(resume=state))


def test_unlearn_has_few_parameters():
    names = list(inspect.signature(cu.unlearn).parameters)
    assert len(names) == 14
    assert names == list(inspect.signature(unlearning.prepare).parameters)
    kept = set(names) | {field.name for field in dataclasses.fields(cu.Options)}
    assert not {"finetune_loss_fn", "loss_fns"} & kept


def test_options_are_checked_when_they_are_made_and_stay():
    for changes, kind, words in (
        ({"per_example": 1}, TypeError, "per_example must be True or False, got 1"),
        ({"microbatch_size": 0}, ValueError, "microbatch_size must be at least 1"),
        ({"microbatch_size": 2.5}, TypeError, "microbatch_size must be a whole number"),
        ({"before_clip": optax.sgd}, TypeError, "before_clip must be an Optax transform"),
        ({"forget_size": -1}, ValueError, "forget_size must be at least 0"),
        ({"recompute_state": {}}, TypeError, "recompute_state must be a function"),
        ({"stop_after": 0}, ValueError, "stop_after must be at least 1"),
        ({"resume": "a.private.npz"}, TypeError, r"resume must .*load_state"),
        ({"evaluate": 3}, TypeError, "evaluate must be a function"),
        ({"evaluate_every": 0}, ValueError, "evaluate_every must be at least 1"),
    ):
        with pytest.raises(kind, match=words):
            cu.Options(**changes)
    made = cu.Options(stop_after=np.int64(3), per_example=np.True_)
    assert type(made.stop_after) is int
    assert made.per_example is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.stop_after = 4


def test_a_finetune_and_a_tuple_are_the_same(whole):
    tuned = run(finetune=(TUNED["finetune"].optimizer, 3))
    assert same(tuned.params, whole.params)


def test_options_survive_a_copy():
    made = dataclasses.replace(cu.Options(stop_after=3), forget_size=2)
    assert (made.stop_after, made.forget_size) == (3, 2)
    assert pickle.loads(pickle.dumps(cu.Options(frozen={"w": True}))).frozen == {"w": True}
