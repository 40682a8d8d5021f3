"""Docstrings are plain text with backticks; this makes reStructuredText of them, for napoleon.

Backticks become literals, and characters that would be markup are escaped. A formula, which is
indented by four columns more than its paragraph, becomes a literal block. Doctests stay.
"""

import re
from typing import Any

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Guarantee|Source):")
SPAN = re.compile(r"(`+)([^`]+)\1")
MARKUP = re.compile(r"(?<![\w*])\*\w(?:[\w -]*\w)?\*(?![\w*])|([*|\\])|_(?=\W|$)")


def indent(line: str) -> int:
    """Columns before the text."""
    return len(line) - len(line.lstrip())


def plain(text: str) -> str:
    """Text without markup, but for *emphasis*."""
    return MARKUP.sub(lambda found: ("\\" if len(found[0]) == 1 else "") + found[0], text)


def escaped(text: str) -> str:
    """Prose with literals for what stands in backticks, and without other markup."""
    parts, end = [], 0
    for span in SPAN.finditer(text):
        parts.append(plain(text[end : span.start()]))
        end = span.end()
        parts.append(f"``{span.group(2)}``" + ("\\ " if text[end : end + 1].isalnum() else ""))
    parts.append(plain(text[end:]))
    return "".join(parts)


def blocks(lines: list[str]) -> list[list[str]]:
    """Paragraphs: lines between empty lines."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [block for block in found if block]


def converted(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText, sections as napoleon expects them."""
    result: list[str] = []
    base, described = 0, False  # of the section; whether its entries have texts of their own
    for block in blocks(lines):
        if section := SECTION.fullmatch(block[0]):
            base = 2
            described = section.group(1) in ("Args", "Attributes", "Raises")
        elif indent(block[0]) == 0:
            base, described = 0, False
        if block[0].lstrip().startswith(">>>"):
            result += [*block, ""]
        elif min(map(indent, block)) >= base + (6 if described else 4):
            inset = " " * (base + (2 if described else 0))
            result += [f"{inset}::", "", *block, ""]
        else:
            result += [*escaped("\n".join(block)).split("\n"), ""]
    return result


def convert(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's hook: changes the lines in place."""
    lines[:] = converted(lines)


def setup(app: Any) -> dict[str, bool]:
    """Runs before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", convert, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
