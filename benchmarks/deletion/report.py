"""The record of all seeds as a table and as a picture."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

METHODS = {
    "exact, fast": "exact ridge, kept inverse",
    "exact, fresh": "exact ridge, sums kept, solved afresh",
    "exact, anew": "exact ridge, sums collected anew",
    "perturbed minimiser": "perturbed minimiser, warm",
    "gradient clipping": "gradient clipping from the public centre",
    "the same run from the centre": "the same noisy run from the centre",
}
YARDSTICK = {"perturbed minimiser": "softmax"}  # the others are compared with "ridge"
COLORS = {  # distinguishable for the colour-blind (Okabe and Ito)
    "exact, fast": "#0072B2",
    "exact, fresh": "#56B4E9",
    "perturbed minimiser": "#D55E00",
    "gradient clipping": "#CC79A7",
    "the same run from the centre": "#009E73",
}
MARKERS = dict(zip(COLORS, "os^Dv", strict=True))

_COSTS = (("flops", ".1f", 1e-6), ("wall", ".2f", 1e3), ("processor", ".2f", 1e3))
CLAIM = """\
What a deletion costs beside the cheapest retraining to the same accuracy: features of a public
network, a private half of CIFAR-10 whose classes the public half does not have.

**Yardstick.** Of every loss, solver and start, 36 settings are tuned on held-out private rows, for
the accuracy that the method compared has there; after a request each family trains on what remains,
up to the first evaluation that reaches it. The cheapest counts, of operations and of seconds each.
Evaluations cost it nothing. "In public curvature" are those that also
have the inverse of the public features' second moments, worked out before from unlabelled public
rows; the tables give the cheapest of all, and the cheapest without it.
**Costs.** A multiplication and an addition are two operations. Seconds are medians of runs in turn,
in one process, compiled code warm, wall clock. What was kept from training is not counted for any
method, nor are features: every method has those of all rows. The test set is for reporting only.
Numbers are means over seeds +- standard errors; seeds vary which private rows are held out, the
rows to forget, the order of the data and the noise. The public network is one."""


def finite(value: Any) -> Any:
    """The same record with None for what is infinite or undefined."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def spread(values: Sequence[float | None], style: str, scale: float = 1.0) -> str:
    """Mean and standard error; a dash if a seed has none; "free" if retraining cost nothing."""
    if not values or any(value is None for value in values):
        return "—"
    if any(math.isinf(value) for value in values if value is not None):
        return "retraining is free"
    numbers = scale * np.asarray(values, float)
    mean = format(np.mean(numbers), style)
    if len(numbers) == 1:
        return mean
    return f"{mean} +- {format(np.std(numbers, ddof=1) / math.sqrt(len(numbers)), style)}"


def cheapest(request: dict[str, Any], name: str, key: str, public: bool) -> float | None:
    """Least cost of the retrainings of a request that reached the target."""
    found = [
        mark[key]
        for mark in request["retraining"][name]
        if mark.get(key) is not None and (public or not mark["public_curvature"])
    ]
    return min(found, default=None)


def ratio(request: dict[str, Any], method: str, key: str, public: bool = True) -> float | None:
    """The method's cost over that of the cheapest retraining; infinite if that costs nothing."""
    own = request["rows"][method].get(key)
    name = YARDSTICK.get(method, "ridge")
    mark = cheapest(request, name, key, public)
    if own is None or mark is None:
        return None
    return own / mark if cheapest(request, name, "flops", public) else math.inf


def requests(record: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Requests of the same kind and size, one of each seed."""
    return [list(each) for each in zip(*(run["requests"] for run in record["seeds"]), strict=True)]


def lines_of(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is its head."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def heads_table(record: dict[str, Any]) -> str:
    """Accuracy of the heads before any deletion."""
    seeds = record["seeds"]
    rows = [["head", "held-out", "test"]]
    for name in seeds[0]["heads"]:
        found = [run["heads"][name] for run in seeds]
        cells = [
            spread([each[part] for each in found], ".2f", 100)
            for part in rows[0][1:] and ("validation", "test")
        ]
        rows.append([name, *cells])
    return lines_of(rows)


def families_table(record: dict[str, Any], name: str, most: int = 12) -> str:
    """The cheapest families before any deletion, those that reach the target for every seed."""
    seeds = [run["retraining"][name] for run in record["seeds"]]
    by_family = [{(e["loss"], e["solver"], e["start"]): e for e in found} for found in seeds]
    common = [key for key in by_family[0] if all(key in each for each in by_family)]
    rows = [["loss", "solver", "start", "example gradients", "Mflop", "held-out", "test"]]
    mean = lambda key: np.mean([each[key]["flops"] for each in by_family])  # noqa: E731
    for key in sorted(common, key=mean)[:most]:
        found = [each[key] for each in by_family]
        curved = any(each["public_curvature"] for each in found)
        rows.append([
            key[0],
            key[1],
            key[2] + (" (in public curvature)" if curved else ""),
            spread([each["examples"] for each in found], ".0f"),
            spread([each["flops"] for each in found], ".1f", 1e-6),
            spread([each["validation"] for each in found], ".1f", 100),
            spread([each["test"] for each in found], ".1f", 100),
        ])  # fmt: skip
    return lines_of(rows)


def request_table(same: list[dict[str, Any]]) -> str:
    """All methods on the requests of one kind and size."""
    rows = [[
        "method", "example gradients", "Mflop", "ms", "CPU ms", "test", "epsilon, delta",
        "flops / cheapest", "... without public curvature", "time / cheapest",
    ]]  # fmt: skip
    for method, title in METHODS.items():
        found = [each["rows"][method] for each in same]
        epsilon, delta = found[0]["epsilon"], found[0]["delta"]
        rows.append([
            title,
            spread([each["examples"] for each in found], ".0f"),
            spread([each["flops"] for each in found], ".1f", 1e-6),
            spread([each.get("wall") for each in found], ".2f", 1e3),
            spread([each.get("processor") for each in found], ".2f", 1e3),
            spread([each["test"] for each in found], ".2f", 100),
            "0, 0" if epsilon == 0 else f"{epsilon:.3g}, {delta:.0e}",
            spread([ratio(each, method, "flops") for each in same], ".1%"),
            spread([ratio(each, method, "flops", False) for each in same], ".1%"),
            spread([ratio(each, method, "wall") for each in same], ".1%"),
        ])  # fmt: skip
    for name in ("ridge", "softmax"):
        rows.append([
            f"*cheapest retraining to the {name} row's accuracy*",
            "",
            *(spread([cheapest(e, name, k, True) for e in same], s, x) for k, s, x in _COSTS),
            "",
            "0, 0",
            *["100%"] * 3,
        ])  # fmt: skip
        by_test = [cheapest(each, name, "flops_by_test", True) for each in same]
        rows.append([
            "*the same, had the test set said when to stop*",
            "", spread(by_test, ".1f", 1e-6), *["—"] * 7,
        ])  # fmt: skip
    return lines_of(rows)


def summary_table(record: dict[str, Any]) -> str:
    """Cost over that of the cheapest retraining, for requests at random, by rows deleted."""
    some = [each for each in requests(record) if each[0]["kind"] == "random"]
    sizes = [f"k = {each[0]['size']}" for each in some]
    rows = [["method, and what is compared", *sizes]]
    for method, title in METHODS.items():
        for key, name in (("flops", "operations"), ("wall", "time")):
            for public, which in ((True, ""), (False, ", beside none in public curvature")):
                cells = [
                    spread([ratio(one, method, key, public) for one in each], ".1%")
                    for each in some
                ]
                if set(cells) != {"—"}:
                    rows.append([f"{title}: {name}{which}", *cells])
    return lines_of(rows)


def to_text(record: dict[str, Any]) -> str:
    """The tables, with what they do and do not say."""
    first = record["seeds"][0]
    rows = ", ".join(f"{count} {name}" for name, count in first["rows"].items())
    chain = first["chain"]
    parts = [
        "# What deletion costs",
        CLAIM,
        f"Rows: {rows}; D = {first['features']}, {first['outputs']} classes; "
        f"{len(record['seeds'])} seeds.",
        "## Cost over that of the cheapest retraining, rows at random",
        summary_table(record),
        "## Heads, before any deletion",
        heads_table(record),
        "## Retraining to the exact ridge head's accuracy, before any deletion",
        families_table(record, "ridge"),
        "## Retraining to the softmax minimiser's accuracy",
        families_table(record, "softmax"),
        "## Requests",
        f"The three exact routes gave the same bits for every request, and so did all of a chain "
        f"of {chain['requests']} requests, compared with training anew on what remained.",
    ]
    for same in requests(record):
        parts += [f"### {same[0]['kind']}, k = {same[0]['size']}", request_table(same)]
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts.append(
        f"`{record['command']}` on {record['device']}, {record['processor']}, Python "
        f"{record['python']}, {packages}."
    )
    return "\n\n".join(parts) + "\n"


def without_curvature(record: dict[str, Any], key: str) -> float | None:
    """Cost of the cheapest retraining without public curvature, over the cheapest of all."""
    found = [
        (cheapest(each, "ridge", key, False), cheapest(each, "ridge", key, True))
        for same in requests(record)
        for each in same
    ]
    values = [without / of_all for without, of_all in found if without and of_all]
    return float(np.mean(values)) if len(values) == len(found) else None


def picture(record: dict[str, Any]) -> Figure:
    """Cost over that of the cheapest retraining, by rows deleted: operations, and seconds."""
    figure = Figure(figsize=(11, 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    drawn: dict[str, Callable[[dict[str, Any], str], float | None]] = {
        "operations": lambda each, method: ratio(each, method, "flops"),
        "seconds": lambda each, method: ratio(each, method, "wall"),
    }
    for axes, (title, of) in zip(panels, drawn.items(), strict=True):
        for method, color in COLORS.items():
            for kind, line in (("random", "-"), ("one class", ":")):
                some = [each for each in requests(record) if each[0]["kind"] == kind]
                values = [[of(one, method) for one in each] for each in some]
                if any(value is None or math.isinf(value) for each in values for value in each):
                    continue
                numbers = np.asarray(values)
                error = (
                    numbers.std(1, ddof=1) / math.sqrt(numbers.shape[1])
                    if numbers.shape[1] > 1
                    else None
                )
                axes.errorbar(
                    [each[0]["size"] for each in some],
                    numbers.mean(1),
                    error,
                    color=color,
                    ls=line,
                    marker=MARKERS[method],
                    capsize=3,
                    label=METHODS[method] if kind == "random" else None,
                )
        key = "flops" if title == "operations" else "wall"
        axes.axhline(1, color="0.3", lw=1)
        axes.text(1, 1.05, "cheapest retraining", fontsize=8, color="0.3")
        if (more := without_curvature(record, key)) is not None:
            axes.axhline(more, color="0.3", lw=1, ls="--")
            axes.text(1, more * 1.05, "... without public curvature", fontsize=8, color="0.3")
        axes.set(xscale="log", yscale="log", xlabel="rows deleted", title=title)
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    panels[0].set(ylabel="cost / cheapest retraining to the same accuracy")
    panels[0].legend(fontsize=8)
    figure.suptitle("Deletion beside retraining (dotted: rows of one class)")
    return figure
