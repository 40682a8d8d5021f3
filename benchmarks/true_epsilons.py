"""What published noise really certifies, beside the claim that comes with it.

    python benchmarks/true_epsilons.py

writes true-epsilons/results.json and table.md beside this file: about three minutes on one core.
A published formula gives a noise scale for the epsilon that it claims. This library says between
which bounds the true epsilon at that noise lies, and how much noise the claim needs.
"""

import argparse
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certunlearn as cu
from certunlearn._numerics.safe_rounding import rounded_down, rounded_up

CLAIMS = (0.5, 1.0, 2.0, 4.0, 8.0)
DELTA = 1e-5
STEPS = 100
RUN = {"init_radius": 1.0, "clip_norm": 1.0, "learning_rate": 0.01, "steps": STEPS}
PLAIN = cu.GradientClipping(**RUN)
DECAYED = cu.GradientClipping(**RUN, weight_decay=1.0)

# Chien et al. (2024), logistic regression on two digits of MNIST as in their code: L2 term of 1e-6
# times the number of rows, rate 1 / smoothness, batches of 128, one epoch, delta 1 / rows.
ROWS, BATCH = 11_264, 128
CONVEXITY = 1e-6 * ROWS
SMOOTHNESS = 0.25 + CONVEXITY
CONTRACTION = 1 - CONVEXITY / SMOOTHNESS
CONVEX = cu.ProjectedNoisySGD(
    # A row that was replaced moves its batch's step by 2 gamma / BATCH once an epoch, for ever.
    initial_distance=2 / SMOOTHNESS / BATCH / (1 - CONTRACTION ** (ROWS // BATCH)),
    learning_rate=1 / SMOOTHNESS,
    strong_convexity=CONVEXITY,
    smoothness=SMOOTHNESS,
    steps=ROWS // BATCH,
)


def theorem(claim: float) -> float:
    """Koloskova et al. (2025), Theorem 1 without weight decay: a standard deviation per step."""
    reach = 1.0 + RUN["learning_rate"] * STEPS
    return 3 * reach * math.sqrt(math.log(1 / DELTA) / STEPS) / claim


def theorem_with_decay(claim: float) -> float:
    """The same with weight decay 1."""
    rate = RUN["learning_rate"]
    reach = (1 - rate) ** STEPS + 1.0
    return math.sqrt(72 * rate * math.log(1 / DELTA)) * reach / claim


def code(claim: float) -> float:
    """The paper's code without weight decay, at the limit of its grid of orders.

    The Renyi divergence of order alpha is at most 2 alpha reach^2 / (T sigma^2). The code takes
    reach^2 / (T sigma^2), for all orders, and so claims nearly that number.
    """
    return (1.0 + RUN["learning_rate"] * STEPS) / math.sqrt(STEPS * claim)


def noisy_descent(claim: float) -> float:
    """Chien et al. (2024), as in their code: the standard deviation that it adds per step.

    Their Renyi divergence of order alpha is at most alpha r. With log(1 / delta) / (alpha - 1) it
    makes epsilon at best r + 2 sqrt(r log(1 / delta)), which is to be the claim. r is worked out
    with half the variance that their steps add.
    """
    log_rows = math.log(ROWS)
    divergence = (math.sqrt(log_rows + claim) - math.sqrt(log_rows)) ** 2
    shrinking = (1 / CONTRACTION ** (2 * CONVEX.steps) - 1) / (1 - CONTRACTION**2)
    half = CONVEX.initial_distance**2 / (2 * divergence * shrinking)
    return math.sqrt(2 * half)


SOURCES: dict[str, tuple[cu.Mechanism, float, Callable[[float], float]]] = {
    "theorem, no weight decay": (PLAIN, DELTA, theorem),
    "theorem, weight decay 1": (DECAYED, DELTA, theorem_with_decay),
    "the paper's code, no weight decay": (PLAIN, DELTA, code),
    "Chien et al., an epoch": (CONVEX, 1 / ROWS, noisy_descent),
}


def row(source: str, claim: float) -> dict[str, Any]:
    """The bounds on the true epsilon at the published noise, and the noise that the claim needs."""
    mechanism, delta, formula = SOURCES[source]
    scale = formula(claim)
    run = {"noise_scale": scale, "delta": delta}
    return {
        "source": source,
        "claimed": claim,
        # Of a convex loss no attack is known that respects what is assumed of it.
        "attack": None if mechanism is CONVEX else cu.epsilon_lower_bound(mechanism, **run),
        "certified": cu.epsilon(mechanism, **run),
        "noise_scale": scale,
        "least_noise_scale": cu.noise_scale(mechanism, epsilon=claim, delta=delta),
    }


def table(record: dict[str, Any]) -> str:
    """The rows, and how to read them."""
    lines = [
        "| noise of | claimed | attack reaches | certified here | noise, times the least |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in record["rows"]:
        ratio = each["noise_scale"] / each["least_noise_scale"]
        attack, certified = each["attack"], rounded_up(each["certified"], 3)
        reached = "—" if attack is None else rounded_down(attack, 3)
        if attack is not None and attack > each["claimed"]:
            certified, reached = f"**{certified}**", f"**{reached}**"
        claimed = f"{each['claimed']:g}"
        lines.append(f"| {each['source']} | {claimed} | {reached} | {certified} | {ratio:.2f} |")
    said = (
        f"Gradient clipping, {STEPS} steps of rate {RUN['learning_rate']:g}, both radii 1, delta "
        f"{DELTA:g}. The true epsilon lies between the two columns in the middle. Bold: an attack "
        "exceeds the claim. *The least* noise is what this library proves the claim with. "
        "*The paper's code* takes the divergence to be equal at all orders, and half of it: it "
        "claims rho where the Gaussian with mu = 2 sqrt(rho) is meant; with weight decay "
        "mu = sqrt(2 rho). By that bound alone its claim of 1 is "
        f"{record['code_bounds']['no weight decay']:.1f} and, with weight decay, "
        f"{record['code_bounds']['weight decay']:.2f}."
    )
    convex = (
        f"*Chien et al.* (2024): noisy SGD on logistic regression, {CONVEX.steps} steps, delta "
        f"1 / {ROWS:,}, as in their code. It adds twice the variance that its bound counts, and "
        "goes through Renyi divergences. Their claim holds, with more noise than it needs."
    )
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    title = "# What published noise certifies"
    return "\n".join(
        [
            title,
            "",
            said,
            "",
            convex,
            "",
            *lines,
            "",
            f"With Python {record['python']}, {packages}.",
            "",
        ]
    )


def one_gaussian(mu: float) -> float:
    """The epsilon of a Gaussian mechanism with this mu."""
    single = cu.Separations(initial_distance=mu, contraction=1.0, shift=0.0, steps=1)
    return cu.epsilon(single, noise_scale=1.0, delta=DELTA)


def main() -> None:
    """Compute the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "true-epsilons")
    parser.add_argument("--claims", type=float, nargs="+", default=CLAIMS)
    args = parser.parse_args()
    rows = []
    for source in SOURCES:
        for claim in args.claims:
            rows.append(row(source, claim))
            print(json.dumps(rows[-1]), flush=True)
    names = ("certunlearn", "jax", "numpy", "scipy")
    record = {
        "command": "python benchmarks/true_epsilons.py",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "device": platform.machine(),
        "code_bounds": {
            "no weight decay": one_gaussian(2.0),
            "weight decay": one_gaussian(math.sqrt(2)),
        },
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "table.md").write_text(table(record))


if __name__ == "__main__":
    main()
