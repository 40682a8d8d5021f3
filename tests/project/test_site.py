"""The site: each public name on one reference page, each page in the navigation, links checked."""

import ast
import importlib
import importlib.util
import inspect
from pathlib import Path

import certunlearn as cu

ROOT = Path(__file__).parents[2]
EXTENSIONS = ROOT / "docs" / "_extensions"
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
ROOMS = [cu, *(value for name in cu.__all__ if inspect.ismodule(value := getattr(cu, name)))]


def loaded(path):
    """A script of the site, which needs no Sphinx until a site is built."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = loaded(EXTENSIONS / "reference_pages.py")
NAVIGATION = loaded(EXTENSIONS / "navigation.py")
DOCSTRINGS = loaded(EXTENSIONS / "plain_docstrings.py")
LINKS = loaded(ROOT / ".ci" / "site_links.py")


def constant(name):
    """A value that the settings of the site assign."""
    for node in ast.parse((ROOT / "docs" / "conf.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


# The reference.


def listed():
    return [entry for page in REFERENCE for entry in PAGES.listed(page.read_text())]


def test_every_public_name_stands_on_exactly_one_reference_page():
    places = {}
    for module, name, description in listed():
        value = getattr(importlib.import_module(module), name)
        assert inspect.isclass(value) or inspect.isfunction(value) or description, name
        # Small numbers may be one object; what has no docstring of its own goes by its name.
        places.setdefault(name if description else id(value), []).append(f"{module}.{name}")
    assert len(places) > 120
    assert [names for names in places.values() if len(names) > 1] == []
    for room in ROOMS:
        for name in room.__all__:
            value = getattr(room, name)
            if not inspect.ismodule(value):
                assert id(value) in places or name in places, f"{room.__name__}.{name}"


def test_names_are_listed_by_their_shortest_public_name():
    top = {id(getattr(cu, name)) for name in cu.__all__}
    for module, name, description in listed():
        if not description and id(getattr(importlib.import_module(module), name)) in top:
            assert module == "certunlearn", name


def test_the_table_of_the_top_level_is_complete():
    text = (ROOT / "docs" / "reference" / "certunlearn.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    names = [name.strip(" `") for row in rows for name in row.split("|")[1].split(",")]
    assert sorted(names) == sorted(cu.__all__)


def test_every_command_has_its_help():
    from certunlearn import cli

    (commands,) = cli._parser()._subparsers._group_actions
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    assert [found.strip() for found in PAGES.COMMAND.findall(text)] == ["", *commands.choices]


# The navigation.


def test_every_page_stands_in_the_navigation_once():
    found = {
        path.relative_to(ROOT).with_suffix("").as_posix()
        for pattern in constant("include_patterns")
        for path in ROOT.glob(pattern)
    }
    root = constant("root_doc")
    tree = NAVIGATION.places(found, constant("NAVIGATION"), constant("BELOW"), root)
    placed = [page for parts in tree.values() for pages in parts.values() for page in pages]
    assert sorted([*placed, root]) == sorted(found)
    assert all(page in found for page in tree)


# What the site makes of docstrings.


def test_formulas_and_doctests_stay_as_they_are():
    text = """Adds *nothing* to `x*y`s of |w|_2_ * 2 * 3.

        x <- x * y

Args:
  x: a number, `[n]`,
    of two lines.

Guarantee:
  None.

      y | z

>>> f(`x`)
"""
    assert DOCSTRINGS.converted(text.splitlines()) == [
        r"Adds *nothing* to ``x*y``\ s of \|w\|_2\_ \* 2 \* 3.",
        "",
        "::",
        "",
        "        x <- x * y",
        "",
        "Args:",
        "  x: a number, ``[n]``,",
        "    of two lines.",
        "",
        "Guarantee:",
        "  None.",
        "",
        "  ::",
        "",
        "      y | z",
        "",
        ">>> f(`x`)",
        "",
    ]


# The links of a built site.


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="b.html#there"><a href="#here"><a href="https://x.org/none"></p>'
    )
    (tmp_path / "b.html").write_text('<p id="there"><img src="a.html"></p>')
    assert LINKS.broken(tmp_path) == []
    (tmp_path / "c.html").write_text('<a href="b.html#gone"><a href="#gone"><img src="none.png">')
    found = LINKS.broken(tmp_path)
    assert found == ["c.html: #gone", "c.html: b.html#gone", "c.html: none.png"]
    (tmp_path / "empty").mkdir()
    assert LINKS.broken(tmp_path / "empty")
