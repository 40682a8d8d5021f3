"""Pages say what is so: code runs, numbers are the benchmarks', links and names lead somewhere."""

import dataclasses
import functools
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import certunlearn as cu
from certunlearn import cli

ROOT = Path(__file__).parents[2]
FRONT = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
PAGES = [*FRONT, *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}


def blocks(language):
    """The code of every block in a language; that of the README has a test of its own."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [
        pytest.param(code, id=f"{page}-{number}")
        for page, text in TEXTS.items()
        for number, code in enumerate(pattern.findall(text))
        if (page, language) != ("README.md", "python")
    ]


def rows(page, heading):
    """Cells of the first table after a heading, a list for each row below the table's head."""
    section = f"\n{TEXTS[page]}".split(f"\n{heading}\n")[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE).group()
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]
    ]


def results(name):
    return json.loads((ROOT / "benchmarks" / name).read_text())


def words(page):
    """A page's text in one line, so that phrases are found across line breaks."""
    return " ".join(TEXTS[page].split())


# Code.


def run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page.md", "exec"), {"__name__": "__main__"})


def is_quick(param):
    return not param.id.startswith("docs/")


# They run where what they print is compared: here below, and in test_start.py.
PRINTED = {"docs/concepts.md-0", *(f"docs/start.md-{number}" for number in range(3))}
SLOW = [block for block in blocks("python") if not is_quick(block) and block.id not in PRINTED]


@pytest.mark.parametrize("code", [block for block in blocks("python") if is_quick(block)])
def test_worked_examples_run(code, tmp_path, monkeypatch):
    run(code, tmp_path, monkeypatch)


@pytest.mark.parametrize("code", SLOW)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:run.private.npz holds the noise key")
def test_code_runs_as_printed(code, tmp_path, monkeypatch):
    run(code, tmp_path, monkeypatch)


def test_there_is_code_on_the_pages_that_teach():
    named = {block.id.rpartition("-")[0] for block in blocks("python")}
    assert named == {
        "CONTRIBUTING.md",
        *(f"docs/{name}.md" for name in ("accountants", "exact", "guarantee", "loops", "methods")),
        "docs/certificate-format.md",
        "docs/concepts.md",
        "docs/start.md",
    }


def test_the_worked_examples_are_short_and_public():
    mechanism, accountant = (block.values[0] for block in blocks("python") if is_quick(block))
    for code, base in ((mechanism, "cu.Mechanism"), (accountant, "cu.accounting.Accountant")):
        body = re.search(rf"(?:^@.*\n)?^class \w+\({base}\):\n(?:    .*\n|\n)+", code, re.MULTILINE)
        assert 0 < len(body.group().strip().splitlines()) <= 40
        assert "certunlearn" not in code.replace("import certunlearn as cu", "")
        assert not re.search(r"\._\w", code.replace("self._one_noise", ""))


@pytest.mark.parametrize("code", blocks("sh"))
def test_commands_can_be_typed(code):
    for line in code.splitlines():
        for command in line.split(" && "):
            name, *arguments = shlex.split(command)
            assert name in (".", "certunlearn", "make", "openssl", "pip", "pytest", "python", "uv")
            if name == "certunlearn":
                cli._parser().parse_args(arguments)  # exits with 2 at an unknown option
            if name == "make":
                assert arguments[0] in recipes()


# Links.


def slug(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_page_is_in_the_index():
    index = TEXTS["docs/index.md"]
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "index.md" or f"]({path.name})" in index


def test_concepts_print_what_the_page_shows(tmp_path, monkeypatch, capsys):
    code, printed = re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", TEXTS["docs/concepts.md"], re.DOTALL
    ).groups()
    run(code, tmp_path, monkeypatch)
    assert capsys.readouterr().out == printed


# Numbers.


@pytest.mark.parametrize(
    ("dataset", "name"), [("digits", "digits"), ("mnist", "MNIST"), ("cifar10", "CIFAR-10")]
)
def test_the_tables_are_what_the_demo_wrote(dataset, name):
    report = (ROOT / "benchmarks" / f"demo-{dataset}" / "table.md").read_text()
    table = "\n".join(line for line in report.splitlines() if line.startswith("|"))
    assert len(table.splitlines()) == 10
    assert table in TEXTS["docs/benchmarks.md"]
    chance = re.search(r"0\.5 \+- (0\.\d+)", report).group(1)
    assert f"0.5 +- {chance} for {name}" in words("docs/benchmarks.md")
    limit = re.search(r"by more than (0\.\d+)", report).group(1)
    assert f"by more than {limit} than for" in words("docs/benchmarks.md")
    assert f"by more than about {limit}." in words("docs/guarantee.md")


NOISE_TABLE = rows("docs/accountants.md", "## How much noise each asks for")


def needed(row, accountant):
    mechanism = cu.GradientClipping(
        init_radius=1.0,
        clip_norm=1.0,
        learning_rate=0.01,
        weight_decay=float(row[0]),
        steps=int(row[1]),
    )
    return cu.noise_scale(mechanism, epsilon=1.0, delta=1e-5, accountant=accountant)


@pytest.mark.parametrize("row", NOISE_TABLE, ids=lambda row: f"{row[0]}-{row[1]}")
def test_noise_by_formula_is_what_the_page_says(row):
    assert row[2:4] == [f"{needed(row, name):.4f}" for name in ("closed-form", "interpolation")]


@pytest.mark.parametrize("row", NOISE_TABLE, ids=lambda row: f"{row[0]}-{row[1]}")
@pytest.mark.slow
def test_noise_by_coupling_is_what_the_page_says(row):
    noise = needed(row, "coupling")
    assert row[4:] == [f"{noise:.4f}", f"{noise / float(row[3]):.2f}"]


def test_the_rows_are_those_of_the_commands():
    commands = re.findall(
        r"--steps (\d+)(?: --weight-decay (\d))?$", TEXTS["docs/accountants.md"], re.M
    )
    assert [(row[1], row[0]) for row in NOISE_TABLE] == [(t, decay or "0") for t, decay in commands]
    first = NOISE_TABLE[0]
    assert f"{float(first[2]) / float(first[3]):.2f} times the noise" in words(
        "docs/accountants.md"
    )
    best = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.01, steps=7)
    assert str(cu.accounting.best_steps(best)) == first[1]


def test_how_much_more_the_closed_form_asks_for():
    noise = re.findall(
        r"^\| unlearned, (closed-form|interpolation) \| (\S+) \|",
        (ROOT / "benchmarks" / "coupling-mnist" / "table.md").read_text(),
        re.MULTILINE,
    )
    values = [float(value) for _, value in noise[:6]]  # those of the three settings
    ratios = [values[i] / values[i + 1] for i in range(0, 6, 2)]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times as much" in words("docs/accountants.md")


def test_how_tight_coupling_is_on_the_grid():
    cells = results("coupling-grid/results.json")["cells"]
    within = sum(cell["ratio"] <= cell["target"] for cell in cells)
    assert f"for {len(cells)} games. In {within} of them" in words("docs/accountants.md")
    assert {round(100 * (cell["target"] - 1)) for cell in cells} == {3, 5, 15}
    assert "3% or 5% without weight decay, 15% with it" in words("docs/accountants.md")


# Names.


def mechanisms():
    return [
        value for name in cu.__all__ if isinstance(value := getattr(cu, name), type(cu.Mechanism))
    ]


def test_every_method_has_a_section():
    sections = re.findall(r"^### `(\w+)`", TEXTS["docs/methods.md"], re.MULTILINE)
    assert set(sections) | {"Mechanism"} == {each.__name__ for each in mechanisms()}


def test_every_accountant_is_listed():
    listed = [row[0].strip('`"') for row in rows("docs/accountants.md", "# Accountants")]
    assert sorted(listed) == sorted(cu.accounting.ACCOUNTANTS)


def test_every_option_of_unlearn_is_listed():
    table = "".join(row[0] for row in rows("docs/loops.md", "## What `unlearn` can do besides"))
    assert set(re.findall(r"(\w+)=", table)) == {f.name for f in dataclasses.fields(cu.Options)}


def resolve(dotted):
    return functools.reduce(getattr, dotted.removeprefix("cu.").split("."), cu)


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md"])
def test_names_that_pages_mention_exist(page):
    for dotted in re.findall(r"\bcu((?:\.\w+)+)", TEXTS[page]):
        resolve(dotted.removeprefix("."))


# What 0.1.0 had at the top and the package has no longer.
GONE = (
    "Keys Linearized PrivateHistory UnlearningFailed UnlearningInterrupted UnlearningResult "
    "UnlearningState Verification add_gaussian_noise available best_steps decay_toward linearized "
    "load_params load_state params_digest project_onto_ball recompute_statistics save_params "
    "save_state system_keys total_variation"
)


def test_every_old_name_has_a_new_one():
    table = rows("CHANGELOG.md", "### Names at the top")
    moved = {re.match(r"`cu\.(\w+)", old).group(1): new for old, new in table}
    assert sorted(moved) == GONE.split()
    for old, new in moved.items():
        assert old not in cu.__all__
        resolve(re.match(r"`(cu[\w.]+)", new).group(1))


def test_every_old_argument_has_a_new_place():
    table = rows("CHANGELOG.md", "### Arguments of `cu.unlearn`")
    old = {re.match(r"`(\w+)=", row[0]).group(1) for row in table}
    options = {f.name for f in dataclasses.fields(cu.Options)}
    newer = {"solver", "gradient_allowance", "save_every", "save_to", "prefetch", "batch_sharding"}
    assert old - {"finetune", "finetune_loss_fn"} == options - newer
    assert {f.name for f in dataclasses.fields(cu.Finetune)} == {"optimizer", "steps", "loss_fn"}


def test_every_new_module_exists():
    same_name = " and the same name"
    for old, new in rows("CHANGELOG.md", "### Modules"):
        names = re.findall(r"`([\w.]+)`", new)
        if new.endswith(same_name):
            names = [names[0] + name for name in re.findall(r"`(\w+)`", old)]
        for name in names:
            assert importlib.util.find_spec(f"certunlearn.{name}"), name


FIELD_WORDS = (
    "init_radius clip_norm model_radius learning_rate weight_decay steps noise_scale epsilon delta "
    "mu retain forget separation contraction shift initial_distance reference centre center "
    "release certificate accountant mechanism"
)


def test_the_glossary_has_the_words_of_the_field():
    listed = [row[0] for row in rows("CONTRIBUTING.md", "## Glossary")]
    listed_words = re.findall(r"\w+", " ".join(listed))
    assert set(FIELD_WORDS.split()) <= set(listed_words)
    kinds = [each for each in mechanisms() if dataclasses.is_dataclass(each)]
    fields = {field.name for each in kinds for field in dataclasses.fields(each)}
    symbols = [row[0].strip("`") for row in rows("CONTRIBUTING.md", "## Glossary")[:6]]
    assert set(symbols) <= fields


def test_every_room_of_the_picture_exists():
    table = rows("CONTRIBUTING.md", "## The house in one picture")
    listed = [name for row in table for name in re.findall(r"`([\w./]+)`", row[0])]
    package = ROOT / "certunlearn"
    assert all((package / name).exists() for name in listed)
    rooms = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(listed)


# Files for tools.


def recipes():
    """The recipe of every target of the Makefile, a list of lines."""
    found, target = {}, None
    for line in (ROOT / "Makefile").read_text().splitlines():
        if named := re.match(r"([\w-]+):", line):
            target = found.setdefault(named.group(1), [])
        elif line.startswith("\t"):
            target.append(line.strip())
    return found


def test_every_make_target_names_files_that_exist():
    targets = recipes()
    assert {"setup", "test", "slow", "lint", "docs", "bench"} <= set(targets)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(phony.group(1).split()) == set(targets)
    for target, recipe in targets.items():
        assert recipe, target
        for line in recipe:
            for path in re.findall(r"[\w./-]+\.(?:py|toml)\b", line):
                assert (ROOT / path).exists(), (target, path)
            for option in re.findall(r"--(?:out|rounds)\b", line):
                script = re.search(r"benchmarks/\w+\.py", line)
                assert script is None or f'"{option}"' in (ROOT / script.group()).read_text()


def test_every_benchmark_is_named():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")}
    assert len(scripts) == 7
    for text in (" ".join(recipes()["bench"]), TEXTS["docs/benchmarks.md"]):
        assert scripts <= set(re.findall(r"(?:benchmarks/|-m benchmarks\.)(\w+)", text))


def test_hooks_run_what_ci_runs():
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (local,) = configuration["repos"]
    assert local["repo"] == "local"
    entries = [hook["entry"] for hook in local["hooks"]]
    assert [entry.replace(" --force-exclude", "") for entry in entries] == [
        "ruff check",
        "ruff format --check",
        "mypy",
    ]
    checks = (ROOT / ".ci" / "run").read_text()
    for hook, entry in zip(local["hooks"], entries, strict=True):
        assert hook["language"] == "system"
        assert {"id", "name"} <= set(hook)
        assert entry.replace(" --force-exclude", "") in checks


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["authors"] == [{"name": "The certunlearn authors"}]
    assert citation["version"] == cu.__version__
    assert citation["license"] == "Apache-2.0"
    cited = [
        (work["year"], [author["family-names"] for author in work["authors"]])
        for work in citation["references"]
    ]
    assert cited == [
        (2025, ["Koloskova", "Allouah", "Jha", "Guerraoui", "Koyejo"]),
        (2024, ["Bok", "Su", "Altschuler"]),
    ]
    assert all({"type", "title"} <= set(work) for work in citation["references"])


def test_what_is_withdrawn_is_refused():
    withdrawn = rows("SECURITY.md", "## Withdrawn")
    assert len(withdrawn) == 1
    (schema,) = re.findall(r"`(certunlearn\.certificate/\d)`", withdrawn[0][0])
    certificate = cu.Certificate.load(ROOT / "benchmarks" / "demo-digits" / "certificate.json")
    assert not cu.verify(dataclasses.replace(certificate, schema=schema))
