"""The README is short, its code runs as printed, and its table is the demo's."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import certunlearn as cu

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# Of README's rows: the benchmark's method, and the numbers of deletions that they name.
SAVING = {
    "[`cu.exact`]": ("exact, fast", (1, 10, 250)),
    "`PerturbedMinimizer`": ("perturbed minimiser", (1,)),
}
MOST_WORDS = 700  # tables and code included, as `wc -w` counts


def test_it_is_short():
    assert len(README.split()) <= MOST_WORDS


def test_there_is_code_to_check():
    assert len(BLOCKS) >= 1


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.slow
def test_code_runs_as_printed(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_the_two_commands_are_there():
    assert 'pip install -e ".[examples]" && certunlearn demo' in README
    assert 'pip install -e ".[test]" && pytest' in README


def test_the_table_is_what_the_demo_wrote():
    report = (ROOT / "benchmarks" / "demo-digits" / "table.md").read_text()
    written = [line for line in report.splitlines() if line.startswith("|")]
    start = README.splitlines().index(written[0])
    shown = [line for line in README.splitlines()[start : start + 8] if line.startswith("|")]
    assert len(shown) == 8
    assert [line for line in written if line in shown] == shown
    # What pays and what does not are both among them.
    assert all(any(name in line for line in shown) for name in ("stopped", "centre", "exact"))


def test_what_unlearning_does_not_save_is_on_the_front():
    plain = " ".join(README.split())
    assert "saves nothing over restarting from its public centre" in plain


def test_every_method_has_a_line():
    section = README.split("## Which method when")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert "[`cu.exact`]" in section
    methods = {name for name in cu.__all__ if isinstance(getattr(cu, name), type(cu.Mechanism))}
    assert named == methods
    assert len(methods) == 11


def measured(record, method, size):
    """The mean share of the cheapest retraining's operations, as the README gives it."""
    from benchmarks.deletion import report

    (same,) = (
        each
        for each in report.requests(record)
        if (each[0]["kind"], each[0]["size"]) == ("random", size)
    )
    return f"{np.mean([report.ratio(one, method, 'flops') for one in same]):.0%}"


def test_what_methods_save_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    folder = ROOT / "benchmarks" / "deletion"
    record = json.loads((folder / "results.json").read_text())
    row = {name: next(r for r in README.splitlines() if name in r) for name in SAVING}
    for name, (method, sizes) in SAVING.items():
        for size in sizes:
            assert measured(record, method, size) in row[name], (name, size)
    baselines = json.loads((folder / "baselines.json").read_text())
    least = min(
        seed["contracting"][name][size]["flops"] / seed["yardsticks"][size]
        for seed in baselines["seeds"]
        for name in seed["contracting"]
        for size in seed["yardsticks"]
    )
    stated = re.search(r"over ([\d,]+) times", README).group(1)
    assert float(stated.replace(",", "")) < least


def test_the_committed_certificate_is_for_the_committed_model():
    folder = ROOT / "benchmarks" / "demo-digits"
    certificate = cu.Certificate.load(folder / "certificate.json")
    assert cu.verify(certificate, cu.certificates.load_params(folder / "unlearned.npz"))
