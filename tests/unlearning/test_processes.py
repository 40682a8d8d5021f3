"""Two processes with two devices each run what one process with four devices runs.

`processes_script.py` is started for each process, and says what it came to.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from process_helpers import kept_programs

import certunlearn as cu

SCRIPT = pathlib.Path(__file__).parents[1] / "processes_script.py"
pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(number, count, port, folder, task="report"):
    env = (
        os.environ
        | kept_programs()
        | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(SCRIPT.parent.parent),
        }
    )
    command = [sys.executable, SCRIPT, str(number), str(count), str(port), str(folder), task]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def finished(processes):
    try:
        said = [process.communicate(timeout=500)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-3000:]


def killed_when_ready(processes, folder, way):
    """Kills both processes once each is dead or ready; their exit codes, and what they said."""
    try:
        for number, process in enumerate(processes):
            while process.poll() is None and not (folder / f"{way}-{number}").exists():
                time.sleep(0.1)  # there is an end to it: the process waits for a limited time
    finally:
        for process in processes:
            process.kill()
    said = [process.communicate()[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of what the processes report; the two have then been killed while they ran on."""
    folder, port = tmp_path_factory.mktemp("processes"), free_port()
    alone = start(0, 1, port, folder)
    both = [start(number, 2, port, folder) for number in (0, 1)]
    codes, said = killed_when_ready(both, folder, "killed")
    finished([alone])
    assert codes == [-signal.SIGKILL] * 2, said
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return [json.loads((folder / f"2-{number} report.json").read_text()) for number in (0, 1)]


@pytest.fixture(scope="module")
def alone(folder):
    return json.loads((folder / "1-0 report.json").read_text())


@pytest.mark.parametrize("run", ["own loop", "unlearn", "drawn keys", "resumed"])
def test_all_processes_have_one_certificate(seen, run):
    assert seen[0][run] == seen[1][run]
    assert json.loads(seen[0][run])["steps_run"] == 3


def test_it_verifies_and_sharding_is_kept(seen, alone):
    for report in (*seen, alone):
        assert report["verified"] == [True] * 3
        assert report["kept"] == ["data"]


def test_the_model_is_that_of_one_process(seen, alone, folder):
    two, one = (cu.certificates.load_params(folder / f"{count}.npz") for count in (2, 1))
    assert cu.certificates.params_digest(two) == json.loads(seen[0]["unlearn"])["params_digest"]
    for name in ("w", "b"):  # sums over processes are rounded in another order
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)
    np.testing.assert_allclose(seen[0]["losses"], alone["losses"], rtol=1e-5)


def test_a_resumed_run_is_the_whole_run(seen):
    digests = [json.loads(seen[0][run])["params_digest"] for run in ("unlearn", "resumed")]
    assert digests[0] == digests[1]


def test_keys_that_nobody_gave_are_those_of_the_first(seen):
    # Had each process its own, copies of the bias would differ, and so would digests.
    assert json.loads(seen[0]["drawn keys"])["key_source"].startswith("64 bits")


def test_what_would_part_the_processes_is_refused(seen):
    for report in seen:
        assert "must be the same on all processes" in report["other keys"]
        assert "save_to must be a function" in report["saves to a file"]
        assert "orbax_checkpoints.Saver" in report["one file of pieces"]


@pytest.fixture(scope="module")
def gone_on(folder):
    """What two fresh processes came to, after two that were killed and two of which one died."""
    port = free_port()
    torn = [start(number, 2, port, folder, "torn") for number in (0, 1)]
    codes, said = killed_when_ready(torn, folder, "torn")
    assert codes[1] == -signal.SIGKILL, said  # the other may have noticed that one is dead
    port = free_port()
    finished([start(number, 2, port, folder, "go on") for number in (0, 1)])
    return [json.loads((folder / f"2-{number} go on.json").read_text()) for number in (0, 1)]


@pytest.mark.parametrize(("way", "steps"), [("killed", {2}), ("torn", {1, 2})])
def test_both_are_killed_and_two_fresh_ones_go_on_from_their_pieces(gone_on, way, steps):
    for report in gone_on:
        found = report[way]
        assert found["step"] in steps
        assert found["resumed, True"] == found["resumed, False"] == report["whole"]
        assert all(found["in pieces, True"])
        assert not any(found["in pieces, False"])
        assert "holds step 3 of a run already" in found["refused"]
        assert found["last"] == 3


def test_a_run_on_local_devices_asks_no_other_process(seen):
    assert seen[0]["local"] != seen[1]["local"]  # they had different keys
