"""The README is short, its code runs as printed, and its table is the demo's."""

import re
from pathlib import Path

import pytest

import certunlearn as cu

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
    table = "\n".join(line for line in report.splitlines() if line.startswith("|"))
    assert len(table.splitlines()) == 7
    assert table in README


def test_what_unlearning_does_not_save_is_on_the_front():
    plain = " ".join(README.split())
    assert "saves nothing over restarting from its public centre" in plain


def test_every_method_has_a_line():
    section = README.split("## Which method when")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert "`cu.exact`" in section
    methods = {name for name in cu.__all__ if isinstance(getattr(cu, name), type(cu.Mechanism))}
    assert named == methods
    assert len(methods) == 11


def test_the_committed_certificate_is_for_the_committed_model():
    folder = ROOT / "benchmarks" / "demo-digits"
    certificate = cu.Certificate.load(folder / "certificate.json")
    assert cu.verify(certificate, cu.certificates.load_params(folder / "unlearned.npz"))
