"""The benchmark of forgetting: its bound on epsilon is true and can find fault; its record."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import certunlearn as cu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def forgetting(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import forgetting

    return forgetting


@pytest.mark.slow
def test_the_bound_stays_below_the_certificate_and_exceeds_it_with_too_little_noise(forgetting):
    record = json.loads((ROOT / "benchmarks" / "forgetting" / "results.json").read_text())
    scale = record["game"]["noise_scale"]
    assert cu.epsilon(forgetting.GAME, noise_scale=scale, delta=forgetting.DELTA) <= 1.0
    assert 0.5 < forgetting.lower_bound(scale, jax.random.key(7), trials=20_000) <= 1.0
    assert forgetting.lower_bound(0.7 * scale, jax.random.key(8), trials=20_000) > 1.0


def test_the_attack_knows_members_where_they_differ(forgetting):
    rng = np.random.default_rng(0)
    members = rng.random((32, 1000)) < 0.5
    shadow = rng.normal(size=(32, 1000)) + members
    inside = np.arange(1000) < 500
    for shift in (0.0, 1.0):
        seen = rng.normal(size=1000) + shift * inside
        ratio = forgetting.scores(seen, shadow, members)
        found = forgetting.attack(ratio[inside], ratio[~inside])
        # Two normal distributions one standard deviation apart: Phi(1 / sqrt(2)) = 0.760. Means of
        # sixteen shadow models each cost a little of it.
        assert found["auc"] == pytest.approx(0.76 if shift else 0.5, abs=0.06)
        assert found["tpr"] < 0.2 if shift else found["tpr"] < 0.05


@pytest.mark.slow
def test_every_kind_of_model_is_made_and_attacked(forgetting, monkeypatch):
    small = {"POOL": 60, "FORGET": 6, "SHADOWS": 16, "TARGETS": 2, "TRAIN_STEPS": 40}
    for name, value in small.items():
        monkeypatch.setattr(forgetting, name, value)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 100)
    pixels = 3 * np.eye(10, 784)[labels] + 0.1 * rng.standard_normal((100, 784))
    rows = {"x": pixels.astype(np.float32), "y": labels.astype(np.int32)}
    pool, test = ({k: v[part] for k, v in rows.items()} for part in (slice(60), slice(60, None)))
    lots = forgetting.drawn(rng)
    assert lots.targets.sum() == 2 * 30
    assert lots.retain.sum() == 2 * 24
    made = forgetting.networks(pool, lots, 0, 1e-3)
    found = forgetting.attacked(forgetting.NET, made, pool, test, lots)
    features = forgetting.linear_heads.random_features(1, {"retain": pool, "test": test})
    made = forgetting.heads(features["retain"], lots)
    found |= forgetting.attacked(forgetting.HEAD, made, features["retain"], features["test"], lots)
    record = json.loads((ROOT / "benchmarks" / "forgetting" / "results.json").read_text())
    assert found.keys() == record["models"].keys()
    for runs in found.values():
        assert [sorted(run) for run in runs] == [["auc", "test", "tpr"]] * 2
    # Models that were trained on 30 rows know them; those that forgot or never saw some do not.
    for name, runs in found.items():
        area = np.mean([run["auc"] for run in runs])
        assert area > 0.75 if "original" in name else area < 0.7


def test_the_record(forgetting):
    folder = ROOT / "benchmarks" / "forgetting"
    record = json.loads((folder / "results.json").read_text())
    table = forgetting.table(record)
    assert table == (folder / "table.md").read_text()
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert "\n".join(line for line in table.splitlines() if line.startswith("|")) in page
    game = record["game"]
    assert game["bound"] <= game["certified"]
    shown = float(re.search(r"epsilon is at least (\d\.\d+)", " ".join(page.split()))[1])
    assert 0 <= game["bound"] - shown < 1e-3
    assert record["shadows"] >= 16
    areas = {name: [run["auc"] for run in runs] for name, runs in record["models"].items()}
    mean, error = {}, {}
    for name, values in areas.items():
        mean[name], error[name] = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
    for name in ("original", "exact head, original"):
        assert mean[name] > 0.5 + 4 * error[name]  # the attack works
    for name in ("retrained", "from the centre", "unlearned", "exact head, unlearned"):
        assert mean[name] < 0.5 + 3 * error[name]
