"""What deletion costs, method by method, beside the cheapest retraining to the same accuracy.

    CERTUNLEARN_DATA_DIR=folder-that-holds-cifar10 python -m benchmarks.deletion

from the repository's root writes results.json, table.md and picture.png into benchmarks/deletion/.
`--quick` takes seconds: a tiny network on synthetic images, whose numbers mean nothing.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import threadpoolctl

from benchmarks.deletion import experiment, features, report
from benchmarks.deletion.experiment import Plan
from certunlearn._numerics import files
from certunlearn.demo import image_halves

WIDTHS, EPOCHS = (32, 64, 128), 7
QUICK_WIDTHS, QUICK_EPOCHS = (4, 8, 8), 6
QUICK = Plan(sizes=(10,), chain=2, rounds=1, every=9)
PACKAGES = ("certunlearn", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")


def main() -> None:
    """Runs all seeds and writes the files, each whole or not at all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds, synthetic images")
    parser.add_argument(
        "--seeds", type=int, choices=range(1, 17), metavar="N", help="3; 1 if quick"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=Plan().sizes, metavar="K")
    parser.add_argument("--cache", type=Path, help="private folder of features; not with --quick")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    begun = time.perf_counter()
    if args.quick:
        found = features.make(image_halves.synthetic(2400, 600), QUICK_WIDTHS, QUICK_EPOCHS)
        plan = QUICK
    else:
        path = (args.cache or features.default_cache()) / f"cifar10-{EPOCHS}.private.npz"
        data = os.environ.get("CERTUNLEARN_DATA_DIR")
        found = features.cached(path, lambda: image_halves.cifar10(data), WIDTHS, EPOCHS)
        plan = Plan(sizes=tuple(args.sizes))
    made = time.perf_counter() - begun
    # One thread of BLAS: a head's products are too small for more.
    with threadpoolctl.threadpool_limits(1, "blas"):
        runs = [
            experiment.run(found, seed, plan)
            for seed in range(args.seeds or (1 if args.quick else 3))
        ]
    record: dict[str, Any] = {
        "command": "python -m benchmarks.deletion" + " --quick" * args.quick,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, one BLAS thread",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "quick": args.quick,
        "epochs": QUICK_EPOCHS if args.quick else EPOCHS,
        "plan": plan._asdict(),
        "seconds_of_features": made,
        "seconds": time.perf_counter() - begun,
        "seeds": runs,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    record = report.finite(record)
    texts = {
        "results.json": json.dumps(record, indent=1, allow_nan=False) + "\n",
        "table.md": report.to_text(record),
    }
    for name, text in texts.items():
        files.write_atomically(args.out / name, lambda file, text=text: file.write(text.encode()))
    figure = report.picture(record)
    files.write_atomically(args.out / "picture.png", lambda f: figure.savefig(f, format="png"))
    print(f"\n{texts['table.md']}\nWrote {args.out} in {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
