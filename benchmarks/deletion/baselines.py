"""Baselines that do not pay, beside the yardsticks of results.json: shards, and contracting steps.

    CERTUNLEARN_DATA_DIR=folder-that-holds-cifar10 python -m benchmarks.deletion.baselines

from the repository's root, after `python -m benchmarks.deletion`, writes baselines.json and
baselines.md into benchmarks/deletion/. It counts operations and takes no times.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import certunlearn as cu
from benchmarks.deletion import costs, deletions, features, report, retraining
from benchmarks.deletion.__main__ import EPOCHS, WIDTHS
from benchmarks.deletion.features import Split
from benchmarks.deletion.retraining import Family
from certunlearn._numerics import files
from certunlearn.demo import image_halves

SHARDS = (8, 32)
L2 = (1e-5, 1e-4, 1e-3)  # of the softmax head that steps contract to
TRAINED_TO = 1e-3  # gradient norm of the trained head, as a share of l2
CLAIM = """\
Operations of a deletion beside the cheapest retraining without public curvature to the exact ridge
head's held-out accuracy, as in table.md; means over seeds +- standard errors.

**Sharded training** splits the private rows at random, trains a head on each shard with the
cheapest family of the whole, and releases the mean of the heads. It stops at the target, or where
it is best. A request retrains the shards that it hits: the expected number, for rows at random.
**Contracting steps** are worked out from the constants, not run: as many steps of full-batch
descent from the old minimiser as bring the noise of (1, 1e-5) down to 0.05 in every weight, from
the distance that is known beforehand. l2 is the best of three with a minimiser at the target."""


def shards(
    split: Split, public: retraining.Public, found: dict[str, Any], count: int, target: float
) -> dict[str, float | bool]:
    """The mean of heads trained apart: its accuracies, and what one shard's training takes."""
    family = Family(found["loss"], found["solver"], found["start"])
    order = np.random.default_rng(count).permutation(len(split.train.y))
    parts = [split.train.take(part) for part in np.array_split(order, count)]
    runs: list[Iterator[Any]] = [
        retraining.points(
            family, found["setting"], retraining.begin(family, rows, split.classes, public)
        )
        for rows in parts
    ]
    best = {"validation": -1.0}
    for stop in zip(*runs, strict=False):
        head = np.mean([each for each, _ in stop], axis=0)
        validation = retraining.accuracy(head, split.validation)
        if validation > best["validation"]:
            best = {
                "validation": validation,
                "test": retraining.accuracy(head, split.test),
                "flops": float(np.mean([cost.flops for _, cost in stop])),
            }
        if validation >= target:
            break
    return best | {"reached": best["validation"] >= target}


def hit(count: int, deleted: int) -> float:
    """Expected number of shards that hold one of so many random rows."""
    return count * (1 - (1 - 1 / count) ** deleted)


def steps_needed(loss: cu.convex.ConvexLoss, size: int, deleted: int) -> dict[str, int]:
    """Steps until the noise for (1, 1e-5) is small enough, for both contracting mechanisms."""
    low, high = loss.strong_convexity, loss.smoothness
    constants = {
        "initial_distance": cu.convex.stability_distance(
            loss, size=size, deletions=deleted, gradient_norm=TRAINED_TO * low
        ),
        "learning_rate": 2 / (low + high),
        "strong_convexity": low,
        "smoothness": high,
    }
    claim = {
        "epsilon": deletions.EPSILON,
        "delta": deletions.DELTA,
        "accountant": "interpolation",
    }

    def small(kind: Any, steps: int) -> bool:
        mechanism = kind(**constants, steps=steps)
        sigma = cu.noise_scale(mechanism, **claim)
        return mechanism.total_noise_scale(sigma) <= deletions.NOISE

    found = {}
    for name, kind in (
        ("descent-to-delete", cu.DescentToDelete),
        ("projected noisy SGD", cu.ProjectedNoisySGD),
    ):
        high_steps = 1
        while not small(kind, high_steps):
            high_steps *= 2
        low_steps = high_steps // 2
        while high_steps - low_steps > max(1, high_steps // 100):
            middle = (low_steps + high_steps) // 2
            low_steps, high_steps = (
                (low_steps, middle) if small(kind, middle) else (middle, high_steps)
            )
        found[name] = high_steps
    return found


def contracting(split: Split, sizes: list[int], target: float) -> dict[str, dict[str, Any]]:
    """What descent costs until it may add its noise, for each number of deletions."""
    n, d = split.train.x.shape
    one = costs.gradient(n, d, split.classes).flops
    rows: dict[str, dict[str, Any]] = {}
    for l2 in L2:
        loss = cu.convex.logistic_regression(feature_norm=1.0, l2=l2, classes=split.classes)
        data = (split.train.x, split.train.y)
        found = cu.solvers.minimize(
            loss, np.zeros((d, split.classes)), data, tolerance=TRAINED_TO * l2
        )
        validation = retraining.accuracy(np.asarray(found.params), split.validation)
        if validation < target:
            continue
        for size in sizes:
            for name, steps in steps_needed(loss, n, size).items():
                old = rows.setdefault(name, {}).get(str(size), {"flops": math.inf})
                if steps * one < old["flops"]:
                    rows[name][str(size)] = {"l2": l2, "steps": steps, "flops": steps * one}
    return rows


def measure(everything: features.Features, run: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """One seed's baselines and yardsticks."""
    split = features.split(everything, run["seed"])
    public = retraining.public_knowledge(split)
    target = run["heads"]["exact ridge"]["validation"]
    family = next(each for each in run["retraining"]["ridge"] if not each["public_curvature"])
    marks = {
        str(each["size"]): min(
            mark["flops"]
            for mark in each["retraining"]["ridge"]
            if not mark["public_curvature"] and mark["flops"] is not None
        )
        for each in run["requests"]
        if each["kind"] == "random"
    }
    return {
        "seed": run["seed"],
        "target": target,
        "yardsticks": marks,
        "shards": {str(s): shards(split, public, family, s, target) for s in SHARDS},
        "contracting": contracting(split, sizes, target),
    }


def to_text(record: dict[str, Any]) -> str:
    """The record as a table."""
    sizes = [str(size) for size in record["sizes"]]
    head = ["baseline", "held-out", "test", *(f"k = {size}" for size in sizes)]
    lines = [head, ["---"] * len(head)]
    seeds = record["seeds"]
    for count in map(str, SHARDS):
        found = [seed["shards"][count] for seed in seeds]
        accuracies = [
            report.spread([each[name] for each in found], ".1f", 100) + "%"
            for name in ("validation", "test")
        ]
        ratios = [
            report.spread(
                [
                    hit(int(count), int(size)) * each["flops"] / seed["yardsticks"][size]
                    for each, seed in zip(found, seeds, strict=True)
                ],
                ".0f",
                100,
            )
            + "%"
            for size in sizes
        ]
        missed = "" if all(each["reached"] for each in found) else " (below the target)"
        lines.append([f"{count} shards, heads averaged{missed}", *accuracies, *ratios])
    for name in seeds[0]["contracting"]:
        ratios = [
            report.spread(
                [s["contracting"][name][size]["flops"] / s["yardsticks"][size] for s in seeds],
                ".0f",
            )
            + " times"
            for size in sizes
        ]
        lines.append([f"{name}, worked out", "at least the target", "—", *ratios])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{CLAIM}\n\n{table}\n"


def main() -> None:
    """Works all seeds out and writes the files, each whole or not at all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, help="private folder of features")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="of results.json")
    args = parser.parse_args()
    results = json.loads((args.out / "results.json").read_text())
    path = (args.cache or features.default_cache()) / f"cifar10-{EPOCHS}.private.npz"
    data = os.environ.get("CERTUNLEARN_DATA_DIR")
    everything = features.cached(path, lambda: image_halves.cifar10(data), WIDTHS, EPOCHS)
    sizes = results["plan"]["sizes"]
    record = {
        "command": "python -m benchmarks.deletion.baselines",
        "versions": results["versions"],
        "sizes": sizes,
        "seeds": [measure(everything, run, sizes) for run in results["seeds"]],
    }
    texts = {
        "baselines.json": json.dumps(report.finite(record), indent=1, allow_nan=False) + "\n",
        "baselines.md": to_text(record),
    }
    for name, text in texts.items():
        files.write_atomically(args.out / name, lambda file, text=text: file.write(text.encode()))
    print(texts["baselines.md"])


if __name__ == "__main__":
    main()
