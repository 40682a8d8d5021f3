"""The benchmark of deletion: what it counts, that tuning never sees the test set, a quick run."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

ROOT = Path(__file__).parents[2]
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def rows():
    from benchmarks.deletion.features import Rows

    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)).astype(np.float32) / 3
    y = np.argmax(x @ rng.normal(size=(6, 3)) + rng.normal(size=(400, 3)), axis=1)
    return Rows(x, y.astype(np.int32))


def problem(rows, start=None):
    from benchmarks.deletion import costs, solvers

    inverse = np.linalg.inv(rows.x.T @ rows.x / len(rows.x) + 1e-4 * np.eye(6))
    wanted = solvers.one_hot(rows.y, 3)
    return solvers.Problem(rows, wanted, start, costs.NOTHING, inverse.astype(np.float32))


def last(points):
    *_, (head, cost) = points
    return head, cost


def minimum(loss, rows, l2):
    """The minimiser by SciPy, from values alone."""
    wanted = np.eye(3)[rows.y]

    def value(flat):
        z = rows.x.astype(float) @ flat.reshape(6, 3)
        if loss == "squares":
            each = np.sum((z - (2 * wanted - 1)) ** 2, axis=1) / 2
        else:
            each = np.log(np.sum(np.exp(z), axis=1)) - np.sum(z * wanted, axis=1)
        return np.mean(each) + l2 / 2 * np.sum(flat**2)

    return scipy.optimize.minimize(value, np.zeros(18), options={"gtol": 1e-7}).x.reshape(6, 3)


@slow
@pytest.mark.parametrize("loss", ["squares", "softmax"])
def test_solvers_minimise_the_loss_they_are_named_after(rows, loss):
    from benchmarks.deletion import solvers

    l2 = 1e-2
    truth = minimum(loss, rows, l2)
    found = {
        "lbfgs": solvers.lbfgs(problem(rows), loss, {"share": 1, "l2": l2, "memory": 20}),
        "newton": solvers.newton(
            problem(rows), loss, {"share": 1, "l2": l2, "public": True, "inner": 10}
        ),
    }
    if loss == "squares":
        found["direct"] = solvers.direct(problem(rows), loss, {"share": 1, "l2": l2})
    for name, points in found.items():
        np.testing.assert_allclose(last(points)[0], truth, atol=2e-3, err_msg=name)


@slow
@pytest.mark.parametrize(
    "setting",
    [
        {"momentum": 0.9, "rate": 0.05},
        {"average": True, "rate": 4.0},
        {"adam": True, "rate": 0.1, "decay": 0.01},
        {"curved": True, "rate": 0.05},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_steps_lead_to_the_minimum(rows, setting):
    from benchmarks.deletion import solvers

    head, cost = last(solvers.steps(problem(rows), "squares", {"batch": 20, **setting}))
    truth = minimum("squares", rows, 0)
    assert np.linalg.norm(head - truth) < 0.25 * np.linalg.norm(truth)
    # Three passes of 20 steps, each 4 * 20 * 6 * 3 operations in its two products, and more.
    assert 3 * 20 * 4 * 20 * 18 < cost.flops < 3 * 20 * (4 * 20 * 18 + 20 * 18 + 16 * 18 + 2 * 108)


@slow
def test_class_sums_are_one_step_in_public_curvature(rows):
    from benchmarks.deletion import solvers

    given = problem(rows)
    head, cost = solvers.class_sums(given)
    wanted = 2 * np.eye(3)[rows.y] - 1
    np.testing.assert_allclose(head, given.inverse @ (rows.x.T @ wanted) / 400, rtol=1e-4)
    assert cost.flops == 400 * 6 + 2 * 36 * 3


@slow
def test_tuning_does_not_look_at_the_test_set(rows, monkeypatch):
    from benchmarks.deletion import retraining
    from benchmarks.deletion.features import Split

    monkeypatch.setattr(retraining, "FAMILIES", retraining.FAMILIES[:6])
    parts = [rows.take(np.s_[i : i + 100]) for i in (0, 100, 200)]
    split = Split(
        parts[0], parts[0].take(np.s_[:30]), parts[1], parts[2], rows.take(np.s_[300:]), 3
    )
    wrong = split._replace(test=split.test._replace(y=np.zeros(100, np.int32)))
    found = []
    for each in (split, wrong):
        public = retraining.public_knowledge(each)
        best = retraining.tune(each, public, {"some": 0.5, "more": 0.55}, every=4)["more"]
        found.append({f: (setting, reached.cost) for f, (setting, reached) in best.items()})
    assert found[0] == found[1]
    assert found[0]


@slow
def test_every_solver_has_as_many_settings():
    from benchmarks.deletion import retraining

    for family in retraining.FAMILIES:
        settings = retraining.grid(family.loss, family.solver)
        assert len({json.dumps(setting) for setting in settings}) == 36, family


@slow
def test_the_first_evaluation_that_reaches_the_target_counts(rows):
    from benchmarks.deletion import costs, retraining
    from benchmarks.deletion.features import Split

    split = Split(rows, rows, rows, rows, rows, 3)
    good = minimum("squares", rows, 1e-3)
    points = [
        (np.zeros((6, 3)), costs.Cost(1, 10)),
        (good, costs.Cost(2, 20)),
        (good, costs.Cost(3, 30)),
    ]
    target = retraining.accuracy(good, rows)
    reached = retraining.reach(lambda: iter(points), split, target, target)
    assert (reached.cost, reached.point) == (costs.Cost(2, 20), 2)
    assert reached.test_cost == costs.Cost(2, 20)
    assert retraining.reach(lambda: iter(points), split, 1.1, 1.1).cost == retraining.NEVER


@slow
def test_a_quick_run_writes_a_record_a_table_and_a_picture(tmp_path):
    command = [sys.executable, "-m", "benchmarks.deletion", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["command"] == "python -m benchmarks.deletion --quick"
    assert {"versions", "device", "python", "seeds", "plan"} <= set(record)
    (run,) = record["seeds"]
    assert run["chain"]["equal"] == run["chain"]["requests"] > 0
    table = (tmp_path / "table.md").read_text()
    for request in run["requests"]:
        rows = request["rows"]
        for name in ("exact, fast", "exact, fresh", "exact, anew"):
            assert (rows[name]["epsilon"], rows[name]["delta"]) == (0, 0)
            assert rows[name]["test"] == rows["exact, fast"]["test"]
            assert 0 < rows[name]["wall"] < math.inf
        assert 0 < rows["perturbed minimiser"]["epsilon"] <= 1
        assert {"gradient clipping", "the same run from the centre"} <= set(rows)
        assert f"### {request['kind']}, k = {request['size']}" in table
        assert all(set(found) >= {"flops", "setting"} for found in request["retraining"]["ridge"])
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_documentation_has_the_tables_numbers():
    written = (ROOT / "benchmarks" / "deletion" / "table.md").read_text()
    summary = re.search(r"(?:^\|.*\n)+", written, re.MULTILINE).group()
    assert summary in (ROOT / "docs" / "benchmarks.md").read_text()
