"""How far the certified epsilon is from the best attack: the truth lies between the two.

    python benchmarks/coupling_grid.py

writes coupling-grid/results.json and table.md beside this file: about an hour. A run that was cut
off goes on where it was: what it has worked out is kept in coupling-grid/unfinished.jsonl until all
is done; delete that file if the package has changed since.

A cell is a run of T steps whose shifts add up to the initial distance, with the noise at which
exact shifted interpolation certifies the nominal epsilon; `product` is learning rate times weight
decay. Beside these stand single games in which coupling is or was far from the attack.
"""

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from certunlearn.accounting import _gaussian, _taut_string
from certunlearn.accounting._attack import best_loss
from certunlearn.accounting._reflection import solution
from certunlearn.accounting._reflection.blocks import Steps

NOMINAL = (0.5, 1.0, 2.0, 4.0, 8.0)
DELTAS = (1e-5, 1e-8)
STEPS = (1, 4, 16, 64, 256, 1024)
PRODUCTS = (0.0, 0.01, 0.05, 0.2)
DISTANCE = 2.0
# What the ratio should not exceed: without weight decay up to epsilon 2 and 8, and with it.
TARGETS = (1.03, 1.05, 1.15)
# Contraction, steps, and what the ratio should not exceed, at a nominal epsilon of 8.
CONTRACTIONS = ((0.9, 40, 1.08), (0.8, 15, 1.06), (0.5, 8, 1.06), (0.2, 6, 1.05), (0.05, 6, 1.05))
# Attacks on longer runs take many minutes.
MOST_ATTACKED = 1_000


class Game(NamedTuple):
    """A run for itself.

    Attributes:
      name: what is special.
      steps: the run.
      delta: at which epsilon is asked for.
      most: what epsilon should not exceed, as a multiple of the attack's; in runs that are too long
        for the attack, epsilon itself.
    """

    name: str
    steps: Steps
    delta: float
    most: float


def at_nominal(contraction: Any, shift: Any, count: int, nominal: float, delta: float) -> Steps:
    """A run with the noise at which interpolation certifies `nominal` at `delta`."""
    each = [np.broadcast_to(np.asarray(part, float), (count,)) for part in (contraction, shift)]
    unit = _taut_string.gdp_mu(DISTANCE, *each, np.ones(count))
    return Steps(DISTANCE, *each, np.full(count, unit / _gaussian.mu(nominal, delta)))


def games() -> list[Game]:
    """Strong contraction, resets, schedules, very long runs, useless noise, small deltas."""
    found = [
        Game(f"contraction {c:g}, {count} steps", at_nominal(c, 0.1, count, 8, 1e-5), 1e-5, most)
        for c, count, most in CONTRACTIONS
    ]
    shift = np.full(8, 0.05)
    shift[[3, 6]] = 3.0
    resets = at_nominal([1, 1, 1e-8, 1, 1, 1e-3, 1, 1], shift, 8, 3, 1e-5)
    found.append(Game("two resets, each followed by a large shift", resets, 1e-5, 1.15))
    alike = at_nominal(0.99, 0.02, 3_000, 10, 1e-5)
    other = alike.shift.copy()
    other[0] *= 0.999
    found += [
        Game("contraction 0.99, 3,000 steps", alike, 1e-5, 2.2e-4),
        Game("the same, another first shift", alike._replace(shift=other), 1e-5, 2.2e-4),
        Game("1,000,000 steps", at_nominal(1, 2e-6, 1_000_000, 1, 1e-5), 1e-5, 0.54),
    ]
    for small in (0.0, 1e-3, 0.3):
        noise = np.array([3, 3, 3, small, 3, 3])
        little = Steps(DISTANCE, np.ones(6), np.full(6, 0.1), noise)
        found.append(Game(f"six steps, the fourth with noise {small:g} of 3", little, 1e-5, 1.05))
    for delta in (1e-15, 1e-60, 1e-80):
        small_delta = at_nominal(1, 0.5, 4, 1, delta)
        found.append(Game(f"4 steps, delta {delta:g}", small_delta, delta, 1.05))
    return found


def played(game: Game) -> dict[str, Any]:
    """A game's two epsilons, their ratio, whether it is as it should be, and the seconds."""
    begun = time.perf_counter()
    certified = solution.epsilon(game.steps, game.delta)
    seconds = time.perf_counter() - begun
    reached = None
    if len(game.steps.noise) <= MOST_ATTACKED:
        reached = best_loss.epsilon(*game.steps, game.delta)
    return {
        "game": game.name,
        "coupling": certified,
        "attack": reached,
        "ratio": None if reached is None else certified / max(reached, 1e-9),
        "most": game.most,
        "met": certified <= game.most * (1.0 if reached is None else reached),
        "seconds": seconds,
    }


def cell(product: float, delta: float, steps: int, nominal: float) -> dict[str, float]:
    """One game: its three epsilons, the ratio of coupling's to the attack's, and the seconds."""
    run = at_nominal(1 - product, DISTANCE / steps, steps, nominal, delta)
    begun = time.perf_counter()
    certified = solution.epsilon(run, delta)
    seconds = time.perf_counter() - begun
    reached = best_loss.epsilon(*run, delta)
    target = TARGETS[2] if product else TARGETS[0] if nominal <= 2 else TARGETS[1]
    return {
        "product": product,
        "delta": delta,
        "steps": steps,
        "interpolation": nominal,
        "coupling": certified,
        "attack": reached,
        "ratio": 1.0 if certified == 0 else certified / max(reached, 1e-9),
        "target": target,
        "seconds": seconds,
    }


def table(results: dict[str, Any]) -> str:
    """Ratios by game and nominal epsilon, those beyond their target in bold."""
    cells = results["cells"]
    head = "| learning rate x weight decay | delta | steps | " + " | ".join(
        f"eps {nominal:g}" for nominal in NOMINAL
    )
    lines = [head + " |", "|---" * (3 + len(NOMINAL)) + "|"]
    for product in PRODUCTS:
        for delta in DELTAS:
            for steps in STEPS:
                row = [
                    c
                    for c in cells
                    if (c["product"], c["delta"], c["steps"]) == (product, delta, steps)
                ]
                texts = []
                for c in row:
                    text = f"{c['attack']:.4g} to {c['coupling']:.4g} ({c['ratio']:.3f})"
                    texts.append(f"**{text}**" if c["ratio"] > c["target"] else text)
                lines.append(f"| {product:g} | {delta:g} | {steps} | " + " | ".join(texts) + " |")
    met = sum(c["ratio"] <= c["target"] for c in cells)
    said = (
        "Each cell: the attack's epsilon, coupling's, and their ratio, at the noise at which "
        f"interpolation certifies the column's epsilon. Bold: beyond {TARGETS[0]} (no weight "
        f"decay, epsilon at most 2), {TARGETS[1]} (no weight decay) or {TARGETS[2]} (weight "
        f"decay). {met} of {len(cells)} cells are within.\n\n"
        "Why others are not. Tilted pairs are tried in runs of up to some dozens of steps, without "
        "weight decay of up to half a dozen: in others they would take minutes, gain less than "
        "fine tables or, where steps are merged, are not proved. Without weight decay merging "
        "costs 1%, and the default tables 2% to 3%, more at delta 1e-8 (`cu.epsilon_bracket` says "
        "how much, and refines). With weight decay mirrors are not the best pairing; and after "
        "many steps the runs have almost surely met: epsilon is nearly 0, and delta so flat as a "
        "function of it that a ratio of epsilons says little, as a few per cent more noise make "
        "up for it."
    )
    single = [
        "Single games, and what each should be at most: a multiple of the attack's epsilon, or an "
        "epsilon where there is no attack. Bold: beyond it. At the smallest deltas windows are so "
        "wide that finer tables would take too much memory.",
        "",
        "| game | attack to coupling | at most |",
        "|---|---|---|",
    ]
    for game in results["games"]:
        text = f"{game['coupling']:.4g}"
        if game["attack"] is not None:
            text = f"{game['attack']:.4g} to {text} ({game['ratio']:.3f})"
        text = text if game["met"] else f"**{text}**"
        single.append(f"| {game['game']} | {text} | {game['most']:g} |")
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    made = f"On {results['device']}, Python {results['python']}, {packages}."
    return "\n".join([said, "", *lines, "", *single, "", made, ""])


def remembered(file: Path, work: dict[str, Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each piece of work gives, in order; what `file` has already is not done again."""
    done = {}
    if file.exists():
        # A line that was being written when the run was cut off has no end.
        lines = [line for line in file.read_text().splitlines(True) if line.endswith("\n")]
        done = dict(map(json.loads, lines))
        file.write_text("".join(lines))
    for name in work:
        if name not in done:
            done[name] = work[name]()
            with file.open("a") as opened:
                opened.write(json.dumps([name, done[name]]) + "\n")
            print(json.dumps(done[name]), flush=True)
    return [done[name] for name in work]


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "coupling-grid")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    unfinished = args.out / "unfinished.jsonl"
    wanted = [
        (product, delta, steps, nominal)
        for product in PRODUCTS
        for delta in DELTAS
        for steps in args.steps
        for nominal in NOMINAL
    ]
    cells = remembered(unfinished, {str(each): partial(cell, *each) for each in wanted})
    single = remembered(unfinished, {game.name: partial(played, game) for game in games()})
    results = {
        "command": "python benchmarks/coupling_grid.py",
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("certunlearn", "jax", "numpy", "scipy")
        },
        "python": platform.python_version(),
        "device": platform.machine(),
        "cells": cells,
        "games": single,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "table.md").write_text(table(results))
    unfinished.unlink()


if __name__ == "__main__":
    main()
