"""Runs the notebooks, and compares what they print with what they store.

    python .ci/notebooks.py             # fails where a stored output is not the code's
    python .ci/notebooks.py --update    # stores the outputs of this run instead

Numbers may differ by what another machine's rounding can do: RELATIVE of their size plus ABSOLUTE.
All other text must be equal. Of a picture only its presence is compared.
"""

import argparse
import difflib
import math
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.]*\w)")
RELATIVE = 0.01
# An accuracy on 360 images may flip four of them.
ABSOLUTE = 0.011
SECONDS_PER_CELL = 900


def printed(cell: nbformat.NotebookNode) -> str:
    """A code cell's text, of all its outputs in order; a picture counts as a line of its own."""
    parts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            parts.append(output.text)
        elif "image/png" in output.get("data", {}):
            parts.append("<picture>\n")
        else:
            data = output.get("data", {})
            parts.append(data.get("text/markdown") or data.get("text/plain") or "")
    return "".join(parts)


def same(stored: str, found: str) -> bool:
    """Whether two texts are equal but for small differences of their numbers."""
    words = [re.sub(r"\s+", " ", NUMBER.sub("#", text)) for text in (stored, found)]
    if words[0] != words[1]:
        return False
    old, new = ([float(word) for word in NUMBER.findall(text)] for text in (stored, found))
    # Small numbers, such as a delta or a noise scale, have only their relative tolerance.
    return all(
        math.isclose(a, b, rel_tol=RELATIVE) or (min(a, b) >= 0.1 and abs(a - b) <= ABSOLUTE)
        for a, b in zip(old, new, strict=True)
    )


def differences(path: Path, update: bool) -> list[str]:
    """What a run of the notebook at `path` prints otherwise than it stores."""
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.from_dict(stored)
    NotebookClient(
        fresh,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
    ).execute()
    found = []
    for number, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        if old.cell_type == "code" and not same(printed(old), printed(new)):
            lines = difflib.unified_diff(
                printed(old).splitlines(), printed(new).splitlines(), "stored", "found", lineterm=""
            )
            found.append(f"{path.name}, cell {number}:\n" + "\n".join(lines))
    if update:
        for cell in fresh.cells:
            cell.metadata.pop("execution", None)
        fresh.metadata.get("language_info", {}).pop("version", None)
        nbformat.write(fresh, path)
    return found


def main() -> int:
    """Runs all notebooks, or those that are named; 1 if an output is not the stored one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--update", action="store_true", help="store what this run prints")
    args = parser.parse_args()
    wrong = []
    for path in args.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb")):
        wrong += differences(path, args.update)
        print(f"{path.name}: run", flush=True)
    print("\n\n".join(wrong))
    return int(bool(wrong) and not args.update)


if __name__ == "__main__":
    sys.exit(main())
