"""A report as a section of a model card, in Markdown."""

import re

from certunlearn.reporting.contents import Report

# Whatever Markdown or HTML could read as more than text.
_SPECIAL = re.compile(r"([\\`*_\[\]|~$]|^[#+>-])")
# Also what GitHub's Markdown makes links of without any mark: addresses, and names of users.
_ENTITIES = (
    ("&", "&amp;"),
    ("<", "&lt;"),
    ("://", "&#58;//"),
    ("www.", "www&#46;"),
    ("@", "&#64;"),
)


def to_markdown(report: Report) -> str:
    """The report as a section to paste into a model card; texts of the record are escaped."""
    lines = ["## Unlearning", "", f"**{_escaped(report.headline)}**", ""]
    for title, texts in (
        ("What is wrong", report.problems),
        ("Claim", report.claim),
        ("Assumptions", report.assumptions),
        ("What this cannot say", report.cannot_say),
    ):
        if texts:
            lines += [f"### {title}", "", *(f"- {_escaped(text)}" for text in texts), ""]
    if report.numbers:
        title = "Record" if report.verified else "Record, not to be relied on"
        lines += [f"### {title}", "", "| field | value |", "|---|---|"]
        lines += [f"| {_escaped(name)} | {_escaped(value)} |" for name, value in report.numbers]
        lines.append("")
    return "\n".join([*lines, "Check it yourself: `certunlearn verify certificate.json`", ""])


def _escaped(text: str) -> str:
    """A text as Markdown that reads as that text, on one line."""
    safe = " ".join(text.split())
    for special, entity in _ENTITIES:
        safe = safe.replace(special, entity)
    return _SPECIAL.sub(r"\\\1", safe)
