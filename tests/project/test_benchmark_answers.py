"""Every number of `benchmarks/README.md` stands in a record."""

import json
import math
import re
from pathlib import Path

import numpy as np

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ANSWERS = {
    row.split("|")[1].strip(): row.split("|")[2].strip()
    for row in (BENCHMARKS / "README.md").read_text().splitlines()
    if row.startswith("|")
}


def record(path):
    return json.loads((BENCHMARKS / path).read_text())


def answer(start):
    (found,) = [text for question, text in ANSWERS.items() if question.startswith(start)]
    return found


def down(value, decimals):
    """What an attack is said to reach: never more than it does."""
    return f"{math.floor(value * 10**decimals) / 10**decimals:.{decimals}f}"


def numbers(text):
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)


def table_row(path, start):
    rows = (BENCHMARKS / path).read_text().splitlines()
    return next(row.split("|") for row in rows if row.startswith(f"| {start}"))


def test_the_demo():
    steps = {row["name"]: row["steps"] for row in record("demo-digits/results.json")["rows"]}
    assert steps["unlearned and fine-tuned"] == steps["started from the centre"]
    wanted = [steps["started from the centre"], steps["retrained, stopped when as good"]]
    assert numbers(answer("Does unlearning a network")) == [str(each) for each in wanted]


def test_deletion():
    cells = table_row("deletion/table.md", "exact ridge, kept inverse: operations")
    shares = [f"{float(cells[column].split('%')[0]):.0f}%" for column in (2, 5)]
    text = answer("What does a deletion cost")
    assert all(share in text for share in shares)
    assert numbers(text) == [shares[0][:-1], shares[1][:-1], "250"]
    for row in (BENCHMARKS / "deletion" / "table.md").read_text().split("## ")[1].splitlines():
        if ": time |" in row:
            for mean, error in re.findall(r"([\d.]+)% \+- ([\d.]+)%", row):
                assert float(mean) + float(error) >= 100


def test_forgetting():
    found = record("forgetting/results.json")
    areas = [
        np.mean([run["auc"] for run in found["models"][name]]) for name in ("original", "unlearned")
    ]
    wanted = [*(f"{each:.3f}" for each in areas), down(found["game"]["bound"], 3)]
    assert numbers(answer("Does it forget")) == [*wanted, "1"]


def test_published_noise():
    rows = record("true-epsilons/results.json")["rows"]
    ones = [row for row in rows if row["claimed"] == 1]
    attack = max(row["attack"] for row in ones if row["attack"] is not None)
    ratios = [
        row["noise_scale"] / row["least_noise_scale"] for row in ones if "theorem" in row["source"]
    ]
    wanted = ["1", down(attack, 2), f"{min(ratios):.2f}", f"{max(ratios):.2f}"]
    assert numbers(answer("What does published")) == wanted


def test_tightness():
    cells = record("coupling-grid/results.json")["cells"]
    goals = sorted({round(100 * (cell["target"] - 1)) for cell in cells})
    within = sum(cell["ratio"] <= cell["target"] for cell in cells)
    wanted = [goals[0], goals[-1], within, len(cells)]
    assert numbers(answer("How tight")) == [str(each) for each in wanted]


def test_less_noise():
    lines = (BENCHMARKS / "coupling-mnist" / "table.md").read_text().splitlines()
    cells = {}
    for line in lines:
        columns = [column.strip() for column in line.split("|")]
        if len(columns) > 6:
            cells.setdefault(columns[1], columns[7])  # of the first setting
    names = ("coupling", "interpolation", "closed-form")
    wanted = [cells[f"unlearned, {name}"].split(" ")[0] for name in names]
    assert numbers(answer("What does less noise")) == wanted
    for name in names:
        ours, other = (cells[f"{start}, {name}"] for start in ("unlearned", "from the centre"))
        (mean, error), (rival, rival_error) = (map(float, numbers(text)) for text in (ours, other))
        assert mean - rival <= np.hypot(error, rival_error)


def test_steps_and_memory():
    ratios = [
        row["ways"][way]["ratio"]
        for row in record("speed.json")["steps"]
        for way in ("noisy_sgd", "unlearn")
    ]
    wanted = [f"{min(ratios):.1f}", f"{max(ratios):.1f}"]
    assert numbers(answer("What does a certified step")) == wanted
    copies = [row["copies"] for row in record("memory.json")["rows"]]
    for way, text in zip(
        ("unlearn", "Optax clip + normal"), numbers(answer("What memory")), strict=True
    ):
        assert {f"{each[way]:.1f}" for each in copies} == {text}


def test_older_methods():
    record_of_baselines = (BENCHMARKS / "deletion" / "baselines.md").read_text()
    factors = [float(each) for each in re.findall(r"(\d+) \+- \d+ times", record_of_baselines)]
    assert factors
    assert min(factors) > float(numbers(answer("Do older"))[0].replace(",", ""))


def test_the_paper_s_figure():
    text = (BENCHMARKS / "paper-figure" / "table.md").read_text()
    figure, elsewhere = re.findall(r"^\*\*(.*)\*\*$", text, re.MULTILINE)
    better, places, worse, ahead, behind = numbers(figure)
    assert numbers(answer("Does unlearning beat")) == [better, places, worse, ahead, behind]
    # "No" is true: by chance alone one comparison in 40 is better; these are not independent.
    assert int(better) <= int(places) / 10
    assert int(ahead) <= min(int(behind), int(places) / 10)
    better, places, worse = numbers(elsewhere)[:3]
    assert numbers(answer("Does a larger radius")) == [better, places, worse]
    assert int(better) <= int(places) / 10
