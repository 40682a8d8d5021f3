"""The README's code runs as printed, and its table is the demo's."""

import json
import re
from pathlib import Path

import pytest

import certunlearn as cu

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_code_to_check():
    assert len(BLOCKS) >= 1


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.slow
def test_code_runs_as_printed(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_the_two_commands_are_there():
    assert 'pip install -e ".[examples]" && certunlearn demo' in README
    assert 'pip install -e ".[test]" && pytest' in README


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_the_tables_are_what_the_demo_wrote(dataset):
    report = (ROOT / "benchmarks" / f"demo-{dataset}" / "table.md").read_text()
    table = "\n".join(line for line in report.splitlines() if line.startswith("|"))
    assert len(table.splitlines()) == 7
    assert table in README


def test_the_price_of_a_step_is_the_benchmarks():
    results = json.loads((ROOT / "benchmarks" / "transforms.json").read_text())["results"]
    ratios = [row["ratio"] for row in results if row["what"] == "step"]
    assert len(ratios) == 3
    assert f"takes {min(ratios):.1f} to {max(ratios):.1f} times as long" in README


def test_the_committed_certificate_is_for_the_committed_model():
    folder = ROOT / "benchmarks" / "demo-digits"
    certificate = cu.Certificate.load(folder / "certificate.json")
    assert cu.verify(certificate, cu.certificates.load_params(folder / "unlearned.npz"))


def test_what_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
