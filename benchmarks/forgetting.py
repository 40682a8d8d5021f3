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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import certunlearn as cu
from certunlearn._numerics.safe_rounding import rounded_down
from certunlearn.demo import data, linear_heads, membership, network

POOL, FORGET, SHADOWS, TARGETS = 1000, 50, 32, 16
TRAIN_STEPS, RATE, PIXELS = 1000, 3e-3, 784
EPSILON, DELTA = 1.0, 1e-5
NET, HEAD = network.MLP(5), network.LinearHead()
RIDGE_L2 = 1e-4
PUBLIC_SEED = 2025  # of the centre and of the random features
# The game of the lower bound: two runs that pull apart as far as the mechanism allows.
GAME = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=10)
MECHANISM = cu.GradientClipping(init_radius=0.01, clip_norm=1.0, learning_rate=1e-4, steps=100)
TRIALS, ERROR = 40_000, 0.05


@functools.partial(jax.jit, static_argnums=0)
def margins(net: Any, params: Any, examples: Any) -> jax.Array:
    """Of each example: the attack looks at nothing else of a model."""
    return network.margins(net.apply(params, examples["x"]), examples["y"])


@functools.partial(jax.jit, static_argnames="steps")
def trained(keys: jax.Array, members: jax.Array, pool: Any, steps: int) -> Any:
    """Models `[n, ...]`, trained by whole batches on the rows that `members [n, POOL]` has."""
    optimizer = optax.adam(RATE)

    def one(key: jax.Array, member: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(member * network.losses(NET, params, pool)[0]) / jnp.sum(member)

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
    area = membership.auc(-member, -other)
    return {"auc": area, "tpr": float(np.mean(member > np.quantile(other, 0.99)))}


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


def unlearned(start: Any, kept: Any, center: Any, noise_scale: float, seed: int) -> Any:
    """What the certified run releases. Its key is known: fit for an experiment only."""
    return cu.unlearn(
        functools.partial(network.mean_loss, NET),
        start,
        kept,
        MECHANISM,
        noise_scale=noise_scale,
        delta=DELTA,
        batch_size=len(kept["y"]),
        center=center,
        finetune=cu.Finetune(optax.adam(RATE), TRAIN_STEPS),
        key=jax.random.key(seed),
        progress=False,
    ).params


class Lots(NamedTuple):
    """Which rows of the pool each model is trained on.

    Attributes:
      shadows: bool `[SHADOWS, POOL]`.
      targets: bool `[TARGETS, POOL]`.
      retain: the same without the rows to forget.
    """

    shadows: np.ndarray
    targets: np.ndarray
    retain: np.ndarray


def drawn(rng: np.random.Generator) -> Lots:
    """A random half of the pool for each model, and `FORGET` of a target's rows to forget."""
    members = rng.permuted(np.tile(np.arange(POOL) < POOL // 2, (SHADOWS + TARGETS, 1)), axis=1)
    retain = members[SHADOWS:].copy()
    for row in retain:
        row[rng.choice(np.flatnonzero(row), FORGET, replace=False)] = False
    return Lots(members[:SHADOWS], members[SHADOWS:], retain)


def networks(pool: Any, lots: Lots, seed: int, noise_scale: float) -> Iterator[Any]:
    """The shadow networks, then of each target its models by name."""
    rows = np.concatenate(lots)
    models = trained(
        jax.random.split(jax.random.key(seed), len(rows)),
        rows.astype(np.float32),
        pool,
        TRAIN_STEPS,
    )
    pick = lambda index: jax.tree.map(lambda leaf: leaf[index], models)  # noqa: E731
    yield [pick(index) for index in range(SHADOWS)]
    center = network.init(NET, PUBLIC_SEED, PIXELS)
    for index in range(TARGETS):
        run = functools.partial(
            unlearned,
            kept=data.take(pool, np.flatnonzero(lots.retain[index])),
            center=center,
            noise_scale=noise_scale,
        )
        original = pick(SHADOWS + index)
        yield {
            "original": original,
            "retrained": pick(SHADOWS + TARGETS + index),
            "from the centre": run(center, seed=2 * index),
            "unlearned": run(original, seed=2 * index + 1),
        }


def heads(pool: Any, lots: Lots) -> Iterator[Any]:
    """The same for exact heads on public features: rows are subtracted from the sums."""

    def sums(member: np.ndarray) -> Any:
        rows = data.take(pool, np.flatnonzero(member))
        return cu.exact.collect(rows["x"], rows["y"], feature_norm=1.0, classes=network.CLASSES)

    solved = functools.partial(cu.exact.ridge, l2=RIDGE_L2)
    yield [solved(sums(member)) for member in lots.shadows]
    for member, kept in zip(lots.targets, lots.retain, strict=True):
        forget = data.take(pool, np.flatnonzero(member & ~kept))
        stats = sums(member)
        yield {
            "exact head, original": solved(stats),
            "exact head, unlearned": solved(cu.exact.remove(stats, forget["x"], forget["y"])),
        }


def attacked(net: Any, models: Iterator[Any], pool: Any, test: Any, lots: Lots) -> dict[str, Any]:
    """By kind of model a list, one entry a target: what the attack finds, and test accuracy."""
    shadow = np.stack([margins(net, params, pool) for params in next(models)])
    accuracy = jax.jit(lambda params, test: jnp.mean(network.losses(net, params, test)[1]))
    found: dict[str, Any] = {}
    for released, member, kept in zip(models, lots.targets, lots.retain, strict=True):
        for name, params in released.items():
            seen = np.asarray(margins(net, params, pool))
            ratio = scores(seen, shadow, lots.shadows)
            success = attack(ratio[member & ~kept], ratio[~member])
            found.setdefault(name, []).append({**success, "test": float(accuracy(params, test))})
        print({name: runs[-1] for name, runs in found.items()}, flush=True)
    return found


def table(record: dict[str, Any]) -> str:
    """The attack's success by model, and the bound."""
    lines = [
        "# Does it forget?",
        "",
        "| model | AUC | true positives at 1% false positives | test accuracy |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, runs in record["models"].items():
        cells = []
        for what, digits, unit in (("auc", 3, ""), ("tpr", 1, "%"), ("test", 1, "%")):
            values = np.array([each[what] for each in runs]) * (100 if unit else 1)
            error = values.std(ddof=1) / len(values) ** 0.5
            cells.append(f"{values.mean():.{digits}f}{unit} +- {error:.{digits}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    game = record["game"]
    said = (
        f"LiRA with {record['shadows']} shadow models on MNIST, a network of 3,985 parameters, "
        f"{record['pool']} images in the pool: examples that {record['forget']} of "
        f"{record['pool'] // 2} training images were to forget, against those never seen. Exact "
        f"heads are linear, on 128 public random features, with shadow heads of their own. AUC 0.5 "
        f"is chance. Means over {record['targets']} models +- standard errors.\n\n"
        f"From {game['trials']:,} runs of each of two worlds that pull apart, at the noise of a "
        f"certified {game['certified']:g}: epsilon is at least "
        f"{rounded_down(game['bound'], 3)}, with confidence {1 - game['error']:.0%} "
        "(Clopper-Pearson)."
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
    pool = data.take(mnist.train, chosen)
    lots = drawn(np.random.default_rng(args.seed))
    noise = cu.noise_scale(MECHANISM, epsilon=EPSILON, delta=DELTA)
    features = linear_heads.random_features(PUBLIC_SEED, {"retain": pool, "test": mnist.test})
    models = attacked(NET, networks(pool, lots, args.seed, noise), pool, mnist.test, lots)
    rows = features["retain"]
    models |= attacked(HEAD, heads(rows, lots), rows, features["test"], lots)
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
        "noise_scale": noise,
        "models": models,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "table.md").write_text(table(record))


if __name__ == "__main__":
    main()
