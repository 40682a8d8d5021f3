"""Checks what a built wheel and source distribution hold.

python .ci/distributions.py dist
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_BYTES = {".whl": 2_000_000, ".gz": 5_000_000}
# Of the tracked files these stay out of the source distribution.
LEFT_OUT = {".gitignore"}
# Folders of things that are made, in a copy without Git.
NO_SOURCE = {"__pycache__", "build", "dist", "certunlearn.egg-info", ".git"}


def project_files():
    """Paths of the project's files: those that Git knows, or all in a copy without it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return {path for path in listed.stdout.splitlines() if (ROOT / path).exists()}
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if not NO_SOURCE & set(path.parts)}


def wheel_problems(names, expected):
    """What is missing from the package in a wheel, or beside it."""
    package = {name for name in expected if name.startswith("certunlearn/")}
    found = {name for name in names if ".dist-info/" not in name}
    missing, more = sorted(package - found), sorted(found - package)
    return [f"the wheel lacks {name}" for name in missing] + [f"the wheel has {n}" for n in more]


def source_problems(names, expected):
    """What is missing from a source distribution, or in it and no part of the project."""
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    made = {name for name in inside if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    missing, more = sorted(expected - LEFT_OUT - inside), sorted(inside - made - expected)
    return [f"the sdist lacks {name}" for name in missing] + [f"the sdist has {n}" for n in more]


def problems(folder):
    """All that is wrong with the distributions in a folder."""
    found, expected = [], project_files()
    wheels, sources = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if (len(wheels), len(sources)) != (1, 1):
        return [f"{folder} must hold one wheel and one source distribution"]
    with zipfile.ZipFile(wheels[0]) as wheel:
        found += wheel_problems(wheel.namelist(), expected)
    with tarfile.open(sources[0]) as source:
        found += source_problems([m.name for m in source.getmembers() if m.isfile()], expected)
    for path in (*wheels, *sources):
        if path.stat().st_size > MOST_BYTES[path.suffix]:
            found.append(f"{path.name} has {path.stat().st_size} bytes")
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "the wheel and the source distribution hold what they should")
    sys.exit(bool(wrong))
