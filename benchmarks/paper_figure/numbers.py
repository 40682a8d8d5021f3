"""What the finished cells say: means, standard errors, comparisons of paired seeds."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from benchmarks.paper_figure.experiment import CENTER, DEFAULT, METHODS, SAME, Sweep, curve

CONFIDENCE = 0.95  # of the interval (Student's t) that must not hold 0 where a difference counts


class Difference(NamedTuple):
    """In one place, and half the width of its confidence interval over seeds."""

    mean: float
    margin: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval does not hold 0, else 0."""
        return int(np.sign(self.mean)) * (abs(self.mean) > self.margin)


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error in per cent; of a single seed no error is known."""
    numbers = 100 * np.asarray(values)
    error = numbers.std(ddof=1) / len(numbers) ** 0.5 if len(numbers) > 1 else np.nan
    return float(numbers.mean()), float(error)


def percent(values: Sequence[float]) -> str:
    """Mean and standard error as text."""
    mean, error = mean_error(values)
    return f"{mean:.1f}" if np.isnan(error) else f"{mean:.1f} +- {error:.1f}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of two methods that share each seed's batches; in per cent."""
    mean, error = mean_error(np.subtract(ours, theirs).tolist())
    return Difference(mean, error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(ours) - 1))


def problems(record: dict[str, Any]) -> list[str]:
    """Those with all cells of the first question."""
    return [
        name
        for name in record["plan"]["parts"]
        if all(has(record, name, m, e) for m in METHODS for e in record["plan"]["epsilons"])
    ]


def is_finished(record: dict[str, Any], problem: str) -> bool:
    """Whether nothing of either question is missing for a problem."""
    sweep = record["plan"]["sweep"]
    places = Sweep(**sweep).places()
    found = [place for place in swept(record) if place.problem == problem]
    rate = record["plan"]["parts"][problem]["grid"]["rates"][-1]
    methods = [has(record, problem, m, e) for m in METHODS for e in record["plan"]["epsilons"]]
    beside = f"retrained/{problem}/{rate:g}" in record["cells"]
    return all(methods) and beside and len(found) == len(places)


def has(record: dict[str, Any], problem: str, method: str, epsilon: float) -> bool:
    """Whether a method's cell is finished, or will never be as no noise is certified."""
    if refusal(record, method, epsilon):
        return True
    try:
        curve(record["cells"], problem, method, epsilon)
    except KeyError:
        return False
    return True


def refusal(record: dict[str, Any], method: str, epsilon: float) -> str | None:
    """Why a method certifies nothing at this epsilon, if so."""
    certified = DEFAULT if method in (CENTER, SAME) else method
    cell = record["cells"].get(f"scale/{certified}/{epsilon:g}", {})
    return cell.get("refused")


def comparisons(record: dict[str, Any], ours: str, theirs: str) -> list[Difference]:
    """In every place: problem, epsilon and number of example gradients."""
    return [
        difference(mine, other)
        for problem in problems(record)
        for epsilon in record["plan"]["epsilons"]
        if not (refusal(record, ours, epsilon) or refusal(record, theirs, epsilon))
        for mine, other in zip(
            curve(record["cells"], problem, ours, epsilon)["accuracy"],
            curve(record["cells"], problem, theirs, epsilon)["accuracy"],
            strict=True,
        )
    ]


class Place(NamedTuple):
    """One place of the second question, with both curves."""

    problem: str
    radius: float
    epsilon: float
    unlearned: dict[str, Any]
    center: dict[str, Any]


def swept(record: dict[str, Any]) -> Iterator[Place]:
    """The finished places of the second question."""
    cells = record["cells"]
    keys = [key.split("/") for key in cells if key.startswith("sweep/") and "/unlearned/" in key]
    for _, problem, _, radius, epsilon in sorted(
        keys, key=lambda key: (key[1] != "mnist", float(key[3]), float(key[4]))
    ):
        other = cells.get(f"sweep/{problem}/{CENTER}/{radius}/{epsilon}")
        if other:
            mine = cells[f"sweep/{problem}/unlearned/{radius}/{epsilon}"]
            yield Place(problem, float(radius), float(epsilon), mine, other)


def better_and_worse(found: Sequence[Difference]) -> tuple[int, int]:
    """In how many places ours is surely better, and surely worse."""
    return sum(each.sign > 0 for each in found), sum(each.sign < 0 for each in found)
