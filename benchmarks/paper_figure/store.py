"""Finished cells in one JSON file: a second call of the command does only what is missing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from certunlearn._numerics import files


def load(path: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The cells that a call with the same plan left in this file.

    Raises:
      ValueError: if the file was written with another plan: its cells answer other questions.
    """
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    if record["plan"] != json.loads(json.dumps(plan)):
        raise ValueError(f"{path} was written with another plan: give another --out, or delete it")
    return dict(record["cells"])


def save(path: Path, plan: Mapping[str, Any], cells: Mapping[str, Any], **more: Any) -> None:
    """Writes the file, whole or not at all; cells are sorted, whatever order they were made in."""
    record = {**more, "plan": plan, "cells": dict(sorted(cells.items()))}
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, lambda file: file.write(text.encode()))


class Store:
    """Cells by name. Each new one is written to the file before the next is begun."""

    def __init__(self, path: Path, plan: Mapping[str, Any], more: Mapping[str, Any]) -> None:
        """Goes on with the file's cells; `more` is written beside the plan."""
        self._path, self._plan, self._more = path, plan, more
        self.cells = load(path, plan)

    def cell(self, name: str, make: Callable[[], Any]) -> Any:
        """The cell of this name, made now if no call has finished it."""
        if name not in self.cells:
            self.update({name: make()})
        return self.cells[name]

    def update(self, cells: Mapping[str, Any]) -> None:
        """Adds finished cells."""
        # Numbers are kept as a reader of the file gets them, so that resuming changes nothing.
        self.cells |= json.loads(json.dumps(cells, allow_nan=False))
        save(self._path, self._plan, self.cells, **self._more)
        print(f"done: {', '.join(cells)}"[:150], flush=True)
