"""Runs on eight devices do what runs on one do, and move no more than training does.

`devices_script.py` runs in processes of its own, one for each kind of axes.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from process_helpers import kept_programs

SCRIPT = pathlib.Path(__file__).parents[1] / "devices_script.py"
WAYS = {"per example", "microbatches", "accumulated", "frozen"}
WAYS |= {"copied parameters", "copied batches", "samples"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["auto", "explicit"])
def seen(request):
    env = (
        os.environ
        | kept_programs()
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(SCRIPT.parent.parent),
        }
    )
    command = [sys.executable, SCRIPT, request.param, "own_loop,unlearn,other_ways,refused"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) | {"kind": request.param}


def numbers(collective):
    """How many numbers a collective moves."""
    shapes = re.findall(r"\w+\[([\d,]*)\]", collective)
    total = 0
    for shape in shapes:
        count = 1
        for length in filter(None, shape.split(",")):
            count *= int(length)
        total += count
    return total


def test_a_noisy_step_sends_single_numbers_more_than_a_plain_one(seen):
    noisy, plain = (list(seen["own_loop"][name]) for name in ("noisy", "plain"))
    assert any("all-gather" in collective for collective in plain)  # FSDP's own
    for collective in plain:
        assert collective in noisy
        noisy.remove(collective)
    assert noisy  # the norm must be that of all pieces
    assert all(each.startswith("all-reduce") and numbers(each) <= 16 for each in noisy), noisy


def test_the_own_loop_is_that_of_one_device(seen):
    found = seen["own_loop"]
    assert found["start kept"]
    assert found["kept"]
    assert found["noise differs by"] == 0
    assert found["clip differs by"] <= 1e-6
    assert found["differs by"] <= 1e-6


@pytest.mark.parametrize("run", ["arrays", "resumed", "stream"])
def test_unlearn_is_that_of_one_device(seen, run):
    assert seen["unlearn"][run]["kept"]
    assert seen["unlearn"][run]["verified"]
    assert seen["unlearn"][run]["differs by"] <= 1e-5


def test_later_runs_compile_no_step(seen):
    assert seen["unlearn"]["compiled anew"] == 0


@pytest.mark.parametrize("way", sorted(WAYS))
def test_other_ways_are_those_of_one_device(seen, way):
    found = seen["other_ways"]
    assert set(found) == WAYS
    assert found[way]["verified"]
    assert found[way]["differs by"] <= 1e-5
    copied = {"copied parameters"}
    if seen["kind"] == "explicit":
        copied |= {"per example", "microbatches", "samples"}  # whose parameters are copied there
    assert found[way]["kept"] is (way not in copied)


def test_what_cannot_be_divided_is_refused(seen):
    assert "batch_size must be such" in seen["refused"]["size"]
    assert "the same devices" in seen["refused"]["devices"]
