"""The benchmark of accuracy at one certificate runs, on few small images, and says what it did."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import certunlearn as cu

ROOT = Path(__file__).parents[2]
ACCOUNTANTS = ("closed-form", "interpolation")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import coupling_mnist

    return coupling_mnist


@pytest.mark.slow
def test_every_seed_has_its_own_order_of_its_own_examples(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH_SIZE", 3)
    examples, keys = (
        np.array([[0, 1, 2, 3, 4, 5, 6], range(10, 17)]),
        jax.random.split(jax.random.key(4), 2),
    )
    found = benchmark.batches_of(examples, keys, epochs=2)
    assert [each.shape for each in found] == [(2, 3)] * 4  # what is left of an epoch is dropped
    for epoch in range(2):
        for seed, key in enumerate(keys):
            order = jax.random.permutation(jax.random.fold_in(key, epoch), 7)
            parts = np.concatenate([each[seed] for each in found[2 * epoch : 2 * epoch + 2]])
            np.testing.assert_array_equal(parts, examples[seed][order][:6])


@pytest.mark.slow
def test_a_small_run_writes_its_record_and_table(benchmark, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 1200)
    pixels = np.eye(10, 16)[labels] + 0.1 * rng.standard_normal((1200, 16))
    rows = {"x": pixels.astype(np.float32), "y": labels.astype(np.int32)}
    parts = SimpleNamespace(
        train={k: v[:1120] for k, v in rows.items()}, test={k: v[1120:] for k, v in rows.items()}
    )
    monkeypatch.setattr(benchmark.data_lib, "mnist", lambda folder: parts)
    monkeypatch.setattr(benchmark, "BATCH_SIZE", 10)
    command = ["coupling_mnist", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--accountants", *ACCOUNTANTS])
    benchmark.main()
    record = json.loads((tmp_path / "results.json").read_text())
    assert len(record["settings"]) == 3
    for part in record["settings"] + record["radii"]:
        mechanism = cu.GradientClipping(**dict(zip(benchmark.FIELDS, part["setting"], strict=True)))
        assert not part["refused"]
        for name in ACCOUNTANTS:
            run = part["runs"][name]
            asked = cu.noise_scale(mechanism, epsilon=1.0, delta=1e-5, accountant=name)
            assert run["noise_scale"] == asked
            # So much noise leaves nothing of a model: before fine-tuning it guesses.
            assert np.mean(run["unlearned"][0]["test"]) < 0.5
        assert np.mean(part["retrained"][-1]["test"]) > 0.5
    table = (tmp_path / "table.md").read_text()
    assert table.count("| unlearned, interpolation |") == 8
    assert (tmp_path / "picture.png").stat().st_size > 10_000
