"""A run whose process is killed goes on from its last save, to the same parameters."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from loop_helpers import DATA, run, same
from process_helpers import kept_programs

import certunlearn as cu
from certunlearn.unlearning import UnlearningFailed, load_state

TUNED = {"finetune": (optax.sgd(0.1), 4)}


class Killed(BaseException):
    """Ends a run at once, and is caught by nothing in between."""


def looked(seen, kill_at=None):
    """An evaluation that keeps what it sees, and ends the run."""

    def evaluate(params):
        seen.append(jax.tree.map(np.asarray, params))
        if len(seen) - 1 == kill_at:
            raise Killed

    return {"evaluate": evaluate, "evaluate_every": 1}


@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_steps_after_the_last_save_are_taken_again_with_the_same_noise(every, tmp_path):
    path = tmp_path / "run.private.npz"
    saves = {"save_every": every, "save_to": path}
    first, again = [], []
    with pytest.raises(Killed):
        run(**saves, **TUNED, **looked(first, kill_at=5))
    state = load_state(path)
    assert state.step == 5 - 5 % every
    resumed = run(resume=state, **saves, **TUNED, **looked(again))
    whole = run(**TUNED)
    assert same(resumed.params, whole.params)
    # After each step that was taken twice the parameters are the same: same noise, same gradient.
    # The first look is before any step; a resumed run looks after each of its own.
    assert same(again[: 5 - state.step], first[state.step + 1 :])
    assert load_state(path).step == 6


def test_saving_changes_nothing_of_the_run(tmp_path):
    path = tmp_path / "run.private.npz"
    saved = run(save_every=2, save_to=str(path), **TUNED)
    assert same(saved.params, run(**TUNED).params)
    assert path.stat().st_mode & 0o077 == 0
    # What follows the noisy steps can be taken again, too.
    assert same(run(resume=load_state(path), **TUNED).params, saved.params)


def test_a_state_of_another_run_is_not_overwritten(tmp_path):
    path = tmp_path / "run.private.npz"
    run(stop_after=2, save_every=2, save_to=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"is there already, .*load_state"):
        run(save_every=2, save_to=path)
    assert path.read_bytes() == before
    other = {name: value + 1 for name, value in DATA.items()}
    with pytest.raises(ValueError, match="another plan: retain_data"):
        run(data=other, resume=load_state(path), save_every=2, save_to=path)
    assert path.read_bytes() == before


def test_a_save_that_fails_loses_no_work(tmp_path):
    def full(state):
        raise OSError("no space left")

    with pytest.raises(UnlearningFailed, match="no space left") as caught:
        run(save_every=2, save_to=full)
    assert caught.value.state.step == 2
    with pytest.raises(UnlearningFailed, match="no folder"):
        run(save_every=2, save_to=tmp_path / "nowhere" / "run.private.npz")


def test_a_function_may_keep_the_states_it_gets():
    kept = []
    whole = run(save_every=2, save_to=kept.append)
    assert [state.step for state in kept] == [2, 4, 6]
    for state in kept[:2]:
        assert all(isinstance(leaf, jax.Array) for leaf in state.leaves)
        assert same(run(resume=state).params, whole.params)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"save_every": 2}, ValueError, "save_every and save_to must be given together"),
        ({"save_to": "a.private.npz"}, ValueError, "must be given together"),
        ({"save_every": 0, "save_to": "a.private.npz"}, ValueError, "save_every must be"),
        ({"save_every": 2, "save_to": "a.npz"}, ValueError, "must end in '.private.npz'"),
        ({"save_every": 2, "save_to": 3}, TypeError, "save_to must be a function, a path"),
        ({"prefetch": -1}, ValueError, "prefetch must be"),
    ],
)
def test_odd_options_of_saving_are_named(options, error, words):
    with pytest.raises(error, match=words):
        cu.Options(**options)


def test_a_run_that_solves_saves_nothing_that_was_not_noised():
    kept = []
    x = np.random.default_rng(0).normal(size=(60, 3)) / 4
    loss = cu.convex.logistic_regression(4.0, 0.1)
    run(
        cu.PerturbedMinimizer(gradient_norm=1e-6, strong_convexity=0.1),
        loss.init(3),
        (x, (x[:, 0] > 0).astype(np.int32)),
        loss,
        noise_scale=1e-3,
        batch_size=None,
        save_every=1,
        save_to=kept.append,
    )
    assert [state.step for state in kept] == [1]


# ------------------------------------------------------------------------------ kill -9

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import loop_helpers
from certunlearn._numerics import files

point, step = {point!r}, {step!r}
die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
calls, replace = [], os.replace


def evaluate(params):
    calls.append(1)
    if point == "between steps" and len(calls) == step + 1:
        die()


def replaced(*args):
    calls.append(1)
    if point == "before the file is there" and len(calls) == step // {every}:
        die()
    replace(*args)
    if point == "after it is there" and len(calls) == step // {every}:
        die()


options = dict(save_every={every}, save_to={path!r})
if point == "between steps":
    options |= dict(evaluate=evaluate, evaluate_every=1)
else:
    files.os.replace = replaced
loop_helpers.run(**options)
raise SystemExit("it lived")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "step", "every", "saved"),
    [
        ("between steps", 5, 2, 4),
        ("between steps", 1, 2, None),
        ("before the file is there", 4, 2, 2),
        ("after it is there", 4, 2, 4),
    ],
)
def test_kill_minus_nine_at_any_point_loses_only_the_steps_since_the_last_save(
    point, step, every, saved, tmp_path
):
    path = tmp_path / "run.private.npz"
    script = KILLED.format(
        tests=os.path.dirname(os.path.dirname(__file__)),
        point=point,
        step=step,
        every=every,
        path=str(path),
    )
    command, environment = [sys.executable, "-c", script], os.environ | kept_programs()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if saved is None:
        assert not path.exists()
        return
    state = load_state(path)
    assert state.step == saved
    seen = []
    resumed = run(
        resume=state, save_every=every, save_to=path, evaluate=seen.append, evaluate_every=1
    )
    assert len(seen) == 6 - saved
    assert same(resumed.params, run().params)
    assert cu.verify(resumed.certificate, resumed.params)
    # The next save has removed what the killed process left of an unfinished file.
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
