"""What a release rests on: one version, and an import that needs no installation."""

import subprocess
import sys
import tomllib
from pathlib import Path

import certunlearn as cu
from certunlearn import _version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# As in a clone that is not installed: nothing knows a distribution of this name.
FROM_SOURCE = """
import importlib.metadata

known = importlib.metadata.version

def version(name):
    if name == "certunlearn":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)

importlib.metadata.version = version
import certunlearn as cu
from certunlearn.certificates import issuing

print(cu.__version__, issuing._versions()["certunlearn"])
"""


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    read = PROJECT["tool"]["setuptools"]["dynamic"]["version"]
    assert read == {"attr": "certunlearn._version.__version__"}
    assert cu.__version__ == _version.__version__


def test_a_source_tree_that_is_not_installed_can_be_imported():
    done = subprocess.run([sys.executable, "-c", FROM_SOURCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [cu.__version__, cu.__version__]
