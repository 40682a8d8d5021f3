"""The first page quotes what its code prints."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "start.md").read_text()
QUOTED = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


def test_every_block_is_followed_by_what_it_prints():
    assert len(QUOTED) == PAGE.count("```python") == PAGE.count("```text") == 3


@pytest.mark.parametrize(("code", "printed"), QUOTED, ids=range(len(QUOTED)))
def test_the_page_quotes_what_its_code_prints(code, printed, capsys):
    exec(compile(code, "docs/start.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.split() == printed.split()
