"""What the pages say of published noise and of the demo's retraining stands in their records."""

import json
import math
import pathlib
import re

import pytest

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


def test_the_sentences_are_the_rows():
    ones = {row["source"]: row for row in RECORD["rows"] if row["claimed"] == 1}
    code = ones["the paper's code, no weight decay"]["attack"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"an attack reaches {code:.2f}." in WORDS
    assert f"reaches {code:.2f} where" in changes
    plain, decayed = (
        ones[name]["noise_scale"] / ones[name]["least_noise_scale"]
        for name in ("theorem, no weight decay", "theorem, weight decay 1")
    )
    assert f"with {plain:.2f} times the noise that is needed" in WORDS
    assert f"with weight decay {decayed:.2f} times." in WORDS


def test_the_attack_is_below_what_is_certified_and_theorems_hold_here():
    for row in RECORD["rows"]:
        assert 0 < row["attack"] <= row["certified"]
        assert (row["attack"] > row["claimed"]) == ("code" in row["source"])


@pytest.mark.parametrize("source", sorted({row["source"] for row in RECORD["rows"]}))
def test_formulas_are_those_of_the_closed_form(true_epsilons, source):
    mechanism, formula = true_epsilons.SOURCES[source]
    delta = true_epsilons.DELTA
    theorem = cu.noise_scale(mechanism, epsilon=1.0, delta=delta, accountant="closed-form")
    if "code" in source:  # the variance has 1 / epsilon instead of 9 log(1 / delta) / epsilon^2
        theorem /= math.sqrt(9 * math.log(1 / delta))
    assert formula(1.0) == pytest.approx(theorem)


def test_steps_of_the_tuned_retraining():
    for dataset, name in (("digits", "digits"), ("mnist", "MNIST")):
        record = json.loads((ROOT / "benchmarks" / f"demo-{dataset}" / "results.json").read_text())
        steps = {row["name"]: row["steps"] for row in record["rows"]}
        fewest = steps["retrained, stopped when as good"]
        assert re.search(rf"{fewest} (steps )?for {name}", WORDS)
        assert re.search(rf"instead of .*{steps['unlearned and fine-tuned']}", WORDS)
