"""A state in Orbax's files is the state that was saved, spread over devices or not."""

import os
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from loop_helpers import run, same
from process_helpers import kept_programs

from certunlearn.unlearning import UnlearningFailed, load_state, orbax_checkpoints, save_state

TESTS = os.path.dirname(os.path.dirname(__file__))


def test_a_run_goes_on_from_what_was_saved(tmp_path):
    folder = tmp_path / "run.private"
    with orbax_checkpoints.Saver(folder) as saver:
        stopped = run(save_every=2, save_to=saver, stop_after=5)
    assert folder.stat().st_mode & 0o077 == 0
    state, expected = orbax_checkpoints.restore_state(folder), stopped.history.state
    assert state.step == 5
    assert same(state, expected)
    others = [name for name in state._fields if not name.endswith("_key") and name != "leaves"]
    assert len(others) == 4
    for name in others:
        assert getattr(state, name) == getattr(expected, name)
    assert same(run(resume=state).params, run().params)
    with pytest.warns(UserWarning, match="secret"):
        save_state(
            tmp_path / "run.private.npz", orbax_checkpoints.restore_state(folder, spread=True)
        )
    assert same(load_state(tmp_path / "run.private.npz"), expected)


def test_leaves_of_all_kinds_come_back(tmp_path):
    kinds = {
        "narrow": np.ones((2, 2), jax.numpy.bfloat16),
        "wide": np.arange(3) / 3,
        "none": np.zeros((0, 4), np.float32),
        "word": np.uint32(2**32 - 1),
        "flag": np.asarray(True),
    }
    state = run(stop_after=2).history.state._replace(leaves=tuple(map(np.asarray, kinds.values())))
    with orbax_checkpoints.Saver(tmp_path / "a.private") as saver:
        saver(state)
    found = orbax_checkpoints.restore_state(tmp_path / "a.private")
    assert same(found, state)
    assert [leaf.dtype for leaf in found.leaves] == [leaf.dtype for leaf in state.leaves]


def test_only_the_last_are_kept_and_each_can_be_had(tmp_path):
    folder = tmp_path / "run.private"
    with orbax_checkpoints.Saver(folder, keep=2) as saver:
        run(save_every=2, save_to=saver)
    assert orbax_checkpoints.restore_state(folder).step == 6
    assert orbax_checkpoints.restore_state(folder, step=4).step == 4
    with pytest.raises(FileNotFoundError, match="holds no state of step 2"):
        orbax_checkpoints.restore_state(folder, step=2)


def test_a_state_of_another_run_is_not_replaced(tmp_path):
    folder = tmp_path / "run.private"
    with orbax_checkpoints.Saver(folder) as saver:
        run(save_every=2, save_to=saver, stop_after=4)
        for key in (7, 8):  # the same run anew, and another
            with pytest.raises(UnlearningFailed, match="holds step 4 of a run already"):
                run(save_every=2, save_to=saver, key=key)
        resumed = run(save_every=2, save_to=saver, resume=orbax_checkpoints.restore_state(folder))
    assert same(resumed.params, run().params)
    assert orbax_checkpoints.restore_state(folder).step == 6


def test_what_is_private_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"must end in '\.private'"):
        orbax_checkpoints.Saver(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no folder"):
        orbax_checkpoints.restore_state(tmp_path / "run.private")
    (tmp_path / "open.private").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="for its owner only"):
        orbax_checkpoints.Saver(tmp_path / "open.private")
    (tmp_path / "empty.private").mkdir(mode=0o700)
    with pytest.raises(FileNotFoundError, match="holds no state"):
        orbax_checkpoints.restore_state(tmp_path / "empty.private")


SPREAD = """
    import os, signal, sys, threading
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    sys.path.insert(0, {tests!r})
    import jax, jax.numpy as jnp, numpy as np
    import certunlearn as cu
    from certunlearn.unlearning import orbax_checkpoints
    from loop_helpers import run, same

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = jax.device_put(jnp.arange(64.0).reshape(16, 4), place)
    data = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    loss = lambda w, batch: jnp.mean((batch @ w) ** 2)
    spread = lambda leaf: len(leaf.sharding.device_set)
    folder, task = {folder!r}, {task!r}


    def go(**changes):
        return run(params=params, data=data, loss=loss, **changes)


    if task == "run":
        saver, looks = orbax_checkpoints.Saver(folder), []

        def killed(params):
            looks.append(1)
            if len(looks) == 6:  # after step 5; the state of step 4 may be on its way
                saver.wait()
                os.kill(os.getpid(), signal.SIGKILL)

        go(save_every=2, save_to=saver, evaluate=killed, evaluate_every=1)
    else:
        whole = go()
        for how in (False, True):
            state = orbax_checkpoints.restore_state(folder, spread=how)
            assert state.step == 4
            weights = next(leaf for leaf in state.leaves if leaf.shape == (16, 4))
            assert isinstance(weights, jax.Array) == how
            assert not how or spread(weights) == 8
            for _ in range(1 + how):  # a state is not used up
                resumed = go(resume=state)
                assert same(resumed.params, whole.params)
                assert spread(resumed.params) == 8
                assert resumed.params.sharding.is_equivalent_to(whole.params.sharding, 2)
        print("as if it had never been killed")
"""


@pytest.mark.slow
def test_a_run_on_eight_devices_is_killed_and_goes_on_with_spread_arrays(tmp_path):
    def program(task):
        script = textwrap.dedent(SPREAD).format(
            tests=TESTS, folder=str(tmp_path / "run.private"), task=task
        )
        command = [sys.executable, "-W", "ignore", "-c", script]
        environment = os.environ | kept_programs()
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = program("run")
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = program("resume")
    assert "as if it had never been killed" in done.stdout, done.stderr
