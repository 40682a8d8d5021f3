"""Prints the lowest versions that pyproject.toml allows, as constraints for pip.

python .ci/lowest.py >build/lowest.txt && pip install -e ".[test]" -c build/lowest.txt
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?(>=|==)([0-9.]+)")


def lowest(project):
    """Lines such as `numpy==2.0`, one for each package, sorted.

    Raises:
      ValueError: if a requirement names no lowest version, or two of one package differ.
    """
    optional = project["optional-dependencies"]
    # Benchmarks compare with the other libraries of this extra; no test imports them.
    extras = [each for extra, names in optional.items() if extra != "bench" for each in names]
    found = {}
    for requirement in project["dependencies"] + extras:
        if requirement.startswith(project["name"] + "["):
            continue
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} must name a lowest version, as in numpy>=2.0")
        name, _, version = match.groups()
        if found.setdefault(name, version) != version:
            raise ValueError(f"{name} has two lowest versions, {found[name]} and {version}")
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    print("\n".join(lowest(tomllib.loads(PROJECT.read_text())["project"])))
