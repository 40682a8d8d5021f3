"""Does it forget? Membership attacks with shadow models, and a lower bound on epsilon from runs.

    python benchmarks/forgetting.py    (needs CERTUNLEARN_DATA_DIR, a folder with mnist/)

writes forgetting/results.json and table.md beside this file: some minutes on two cores. The attack
is LiRA's (Carlini et al. 2022): for each example the likelihood of the model's margin among shadow
models that were trained with it, over that among those trained without. Each model under attack is
trained on a random half of a small pool, and forgets a tenth of it.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import certunlearn as cu
from certunlearn.demo import data, network

POOL, FORGET, SHADOWS, TARGETS = 1000, 50, 32, 16
TRAIN_STEPS, RATE, PIXELS = 1000, 3e-3, 784
EPSILON, DELTA = 1.0, 1e-5
NET = network.MLP(5)
MODELS = ("original", "retrained", "from the centre", "unlearned")
# The game of the lower bound: two runs that pull apart as far as the mechanism allows.
GAME = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=10)
TRIALS, ERROR = 40_000, 0.05


def margins(params: Any, examples: Any) -> jax.Array:
    """The logits of the labels' probabilities."""
    logits = NET.apply(params, examples["x"])
    is_label = jax.nn.one_hot(examples["y"], network.CLASSES, dtype=bool)
    others = jax.nn.logsumexp(logits, axis=-1, where=~is_label)
    return jnp.sum(logits, axis=-1, where=is_label) - others


@functools.partial(jax.jit, static_argnames="steps")
def trained(keys: jax.Array, members: jax.Array, pool: Any, steps: int) -> Any:
    """Models `[n, ...]`, trained by whole batches on the rows that `members [n, POOL]` has."""
    optimizer = optax.adam(RATE)

    def one(key: jax.Array, member: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(member * jax.nn.softplus(-margins(params, pool))) / jnp.sum(member)

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        params = NET.init(key, jnp.zeros((1, PIXELS)))
        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

    return jax.vmap(one)(keys, members)


def scores(seen: np.ndarray, shadow: np.ndarray, members: np.ndarray) -> np.ndarray:
    """LiRA's log likelihood ratios `[POOL]` of the margins `seen [POOL]` of a model.

    Means are per example, of `shadow [SHADOWS, POOL]` with and without it; the standard deviations
    are common to all examples, as Carlini et al. advise for few shadow models.
    """
    ratio = np.zeros_like(seen)
    for inside, sign in ((members, 1), (~members, -1)):
        count = inside.sum(axis=0)
        mean = np.sum(shadow * inside, axis=0) / count
        spread = np.sqrt(np.mean(((shadow - mean)[inside]) ** 2))
        ratio += sign * scipy.stats.norm.logpdf(seen, mean, spread)
    return ratio


def attack(member: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The area under the ROC curve, and the true positive rate at 1% false positives."""
    above = np.mean(member[:, None] > other) + 0.5 * np.mean(member[:, None] == other)
    return {"auc": float(above), "tpr": float(np.mean(member > np.quantile(other, 0.99)))}


def statistics(noise_scale: float, key: jax.Array, trials: int) -> tuple[np.ndarray, np.ndarray]:
    """What the runs of both worlds of `GAME` end at, along the line on which they differ."""

    def run(world: float, key: jax.Array) -> jax.Array:
        tx = cu.noisy_sgd(GAME, noise_scale, key=key)
        away = world * jnp.eye(4)[0]
        params, gradient = GAME.init_radius * away, -10 * GAME.clip_norm * away

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=GAME.steps)[0][0][0]

    worlds = [
        jax.jit(jax.vmap(functools.partial(run, world)))(jax.random.split(each, trials))
        for world, each in zip((1.0, -1.0), jax.random.split(key), strict=True)
    ]
    return np.asarray(worlds[0]), np.asarray(worlds[1])


def lower_bound(noise_scale: float, key: jax.Array, trials: int = TRIALS) -> float:
    """Epsilon that the runs show at `DELTA`, with confidence 1 - `ERROR` (Clopper-Pearson).

    The threshold is chosen on one half of the trials and judged on the other.
    """
    ours, theirs = statistics(noise_scale, key, trials)
    half = trials // 2

    def bound(threshold: float, part: slice) -> float:
        hits, alarms = np.sum(ours[part] > threshold), np.sum(theirs[part] > threshold)
        low = scipy.stats.beta.ppf(ERROR / 2, hits, half - hits + 1) if hits else 0.0
        high = scipy.stats.beta.ppf(1 - ERROR / 2, alarms + 1, half - alarms)
        return float(np.log((low - DELTA) / high)) if low > DELTA else 0.0

    candidates = np.quantile(theirs[:half], np.linspace(0.5, 0.999, 60))
    best = max(candidates, key=lambda threshold: bound(threshold, slice(None, half)))
    return max(0.0, bound(best, slice(half, None)))


def unlearned(
    start: Any, kept: Any, center: Any, mechanism: cu.Mechanism, noise_scale: float, seed: int
) -> Any:
    """What the certified run releases. Its key is known: fit for an experiment only."""
    return cu.unlearn(
        functools.partial(network.mean_loss, NET),
        start,
        kept,
        mechanism,
        noise_scale=noise_scale,
        delta=DELTA,
        batch_size=len(kept["y"]),
        center=center,
        finetune=cu.Finetune(optax.adam(RATE), TRAIN_STEPS),
        key=jax.random.key(seed),
        progress=False,
    ).params


def attacked(pool: Any, test: Any, seed: int) -> dict[str, Any]:
    """What the attack finds on each kind of model, one number a target, and test accuracies."""
    rng = np.random.default_rng(seed)
    members = rng.permuted(np.tile(np.arange(POOL) < POOL // 2, (SHADOWS + TARGETS, 1)), axis=1)
    forget = [rng.choice(np.flatnonzero(row), FORGET, replace=False) for row in members[SHADOWS:]]
    retain = members[SHADOWS:].copy()
    for row, left_out in zip(retain, forget, strict=True):
        row[left_out] = False
    rows = np.concatenate([members, retain])
    keys = jax.random.split(jax.random.key(seed), len(rows))
    models = trained(keys, rows.astype(np.float32), pool, TRAIN_STEPS)
    pick = lambda index: jax.tree.map(lambda leaf: leaf[index], models)  # noqa: E731
    see = jax.jit(margins)
    shadow = np.stack([see(pick(index), pool) for index in range(SHADOWS)])
    center = network.init(NET, 2025, PIXELS)
    radius = 0.01
    mechanism = cu.GradientClipping(
        init_radius=radius, clip_norm=1.0, learning_rate=radius / 100, steps=100
    )
    scale = cu.noise_scale(mechanism, epsilon=EPSILON, delta=DELTA)
    found: dict[str, Any] = {name: [] for name in MODELS}
    for index in range(TARGETS):
        kept = data.take(pool, np.flatnonzero(retain[index]))
        original = pick(SHADOWS + index)
        run = functools.partial(
            unlearned, kept=kept, center=center, mechanism=mechanism, noise_scale=scale
        )
        released = {
            "original": original,
            "retrained": pick(SHADOWS + TARGETS + index),
            "from the centre": run(center, seed=2 * index),
            "unlearned": run(original, seed=2 * index + 1),
        }
        outside = ~members[SHADOWS + index]
        for name, params in released.items():
            ratio = scores(np.asarray(see(params, pool)), shadow, members[:SHADOWS])
            correct = float(np.mean(np.asarray(see(params, test)) > 0))
            found[name].append(
                {**attack(ratio[forget[index]], ratio[outside]), "confident": correct}
            )
        print(index, {name: each[-1] for name, each in found.items()}, flush=True)
    return {"noise_scale": scale, "models": found}


def table(record: dict[str, Any]) -> str:
    """The attack's success by model, and the bound."""
    lines = [
        "| model | AUC | true positives at 1% false positives |",
        "| --- | ---: | ---: |",
    ]
    for name, runs in record["models"].items():
        cells = []
        for what, digits in (("auc", 3), ("tpr", 1)):
            values = np.array([each[what] for each in runs]) * (100 if what == "tpr" else 1)
            error = values.std(ddof=1) / len(values) ** 0.5
            unit = "%" if what == "tpr" else ""
            cells.append(f"{values.mean():.{digits}f}{unit} +- {error:.{digits}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    game = record["game"]
    said = (
        f"LiRA with {record['shadows']} shadow models on MNIST, a network of 3,985 parameters, "
        f"{record['pool']} images in the pool: examples that {record['forget']} of "
        f"{record['pool'] // 2} training images were to forget, against those never seen. AUC 0.5 "
        f"is chance. Means over {record['targets']} models +- standard errors.\n\n"
        f"From {game['trials']:,} runs of each of two worlds that pull apart, at the noise of a "
        f"certified {game['certified']:g}: epsilon is at least {game['bound']:.3f}, with "
        f"confidence {1 - game['error']:.0%} (Clopper-Pearson)."
    )
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join([*lines, "", said, "", f"{record['device']}, {packages}.", ""])


def main() -> None:
    """Train, attack, bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "forgetting")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scale = cu.noise_scale(GAME, epsilon=EPSILON, delta=DELTA)
    bound = lower_bound(scale, jax.random.key(args.seed))
    print("lower bound", bound, flush=True)
    mnist = data.load("mnist", os.environ.get("CERTUNLEARN_DATA_DIR"), args.seed)
    chosen = np.random.default_rng(args.seed).choice(len(mnist.train["y"]), POOL, replace=False)
    names = ("certunlearn", "jax", "flax", "optax", "numpy", "scipy")
    record = {
        "command": "python benchmarks/forgetting.py",
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "pool": POOL,
        "forget": FORGET,
        "shadows": SHADOWS,
        "targets": TARGETS,
        "certified": {"epsilon": EPSILON, "delta": DELTA},
        "game": {
            "noise_scale": scale,
            "trials": TRIALS,
            "error": ERROR,
            "certified": EPSILON,
            "bound": bound,
        },
        **attacked(data.take(mnist.train, chosen), mnist.test, args.seed),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "table.md").write_text(table(record))


if __name__ == "__main__":
    main()
