"""The records of the benchmarks as Markdown tables and as a picture."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Distinguishable for the colour-blind (Okabe and Ito), and by shape.
STYLE = {
    "Optax clip + normal": ("#E69F00", "s", "Optax's clip + jax.random.normal"),
    "noisy_sgd": ("#0072B2", "o", "cu.noisy_sgd in one's own loop"),
    "unlearn": ("#D55E00", "D", "cu.unlearn"),
}
LIBRARIES = {
    "ours": "`cu.clipped_value_and_grad`, `cu.noisy_sgd`",
    "unlearn": "`cu.unlearn(per_example=True)`",
    "optax dpsgd": "`optax.contrib.dpsgd`",
    "jax-privacy": "jax-privacy",
    "torch SGD": "PyTorch, plain SGD",
    "Opacus flat": "Opacus, hooks",
    "Opacus ghost": "Opacus, ghost norms",
}


def lines_of(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is its head."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body)) + "\n"


def cell(way: dict[str, Any] | str) -> str:
    """A ratio of wall clock, and of processor time in brackets."""
    if isinstance(way, str):
        return way
    processor = way["processor_ratio"]
    return f"{way['ratio']:.2f}" + ("" if processor is None else f" ({processor:.2f})")


def spread(way: dict[str, Any] | str) -> str:
    """Where the middle half of the rounds' ratios lies."""
    if isinstance(way, str):
        return "—"
    low, high = way["ratio_middle_half"]
    return f"{low:.2f}–{high:.2f}"


def say(row: dict[str, Any]) -> None:
    """One line while it is measured."""
    cells = (f"{name} {cell(way)}" for name, way in row["ways"].items())
    print(f"{row['network']}: {', '.join(cells)}", flush=True)


def steps(rows: list[dict[str, Any]]) -> str:
    """Each network, each way; plain SGD in milliseconds."""
    head = ["network", "plain SGD, ms", "Optax clip + normal", "`noisy_sgd`", "`unlearn`"]
    table = [[*head, "`unlearn`, middle half"]]
    for row in rows:
        ways = row["ways"]
        table.append(
            [
                row["network"],
                f"{1e3 * ways['plain']['seconds']:.3g}",
                *(cell(ways[name]) for name in STYLE),
                spread(ways["unlearn"]),
            ]
        )
    return lines_of(table)


def examples(rows: list[dict[str, Any]]) -> str:
    """Each way of clipping examples; each network a column."""
    names = [name for name in rows[0]["ways"] if name != "plain"]
    table = [["way", *(row["network"] for row in rows)]]
    for name in names:
        told = LIBRARIES.get(name, name)
        for short in ("ours", "jax-privacy"):
            if name.startswith(f"{short} in"):
                told = LIBRARIES[short] + name.removeprefix(short)
        cells = []
        for row in rows:
            way, rival = row["ways"][name], row["ways"]["optax dpsgd"]
            if isinstance(way, str):
                cells.append(way)
            else:
                cells.append(f"{way['ratio']:.3g} ({way['seconds'] / rival['seconds']:.2f})")
        table.append([told, *cells])
    return lines_of(table)


def parts(rows: list[dict[str, Any]]) -> str:
    """Noise, clip and step without a gradient."""
    table = [["what", "parameters", "Optax and JAX, ms", "strict, ms", "ratio"]]
    for row in rows:
        plain, ours = row["ways"]["plain"], row["ways"]["ours"]
        table.append(
            [
                row["what"],
                f"{row['parameters']:,}",
                f"{1e3 * plain['seconds']:.3g}",
                f"{1e3 * ours['seconds']:.3g}",
                cell(ours),
            ]
        )
    return lines_of(table)


def replicas(rows: list[dict[str, Any]]) -> str:
    """Runs one by one and together."""
    table = [["network", "runs", "one by one, ms", "together, ms", "ratio", "middle half"]]
    for row in rows:
        alone, together = row["ways"]["one by one"], row["ways"]["together"]
        table.append(
            [
                row["network"],
                str(row["runs"]),
                f"{1e3 * alone['seconds']:.3g}",
                f"{1e3 * together['seconds']:.3g}",
                cell(together),
                spread(together),
            ]
        )
    return lines_of(table)


def accountants(rows: list[dict[str, Any]]) -> str:
    """Seconds of `noise_scale`; each T a column."""
    counts = sorted({row["steps"] for row in rows})
    table = [["accountant", *(f"T = {count:,}" for count in counts)]]
    found = {(row["accountant"], row["steps"]): row["seconds"] for row in rows}
    for name in dict.fromkeys(row["accountant"] for row in rows):
        seconds = [found.get((name, count)) for count in counts]
        table.append([name, *("—" if each is None else f"{each:.2g}" for each in seconds)])
    return lines_of(table)


def compiling(record: dict[str, Any]) -> str:
    """Compilation of a clip, and of two requests."""
    table = [["what", "Optax, s", "ours, s"]]
    for kind, seconds in record["clip"].items():
        name = f"compiling a clip of {record['leaves']} leaves {kind}"
        table.append([name, f"{seconds['optax']:.2f}", f"{seconds['ours']:.2f}"])
    for name in ("first request", "second request"):
        each = record[name]
        text = f"{name} of equal shapes ({each['backend_compilations']} compilations)"
        table.append([text, "—", f"{each['seconds']:.2f}"])
    return lines_of(table)


def importing(record: dict[str, Any]) -> str:
    """Seconds of a fresh process."""
    table = [["import", "seconds", "processor seconds"]]
    for name, way in record.items():
        table.append([f"`{name}`", f"{way['seconds']:.2f}", f"{way['processor_seconds']:.2f}"])
    return lines_of(table)


TITLES = {
    "steps": (
        "A step, the batch's gradient clipped",
        "Times plain SGD's, processor time in brackets.",
        steps,
    ),
    "examples": (
        "A step, each example's gradient clipped",
        "Times plain SGD's in JAX; in brackets, times that of Optax's `dpsgd`.",
        examples,
    ),
    "parts": ("Noise, clip and both with the update", "No gradient is counted.", parts),
    "replicas": (
        "Several runs together",
        "A step of all runs; in brackets the ratio of processor time.",
        replicas,
    ),
    "compiling": ("Compiling", "", compiling),
    "importing": ("Importing", "Fresh processes, in turn.", importing),
    "accountants": ("Accountants", "Seconds of `noise_scale` for T steps.", accountants),
}


def speed(record: dict[str, Any]) -> str:
    """All tables of the record of speed."""
    texts = ["# Speed\n"]
    for name, (title, note, table) in TITLES.items():
        if name in record:
            about = record["measured"][name]
            told = f"`{about['command']}`; {about['device']}, {about['processor']}, "
            told += f"{about['cores']} cores; median of {about['rounds']} rounds."
            texts.append(f"## {title}\n\n{f'{note} {told}'.strip()}\n\n{table(record[name])}")
    return "\n".join(texts)


def picture(record: dict[str, Any]) -> Figure:
    """Ratios of whole steps, a row for each network: median and middle half."""
    rows = record["steps"]
    figure = Figure(figsize=(8, 1.6 + 0.75 * len(rows)), dpi=130, layout="constrained")
    axes = figure.subplots()
    for number, (name, (color, marker, label)) in enumerate(STYLE.items()):
        for place, row in enumerate(rows):
            way = row["ways"][name]
            low, high = way["ratio_middle_half"]
            height = -place + 0.22 * (1 - number)
            axes.plot([low, high], [height, height], color=color, linewidth=3, alpha=0.5)
            axes.plot(
                way["ratio"],
                height,
                marker=marker,
                color=color,
                markersize=8,
                linestyle="none",
                label=label if place == 0 else None,
            )
            axes.annotate(
                f"{way['ratio']:.2f}",
                (max(way["ratio"], high), height),
                xytext=(9, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=9,
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([-place for place in range(len(rows))], [row["network"] for row in rows])
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    most = max(row["ways"][name]["ratio_middle_half"][1] for row in rows for name in STYLE)
    least = min(row["ways"][name]["ratio_middle_half"][0] for row in rows for name in STYLE)
    axes.set_xlim(min(0.9, least - 0.05), 1 + 1.12 * (most - 1))
    axes.set_xlabel("time of a step, plain SGD = 1 (median; bar: middle half of the rounds)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(STYLE), frameon=False)
    return figure


def peaks(record: dict[str, Any]) -> str:
    """Peaks in copies of the parameters; each way a column."""
    names = list(record["rows"][0]["copies"])
    told = [re.sub("noisy_sgd|unlearn", r"`\g<0>`", name) for name in names]
    table = [["network", *told]]
    for row in record["rows"]:
        table.append([row["network"], *(f"{row['copies'][name]:.1f}" for name in names)])
    return lines_of(table)


def memory(record: dict[str, Any]) -> str:
    """The page of the record of memory."""
    return (
        f"# Memory\n\nPeak of a step, in copies of the parameters. `{record['command']}`; "
        f"{record['device']}, jax {record['versions']['jax']}.\n\n{peaks(record)}"
    )


def by_size(rows: list[dict[str, Any]]) -> str:
    """What a noisy step takes more than a plain one."""
    table = [
        ["parameters", "batch", "plain step, ms", "certificate adds, ms", "ns a parameter", "ratio"]
    ]
    for row in rows:
        table.append(
            [
                f"{row['parameters']:,}",
                str(row["batch"]),
                f"{1e3 * row['plain_seconds']:.3g}",
                f"{1e3 * row['more_seconds']:.3g}",
                f"{1e9 * row['more_seconds'] / row['parameters']:.3g}",
                f"{row['ratio']:.2f}",
            ]
        )
    return lines_of(table)


def by_steps(rows: list[dict[str, Any]]) -> str:
    """What T steps take in all."""
    table = [["T", "`unlearn` in all, s", "ms a step", "`noise_scale`, s"]]
    for row in rows:
        each = 1e3 * row["seconds"] / row["steps"]
        table.append(
            [
                f"{row['steps']:,}",
                f"{row['seconds']:.2f}",
                f"{each:.3g}",
                f"{row['noise_scale_seconds']:.2g}",
            ]
        )
    return lines_of(table)


def by_devices(rows: list[dict[str, Any]]) -> str:
    """Collectives of a plain and a noisy step, and what a device holds of all parameters."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["collectives"]))
    table = [["devices", "step", *kinds, "one device holds, copies of all parameters"]]
    for row in rows:
        table.append(
            [
                str(row["devices"]),
                "noisy" if row["noisy"] else "plain",
                *(str(row["collectives"].get(kind, 0)) for kind in kinds),
                f"{row['copies_of_all_parameters']:.2f}",
            ]
        )
    return lines_of(table)


def estimated(record: dict[str, Any]) -> str:
    """The estimate for a large model."""
    found, update = record["estimate"], record["update"]
    giga = {name: f"{found[name] / 1e9:.2f} GB" for name in found if name.endswith("_bytes")}
    rows = [
        ["what", "how much"],
        ["parameters of the frozen base", f"{found['base_parameters'] / 1e9:.2f} billion"],
        ["parameters of the low-rank leaves", f"{found['low_rank_parameters'] / 1e6:.1f} million"],
        ["base in bfloat16", giga["base_bytes"]],
        ["leaves in float32", giga["low_rank_bytes"]],
        [f"peak of the update, {update['copies']:.1f} copies of the leaves", giga["update_bytes"]],
        ["forward and backward, operations", f"{found['model_flops']:.2g}"],
        [
            f"clip, noise and update, {update['flops_a_coordinate']:.0f} operations a coordinate",
            f"{found['update_flops']:.2g}",
        ],
        ["share of the operations", f"{found['update_share_of_flops']:.1g}"],
        ["forward and backward at the assumed speed", f"{found['model_seconds']:.2g} s"],
        ["clip, noise and update at the assumed bandwidth", f"{found['update_seconds']:.2g} s"],
    ]
    return lines_of(rows)


def scaling_sections(record: dict[str, Any]) -> dict[str, str]:
    """All tables of the record of scaling, by title."""
    return {
        "Parameters": by_size(record["parameters"]),
        "Batch": by_size(record["batches"]),
        "Steps": by_steps(record["steps"]),
        "Devices": by_devices(record["devices"]),
        "An estimate": estimated(record),
    }


def scaling(record: dict[str, Any]) -> str:
    """All tables of the record of scaling."""
    told = f"`{record['command']}`; {record['device']}, {record['processor']}, "
    told += f"{record['cores']} cores; median of {record['rounds']} rounds."
    texts = [f"## {title}\n\n{table}" for title, table in scaling_sections(record).items()]
    return "\n".join([f"# Scaling\n\n{told}\n", *texts])


# ------------------------------------------------------------------------------ pages


def range_of(record: dict[str, Any]) -> str:
    """What pages say of a step of `noisy_sgd` and `unlearn`, over all networks."""
    ours = [
        row["ways"][name]["ratio"] for row in record["steps"] for name in ("noisy_sgd", "unlearn")
    ]
    return f"takes {min(ours):.1f} to {max(ours):.1f} times as long as plain SGD's"


def renewed(text: str, shown: dict[str, str]) -> str:
    """A page in which the first table after each heading is the one given."""
    for heading, table in shown.items():
        before, after = text.split(f"\n{heading}\n", 1)
        after = re.sub(r"(?:^\|.*\n)+", lambda _, table=table: table, after, count=1, flags=re.M)
        text = f"{before}\n{heading}\n{after}"
    return text


def shown_of_speed(record: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/benchmarks.md, by heading."""
    return {f"### {TITLES[n][0]}": TITLES[n][2](record[n]) for n in TITLES if n in record}


def shown_of_gpu(record: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/benchmarks.md that were measured on a GPU, by heading."""
    prefix = "### On a GPU: "
    return {
        f"{prefix}{heading[4].lower()}{heading[5:]}": table
        for heading, table in shown_of_speed(record).items()
    }


def shown_of_scaling(record: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/scaling.md, by heading."""
    return {f"## {title}": table for title, table in scaling_sections(record).items()}


def renew(page: Path, shown: dict[str, str], steps_of: dict[str, Any] | None = None) -> None:
    """Writes tables into a page, and the range of the steps of a record of speed."""
    text = renewed(page.read_text(), shown)
    if steps_of is not None:
        text = re.sub(RANGE, range_of(steps_of), text)
    page.write_text(text)


# A phrase may be broken over two lines anywhere.
RANGE = r"takes [\d.]+ to [\d.]+ times as long as plain SGD's".replace(" ", r"\s+")
