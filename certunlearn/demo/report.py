"""The demo's report: the table, what it does and does not mean, the picture, and the files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from certunlearn import accounting, mechanisms
from certunlearn._numerics import files
from certunlearn._numerics.safe_rounding import rounded_up
from certunlearn.certificates import Certificate, verification
from certunlearn.demo.run import Result, Row

FILES = ("certificate.json", "unlearned.npz", "report.png", "table.md", "results.json")

# How many points of a slow accountant's epsilon the picture shows.
_SLOW_POINTS = 9

_HEADER = (
    "model",
    "test",
    "retain",
    "forget",
    "MIA AUC",
    "steps",
    "seconds",
    "certified (epsilon, delta)",
)


def write(result: Result, folder: Path) -> None:
    """Writes `FILES` into an existing folder, each whole or not at all."""
    result.certificate.save(folder / "certificate.json")
    files.save_params(folder / "unlearned.npz", result.params)
    figure = picture(result)
    files.write_atomically(folder / "report.png", lambda file: figure.savefig(file, format="png"))
    texts = {
        "table.md": f"{to_text(result)}\n",
        "results.json": json.dumps(to_record(result), indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        files.write_atomically(folder / name, _writer(text))


def _writer(text: str) -> Callable[[IO[bytes]], int]:
    return lambda file: file.write(text.encode())


def to_text(result: Result) -> str:
    """What the demo prints."""
    return f"{table(result.rows)}\n\n{notes(result)}"


def table(rows: tuple[Row, ...]) -> str:
    """The rows as a Markdown table, aligned so that it reads well as plain text too."""
    cells = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]

    def aligned(line: tuple[str, ...]) -> str:
        first = line[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True))
        return f"| {' | '.join([first, *rest, line[-1].ljust(widths[-1])])} |"

    rule = "|".join(
        "-" * (width + 1) + (":" if 0 < i < len(widths) - 1 else "-")
        for i, width in enumerate(widths)
    )
    return "\n".join([aligned(cells[0]), f"|{rule}|", *map(aligned, cells[1:])])


def notes(result: Result) -> str:
    """What the certificate can and cannot promise, and what may leave."""
    certificate, mechanism, sizes = result.certificate, result.mechanism, result.sizes
    return "\n".join(
        [
            "Promised: no event, such as being right about an example or exposing a member, is "
            "more likely than for a model",
            f"that never saw the forget set (same procedure, start trained without it) by more "
            f"than {rounded_up(certificate.total_variation, 3)}; so old knowledge cannot",
            "make it better than the run started from the centre by more than that either.",
            f"True epsilon of such a run, at delta = {rounded_up(certificate.delta, 6)}: "
            f"{verification.interval(certificate)}, by {certificate.accountant}.",
            "Not promised: that the old accuracy is kept (at small epsilon the old model is almost "
            "wholly forgotten, and fine-tuning",
            "wins it back as retraining would), nor anything about frozen parts, the architecture "
            "or how hyperparameters were chosen.",
            "",
            f"{result.dataset}: {sizes['train']} training images, {sizes['forget']} of them to "
            f"forget, {sizes['test']} test images. MIA AUC: forget",
            "against test set, each loss relative to that of a reference model trained on retain "
            f"data only; 0.5 +- {result.auc_error:.3f} for a",
            "model that saw neither set. Seconds include compiling.",
            *([result.origin] if result.origin else []),
            f"Noisy phase: {mechanism.steps} steps, C0 = {mechanism.init_radius:.3g}, C1 = "
            f"{mechanism.clip_norm:.3g}, gamma = {mechanism.learning_rate:.3g}, noise per step "
            f"{certificate.noise_scale:.3g}.",
            "Only unlearned.npz and certificate.json may leave. The row after the noisy phase and "
            "the other files are for the operator.",
            f"The noise key came from --seed {result.seed}, for experiments; leave key=None for a "
            "real deletion request.",
        ]
    )


def to_record(result: Result) -> dict[str, Any]:
    """All numbers of the report, JSON-ready."""
    return {
        "note": "for the operator: the curve shows hidden iterates, which must not leave",
        "dataset": result.dataset,
        "seed": result.seed,
        "sizes": result.sizes,
        "settings": dataclasses.asdict(result.settings),
        "mechanism": mechanisms.to_record(result.mechanism),
        "noise_scale": result.certificate.noise_scale,
        "accountant": result.certificate.accountant,
        "epsilon_lower_bound": result.certificate.epsilon_lower_bound,
        "total_variation": result.certificate.total_variation,
        "auc_error": result.auc_error,
        "rows": [dataclasses.asdict(row) for row in result.rows],
        "curve": [{"step": step, **numbers} for step, numbers in result.curve],
        "versions": result.certificate.versions,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
    }


def picture(result: Result) -> Figure:
    """Two panels: accuracy over steps, and the certified epsilon over steps."""
    figure = Figure(figsize=(12, 4.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    _accuracy(left, result)
    _epsilon(right, result)
    noisy, last = result.mechanism.steps, result.curve[-1][0]
    for axes, end in ((left, last), (right, min(2 * noisy, last))):
        axes.axvspan(0, noisy, color="0.9", zorder=0, label="noisy phase")
        axes.set(xlabel="step", xlim=(0, end))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(loc="lower right", fontsize=9)
    right.legend(loc="upper right", fontsize=9)
    return figure


def _accuracy(axes: Axes, result: Result) -> None:
    steps = [step for step, _ in result.curve]
    for name, color in (("test", "C0"), ("forget", "C3")):
        values = [numbers[name] for _, numbers in result.curve]
        axes.plot(steps, values, color=color, label=f"unlearned, {name} set")
    original, retrained = result.rows[0], result.rows[1]
    axes.axhline(original.test, color="0.3", ls=":", label=f"original, test {original.test:.1%}")
    axes.axhline(retrained.test, color="C2", ls="--", label=f"retrained, test {retrained.test:.1%}")
    axes.set(title=f"Accuracy while unlearning ({result.dataset})", ylabel="accuracy", ylim=(0, 1))


def _epsilon(axes: Axes, result: Result) -> None:
    certificate, mechanism = result.certificate, result.mechanism
    claim: dict[str, Any] = {
        "noise_scale": certificate.noise_scale,
        "delta": certificate.delta,
    }
    steps, last = mechanism.steps, result.curve[-1][0]
    curve = accounting.epsilon_curve(mechanism, **claim, accountant="interpolation")
    axes.plot(range(1, steps + 1), curve[1:], color="C1", label="interpolation, if stopped here")
    if certificate.accountant != "interpolation":
        # Each number takes seconds, so the picture shows a few points instead of a line.
        stops = np.unique(np.geomspace(1, steps, _SLOW_POINTS).round().astype(int))[:-1].tolist()
        found = [
            accounting.epsilon(mechanism.first(stop), **claim, accountant=certificate.accountant)
            for stop in stops
        ]
        axes.plot(stops, found, "o", color="C0", label=f"{certificate.accountant}, if stopped here")
    axes.plot(
        [steps, last], [certificate.epsilon] * 2, color="C0", ls="--", label="fine-tuning adds none"
    )
    axes.plot(steps, certificate.epsilon, "o", color="C3", label=_claim_label(certificate))
    axes.set(
        title="Certified epsilon",
        ylabel=f"epsilon at delta = {rounded_up(certificate.delta, 6)}",
        yscale="log",
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _claim_label(certificate: Certificate) -> str:
    return f"certified ({rounded_up(certificate.epsilon)}, {rounded_up(certificate.delta, 6)})"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.test:.1%}",
        f"{row.retain:.1%}",
        f"{row.forget:.1%}",
        f"{row.auc:.3f}",
        str(row.steps),
        f"{row.seconds:.1f}",
        _certified(row.certified),
    )


def _certified(claim: tuple[float, float] | None) -> str:
    if claim is None:
        return "—"
    if claim == (0, 0):
        return "0, 0 (never saw it)"
    return f"{rounded_up(claim[0])}, {rounded_up(claim[1], 6)}"
