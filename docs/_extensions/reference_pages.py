"""Reference pages list names in Markdown; the site puts each name's docstring there.

    ```{names} certunlearn.convex      ```{command} plan
    ConvexLoss                         ```
    ridge_regression
    ```

A name is followed by ": " and its description where it is a constant, which has no docstring.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import os
import re
from typing import Any

NAMES = re.compile(r"^```\{names\} ([\w.]+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^```\{command\}([^\n]*)\n```$", re.MULTILINE)


def listed(text: str) -> list[tuple[str, str, str]]:
    """Module, name and description (or "") of every name that a page lists."""
    return [
        (module, *(line.partition(": ")[0], line.partition(": ")[2]))
        for module, names in NAMES.findall(text)
        for line in names.splitlines()
        if line
    ]


def directive(module: str, name: str, description: str) -> str:
    """What documents one name, in reStructuredText."""
    value = getattr(importlib.import_module(module), name)
    dotted = f"{module}.{name}"
    if description:
        return f".. py:data:: {dotted}\n\n   {description}\n"
    kind = "function"
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, Exception) else "class"
    return f".. auto{kind}:: {dotted}\n"


def documented(block: re.Match) -> str:
    """The docstring of each name of a block."""
    parts = []
    for module, name, description in listed(block.group()):
        parts.append(directive(module, name, description))
    return "```{eval-rst}\n" + "\n".join(parts) + "```"


def helped(block: re.Match) -> str:
    """What the command prints with --help."""
    from certunlearn import cli

    os.environ.update(COLUMNS="88", NO_COLOR="1")
    arguments = block.group(1).split()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli._parser().parse_args([*arguments, "--help"])
    return f"```text\n{printed.getvalue()}```"


def fill(app: Any, name: str, source: list[str]) -> None:
    """Replaces the blocks of a reference page."""
    if name.startswith("docs/reference/"):
        source[0] = COMMAND.sub(helped, NAMES.sub(documented, source[0]))


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples, which their class describes, and argparse's own."""
    doc = getattr(obj, "__doc__", None) or ""
    if doc.startswith("Alias for field number") or isinstance(obj, argparse.Action):
        return True
    return None


def setup(app: Any) -> dict[str, bool]:
    """Registers both."""
    app.connect("source-read", fill)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
