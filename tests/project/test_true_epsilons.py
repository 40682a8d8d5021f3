"""What the pages say of published noise and of the demo's retraining stands in their records."""

import json
import math
import pathlib
import re

import pytest
import scipy.optimize

import certunlearn as cu

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
WORDS = " ".join(PAGE.split())
RECORD = json.loads((ROOT / "benchmarks" / "true-epsilons" / "results.json").read_text())


@pytest.fixture
def true_epsilons(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import true_epsilons

    return true_epsilons


def test_the_table_is_what_the_record_gives_and_the_page_quotes_it(true_epsilons):
    table = true_epsilons.table(RECORD)
    assert table == (ROOT / "benchmarks" / "true-epsilons" / "table.md").read_text()
    assert "\n".join(line for line in table.splitlines() if line.startswith("|")) in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("source", ["theorem, weight decay 1", "the paper's code, no weight decay"])
def test_the_record_is_what_this_code_says(true_epsilons, source):
    rows = RECORD["rows"]
    stored = dict(next(r for r in rows if (r["source"], r["claimed"]) == (source, 1.0)))
    # A noise scale is within about 0.5% of the least that can be proved.
    noise = pytest.approx(stored.pop("least_noise_scale"), rel=1e-2)
    found = true_epsilons.row(source, 1.0)
    assert found.pop("least_noise_scale") == noise
    for key, value in stored.items():
        assert found[key] == (value if key == "source" else pytest.approx(value, rel=1e-3))


def test_the_sentences_are_the_rows():
    ones = {row["source"]: row for row in RECORD["rows"] if row["claimed"] == 1}
    code = ones["the paper's code, no weight decay"]["attack"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    shown = float(re.search(r"an attack reaches (\d+\.\d+)\.", WORDS)[1])
    assert 0 <= code - shown < 0.01
    assert f"reaches {shown} where" in changes
    plain, decayed = (
        ones[name]["noise_scale"] / ones[name]["least_noise_scale"]
        for name in ("theorem, no weight decay", "theorem, weight decay 1")
    )
    assert f"with {plain:.2f} times the noise that this library needs" in WORDS
    assert f"with weight decay {decayed:.2f} times." in WORDS
    convex = ones["Chien et al., an epoch"]
    ratio = convex["noise_scale"] / convex["least_noise_scale"]
    shown = float(re.search(r"claim of 1 is certified as (\d\.\d+), with", WORDS)[1])
    assert 0 <= shown - convex["certified"] < 1e-3
    assert f"with {ratio:.2f} times the noise that it needs" in WORDS


def test_the_attack_is_below_what_is_certified_and_theorems_hold_here():
    for row in RECORD["rows"]:
        if "Chien" in row["source"]:
            assert row["attack"] is None
            assert row["certified"] < row["claimed"]
            continue
        assert 0 < row["attack"] <= row["certified"]
        assert (row["attack"] > row["claimed"]) == ("code" in row["source"])


@pytest.mark.parametrize("claim", [0.5, 8.0])
def test_the_noise_of_noisy_descent_minimises_its_published_bound(true_epsilons, claim):
    """Over orders alpha, the bound is alpha Z^2 / (2 eta s^2) (c^2 - 1) / (1 - c^(-2 T))."""
    rows, batch, lam = 11_264, 128, 1e-6
    m, eta = lam * rows, 1 / (0.25 + lam * rows)
    c, steps = 1 - eta * m, rows // batch
    distance = 2 * eta / batch / (1 - c**steps)
    published = true_epsilons.noisy_descent(claim) / math.sqrt(2 * eta)  # what they call sigma

    def bound(alpha):
        slope = distance**2 / (2 * eta * published**2) * (c**2 - 1) / (1 - c ** (-2 * steps))
        return alpha * slope + math.log(rows) / (alpha - 1)

    least = scipy.optimize.minimize_scalar(bound, bounds=(1 + 1e-9, 1e5), method="bounded").fun
    assert least == pytest.approx(claim, rel=1e-6)
    # The true epsilon: distance c^T Z against a Gaussian with the variance of all steps.
    total = math.sqrt(2 * eta * published**2 * sum(c ** (2 * t) for t in range(steps)))
    mechanism, delta, _ = true_epsilons.SOURCES["Chien et al., an epoch"]
    single = cu.Separations(initial_distance=distance * c**steps, contraction=1, shift=0, steps=1)
    expected = cu.epsilon(single, noise_scale=total, delta=delta)
    scale = true_epsilons.noisy_descent(claim)
    assert cu.epsilon(mechanism, noise_scale=scale, delta=delta) == pytest.approx(expected)


SOURCES = sorted({row["source"] for row in RECORD["rows"] if "Chien" not in row["source"]})


@pytest.mark.parametrize("source", SOURCES)
def test_formulas_are_those_of_the_closed_form(true_epsilons, source):
    mechanism, delta, formula = true_epsilons.SOURCES[source]
    theorem = cu.noise_scale(mechanism, epsilon=1.0, delta=delta, accountant="closed-form")
    if "code" in source:  # the variance has 1 / epsilon instead of 9 log(1 / delta) / epsilon^2
        theorem /= math.sqrt(9 * math.log(1 / delta))
    assert formula(1.0) == pytest.approx(theorem)


def test_steps_of_the_tuned_retraining():
    for dataset, name in (("digits", "digits"), ("mnist", "MNIST"), ("cifar10", "CIFAR-10")):
        record = json.loads((ROOT / "benchmarks" / f"demo-{dataset}" / "results.json").read_text())
        steps = {row["name"]: row["steps"] for row in record["rows"]}
        fewest = steps["retrained, stopped when as good"]
        assert re.search(rf"{fewest} (steps )?for {name}", WORDS)
        assert re.search(rf"instead of .*{steps['unlearned and fine-tuned']}", WORDS)


def test_the_exact_head_is_near_the_network_on_public_features():
    record = json.loads((ROOT / "benchmarks" / "demo-cifar10" / "results.json").read_text())
    test = {row["name"]: row["test"] for row in record["rows"]}
    assert test["unlearned and fine-tuned"] - test["linear: exact head"] <= 0.02
    assert "within two points of the unlearned network's test accuracy" in WORDS
