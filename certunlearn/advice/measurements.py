"""What the committed benchmarks say, as shipped with the package: numbers with their source.

`measured.json` is written by `python -m benchmarks.deletion.measured` from the committed results,
and by nothing else.
"""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

UNITS = ("operations", "seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeCost:
    """What a deletion costs, over what the cheapest retraining to the same accuracy costs.

    Attributes:
      mean: over the seeds of the benchmark; below 1 is cheaper than retraining.
      standard_error: of that mean.
      unit: `"operations"` or `"seconds"`.
      measured_deletions: rows that were deleted there.
      as_measured: whether your numbers of rows, features, classes and deletions are those of the
        benchmark; if not, yours may differ by a lot.
      source: the file of the repository that has the numbers.
    """

    mean: float
    standard_error: float
    unit: str
    measured_deletions: int
    as_measured: bool
    source: str


@functools.cache
def shipped() -> dict[str, Any]:
    """The record; do not change it."""
    text = resources.files("certunlearn.advice").joinpath("measured.json").read_text("utf-8")
    return json.loads(text)


def nearest_size(deletions: int) -> int:
    """The smallest number of deleted rows measured that is not below `deletions`, or the largest.

    Costs of exact deletions grow with the rows, so a larger number flatters nobody.

    >>> [nearest_size(k) for k in (1, 2, 30, 500)]
    [1, 10, 100, 250]
    """
    sizes = sorted(map(int, shipped()["deletion"]["costs"]))
    return next((size for size in sizes if size >= deletions), sizes[-1])


def size_below(deletions: int) -> int | None:
    """The largest number of deleted rows measured that is below `deletions`, or None.

    >>> [size_below(k) for k in (1, 2, 30, 500)]
    [None, 1, 10, 250]
    """
    sizes = map(int, shipped()["deletion"]["costs"])
    return max((size for size in sizes if size < deletions), default=None)


def cost_of(
    method: str,
    *,
    deletions: int,
    rows: int | None,
    features: int | None,
    classes: int | None,
    unit: str,
    public_rows: bool,
) -> RelativeCost | None:
    """The measured cost of a method for a head on public features, or None if it has none."""
    record, size = shipped()["deletion"], nearest_size(deletions)
    which = f"{unit}, {'with' if public_rows else 'without'} public rows"
    found = record["costs"][str(size)][method][which]
    if found is None:
        return None
    same = (rows, features, classes) == tuple(record[k] for k in ("rows", "features", "classes"))
    return RelativeCost(
        mean=found[0],
        standard_error=found[1],
        unit=unit,
        measured_deletions=size,
        as_measured=same and size == deletions,
        source=record["source"],
    )


def describe_case() -> str:
    """What was measured, in words."""
    record = shipped()["deletion"]
    return f"{record['rows']:,} rows, {record['features']} features, {record['classes']} classes"


def count_of_rows(count: int) -> str:
    """A number of rows, in words."""
    return "1 row" if count == 1 else f"{count} rows"


def percent(cost: RelativeCost) -> str:
    """Mean and standard error."""
    return f"{cost.mean:.1%} +- {cost.standard_error:.1%}"


def in_words(cost: RelativeCost) -> str:
    """A measured cost, and how far it is from the user's case."""
    case = "as in your case" if cost.as_measured else "yours may differ by a lot"
    return (
        f"{percent(cost)} of the {cost.unit} of the cheapest retraining, measured for "
        f"{count_of_rows(cost.measured_deletions)} deleted of {describe_case()}: {case} "
        f"({cost.source})."
    )
