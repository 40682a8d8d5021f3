"""Docstrings and signatures by name: types by their aliases, public names as links.

A name that is also an argument's (`epsilon`, `delta`) is no link: most texts mean the argument.
"""

import contextlib
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import reference_pages
from chex import ArrayTree
from jax.typing import ArrayLike
from sphinx.util.typing import stringify_annotation

from certunlearn._numerics import checks
from certunlearn.sums import row_batches

PAGES = Path(__file__).parent.parent / "reference"
# The larger ones first, since they may hold the others.
ALIASES = {
    "Features": row_batches.Features,
    "ArrayTree": ArrayTree,
    "ArrayLike": ArrayLike,
    "ScalarOrSchedule": checks.ScalarOrSchedule,
}


@functools.cache
def targets() -> dict[str, str]:
    """For each public name that no argument has, and for `cu.` before any: its dotted name."""
    dotted, arguments = {}, set()
    for page in sorted(PAGES.glob("*.md")):
        for module, name, _ in reference_pages.listed(page.read_text()):
            value = getattr(importlib.import_module(module), name)
            dotted.setdefault(name, f"{module}.{name}")
            short = module.replace("certunlearn", "cu", 1)
            dotted[f"{short}.{name}"] = dotted[f"{module}.{name}"] = f"{module}.{name}"
            with contextlib.suppress(TypeError, ValueError):  # constants and errors take nothing
                arguments |= set(inspect.signature(value).parameters)
    return {name: target for name, target in dotted.items() if name not in arguments}


def span(text: str) -> str:
    """What stands in backticks, as reStructuredText."""
    target = targets().get(text)
    return f":py:obj:`{text} <{target}>`" if target else f"``{text}``"


@functools.cache
def spelled() -> list[tuple[str, str]]:
    """How Sphinx spells the types that have an alias here, and the alias."""
    return [
        (stringify_annotation(value, mode), alias)
        for alias, value in ALIASES.items()
        for mode in ("fully-qualified-except-typing", "smart")
    ]


def shorten(app: Any, what: str, name: str, obj: Any, options: Any, arguments: Any, result: Any):
    """Sphinx's hook: the signature with the aliases' names."""

    def short(text: str | None) -> str | None:
        for long, alias in 2 * spelled():  # twice: Sphinx spells out a tree's first branches
            text = text.replace(long, alias) if text else text
        return text and re.sub(r"~?[\w.]+\.(?=ArrayTree\b)", "", text)

    return short(arguments), short(result)


def setup(app: Any) -> dict[str, bool]:
    """Registers the hook."""
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
