"""What a release rests on beside the code: lowest versions, workflows, distributions, templates."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))


def script(name):
    """A module of .ci, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jobs():
    found = {}
    for path in WORKFLOWS:
        found |= yaml.safe_load(path.read_text())["jobs"]
    return found


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


# ------------------------------------------------------------------------------ workflows


def test_workflows_check_what_a_landing_needs():
    ran = {name: commands(job) for name, job in jobs().items()}
    everything = {command for each in ran.values() for command in each}
    needed = ("lint", "test", "slow", "docs", "dist", "setup-lowest", "setup-newest")
    assert {f"make {target}" for target in needed} <= everything
    for each in ran.values():  # an environment before what runs in it
        assert re.match(r"make setup|python -m pip install", each[0]), each


def test_workflows_run_what_exists():
    extras = PROJECT["optional-dependencies"]
    for name, job in jobs().items():
        for command in commands(job):
            words = shlex.split(command)
            if words[0] == "make":
                assert len(words) == 2, (name, command)
                assert words[1] in TARGETS, (name, command)
            else:
                assert words[:4] == ["python", "-m", "pip", "install"], (name, command)
                asked = re.fullmatch(r"\.\[([\w,]+)\]", words[-1]).group(1)
                assert set(asked.split(",")) <= set(extras), (name, command)


def test_workflows_cover_the_versions_of_python_that_are_promised():
    tested = jobs()["tests"]["strategy"]["matrix"]["python"]
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert tested == classified == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={tested[0]}"
    with_python = [s["with"]["python-version"] for s in jobs()["lowest"]["steps"] if "with" in s]
    assert with_python == [tested[0]]


def test_workflows_upload_nothing_and_may_write_nothing():
    for path in WORKFLOWS:
        text = path.read_text()
        assert not re.search(
            r"upload|publish|secrets\.|pull_request_target", text.split("name:")[1]
        )
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}


# ------------------------------------------------------------------------------ versions


def test_lowest_versions_are_those_of_the_project():
    lowest = script("lowest")
    found = dict(line.split("==") for line in lowest.lowest(PROJECT))
    for requirement in PROJECT["dependencies"]:
        name, version = requirement.split(">=")
        assert found[name] == version
    assert {"flax", "pytest", "jsonschema"} <= set(found)
    assert not {"certunlearn", "torch"} & set(found)


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [(["numpy"], "lowest version"), (["numpy<3"], "lowest version"), (["b>=1", "b>=2"], "two")],
)
def test_what_has_no_lowest_version_is_refused(dependencies, message):
    project = {"name": "x", "dependencies": dependencies, "optional-dependencies": {}}
    with pytest.raises(ValueError, match=message):
        script("lowest").lowest(project)


# ------------------------------------------------------------------------------ distributions


def test_what_a_distribution_lacks_or_has_too_much_is_named():
    check = script("distributions")
    expected = {"certunlearn/a.py", "certunlearn/b.json", "tests/test_a.py", ".gitignore"}
    wheel = ["certunlearn/a.py", "certunlearn/b.json", "certunlearn-1.dist-info/METADATA"]
    assert check.wheel_problems(wheel, expected) == []
    assert check.wheel_problems(wheel[:1], expected) == ["the wheel lacks certunlearn/b.json"]
    assert check.wheel_problems([*wheel, "tests/a"], expected) == ["the wheel has tests/a"]
    source = [f"x-1/{name}" for name in (*sorted(expected - {".gitignore"}), "PKG-INFO")]
    assert check.source_problems(source, expected) == []
    assert check.source_problems(source[1:], expected) == ["the sdist lacks certunlearn/a.py"]
    assert check.source_problems([*source, "x-1/k"], expected) == ["the sdist has k"]


def test_package_data_are_named_in_the_project():
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = whole["tool"]["setuptools"]["package-data"]["certunlearn"]
    package = ROOT / "certunlearn"
    data = {path for path in package.rglob("*") if path.suffix in (".json", ".typed")}
    assert data == {path for pattern in patterns for path in package.glob(pattern)}
    assert package / "certificates" / "certificate.schema.json" in data


def test_issues_have_templates():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("[!c]*.yml"))]
    assert len(forms) == 2
    for form in forms:
        assert {"name", "description", "body"} <= set(form)
        assert all(part["type"] in ("markdown", "textarea") for part in form["body"])
    assert "SECURITY.md" in (folder / "unsound-certificate.md").read_text()
    assert (ROOT / ".github" / "pull_request_template.md").exists()


def test_the_page_on_installing_knows_extras_and_versions():
    page = (ROOT / "docs" / "installing.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert set(named) == set(PROJECT["optional-dependencies"])
    python, jax, numpy = re.search(
        r"Python ([\d.]+) or.* JAX ([\d.]+) and NumPy ([\d.]+) among", page, re.DOTALL
    ).groups()
    assert f">={python}" == PROJECT["requires-python"]
    assert {f"jax>={jax}", f"numpy>={numpy}"} <= set(PROJECT["dependencies"])
