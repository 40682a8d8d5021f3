"""The paper's figure, redone: equal compute, fair splits, resuming, and the committed record."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import certunlearn as cu

ROOT = Path(__file__).parents[2]
KEY = jax.random.key(0)
FOLDER = ROOT / "benchmarks" / "paper-figure"


@pytest.fixture
def package(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import paper_figure

    return paper_figure


@pytest.fixture
def record():
    return json.loads((FOLDER / "results.json").read_text())


def examples(size, shape, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.random((size, *shape)).astype(np.float32)
    return {"x": pixels, "y": rng.integers(0, 10, size).astype(np.int32)}


def problem(datasets, name="mnist", shape=(784,)):
    sets = [examples(size, shape) for size in (400, 50, 50)]
    return datasets.Problem(name, datasets.NETS[name], *sets)


def test_networks_have_the_paper_s_numbers_of_parameters(package):
    from benchmarks.paper_figure import datasets

    assert datasets.parameters(problem(datasets)) == 3985
    assert datasets.parameters(problem(datasets, "cifar10", (16, 16, 3))) == 20042


def test_validation_and_training_images_are_disjoint_parts_of_the_training_file(
    package, monkeypatch
):
    from benchmarks.paper_figure import datasets

    for train, kept in ((None, 80), (30, 30)):
        ours, held_out = datasets.split(100, 20, train)
        assert (len(ours), len(held_out)) == (kept, 20)
        assert not set(ours) & set(held_out)
    whole, test = examples(100, (4,)), examples(30, (4,), seed=1)
    dataset = datasets.data_lib.Dataset("mnist", whole, test)
    monkeypatch.setattr(datasets.data_lib, "mnist", lambda data_dir: dataset)
    loaded = datasets.load("mnist", None, 20, None)
    rows = [{row.tobytes() for row in part["x"]} for part in loaded[2:]]
    assert [len(each) for each in rows] == [80, 20, 30]
    assert not rows[0] & rows[1]
    assert rows[2] == {row.tobytes() for row in test["x"]}


def test_an_interrupted_call_and_a_second_one_leave_the_same_file(package, tmp_path):
    from benchmarks.paper_figure.store import Store

    plan, made = {"seeds": (1, 2)}, []

    def run(path, stop_at):
        store = Store(path, plan, {"device": "cpu"})

        def make(name):
            if name == stop_at:
                raise KeyboardInterrupt
            made.append(name)
            return {"accuracy": (0.1, 1 / 3), "name": name}

        for name in ("b", "a", "c"):
            assert store.cell(name, lambda name=name: make(name))["accuracy"] == [0.1, 1 / 3]

    run(tmp_path / "whole.json", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts.json", "c")
    run(tmp_path / "parts.json", None)
    assert made == ["b", "a", "c", "b", "a", "c"]
    assert (tmp_path / "parts.json").read_text() == (tmp_path / "whole.json").read_text()
    with pytest.raises(ValueError, match="another plan"):
        Store(tmp_path / "whole.json", {"seeds": (1,)}, {})


def test_all_methods_take_equally_many_gradients(package, monkeypatch):
    from benchmarks.paper_figure import datasets, experiment, running, scales

    counted = {"gradients": 0}

    def counting(params, state, data, indices):
        counted["gradients"] += indices.size
        return params, state

    monkeypatch.setattr(running, "_adam_step", lambda net: counting)
    monkeypatch.setattr(running, "_noisy_step", lambda net, unit: counting)
    monkeypatch.setattr(running, "_perturbed", lambda unit, inside, state: inside)
    monkeypatch.setattr(running, "_started", lambda unit, center, params, *rest: (params, ()))
    monkeypatch.setattr(running, "_noise_keys", lambda lab, *rest: lab.keys)
    monkeypatch.setattr(running, "measured", lambda lab, params, examples: np.zeros((1, 2)))
    schedule = running.Schedule(10, 3, (3, 4, 9), 1)
    places = running.batches_of(np.tile(np.arange(40), (2, 1)), jax.random.split(KEY), 10, 9)
    params = {"w": jnp.zeros((2, 3))}
    lab = running.Lab(
        problem(datasets), schedule, None, params, params, jax.random.split(KEY), places
    )
    trial = running.Trial(0.1, 0.01, 1.0)
    runs = [
        lambda: running.retrained(lab, [0.01], None),
        lambda: running.unlearned(lab, experiment.DEFAULT, [trial], None, from_center=True),
        *(
            lambda method=method: running.unlearned(lab, method, [trial], None)
            for method in scales.CERTIFIED
        ),
    ]
    for run in runs:
        counted["gradients"] = 0
        (curve,) = run()
        assert curve["gradients"] == [30, 40, 90]
        assert counted["gradients"] == 90 * 2  # of two seeds


def test_every_method_has_the_same_number_of_trials(package):
    from benchmarks.paper_figure import plans

    for plan in (plans.full(5), plans.quick(1)):
        for part in plan.parts.values():
            trials = len(part.grid.radii) * len(part.grid.rates)
            assert len(part.grid.retraining_rates) == trials


def test_noise_is_proportional_to_the_radius(package, record):
    from benchmarks.paper_figure import scales

    for method in scales.CERTIFIED:
        accountant = {"accountant": method.split(", ")[1]} if ", " in method else {}
        if accountant == {"accountant": "coupling"}:
            continue  # slow, below
        scale = record["cells"][f"scale/{method}/1"]["scale"]
        mechanism = scales.mechanism(method, 0.01)
        noise = 0.01 * scale
        found = cu.epsilon(mechanism, noise_scale=noise, delta=scales.DELTA, **accountant)
        assert found == pytest.approx(1.0, rel=1e-3)


@pytest.mark.slow
def test_the_default_s_noise_is_certified_at_every_radius(package, record):
    from benchmarks.paper_figure import experiment, scales

    scale = record["cells"][f"scale/{experiment.DEFAULT}/1"]["scale"]
    mechanism = scales.mechanism(experiment.DEFAULT, 0.01)
    found = cu.epsilon(mechanism, noise_scale=0.01 * scale, delta=scales.DELTA)
    assert 0.995 < found <= 1.0  # coupling's noise is rounded up


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient clipping, coupling", "model clipping"])
def test_unit_coordinates_are_the_mechanism_of_that_radius(package, method):
    from benchmarks.paper_figure import datasets, running, scales

    lab = running.prepare(problem(datasets), running.Schedule(10, 3, (3,), 1), [0])
    trial = running.Trial(0.1, 0.01, 0.01)
    seen = {}

    def look(lab, params, *rest):
        seen["params"] = jax.tree.map(lambda leaf: leaf[0], params)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "finished", look)
        running.unlearned(lab, method, [trial], None)
    mechanism = scales.mechanism(method, trial.radius, 3)
    center, original = (
        jax.tree.map(lambda leaf: leaf[0], each) for each in (lab.center, lab.original)
    )
    params = cu.clip_params(original, trial.radius, center)
    (key,) = running._noise_keys(lab, method, trial, False)
    scale = trial.radius * trial.unit_scale
    tx = cu.noisy_sgd(mechanism, scale, key=key, center=center)
    state = tx.init(params)
    gradient = jax.grad(lambda own, batch: running.network.mean_loss(lab.problem.net, own, batch))
    for (indices,) in lab.batches:
        batch = {name: values[indices] for name, values in lab.data.items()}
        updates, state = tx.update(gradient(params, batch), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for ours, theirs in zip(jax.tree.leaves(seen["params"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_table_and_the_pages_are_the_record(package, record):
    from benchmarks.paper_figure import experiment, numbers, report

    text = report.to_text(record)
    assert text == (FOLDER / "table.md").read_text()
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    said = " ".join(page.split())
    for sentence in (report.answer(record), report.sweep_answer(record)):
        assert sentence in said
    assert numbers.problems(record) == ["mnist", "cifar10"]
    for name in numbers.problems(record):
        assert numbers.is_finished(record, name)
        for table in (report.final_table(record, name), report.sweep_table(record, name)):
            assert table in page
    assert record["cells"]["parameters/mnist"] == 3985
    assert record["cells"]["parameters/cifar10"] == 20042
    for name, part in record["plan"]["parts"].items():
        schedule = part["schedule"]
        wanted = [each * schedule["batch_size"] for each in schedule["checkpoints"]]
        for method in experiment.METHODS:
            for epsilon in record["plan"]["epsilons"]:
                found = experiment.curve(record["cells"], name, method, epsilon)
                assert found["gradients"] == wanted
                assert {len(each) for each in found["accuracy"]} == {record["plan"]["seeds"]}


def test_standard_errors(package):
    from benchmarks.paper_figure import numbers

    assert numbers.mean_error([0.1, 0.2, 0.3]) == pytest.approx((20, 10 / 3**0.5))
    assert numbers.percent([0.5]) == "50.0"
    assert numbers.difference([0.5, 0.6], [0.4, 0.5]).sign == 1
    assert numbers.difference([0.5, 0.6], [0.6, 0.5]).sign == 0
    assert numbers.difference([0.4, 0.5], [0.5, 0.6]).sign == -1
    # Differences of 1, 2 and 3 points: a standard error of 0.577, and t = 4.303.
    assert numbers.difference([0.01, 0.02, 0.03], [0, 0, 0]).margin == pytest.approx(
        2.484, abs=1e-3
    )


@pytest.mark.slow
def test_a_small_run_resumes_and_writes_all_files(package, monkeypatch, tmp_path):
    from benchmarks.paper_figure import __main__ as command
    from benchmarks.paper_figure import datasets, plans, running, scales
    from benchmarks.paper_figure.experiment import Grid, Sweep
    from benchmarks.paper_figure.store import Store

    part = plans.Part(50, None, running.Schedule(50, 3, (3, 6), 1), Grid((0.1,), (0.01,), (0.01,)))
    plan = plans.Plan(2, (1.0,), {"mnist": part}, Sweep((0.1,), (1.0,), (1.0,), 0.1))
    monkeypatch.setattr(datasets, "load", lambda *args: problem(datasets))
    monkeypatch.setattr(scales, "unit_scale", lambda *args: {"scale": 1.0})

    def run(path):
        store = Store(path / "results.json", plan.record(), {"versions": {}, "device": "cpu"})
        store._more["processor"] = "one"
        command.run(store, plan, None)
        return json.loads((path / "results.json").read_text())

    whole = run(tmp_path / "whole")
    half = {"versions": {}, "device": "cpu", "plan": plan.record()}
    half["cells"] = dict(list(whole["cells"].items())[::2])
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "results.json").write_text(json.dumps(half))
    assert run(tmp_path / "half") == whole
    command.write(whole, tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {"results.json", "table.md", "picture.png", "radii.png"}
