"""Speed, memory and scaling: pages show the numbers measured, and columns are equal work."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

ROOT = Path(__file__).parents[2]
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def record(name):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text()


def test_pages_show_what_was_measured():
    from benchmarks.steps import tables

    speed, memory, scaling = record("speed"), record("memory"), record("scaling")
    shown = tables.shown_of_speed(speed) | {"### Memory": tables.peaks(memory)}
    assert len(shown) == 8
    shown |= tables.shown_of_gpu(record("gpu/speed"))
    assert len(shown) in (11, 12, 13)
    assert tables.renewed(page("benchmarks"), shown) == page("benchmarks")
    assert tables.renewed(page("scaling"), tables.shown_of_scaling(scaling)) == page("scaling")
    for name in ("benchmarks", "sharp-edges"):
        assert tables.range_of(speed) in " ".join(page(name).split())
    for name, written in (
        ("speed", tables.speed),
        ("gpu/speed", tables.speed),
        ("memory", tables.memory),
    ):
        assert written(record(name)) == (ROOT / "benchmarks" / f"{name}.md").read_text()
    assert tables.scaling(scaling) == (ROOT / "benchmarks" / "scaling.md").read_text()
    ours = lambda parts, what, size: next(  # noqa: E731
        row["ways"]["ours"]["seconds"]
        for row in parts
        if (row["what"], row["parameters"]) == (what, size)
    )
    words = " ".join(page("benchmarks").split())
    graphs = record("gpu/graphs")["parts"]
    small, large = (1e3 * ours(graphs, "step", size) for size in (10**4, 10**7))
    assert f"10,000 parameters took {small:.2f} ms, and of 10 million {large:.2f} ms" in words
    each = 1e3 * ours(speed["parts"], "noise", 10**6)  # nanoseconds
    assert f"a true normal number costs about {each:.1f} ns" in words
    assert f"{each / 10:.2f} ms for 100,000 parameters" in words
    for measured in (speed["measured"], record("gpu/speed")["measured"]):
        assert not any("--quick" in each["command"] for each in measured.values())
    assert "(gpu)" in record("gpu/speed")["measured"]["steps"]["device"]


def test_a_page_takes_a_new_table_and_keeps_the_rest():
    from benchmarks.steps import tables

    text = "\n## A\n\ntext\n\n| old |\n| --- |\n\nmore\n\n## B\n\n| old |\n"
    new = tables.renewed(text, {"## A": "| new |\n| --- |\n| 1 |\n"})
    assert new == "\n## A\n\ntext\n\n| new |\n| --- |\n| 1 |\n\nmore\n\n## B\n\n| old |\n"


def test_ratios_are_of_the_same_round():
    from benchmarks.steps import timing

    plain = [(1.0, 2.0), (10.0, 20.0), (4.0, 8.0)]  # a machine that was busy in between
    ours = [(2.0, 2.0), (20.0, 40.0), (8.0, 24.0)]
    found = timing.summary(ours, plain)
    assert found["ratio"] == 2
    assert found["ratio_middle_half"] == [2, 2]
    assert found["processor_ratio"] == 2
    assert found["processor_ratio_middle_half"] == [1.5, 2.5]
    assert found["seconds"] == 8


def test_the_networks_have_as_many_parameters_as_they_say():
    from benchmarks.steps import networks

    sizes = {name: make().parameters for name, make in networks.ROWS.items()}
    assert sizes["MLP 4k"] == 3985
    assert abs(sizes["MLP 100k"] / 1e5 - 1) < 0.01
    assert abs(sizes["CNN 20k"] / 2e4 - 1) < 0.03
    assert abs(sizes["CNN 2M"] / 2e6 - 1) < 0.02
    assert abs(sizes["transformer 10M"] / 1e7 - 1) < 0.05


@pytest.fixture
def quiet(monkeypatch):
    from benchmarks.steps import loops

    monkeypatch.setattr(loops, "NOISE", 2e-6)


def moved(loop, network):
    """Differences of the parameters after a step from what they were."""
    loop.run(1)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), loop.carry[0], network.params)


def gap(one, other):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.max(np.abs(a - b)), one, other)))


@slow
@pytest.mark.parametrize("way", ["ours", "in microbatches", "optax dpsgd", "jax-privacy"])
def test_ways_to_clip_examples_take_the_same_step(way, quiet):
    from benchmarks.steps import loops, networks, rivals

    if way == "jax-privacy":
        pytest.importorskip("jax_privacy")
    network = networks.TINY()
    loop = {
        "ours": loops.per_example,
        "in microbatches": lambda network: loops.per_example(network, 2),
        **rivals.RIVALS,
    }[way](network)
    batch = jax.tree.map(lambda leaf: leaf[loop.batches[0]], network.data)
    rate = loops.RATE / network.batch_size
    clipped = raw = jax.tree.map(np.zeros_like, network.params)
    for row in range(network.batch_size):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)
        gradient = jax.grad(network.loss_fn)(network.params, one)
        factor = min(1.0, loops.CLIP / float(optax.tree.norm(gradient)))
        clipped = jax.tree.map(lambda t, g, f=factor: t - rate * f * g, clipped, gradient)
        raw = jax.tree.map(lambda t, g: t - rate * g, raw, gradient)
    step = moved(loop, network)
    assert gap(step, clipped) < 2e-5
    assert gap(step, raw) > 1e-4


@slow
def test_ways_to_clip_the_batch_take_the_same_step(quiet):
    from benchmarks.steps import loops, networks

    network = networks.TINY()
    one, other = (moved(make(network), network) for make in (loops.optax_parts, loops.noisy_sgd))
    assert gap(one, other) < 2e-5
    assert gap(one, jax.tree.map(np.zeros_like, one)) > 1e-3


@slow
@pytest.mark.parametrize("name", ["speed", "memory", "scaling"])
def test_a_quick_run_writes_what_the_pages_read(name, tmp_path):
    from benchmarks import scaling, speed
    from benchmarks.steps import tables

    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", "--quick"]
    subprocess.run([*command, "--out", tmp_path], cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.md").read_text() == getattr(tables, name)(found)
    if name == "speed":
        assert set(speed.SECTIONS) <= set(found)
        assert found["compiling"]["first request"]["backend_compilations"] > 0
        ways = found["steps"][0]["ways"]
        assert all(way["seconds"] > 0 for way in ways.values())
        assert ways["plain"]["ratio"] == 1
        assert (tmp_path / "speed.png").stat().st_size > 10_000
    if name == "memory":
        copies = found["rows"][0]["copies"]
        assert 1 <= copies["plain SGD"] <= copies["noisy_sgd"]
        assert copies["unlearn"] > 1
    if name == "scaling":
        one, *_, many = (row for row in found["devices"] if row["noisy"])
        assert not one["collectives"]
        assert many["devices"] == scaling.DEVICES
        assert many["collectives"]["all-reduce"] > 0
        assert many["copies_of_all_parameters"] < one["copies_of_all_parameters"]
