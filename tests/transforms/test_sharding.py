"""Eight devices: one clip, independent noise for pieces, equal noise for copies, no leaf gathered.

All is run once, in a process of its own that is given eight devices: `sharding_script.py`.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "sharding_script.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen():
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(SCRIPT.parent.parent),
    }
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_pieces_have_independent_noise(seen):
    for name in ("noise", "noise on a constant", "noise alone", "noise on a grid"):
        assert seen["pieces"][name] == 0, name


def test_pieces_are_clipped_as_one(seen):
    pieces = seen["pieces"]
    assert 0.0999 < pieces["clip"] <= 0.1 + 1e-6  # the noise is 1e-9
    assert pieces["clip of a NaN"] < 1e-6
    assert 0.9999 < pieces["joint clip"] <= 1
    assert 1.9999 < pieces["clip_params"] <= 2
    assert 0.4999 < pieces["project_onto_ball"] <= 0.5


def test_copies_stay_in_step(seen):
    assert seen["copies"] == {"pmap": True, "named pmap": True, "shard_map": True}


def test_what_is_not_tracked_is_refused(seen):
    assert len(seen["unchecked"]) == 6
    for name, message in seen["unchecked"].items():
        assert "check_vma must be True" in message, name


def test_sharded_arrays_have_the_noise_of_one_device_and_are_not_gathered(seen):
    sharded = seen["sharded"]
    assert sharded["noise"] == [True, True]
    assert sharded["gathers"] == []
    assert all(0.9999 < norm <= 1 for norm in sharded["clip"])


def test_examples_on_several_devices_are_not_clipped_together(seen):
    assert "batch must be the same on all devices" in seen["examples"]["gradient"]
    assert "features must be the same on all devices" in seen["examples"]["features"]
    assert "inputs must be the same on all devices" in seen["examples"]["scales"]


def test_sharded_parameters_that_cannot_carry_the_noise_have_none(seen):
    assert all(seen["swallowed"]["jit"])
    assert all(seen["swallowed"]["pieces"])


def test_explicit_axes_are_kept(seen):
    assert seen["explicit"]["kept"]
    assert 0.9999 < seen["explicit"]["clip"] <= 1


def test_noise_is_worked_out_where_it_is(seen):
    assert len(seen["everywhere"]) == 12
    for place, noise in seen["everywhere"].items():
        assert noise == {"equal": True, "kept": True, "moves": []}, place
