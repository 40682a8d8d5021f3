"""What strictness costs: the library's noise, clip and whole step beside Optax's plain ones.

    python benchmarks/transforms.py

writes benchmarks/transforms.json. Ratios of medians, alternating in one process; sizes in numbers
of float32 parameters. The work is not equal on purpose: `jax.random.normal` has no tails beyond
5.4 standard deviations, and `optax.clip_by_global_norm` overshoots its bound and passes NaN
through. The ratio is the price of what a certificate needs.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import certunlearn as cu
from certunlearn._numerics import normal_draws

SIZES = (10**4, 10**6, 10**7)
KEY = jax.random.key(0)


def pairs(size: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """For each comparison: the plain way and ours, both compiled, on the same inputs."""
    gradient = {"w": jax.random.normal(KEY, (size,))}
    params = {"w": jnp.zeros(size)}
    mechanism = cu.GradientClipping(
        init_radius=1.0, clip_norm=1.0, learning_rate=0.1, weight_decay=0.1, steps=100
    )
    plain_step = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.1),
    )

    def plain_noisy(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = plain_step.update(gradient, state, params)
        drawn = jax.random.normal(KEY, (size,))
        return jax.tree.map(lambda p, u: p + u + 0.5 * drawn, params, updates)

    our_step = cu.noisy_sgd(mechanism, 0.5, key=KEY)

    def our_noisy(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = our_step.update(gradient, state, params)
        return optax.apply_updates(params, updates)

    def clip(tx: Any) -> Callable[[], Any]:
        update, state = jax.jit(tx.update), tx.init(params)
        return lambda: update(gradient, state)[0]

    def step(tx: Any, update: Any) -> Callable[[], Any]:
        compiled, state = jax.jit(update), tx.init(params)
        return lambda: compiled(gradient, state, params)

    normal = jax.jit(lambda key: jax.random.normal(key, (size,)))
    return {
        "noise": (lambda: normal(KEY), lambda: normal_draws.standard_normal(KEY, (size,))),
        "clip": (clip(optax.clip_by_global_norm(1.0)), clip(cu.clip_by_global_norm(1.0))),
        "step": (step(plain_step, plain_noisy), step(our_step, our_noisy)),
    }


def ratio(plain: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median times in milliseconds, and ours over plain."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in (plain, ours):
        jax.block_until_ready(run())
    for _ in range(rounds):
        for run, kept in zip((plain, ours), times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run())
            kept.append(1e3 * (time.perf_counter() - start))
    medians = [statistics.median(kept) for kept in times]
    return {"plain_ms": medians[0], "ours_ms": medians[1], "ratio": medians[1] / medians[0]}


def main() -> None:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    results = []
    for size in SIZES:
        for name, (plain, ours) in pairs(size).items():
            measured = ratio(plain, ours, args.rounds)
            results.append({"what": name, "parameters": size, **measured})
            print(f"{name:6} {size:>9} parameters: {measured['ratio']:.2f}x")
    packages = ("certunlearn", "jax", "jaxlib", "optax", "numpy")
    record = {
        "command": "python benchmarks/transforms.py",
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rounds": args.rounds,
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
