"""What a tighter accountant buys at one certificate, (1, 1e-5): how soon accuracy is back.

    CERTUNLEARN_DATA_DIR=folder-that-holds-mnist python benchmarks/coupling_mnist.py

writes results.json, table.md and picture.png into benchmarks/coupling-mnist/. Accountants differ
in the noise that they ask for, and runs in nothing else: for each seed the data orders and, up to
its scale, the noise are equal. All seeds run at once, under `vmap`, each with its own original
model, forget set, data orders and noise key. Small seeds are for experiments, not for deletions.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import certunlearn as cu
from certunlearn import accounting
from certunlearn._numerics import batches, files, schedules
from certunlearn.demo import data as data_lib
from certunlearn.demo import network
from certunlearn.demo.run import FORGET_FRACTION, PUBLIC_SEED

EPSILON, DELTA = 1.0, 1e-5
HIDDEN, BATCH_SIZE, LEARNING_RATE, TRAIN_EPOCHS = 64, 250, 1e-3, 5
ACCOUNTANTS = {"closed-form": "C3", "interpolation": "C0", "coupling": "C2"}  # and their colours
STARTS = ("unlearned", "from the centre")
SYMBOLS = ("gamma", "lambda", "C0", "C1", "T")
FIELDS = ("learning_rate", "weight_decay", "init_radius", "clip_norm", "steps")
SETTINGS = ((1e-3, 50, 0.01, 10, 100), (1e-3, 50, 0.1, 10, 100), (1e-2, 10, 0.1, 1, 60))
EPOCHS = (0, 1, 2, 5)  # of fine-tuning, after which to measure; T is less than one
RADII = (0.1, 0.03, 0.01, 0.003, 0.001)  # C0 in the last setting, measured after 0 and 1 epochs

CLAIM = f"""\
Accuracy on MNIST at one certificate, ({EPSILON:g}, {DELTA:g}), by accountant.

The comparison is at **equal settings** (gamma, lambda, C0, C1, T): every accountant gets the same
mechanism, and all that differs is the noise it asks for. It does not say what each could do at
settings chosen to suit it; that gap may be smaller (without weight decay and at the best number of
steps the accountants are closer). "Retrained" starts from fresh random weights and takes T
ordinary Adam steps in place of the noisy ones, then the same fine-tuning. "From the centre" is the
same noisy run with the same noise scale, started at the public centre: it never saw the forget set,
and a certificate at this epsilon leaves the unlearned model little room to be better. Noise:
standard deviation per coordinate, of one step and of all in x_T. Test and forget: accuracy in per
cent after so many epochs of fine-tuning (0: after the noisy phase), mean +- standard deviation over
seeds, which vary the original model, the forget set, the data orders and the noise."""

fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))  # each seed's key for one purpose only
adam = optax.adam(LEARNING_RATE)
adam_state = jax.vmap(adam.init)


class Experiment(NamedTuple):
    """What every run shares; arrays, batches and compiled steps have a leading axis of seeds."""

    data: dict[str, jax.Array]
    center: Any
    original: Any
    fresh: Any
    keys: jax.Array
    noisy_batches: list[np.ndarray]
    finetuning_batches: list[np.ndarray]
    adam_step: Callable[..., Any]
    noisy_step: Callable[[cu.GradientClipping], Callable[..., Any]]
    measure: Callable[[Any], dict[str, list[float]]]


def compiled_step(net: network.MLP, update: Callable[..., Any]) -> Callable[..., Any]:
    """One step of an Optax update for every seed at once; old parameters' memory is used again."""

    def one(params: Any, state: Any, data: Any, indices: jax.Array) -> tuple[Any, Any]:
        batch = jax.tree.map(lambda x: x[indices], data)
        grads = jax.grad(functools.partial(network.mean_loss, net))(params, batch)
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(jax.vmap(one, in_axes=(0, 0, None, 0)), donate_argnums=(0, 1))


def noisy_update(mechanism: cu.GradientClipping, center: Any) -> Callable[..., Any]:
    """`noisy_sgd` with the noise scale in its state, so that accountants share a compilation."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        inner, scale = state
        # An update draws from the key in the state, one for each seed, and not from this one.
        tx = cu.noisy_sgd(mechanism, scale, key=jax.random.key(0), center=center)
        updates, inner = tx.update(grads, inner, params)
        return updates, (inner, scale)

    return update


def batches_of(examples: jax.Array, keys: jax.Array, epochs: int) -> list[np.ndarray]:
    """Indices `[seeds, BATCH_SIZE]` for each step: every seed's own order of its own examples."""
    size = examples.shape[1]
    own = [*zip(keys, np.asarray(examples), strict=True)]
    orders = [
        np.stack([each[batches.epoch_order(key, epoch, size)] for key, each in own])
        for epoch in range(epochs)
    ]
    starts = range(0, size - BATCH_SIZE + 1, BATCH_SIZE)
    return [order[:, start : start + BATCH_SIZE] for order in orders for start in starts]


def descend(step: Any, params: Any, state: Any, data: Any, indices: Any) -> tuple[Any, Any]:
    """Takes one step on each of the batches."""
    for batch in indices:
        params, state = step(params, state, data, batch)
    return params, state


def prepare(seeds: int, data_dir: str | None) -> Experiment:
    """Loads the data, draws the forget sets and trains the original models on everything."""
    dataset = data_lib.mnist(data_dir)
    train, test = jax.tree.map(jnp.asarray, (dataset.train, dataset.test))
    size, pixels = train["x"].shape
    keys = jax.random.split(jax.random.key(0), seeds)
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, size))(fold(keys, 0))
    retain, forget = jnp.split(shuffled, [size - round(size * FORGET_FRACTION)], axis=1)
    net = network.MLP(HIDDEN)
    init = jax.vmap(lambda key: network.init(net, key, pixels))
    center = network.init(net, PUBLIC_SEED, pixels)
    adam_step = compiled_step(net, adam.update)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None, None))
    def accuracies(params: Any, own: jax.Array, train: Any, test: Any) -> dict[str, jax.Array]:
        sets = {"test": test, "forget": jax.tree.map(lambda x: x[own], train)}
        return {name: jnp.mean(network.losses(net, params, s)[1]) for name, s in sets.items()}

    params = init(fold(keys, 1))
    everything = batches_of(shuffled, fold(keys, 2), TRAIN_EPOCHS)
    return Experiment(
        data=train,
        center=center,
        original=descend(adam_step, params, adam_state(params), train, everything)[0],
        fresh=init(fold(keys, 3)),
        keys=keys,
        noisy_batches=batches_of(retain, fold(keys, 4), 1),
        finetuning_batches=batches_of(retain, fold(keys, 5), EPOCHS[-1]),
        adam_step=adam_step,
        noisy_step=functools.cache(lambda m: compiled_step(net, noisy_update(m, center))),
        measure=lambda p: {n: a.tolist() for n, a in accuracies(p, forget, train, test).items()},
    )


def finetuned(run: Experiment, params: Any, state: Any, epochs: Sequence[int]) -> list[Any]:
    """What is measured after each of these numbers of epochs of Adam, from 0 on."""
    indices, curve = run.finetuning_batches, []
    per_epoch = len(indices) // EPOCHS[-1]
    for done, until in zip((0, *epochs), epochs, strict=False):
        part = indices[done * per_epoch : until * per_epoch]
        params, state = descend(run.adam_step, params, state, run.data, part)
        curve.append({"epochs": until, **run.measure(params)})
    return curve


def retrained(run: Experiment, steps: int) -> list[Any]:
    """The curve of fresh models that take ordinary steps in place of the noisy ones."""
    params, indices = jax.tree.map(jnp.copy, run.fresh), run.noisy_batches[:steps]
    params, state = descend(run.adam_step, params, adam_state(params), run.data, indices)
    return finetuned(run, params, state, EPOCHS)


def unlearned(
    run: Experiment, mechanism: cu.GradientClipping, scale: float, start: str, epochs: Sequence[int]
) -> list[Any]:
    """The curve of the noisy phase and fine-tuning, from the originals or from the centre."""
    params, keys, center = run.original, fold(run.keys, 6), run.center
    if start == "from the centre":
        # Noise of its own: runs with the same noise would differ by what it is there to hide.
        params = jax.tree.map(lambda o, c: jnp.broadcast_to(c, o.shape), params, center)
        keys = fold(run.keys, 7)
    params = jax.vmap(lambda p: cu.clip_params(p, mechanism.init_radius, center))(params)
    make = lambda key, p: cu.noisy_sgd(mechanism, scale, key=key, center=center).init(p)  # noqa: E731
    rounded = jnp.full(len(keys), schedules.round_up(scale, np.float32))
    state = (jax.vmap(make)(keys, params), rounded)
    # The radius plays no part in a step; without it more settings share a compiled one.
    step = run.noisy_step(dataclasses.replace(mechanism, init_radius=1.0))
    params, _ = descend(step, params, state, run.data, run.noisy_batches[: mechanism.steps])
    return finetuned(run, params, adam_state(params), epochs)


def compare(
    run: Experiment, setting: Sequence[Any], names: Sequence[str], retraining: list[Any]
) -> dict[str, Any]:
    """All runs of one setting, measured where retraining was; refusals come with the reason."""
    mechanism = cu.GradientClipping(**dict(zip(FIELDS, setting, strict=True)))
    epochs, runs, refused = [point["epochs"] for point in retraining], {}, {}
    for name in names:
        begun = time.perf_counter()
        try:
            scale = cu.noise_scale(mechanism, epsilon=EPSILON, delta=DELTA, accountant=name)
        except ValueError as error:
            refused[name] = str(error)
            continue
        print(f"{setting_text(setting)}, {name}: noise {scale:.4g}", flush=True)
        runs[name] = {
            "noise_scale": scale,
            "accountant_seconds": time.perf_counter() - begun,
            "total_noise": mechanism.total_noise_scale(scale),
            **{start: unlearned(run, mechanism, scale, start, epochs) for start in STARTS},
        }
    return {"setting": setting, "retrained": retraining, "runs": runs, "refused": refused}


def setting_text(setting: Sequence[float]) -> str:
    """The setting in words."""
    return ", ".join(f"{s} = {v:g}" for s, v in zip(SYMBOLS, setting, strict=True))


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{100 * np.mean(values):.1f} +- {100 * np.std(values, ddof=1):.1f}"


def table(parts: Sequence[dict[str, Any]]) -> str:
    """Settings as one Markdown table."""
    epochs = [point["epochs"] for point in parts[0]["retrained"]]
    header = ["model", "noise", "in all", *(f"test, {n}" for n in epochs)]
    lines = [[*header, f"forget, {epochs[-1]}"], ["---", *["---:"] * (len(epochs) + 3)]]

    def add(name: str, curve: Sequence[Any], noise: Sequence[str] = ("—", "—")) -> None:
        cells = [percent(point["test"]) for point in curve]
        lines.append([name, *noise, *cells, percent(curve[-1]["forget"])])

    for part in parts:
        lines.append([f"**{setting_text(part['setting'])}**"])
        add("retrained from scratch", part["retrained"])
        for name, run in part["runs"].items():
            noise = (f"{run['noise_scale']:.4f}", f"{run['total_noise']:.3f}")
            for start in STARTS:
                add(f"{start}, {name}", run[start], noise)
        lines += [[f"{name} refuses: {reason}"] for name, reason in part["refused"].items()]
    lines = [[*line, *[""] * (len(header) + 1 - len(line))] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_text(record: dict[str, Any]) -> str:
    """The tables, with what they do and do not say."""
    original = record["original"]
    sizes = (
        f"{record['seeds']} seeds; {FORGET_FRACTION:.0%} of the training images to forget; a "
        f"784-{HIDDEN}-{network.CLASSES} network; batches of {BATCH_SIZE}; Adam at "
        f"{LEARNING_RATE:g}. Original models: test {percent(original['test'])}, forget "
        f"{percent(original['forget'])}."
    )
    tables = [table(record["settings"]), "## As C0 shrinks, all else equal", table(record["radii"])]
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    made = f"On {record['device']}, {record['machine']}, with {packages}."
    return "\n\n".join([CLAIM, sizes, "## Three settings", *tables, made]) + "\n"


def draw(axes: Axes, x: Sequence[float], points: Sequence[Any], **style: Any) -> None:
    """Mean test accuracy in per cent, with its standard deviation over seeds."""
    tests = 100 * np.asarray([point["test"] for point in points])
    axes.errorbar(x, tests.mean(1), tests.std(1, ddof=1), capsize=2, marker="o", ms=3, **style)


def picture(record: dict[str, Any]) -> Figure:
    """Above: accuracy over fine-tuning, by setting. Below: noise and accuracy over C0."""
    figure = Figure(figsize=(13, 8), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 3)
    for axes, part in zip(above, record["settings"], strict=True):
        epochs = [point["epochs"] for point in part["retrained"]]
        draw(axes, epochs, part["retrained"], color="0.3", ls="--", label="retrained")
        for name, run in part["runs"].items():
            color, label = ACCOUNTANTS[name], f"{name}, noise {run['noise_scale']:.3g}"
            draw(axes, epochs, run["unlearned"], color=color, label=label)
            draw(axes, epochs, run["from the centre"], color=color, ls=":")
        axes.set(title=setting_text(part["setting"]), xlabel="epochs of fine-tuning")
    draw_radii(below, record["radii"])
    for axes in (*above, *below):
        axes.set_title(axes.get_title(), fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in (*above, *below[1:]):
        axes.set(ylabel="test accuracy (per cent)", ylim=(0, 100))
    figure.suptitle("Equal certificates, equal settings (dotted: the same run from the centre)")
    return figure


def draw_radii(panels: Sequence[Axes], parts: Sequence[dict[str, Any]]) -> None:
    """Noise per step, and accuracy after the noisy phase and after an epoch, over C0."""
    radii = [part["setting"][2] for part in parts]
    for name, color in ACCOUNTANTS.items():
        runs = [part["runs"][name] for part in parts if name in part["runs"]]
        if len(runs) < len(parts):
            continue
        panels[0].plot(radii, [run["noise_scale"] for run in runs], "o-", c=color, label=name)
        for i, axes in enumerate(panels[1:]):
            draw(axes, radii, [run["unlearned"][i] for run in runs], color=color, label=name)
            draw(axes, radii, [run["from the centre"][i] for run in runs], color=color, ls=":")
    for i, axes in enumerate(panels[1:]):
        points = [part["retrained"][i] for part in parts]
        draw(axes, radii, points, color="0.3", ls="--", label="retrained")
    titles = ("noise per step", "after the noisy phase", "after one epoch of fine-tuning")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=f"{title}, over C0", xscale="log", xlabel="C0")
    panels[0].set(yscale="log", ylabel="noise per step")


def main() -> None:
    """Runs both parts and writes the files, each whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accountants", nargs="+", choices=ACCOUNTANTS, default=[*ACCOUNTANTS])
    parser.add_argument("--seeds", type=int, choices=range(2, 17), default=5, metavar="N")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "coupling-mnist")
    args = parser.parse_args()
    if unknown := sorted(set(args.accountants) - set(accounting.ACCOUNTANTS)):
        parser.error(f"this version of certunlearn has no accountant {', '.join(unknown)}")
    begun = time.perf_counter()
    run = prepare(args.seeds, os.environ.get("CERTUNLEARN_DATA_DIR") or None)
    print(f"originals trained after {time.perf_counter() - begun:.0f} s", flush=True)
    retraining = {steps: retrained(run, steps) for steps in sorted({s[-1] for s in SETTINGS})}
    settings = [compare(run, s, args.accountants, retraining[s[-1]]) for s in SETTINGS]
    shrunk = [(*SETTINGS[-1][:2], radius, *SETTINGS[-1][3:]) for radius in RADII]
    radii = [compare(run, s, args.accountants, retraining[s[-1]][:2]) for s in shrunk]
    packages = ("certunlearn", "jax", "jaxlib", "flax", "optax", "numpy")
    record = {
        "command": "python benchmarks/coupling_mnist.py",
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "certificate": {"epsilon": EPSILON, "delta": DELTA},
        "seeds": args.seeds,
        "seconds": time.perf_counter() - begun,
        "original": run.measure(run.original),
        "settings": settings,
        "radii": radii,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    texts = {"results.json": json.dumps(record, indent=1) + "\n", "table.md": to_text(record)}
    for name, text in texts.items():
        files.write_atomically(args.out / name, lambda file, text=text: file.write(text.encode()))
    figure = picture(record)
    files.write_atomically(args.out / "picture.png", lambda f: figure.savefig(f, format="png"))
    print(f"\n{texts['table.md']}\nWrote {args.out} in {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
