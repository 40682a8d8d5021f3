"""The page that says which method: every verdict and number is what the library answers."""

import math
import re
from pathlib import Path

import pytest
from advice_helpers import mu_of

import certunlearn as cu

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
SECTION = PAGE.split("\n## Which method?\n")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| (.*`) \| (.*) \|$", SECTION, re.MULTILINE)
FIRST = "parameters=20_042, public_start=True, rows=50_000, deletions=500"


@pytest.mark.parametrize(("said", "verdict"), ROWS, ids=range(len(ROWS)))
def test_the_verdicts_are_those_of_the_library(said, verdict):
    code = ", ".join(re.findall(r"`(.*?)`", said))
    if said.startswith("the same, and "):
        code = f"{FIRST}, {code}"
    arguments = eval(f"dict({code})")
    assert cu.advise(**arguments).verdict == verdict


def test_the_page_shows_every_kind_of_case():
    assert len(ROWS) == 8
    assert ROWS[0][0] == f"`{FIRST}`"


def test_the_noise_beside_what_is_kept():
    (shown,) = re.findall(r"(\d+) times r for 20,042 parameters at epsilon = 4", SECTION)
    assert shown == f"{2 * math.sqrt(20_042) / mu_of(4.0, 1e-5):.0f}"
