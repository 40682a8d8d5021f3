"""Writes what `certunlearn.advice` ships of the committed benchmarks; it measures nothing.

    python -m benchmarks.deletion.measured

Run it after a benchmark that it reads has been run again. A test compares the file with what this
module makes of the committed results.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.deletion import report
from certunlearn._numerics import files

BENCHMARKS = Path(__file__).parents[1]
SHIPPED = BENCHMARKS.parent / "certunlearn" / "advice" / "measured.json"
DELETION, CONTRACTING, NETWORK = (
    "deletion/results.json",
    "deletion/baselines.json",
    "coupling-mnist/results.json",
)
COSTS = {"operations": "flops", "seconds": "wall"}


def spread(values: Sequence[float | None]) -> list[float] | None:
    """Mean and standard error; None if a seed has no number."""
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    numbers = np.asarray(values, float)
    return [float(np.mean(numbers)), float(np.std(numbers, ddof=1) / math.sqrt(len(numbers)))]


def of_deletion(record: dict[str, Any]) -> dict[str, Any]:
    """Costs over those of the cheapest retraining, of rows at random; accuracies; passes."""
    first = record["seeds"][0]
    some = [each for each in report.requests(record) if each[0]["kind"] == "random"]
    return {
        "source": f"benchmarks/{DELETION}",
        "seeds": len(record["seeds"]),
        "rows": first["rows"]["train"],
        "features": first["features"],
        "classes": first["outputs"],
        "test_accuracy": {
            name: spread([run["heads"][name]["test"] for run in record["seeds"]])
            for name in ("exact ridge", "softmax minimiser")
        },
        "passes": {
            str(same[0]["size"]): spread(
                [
                    each["rows"]["perturbed minimiser"]["examples"] / first["rows"]["train"]
                    for each in same
                ]
            )
            for same in some
        },
        "costs": {
            str(same[0]["size"]): {
                method: {
                    f"{unit}, {'with' if public else 'without'} public rows": spread(
                        [report.ratio(each, method, key, public) for each in same]
                    )
                    for unit, key in COSTS.items()
                    for public in (True, False)
                }
                for method in report.METHODS
            }
            for same in some
        },
    }


def of_contracting(record: dict[str, Any]) -> dict[str, Any]:
    """Operations of contracting steps over those of the cheapest retraining."""
    return {
        "source": f"benchmarks/{CONTRACTING}",
        "times": {
            size: {
                name: spread(
                    [
                        seed["contracting"][name][size]["flops"] / seed["yardsticks"][size]
                        for seed in record["seeds"]
                    ]
                )
                for name in record["seeds"][0]["contracting"]
            }
            for size in map(str, record["sizes"])
        },
    }


def of_network(record: dict[str, Any]) -> dict[str, Any]:
    """Test accuracy of a network after all epochs, in the setting that suits unlearning best."""
    last = lambda entry: entry[-1]["test"]  # noqa: E731
    best = max(record["settings"], key=lambda each: np.mean(last(_coupled(each)["unlearned"])))
    runs = _coupled(best)
    return {
        "source": f"benchmarks/{NETWORK}",
        "seeds": record["seeds"],
        **record["certificate"],
        "epochs": runs["unlearned"][-1]["epochs"],
        "test_accuracy": {
            "unlearned": spread(last(runs["unlearned"])),
            "from the centre": spread(last(runs["from the centre"])),
            "retrained": spread(last(best["retrained"])),
        },
    }


def _coupled(setting: dict[str, Any]) -> dict[str, Any]:
    return setting["runs"]["coupling"]


def collected() -> str:
    """The file's text, from the committed results."""
    read = lambda name: json.loads((BENCHMARKS / name).read_text())  # noqa: E731
    found = {
        "deletion": of_deletion(read(DELETION)),
        "contracting": of_contracting(read(CONTRACTING)),
        "network": of_network(read(NETWORK)),
    }
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


if __name__ == "__main__":
    files.write_atomically(SHIPPED, lambda file: file.write(collected().encode()))
