"""Puts the navigation tree below the text of pages, which stay plain Markdown for other readers."""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TITLES = {"README": "Overview"}  # in the side bar, where a page's own title says too little
HEADING = re.compile(r"^# ", re.MULTILINE)
FRONT = '<!doctype html><meta charset="utf-8"><title>certunlearn</title>\n'
FRONT += '<meta http-equiv="refresh" content="0; url=docs/index.html">\n'
FRONT += '<a href="docs/index.html">Documentation of certunlearn</a>\n'


def places(found: set[str], navigation: dict, below: dict, root: str) -> dict[str, dict]:
    """For each page that has pages below it: their names by caption, each page once.

    Whatever stands in the side bar by its name or by an earlier pattern is in no later pattern.
    """
    taken = {root}
    named = {name for part in navigation.values() for name in part if "*" not in name}

    def matching(patterns: list[str]) -> list[str]:
        pages = []
        for pattern in patterns:
            for page in sorted(found):
                hit = page == pattern or (page not in named and fnmatchcase(page, pattern))
                if hit and page not in taken:
                    taken.add(page)
                    pages.append(page)
        return pages

    tree = {root: {caption: matching(part) for caption, part in navigation.items()}}
    for page, patterns in below.items():
        tree[page] = {"": matching(patterns)}
    return tree


def toctree(caption: str, pages: list[str]) -> str:
    """One hidden tree as MyST text, "" if no page is in it."""
    if not pages:
        return ""
    head = f":caption: {caption}\n" if caption else ""
    lines = "".join(
        f"{TITLES[page]} </{page}>\n" if page in TITLES else f"/{page}\n" for page in pages
    )
    return f"\n\n```{{toctree}}\n:hidden:\n{head}\n{lines}```\n"


def add_trees(app: Any, name: str, source: list[str]) -> None:
    """Adds to a page the trees of what is below it, and a heading to tables that scripts wrote."""
    config = app.config
    tree = places(
        set(app.env.found_docs),
        config.certunlearn_navigation,
        config.certunlearn_below,
        config.root_doc,
    )
    if name.startswith("benchmarks/") and not HEADING.search(source[0]):
        source[0] = f"# {name.removeprefix('benchmarks/')}\n\n{source[0]}"
    for caption, pages in tree.get(name, {}).items():
        source[0] += toctree(caption, pages)


def add_front(app: Any, error: Exception | None) -> None:
    """The site's own address leads to the first page, which lies in docs/."""
    if error is None and app.builder.format == "html":
        Path(app.outdir, "index.html").write_text(FRONT)


def setup(app: Any) -> dict[str, bool]:
    """Registers both."""
    app.connect("source-read", add_trees)
    app.connect("build-finished", add_front)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
