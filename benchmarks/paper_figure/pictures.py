"""One picture for each question. Colours are those of Okabe and Ito; markers differ, too."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper_figure import numbers
from benchmarks.paper_figure.experiment import CENTER, DEFAULT, METHODS, SAME, TUNED, curve
from benchmarks.paper_figure.report import TITLES
from benchmarks.paper_figure.scales import MODEL, OUTPUT

STYLES: dict[str, dict[str, Any]] = {
    "gradient clipping, closed-form": {"color": "#56B4E9", "marker": "v"},
    "gradient clipping, interpolation": {"color": "#0072B2", "marker": "s"},
    DEFAULT: {"color": "#009E73", "marker": "o"},
    MODEL: {"color": "#CC79A7", "marker": "D"},
    OUTPUT: {"color": "#E69F00", "marker": "^"},
    CENTER: {"color": "black", "marker": "x", "ls": "--"},
    SAME: {"color": "0.5", "marker": "+", "ls": ":"},
    TUNED: {"color": "#D55E00", "marker": "*", "ls": "-."},
}


def draw(axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], **style: Any) -> None:
    """Means with their standard errors."""
    means, errors = np.transpose([numbers.mean_error(each) for each in seeds])
    axes.errorbar(x, means, np.nan_to_num(errors), capsize=2, ms=5, lw=1.3, **style)


def compute(record: dict[str, Any]) -> Figure:
    """Accuracy against compute: a row for each problem, a column for each epsilon."""
    names, epsilons = numbers.problems(record), record["plan"]["epsilons"]
    size = (3.2 * len(epsilons) + 1, 3.6 * len(names) + 1)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(len(names), len(epsilons), squeeze=False, sharex="row", sharey="row")
    for row, problem in zip(panels, names, strict=True):
        for axes, epsilon in zip(row, epsilons, strict=True):
            for method in METHODS:
                if numbers.refusal(record, method, epsilon):
                    continue
                found = curve(record["cells"], problem, method, epsilon)
                thousands = np.asarray(found["gradients"]) / 1000
                draw(axes, thousands, found["accuracy"], label=method, **STYLES[method])
            axes.set_title(f"{TITLES[problem]}, epsilon = {epsilon:g}")
            axes.set_xlabel("example gradients (thousands)")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("test accuracy (per cent)")
    _legend(figure, panels.flat[0], 4)
    figure.suptitle("Accuracy at equal compute and equal true epsilon")
    return figure


def radii(record: dict[str, Any]) -> Figure:
    """Accuracy against radius at a few epsilons, and against epsilon at one radius."""
    plan, places = record["plan"]["sweep"], list(numbers.swept(record))
    names = [name for name in TITLES if any(place.problem == name for place in places)]
    columns = len(plan["at_epsilons"]) + 1
    size = (4.2 * columns, 3.8 * len(names) + 0.8)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(len(names), columns, squeeze=False, sharey="row")
    for row, problem in zip(panels, names, strict=True):
        own = [place for place in places if place.problem == problem]
        for axes, epsilon in zip(row, plan["at_epsilons"], strict=False):
            chosen = [place for place in own if place.epsilon == epsilon]
            _sweep(axes, [place.radius for place in chosen], chosen)
            axes.set(title=f"{TITLES[problem]}, epsilon = {epsilon:g}", xlabel="radius C0")
        chosen = [place for place in own if place.radius == plan["at_radius"]]
        _sweep(row[-1], [place.epsilon for place in chosen], chosen)
        row[-1].set(title=f"{TITLES[problem]}, radius = {plan['at_radius']:g}", xlabel="epsilon")
        row[0].set_ylabel("test accuracy (per cent)")
        _retrained(row, record, problem)
    _legend(figure, panels.flat[0], 3)
    figure.suptitle("Where unlearning does not pay: the run from the centre never saw the data")
    return figure


def _sweep(axes: Axes, x: Sequence[float], places: Sequence[numbers.Place]) -> None:
    for at, when, width in ((-1, "all steps", 1.8), (0, "the noisy steps", 0.9)):
        solid = {"color": "#009E73", "marker": "o"} if at else {"color": "#56B4E9", "marker": "v"}
        dashed = {"color": "black", "marker": "x"} if at else {"color": "#D55E00", "marker": "+"}
        curves = [(place.unlearned, place.center) for place in places]
        draw(axes, x, [c[0]["accuracy"][at] for c in curves], label=f"unlearned, {when}", **solid)
        style = {**dashed, "ls": "--", "alpha": min(1.0, width)}
        draw(axes, x, [c[1]["accuracy"][at] for c in curves], label=f"{CENTER}, {when}", **style)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)


def _retrained(row: Sequence[Axes], record: dict[str, Any], problem: str) -> None:
    rate = record["plan"]["parts"][problem]["grid"]["rates"][-1]
    found = record["cells"].get(f"retrained/{problem}/{rate:g}")
    if found:
        mean, _ = numbers.mean_error(found["accuracy"][-1])
        for axes in row:
            axes.axhline(mean, color="0.4", ls=":", label="retrained, as many steps")


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=columns, fontsize=10)
