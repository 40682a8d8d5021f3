"""Exact sums on disk: the same afterwards, private, whole at any moment, checked when read."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sums_helpers import features, labels, same_sums

from certunlearn import sums
from certunlearn._numerics import archives

CASES = {
    "labels": (labels(), {}),
    "weights": (labels(), {"class_weights": (3, 255, 1), "index": False}),
    "regression": (features(60, 1, 2)[:, 0], {}),
    "outputs": (features(60, 2, 3), {"bits": 7, "index": False}),
}


def collected(case):
    targets, options = CASES[case]
    return sums.collect(features(), targets, feature_norm=2.0, **options)


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_was_written(tmp_path, case):
    stats, path = collected(case), tmp_path / "sums.private.npz"
    sums.save(path, stats)
    read = sums.load(str(path))
    assert same_sums(read, stats)
    assert sums.digest(read) == sums.digest(stats)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    x, y = features()[:9], CASES[case][0][:9]
    assert same_sums(sums.remove(read, x, y), sums.remove(stats, x, y))
    if stats.index is not None:
        assert same_sums(sums.merge(read, sums.remove(stats, features(), CASES[case][0])), stats)
        with pytest.raises(ValueError, match="row 0"):
            sums.remove(sums.remove(read, x, y), x, y)
    else:
        assert read.index is None
    nothing = sums.remove(stats, features(), CASES[case][0])
    sums.save(path, nothing)
    assert same_sums(sums.load(path), nothing)


def test_names_must_say_that_the_file_is_private(tmp_path):
    stats = collected("labels")
    for name in ("sums.npz", "private.npz.bak", "sums.private.json"):
        with pytest.raises(ValueError, match=r"path must end in '\.private\.npz'"):
            sums.save(tmp_path / name, stats)
    for wrong in (3, None, b"a.private.npz"):
        with pytest.raises(TypeError, match="path must be a string"):
            sums.save(wrong, stats)
        with pytest.raises(TypeError, match="path must be a string"):
            sums.load(wrong)
    with pytest.raises(FileNotFoundError):
        sums.load(tmp_path / "absent.private.npz")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------ strangers' files


def rewritten(path, change):
    """A file of labels with an index, of which `change` has changed the arrays."""
    sums.save(path, collected("labels"))
    arrays = archives.read(path)
    change(arrays)
    with open(path, "wb") as file:
        archives.write(file, arrays)


def about(**changes):
    def change(arrays):
        text = json.loads(str(arrays["about"]))
        public = changes.get("settings", {})
        if isinstance(public, dict):
            text |= changes | {"settings": text["settings"] | public}
        else:
            text |= changes
        arrays["about"] = np.asarray(json.dumps(text))

    return change


def array(name, change):
    def changed(arrays):
        arrays[name] = change(arrays[name])

    return changed


def bump(place, by=1):
    def changed(values):
        values = values.copy()
        values[place] += by
        return values

    return changed


def dropped(name):
    return lambda arrays: arrays.pop(name)


WRONG = {
    "no about": dropped("about"),
    "about numbers": array("about", lambda a: np.ones(3)),
    "about no JSON": array("about", lambda a: np.asarray("{")),
    "about a list": array("about", lambda a: np.asarray("[1]")),
    "about deep": array("about", lambda a: np.asarray("[" * 100_000)),
    "another format": about(format="certunlearn exact sums 2"),
    "more entries": about(more=1),
    "rows no number": about(rows="60"),
    "rows a bool": about(rows=True),
    "rows negative": about(rows=-1, weight=-1),
    "rows others": about(rows=61, weight=61),
    "rows too many": about(rows=2**45, weight=2**45),
    "weight another": about(weight=61),
    "settings no dict": about(settings=[1]),
    "settings more": about(settings={"more": 1}),
    "bits out of range": about(settings={"bits": 40}),
    "bits no number": about(settings={"bits": "20"}),
    "another size": about(settings={"num_features": 6}),
    "norm infinite": about(settings={"feature_norm": float("inf")}),
    "norm huge": about(settings={"feature_norm": 10**400}),
    "other classes": about(settings={"classes": 4}),
    "regression": about(settings={"classes": None}),
    "weights text": about(settings={"class_weights": "123"}),
    "weights others": about(settings={"class_weights": [1, 2, 3]}),
    "fewer bits than the sums": about(settings={"bits": 10}),
    "no gram": dropped("gram_high"),
    "no cross": dropped("cross_low"),
    "no counts": dropped("class_counts"),
    "no salt": dropped("salt"),
    "no index": dropped("index_counts"),
    "no index halves": dropped("index_high"),
    "more arrays": lambda arrays: arrays.update(more=np.ones(3)),
    "gram floats": array("gram_high", lambda a: a.astype(np.float64)),
    "gram big-endian": array("gram_high", lambda a: a.astype(">i8")),
    "gram low of int64": array("gram_low", lambda a: a.astype(np.int64)),
    "gram cut": array("gram_low", lambda a: a[1:]),
    "gram not symmetric": array("gram_low", bump((0, 1))),
    "gram high not symmetric": array("gram_high", bump((0, 1))),
    "gram negative": array("gram_high", bump((0, 0), -(2**40))),
    "trace too large": array("gram_high", bump((0, 0), 2**20)),
    "gram too large": array("gram_high", lambda a: bump((0, 1), 2**62)(bump((1, 0), 2**62)(a))),
    "gram as low as int64": array("gram_high", lambda a: np.full_like(a, -(2**63))),
    "cross too large": array("cross_high", bump((0, 1), 2**10)),
    "counts others": array("class_counts", bump(0)),
    "counts negative": array("class_counts", lambda a: a + np.array([100, -100, 0])),
    "counts wrap": array("class_counts", lambda a: a + np.array([2**62, 2**62, 0])),
    "index unsorted": array("index_high", lambda a: a[::-1]),
    "index cut": array("index_low", lambda a: a[1:]),
    "index counts zero": array("index_counts", bump(0, -1)),
    "index counts others": array("index_counts", bump(0)),
    "index counts wrap": array("index_counts", lambda a: a + (np.arange(60) < 4) * 2**62),
    "index of two dimensions": lambda arrays: arrays.update(
        {name: arrays[name][None] for name in arrays if name.startswith("index")}
    ),
    "salt short": array("salt", lambda a: a[:5]),
    "salt of no dimension": array("salt", lambda a: a[0]),
    "salt floats": array("salt", lambda a: a.astype(np.float64)),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_cannot_be_are_value_errors(tmp_path, name):
    path = tmp_path / "sums.private.npz"
    rewritten(path, WRONG[name])
    with pytest.raises(ValueError, match=r"sums\.private\.npz' holds no exact sums"):
        sums.load(path)


def test_rewriting_alone_is_no_error(tmp_path):
    path = tmp_path / "sums.private.npz"
    rewritten(path, lambda arrays: None)
    assert same_sums(sums.load(path), collected("labels"))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 10**9), st.integers(1, 255), st.booleans())
def test_damaged_files_are_value_errors_or_the_same(tmp_path, place, flip, cut):
    path = tmp_path / "sums.private.npz"
    stats = collected("regression")
    sums.save(path, stats)
    content = bytearray(path.read_bytes())
    place %= len(content)
    if cut:
        content = content[:place]
    else:
        content[place] ^= flip
    path.write_bytes(content)
    try:
        read = sums.load(path)
    except ValueError:
        return
    assert same_sums(read, stats)


# ------------------------------------------------------------------------------ kill -9

# A copy of a process that has imported all is there at once, where a new one takes seconds.
SCRIPT = """
import os, random, signal, sys, time
import numpy as np
from certunlearn import sums

path, draw, x = sys.argv[1], random.Random(0), np.random.default_rng(0).normal(size=(60, 200))
states = [sums.collect(x[:count], np.ones(count), feature_norm=20.0) for count in (30, 60)]
digests = [sums.digest(state) for state in states]
sums.save(path, states[0])
seen = []
for _ in range(16):
    copy = os.fork()
    while copy == 0:
        for state in states:
            sums.save(path, state)
    time.sleep(0.05 + draw.random() * 0.2)
    os.kill(copy, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == -signal.SIGKILL
    seen.append(digests.index(sums.digest(sums.load(path))))
print(seen)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_the_old_sums_or_the_new(tmp_path):
    path = tmp_path / "sums.private.npz"
    command = [sys.executable, "-c", SCRIPT, str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert 1 in json.loads(done.stdout)  # they did write
    sums.save(path, sums.load(path))
    assert os.listdir(tmp_path) == ["sums.private.npz"]  # nothing is left of those killed


RESUMED = """
import os, signal, sys
import numpy as np
from certunlearn import sums
from certunlearn._numerics import archives

path, rows = sys.argv[1], 0
x, y = (np.load(name) for name in sys.argv[2:])
write = archives.write

def dying(file, arrays):
    global saves
    if saves == 0:
        file.write(b"PK half of a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    saves -= 1
    write(file, arrays)

def go_on():
    try:
        stats = sums.load(path)
    except FileNotFoundError:
        stats = sums.empty(x.shape[1], feature_norm=9.0, classes=3)
    while stats.rows < len(x):
        here = slice(stats.rows, stats.rows + 5)
        stats = sums.add(stats, x[here], y[here])
        sums.save(path, stats)

archives.write = dying
for saves in (2, 0, 1, 100):
    copy = os.fork()
    if copy == 0:
        go_on()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    assert code == (0 if saves == 100 else -signal.SIGKILL)
    rows = min(rows + 5 * saves, 40)
    assert sums.load(path).rows == rows
"""


@pytest.mark.slow
def test_a_collection_killed_again_and_again_ends_with_the_same_sums(tmp_path):
    path, x, y = tmp_path / "sums.private.npz", features(40, 30), labels(40)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    names = [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    subprocess.run([sys.executable, "-c", RESUMED, str(path), *names], check=True)
    whole = sums.collect(x, y, feature_norm=9.0)
    assert sums.digest(sums.load(path)) == sums.digest(whole)
    assert sums.remove(sums.load(path), x, y).rows == 0
