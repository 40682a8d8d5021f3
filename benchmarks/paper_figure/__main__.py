"""The paper's figure, redone: accuracy against compute at a true epsilon, and where it fails.

    CERTUNLEARN_DATA_DIR=folder-that-holds-both python -m benchmarks.paper_figure

from the repository's root writes results.json, table.md and pictures into benchmarks/paper-figure/.
Each finished cell is in results.json at once: a second call goes on where the first one ended.
`--quick` takes up to two minutes, and its numbers mean nothing.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from benchmarks.paper_figure import (
    datasets,
    experiment,
    numbers,
    pictures,
    plans,
    report,
    running,
    scales,
)
from benchmarks.paper_figure.store import Store
from certunlearn._numerics import files

PACKAGES = ("certunlearn", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")


def run(store: Store, plan: plans.Plan, data_dir: str | None) -> None:
    """Makes all cells that are missing."""
    for name, part in plan.parts.items():
        if numbers.is_finished({"plan": plan.record(), "cells": store.cells}, name):
            continue
        problem = datasets.load(name, data_dir, part.validation, part.train)
        store.cell(f"parameters/{name}", lambda problem=problem: datasets.parameters(problem))
        tuning = running.prepare(problem, part.schedule, [experiment.TUNING_SEED])
        for method in scales.CERTIFIED:
            experiment.tune(store, tuning, part.grid, method, plan.epsilons, plan.seeds)
        experiment.tune_retraining(store, tuning, part.grid, plan.seeds)
        lab = running.prepare(problem, part.schedule, range(plan.seeds))
        experiment.compare(store, lab, plan.epsilons)
        experiment.sweep(store, lab, part.grid, plan.sweep)


def write(record: dict[str, Any], out: Path) -> None:
    """The table and the pictures of what is finished."""
    text = report.to_text(record).encode()
    files.write_atomically(out / "table.md", lambda file: file.write(text))
    for name, draw in (("picture.png", pictures.compute), ("radii.png", pictures.radii)):
        figure = draw(record)
        files.write_atomically(out / name, lambda f, figure=figure: figure.savefig(f, format="png"))


def main() -> None:
    """Runs what is missing and writes the files, each whole or not at all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, choices=range(1, 17), metavar="N", help="5; 1 if quick"
    )
    parser.add_argument("--quick", action="store_true", help="two minutes; numbers mean nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "paper-figure")
    args = parser.parse_args()
    seeds = args.seeds or (1 if args.quick else 5)
    plan = plans.quick(seeds) if args.quick else plans.full(seeds)
    more = {
        "command": "python -m benchmarks.paper_figure" + " --quick" * args.quick,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "processor": f"{platform.machine()}, {len(os.sched_getaffinity(0))} core used",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "quick": args.quick,
    }
    store = Store(args.out / "results.json", plan.record(), more)
    run(store, plan, os.environ.get("CERTUNLEARN_DATA_DIR") or None)
    write(json.loads((args.out / "results.json").read_text()), args.out)


if __name__ == "__main__":
    main()
