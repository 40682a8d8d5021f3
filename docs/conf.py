"""The documentation site: `make site` builds it from the repository's root into build/site.

Pages are plain Markdown that GitHub shows, too. What a site has besides is made here: the
navigation from `NAVIGATION`, reference pages from docstrings (`_extensions/`).
"""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_extensions"), str(ROOT)]

import certunlearn  # noqa: E402

project = "certunlearn"
author = "The certunlearn authors"
copyright = author
version = release = certunlearn.__version__
language = "en"

# The part of the site's side bar that a page stands in. A line is a page or a pattern of pages;
# whatever matches a pattern is added. A page that stands nowhere is an error.
NAVIGATION = {
    "Start here": ["docs/start*", "README", "docs/installing", "docs/methods", "docs/choosing*"],
    "How-to": ["docs/loops", "docs/examples", "docs/exact", "docs/devices", "docs/howto*"],
    "Concepts": [
        "docs/concepts",
        "docs/guarantee",
        "docs/certificate-format",
        "docs/accountants",
        "docs/sharp-edges",
    ],
    "Benchmarks": [
        "docs/benchmarks",
        "benchmarks/README",
        "docs/scaling",
        "docs/comparison*",
        "benchmarks/tables",
    ],
    "Notebooks": [
        "notebooks/quickstart",
        "notebooks/exact",
        "notebooks/systems",
        "notebooks/coupling",
        "notebooks/*",
    ],
    "Reference": [
        "docs/reference/certunlearn",
        "docs/reference/mechanisms",
        "docs/reference/unlearning",
        "docs/reference/*",
        "docs/certificate-format*",
        "docs/theory/README",
    ],
    "Project": ["CHANGELOG", "CONTRIBUTING", "SECURITY", "docs/deprecation*", "docs/release*"],
}
# Pages below another page, which name no place in the side bar themselves.
BELOW = {"docs/theory/README": ["docs/theory/*"], "docs/benchmarks": ["benchmarks/*"]}

root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/*.md",
    "docs/**/*.md",
    "notebooks/*.ipynb",
    "benchmarks/*.md",
    "benchmarks/**/*.md",
]
exclude_patterns = ["build/**", "**/.ipynb_checkpoints/**"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "navigation",
    "names_in_text",
    "plain_docstrings",
    "reference_pages",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = [
    "myst.header",  # tables that scripts write start with a lower heading
    "misc.highlighting_failure",  # an excerpt of JSON with "..." is shown without colours
]
nb_execution_mode = "off"  # the notebooks' stored outputs are shown; .ci/notebooks.py checks them

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Guarantee", "Source"]

html_theme = "furo"
html_title = f"certunlearn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False


def setup(app: Any) -> dict[str, bool]:
    """Nothing is kept between processes that a parallel build would lose."""
    app.add_config_value("certunlearn_navigation", NAVIGATION, "env")
    app.add_config_value("certunlearn_below", BELOW, "env")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
