"""The example scripts run, and their page shows what they hold."""

import ast
import re
import runpy
from pathlib import Path

import pytest

import certunlearn as cu

ROOT = Path(__file__).parents[2]
MOST_LINES = 80
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "examples.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_the_script_runs_and_what_it_asserts_holds(script, capsys):
    found = runpy.run_path(str(script), run_name="__main__")
    certificate = found["certificate"]
    assert certificate.steps_run == certificate.mechanism.get("steps", 0)
    assert cu.verify(certificate)
    assert "epsilon" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_page_shows_the_script(script):
    text = script.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    sections = [part for part in PAGE.split("\n## ")[1:] if f"](../examples/{script.name})" in part]
    assert len(sections) == 1
    shown = re.findall(r"```py\n(.*?)\n```", sections[0], re.DOTALL)
    assert shown
    for block in shown:
        assert f"\n{block}\n" in text
    prose = " ".join(re.sub(r"[*-]", " ", sections[0]).split())
    for line in ast.get_docstring(ast.parse(text)).split("\n\n"):
        assert " ".join(re.sub(r"[*-]", " ", line).split()) in prose
