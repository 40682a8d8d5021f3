"""The cells of both questions: tuning on the validation split, then runs of all seeds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.paper_figure import running, scales
from benchmarks.paper_figure.running import Lab, Trial
from benchmarks.paper_figure.store import Store

SAME, TUNED = "retrained, same schedule", "retrained, tuned"
CENTER = "from the centre"
METHODS = (*scales.CERTIFIED, CENTER, SAME, TUNED)
DEFAULT = f"{scales.GRADIENT}, coupling"  # the centre's run and the same schedule's are its twins
TUNING_SEED = 100  # not one of those that the results are of


class Grid(NamedTuple):
    """Hyperparameters of a problem. Every method has equally many trials at each epsilon.

    Attributes:
      radii: of certified methods.
      rates: of their fine-tuning by Adam; each goes with each radius.
      retraining_rates: of the tuned retraining.
    """

    radii: tuple[float, ...]
    rates: tuple[float, ...]
    retraining_rates: tuple[float, ...]


class Sweep(NamedTuple):
    """Where it does not pay: radii at a few epsilons, and epsilons at one radius."""

    radii: tuple[float, ...]
    at_epsilons: tuple[float, ...]
    epsilons: tuple[float, ...]
    at_radius: float

    def places(self) -> list[tuple[float, float]]:
        """Pairs of radius and epsilon, each once."""
        grid = [(radius, epsilon) for epsilon in self.at_epsilons for radius in self.radii]
        line = [(self.at_radius, epsilon) for epsilon in self.epsilons]
        return sorted({*grid, *line})


def unit_scale(store: Store, method: str, epsilon: float, noisy_steps: int) -> dict[str, Any]:
    """The noise scale at radius 1, made once for both problems."""
    name = f"scale/{method}/{epsilon:g}"
    return dict(store.cell(name, lambda: scales.unit_scale(method, epsilon, noisy_steps)))


def tune(
    store: Store, lab: Lab, grid: Grid, method: str, epsilons: Sequence[float], together: int
) -> None:
    """The validation accuracies of all trials of a certified method."""
    for epsilon in epsilons:
        unit = unit_scale(store, method, epsilon, lab.schedule.noisy_steps)
        if "refused" in unit:
            continue
        trials = [Trial(c0, rate, unit["scale"]) for c0 in grid.radii for rate in grid.rates]

        def make(trials: list[Trial] = trials) -> list[Any]:
            run = lambda part: running.unlearned(lab, method, part, lab.problem.validation)  # noqa: E731
            return _tried(trials, in_pieces(run, trials, together))

        store.cell(f"tuning/{lab.problem.name}/{method}/{epsilon:g}", make)


def tune_retraining(store: Store, lab: Lab, grid: Grid, together: int) -> None:
    """The same for retraining, which knows no epsilon."""
    rates = grid.retraining_rates

    def make() -> list[Any]:
        run = lambda part: running.retrained(lab, part, lab.problem.validation)  # noqa: E731
        trials = [Trial(0.0, rate, 0.0) for rate in rates]
        return _tried(trials, in_pieces(run, rates, together))

    store.cell(f"tuning/{lab.problem.name}/{TUNED}", make)


def in_pieces(run: Callable[[Any], list[Any]], trials: Sequence[Any], together: int) -> list[Any]:
    """What `run` gives for all trials; pieces of one size share a compiled step."""
    parts = [trials[at : at + together] for at in range(0, len(trials), together)]
    return [curve for part in parts for curve in run(part)]


def _tried(trials: Sequence[Trial], curves: Sequence[Any]) -> list[Any]:
    return [
        {"radius": trial.radius, "rate": trial.rate, "score": score(curve)}
        for trial, curve in zip(trials, curves, strict=True)
    ]


def score(curve: dict[str, Any]) -> float:
    """What tuning maximises: the mean accuracy over the checkpoints, and so at all computes."""
    return float(np.mean(curve["accuracy"]))


def chosen(cells: dict[str, Any], problem: str, method: str, epsilon: float) -> dict[str, Any]:
    """The trial with the best score, the first of several."""
    if method == TUNED:
        return dict(max(cells[f"tuning/{problem}/{TUNED}"], key=lambda trial: trial["score"]))
    twin = DEFAULT if method in (CENTER, SAME) else method
    trials = cells[f"tuning/{problem}/{twin}/{epsilon:g}"]
    return dict(max(trials, key=lambda trial: trial["score"]))


def compare(store: Store, lab: Lab, epsilons: Sequence[float]) -> None:
    """The test accuracies of all methods, each with the hyperparameters that tuning chose."""
    name, test = lab.problem.name, lab.problem.test
    store.cell(f"original/{name}", lambda: running.measured(lab, lab.original, test)[0].tolist())
    for epsilon in epsilons:
        for method in METHODS:
            certified = DEFAULT if method in (CENTER, SAME, TUNED) else method
            unit = unit_scale(store, certified, epsilon, lab.schedule.noisy_steps)
            if "refused" in unit:
                continue
            best = chosen(store.cells, name, method, epsilon)
            trial = Trial(best["radius"], best["rate"], unit["scale"])
            if method in (SAME, TUNED):
                # It does not depend on epsilon but by its rate.
                make = lambda rate=trial.rate: running.retrained(lab, [rate], test)[0]  # noqa: E731
                store.cell(f"retrained/{name}/{trial.rate:g}", make)
                continue
            store.cell(
                f"run/{name}/{method}/{epsilon:g}",
                lambda trial=trial, method=method, certified=certified: running.unlearned(
                    lab, certified, [trial], test, from_center=method == CENTER
                )[0],
            )


def curve(cells: dict[str, Any], problem: str, method: str, epsilon: float) -> dict[str, Any]:
    """The finished curve of a method."""
    if method in (SAME, TUNED):
        rate = chosen(cells, problem, method, epsilon)["rate"]
        return dict(cells[f"retrained/{problem}/{rate:g}"])
    return dict(cells[f"run/{problem}/{method}/{epsilon:g}"])


def sweep(store: Store, lab: Lab, grid: Grid, plan: Sweep) -> None:
    """Test accuracies of gradient clipping and of its twin from the centre, by radius, epsilon."""
    name, test = lab.problem.name, lab.problem.test
    rate = grid.rates[-1]
    for radius, epsilon in plan.places():
        unit = unit_scale(store, DEFAULT, epsilon, lab.schedule.noisy_steps)
        trial = Trial(radius, rate, unit["scale"])
        for start in ("unlearned", CENTER):
            store.cell(
                f"sweep/{name}/{start}/{radius:g}/{epsilon:g}",
                lambda trial=trial, start=start: running.unlearned(
                    lab, DEFAULT, [trial], test, from_center=start == CENTER
                )[0],
            )
    store.cell(f"retrained/{name}/{rate:g}", lambda: running.retrained(lab, [rate], test)[0])
