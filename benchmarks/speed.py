"""What a certificate costs in time: the library's steps beside plain ones and other libraries'.

    python -m benchmarks.speed

from the repository's root writes speed.json, speed.md and speed.png into benchmarks/, and the
tables into docs/. It takes about ten minutes on two cores, which should have nothing else to do.
The extra `bench` installs the other libraries; without it their columns say "not installed".
`--quick` takes seconds, on a tiny network: its numbers mean nothing. `--sections steps parts`
measures these anew and keeps the rest of the JSON file; `--render` writes tables and picture from
it and measures nothing. The tables of a GPU are those of

    python -m benchmarks.speed --out benchmarks/gpu
        --sections steps examples parts replicas compiling

Within a row all ways take turns in one process. A ratio is the median, over rounds, of a way's time
over plain SGD's in the same round.
"""

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import certunlearn as cu
from benchmarks.steps import loops, networks, rivals, tables, timing
from benchmarks.steps.networks import Network
from certunlearn._numerics import files

HERE = Path(__file__).parent.resolve()
GPU = HERE / "gpu"
LONGEST = 60.0  # an accountant that takes longer, in seconds, is not asked for more steps


class Plan:
    """How much is measured."""

    def __init__(self, quick: bool, rounds: int, names: list[str]) -> None:
        """Few and tiny if `quick`, else of the networks named."""
        tiny: dict[str, Callable[[], Network]] = {"tiny": networks.TINY}
        self.networks = tiny if quick else {name: networks.ROWS[name] for name in names}
        some = {name: networks.ROWS[name] for name in ("MLP 100k", "CNN 20k") if name in names}
        self.examples = tiny if quick else some
        small = ("MLP 4k", "MLP 100k", "CNN 20k")
        self.replicas = tiny if quick else {n: networks.ROWS[n] for n in small if n in names}
        self.runs = 2 if quick else 8
        self.microbatches = (2,) if quick else (8,)
        self.rounds = rounds
        self.seconds = 0.01 if quick else 0.3  # of one way in one round
        self.sizes = (100,) if quick else (10**4, 10**6, 10**7)
        self.steps = (1,) if quick else (1, 10, 100, 1_000, 10_000)
        self.leaves = 4 if quick else 200
        self.imports = 1 if quick else 5


def row(
    network: Network, runs: dict[str, Callable[[], Any]], plan: Plan, **options: Any
) -> dict[str, Any]:
    """One network: `plain`, the ways in `runs`, and `unlearn` whose pauses the others fill."""
    made: dict[str, Any] = {"plain": loops.plain(network).run}
    missing = {}
    for name, make in runs.items():
        try:
            made[name] = make().run
        except ImportError:
            missing[name] = "not installed"
    steps = timing.steps_for(made["plain"], plan.seconds)
    # A way that is far slower than plain SGD takes fewer steps a round.
    counts = {n: max(1, min(steps, timing.steps_for(r, plan.seconds))) for n, r in made.items()}
    counts["unlearn"] = counts[next(iter(runs))]
    times: dict[str, timing.Times] = {name: [] for name in (*made, "unlearn")}
    waits: list[tuple[float, float]] = []
    started: list[tuple[float, float]] = []

    def between(step: int) -> None:
        now = timing.now()
        if started:
            waits.append((now[0] - started[-1][0], now[1] - started[-1][1]))
        if step and len(waits) > 1:  # the first wait has the compilation
            times["unlearn"].append(tuple(wait / counts["unlearn"] for wait in waits[-1]))
            for name in timing.turned(list(made), len(waits)):
                clock, processor = timing.timed(lambda name=name: made[name](counts[name]))
                times[name].append((clock / counts[name], processor / counts[name]))
        started.append(timing.now())

    with timing.compilations() as compiled:
        loops.unlearn(
            network, counts["unlearn"] * (plan.rounds + 1), counts["unlearn"], between, **options
        )
    base = times["plain"]
    return {
        "network": network.name,
        "parameters": network.parameters,
        "batch": network.batch_size,
        "steps_a_round": counts,
        "compile_seconds_of_unlearn": sum(compiled),
        "ways": {name: timing.summary(found, base) for name, found in times.items()} | missing,
    }


def steps(plan: Plan) -> list[dict[str, Any]]:
    """The gradient of the batch clipped: each network, each way."""
    found = []
    for make in plan.networks.values():
        network = make()
        runs = {
            "Optax clip + normal": functools.partial(loops.optax_parts, network),
            "noisy_sgd": functools.partial(loops.noisy_sgd, network),
        }
        found.append(row(network, runs, plan))
        tables.say(found[-1])
    return found


def examples(plan: Plan) -> list[dict[str, Any]]:
    """The gradient of each example clipped: ours and other libraries'."""
    found = []
    for make in plan.examples.values():
        network = make()
        runs = {"ours": functools.partial(loops.per_example, network)}
        for size in plan.microbatches:
            name = f"in microbatches of {size}"
            runs[f"ours {name}"] = functools.partial(loops.per_example, network, size)
            runs[f"jax-privacy {name}"] = functools.partial(rivals.jax_privacy, network, size)
        runs |= {n: functools.partial(make, network) for n, make in rivals.RIVALS.items()}
        found.append(row(network, runs, plan, per_example=True))
        tables.say(found[-1])
    return found


def parts(plan: Plan) -> list[dict[str, Any]]:
    """Noise, clip, and both with the update; no gradient."""
    found = []
    for size in plan.sizes:
        for name, (plain, ours) in loops.parts(size).items():
            runs = {"plain": plain, "ours": ours}
            times = timing.in_turn(
                {
                    which: lambda n, run=run: [run() for _ in range(n)]
                    for which, run in runs.items()
                },
                timing.steps_for(
                    lambda n, plain=plain: [plain() for _ in range(n)], plan.seconds / 3
                ),
                plan.rounds,
            )
            ways = {which: timing.summary(times[which], times["plain"]) for which in runs}
            found.append({"what": name, "parameters": size, "ways": ways})
            print(f"{name:6} {size:>9} parameters: {ways['ours']['ratio']:.2f}", flush=True)
    return found


def accountants(plan: Plan) -> list[dict[str, Any]]:
    """Seconds that `noise_scale` takes for T steps of gradient clipping with weight decay."""
    found: list[dict[str, Any]] = []
    slow: set[str] = set()
    for count in plan.steps:
        mechanism = cu.GradientClipping(
            init_radius=1.0, clip_norm=1.0, learning_rate=0.1, weight_decay=0.1, steps=count
        )
        for name, problem in cu.supported_accountants(mechanism).items():
            if problem is not None or name in slow:
                continue
            ask = functools.partial(
                cu.noise_scale, mechanism, epsilon=1.0, delta=1e-5, accountant=name
            )
            if count == plan.steps[0]:
                ask()  # what is loaded and compiled once
            seconds, processor = timing.timed(ask)
            kept = {"seconds": seconds, "processor_seconds": processor}
            found.append({"accountant": name, "steps": count, **kept})
            if seconds > LONGEST:
                slow.add(name)
            print(f"{name}, T = {count}: {seconds:.3f} s", flush=True)
    return found


def replicas(plan: Plan) -> list[dict[str, Any]]:
    """Runs that `run_replicas` takes together, and the same runs one after the other."""
    ways = {"one by one": loops.one_by_one, "together": loops.together}
    found = []
    for make in plan.replicas.values():
        network = make()

        def timed(way: Callable[[list[Any]], None], steps: int) -> tuple[float, float]:
            runs = [loops.prepared(network, steps, number) for number in range(plan.runs)]  # noqa: B023
            clock, processor = timing.timed(lambda: way(runs))
            return clock / steps, processor / steps

        for way in ways.values():
            timed(way, 1)  # what is compiled once
        steps = max(1, round(plan.seconds / timed(loops.one_by_one, 2)[0]))
        for way in ways.values():
            timed(way, steps)
        times: dict[str, timing.Times] = {name: [] for name in ways}
        for number in range(plan.rounds):
            for name in timing.turned(list(ways), number):
                times[name].append(timed(ways[name], steps))
        found.append(
            {
                "network": network.name,
                "parameters": network.parameters,
                "runs": plan.runs,
                "steps_a_round": steps,
                "ways": {n: timing.summary(times[n], times["one by one"]) for n in ways},
            }
        )
        tables.say(found[-1])
    return found


def compiling(plan: Plan) -> dict[str, Any]:
    """Compilation of a clip of many leaves, and of a second request of equal shapes."""
    found: dict[str, Any] = {"leaves": plan.leaves, "clip": {}}
    shapes = {"all different": [(20 + i, 30) for i in range(plan.leaves)]}
    shapes["of 4 shapes"] = [(32, 32 * (1 + i % 4)) for i in range(plan.leaves)]
    for kind, each in shapes.items():
        tree = [jnp.ones(shape) for shape in each]
        seconds = {}
        clips = {"optax": optax.clip_by_global_norm(1.0), "ours": cu.clip_by_global_norm(1.0)}
        for name, tx in clips.items():
            update = jax.jit(lambda tree, tx=tx: tx.update(tree, tx.init(tree))[0])
            seconds[name] = timing.timed(lambda u=update, t=tree: u.lower(t).compile())[0]
        found["clip"][kind] = seconds
        print(f"compiling a clip of {plan.leaves} leaves {kind}: {seconds}", flush=True)
    network = networks.TINY() if plan.leaves < 10 else networks.ROWS["MLP 4k"]()
    jax.clear_caches()
    for request in ("first request", "second request"):
        with timing.compilations() as compiled:
            # The steps are not few because compiling is to be seen, but the same in both.
            times = timing.timed(lambda: loops.unlearn(network, 10, 10, lambda step: None))
        found[request] = {
            "backend_compilations": len(compiled),
            "compile_seconds": sum(compiled),
            "seconds": times[0],
            "processor_seconds": times[1],
        }
        print(f"{request} of 10 steps: {found[request]}", flush=True)
    return found


def importing(plan: Plan) -> dict[str, Any]:
    """Seconds of fresh processes that import the library, or JAX and Optax alone, in turn."""
    codes = {"jax, optax": "import jax, optax", "certunlearn": "import certunlearn"}
    times = timing.in_turn(
        {
            name: lambda n, code=code: subprocess.run([sys.executable, "-c", code], check=True)
            for name, code in codes.items()
        },
        1,
        plan.imports,
    )
    return {name: timing.summary(found, times["jax, optax"]) for name, found in times.items()}


SECTIONS: dict[str, Callable[[Plan], Any]] = {
    "importing": importing,
    "steps": steps,
    "examples": examples,
    "parts": parts,
    "replicas": replicas,
    "compiling": compiling,
    "accountants": accountants,
}


def main() -> None:
    """Measures what is asked for and writes the files after each section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds, a tiny network")
    parser.add_argument("--rounds", type=int, metavar="N", help="11; 2 if quick")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--networks", nargs="+", choices=networks.ROWS, default=list(networks.ROWS))
    parser.add_argument("--render", action="store_true", help="only table and picture, from JSON")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "speed.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not args.render:
        plan = Plan(args.quick, args.rounds or (2 if args.quick else 11), args.networks)
        command = "python -m benchmarks.speed" + " --quick" * args.quick
        for name in args.sections:
            about = {"command": command, "rounds": plan.rounds, **timing.machine()}
            print(f"== {name}", flush=True)
            clock, _ = timing.timed(lambda name=name: record.update({name: SECTIONS[name](plan)}))
            record.setdefault("measured", {})[name] = about | {"seconds": clock}
            write(args.out, record)
    write(args.out, record)
    if args.out.resolve() in (HERE, GPU) and not args.quick:
        renew_pages()
    print(f"\n{tables.speed(record)}")


def renew_pages() -> None:
    """Writes into docs/ what has been measured here, and on a GPU."""
    records = {folder: folder / "speed.json" for folder in (HERE, GPU)}
    found = {folder: json.loads(path.read_text()) for folder, path in records.items()}
    shown = tables.shown_of_speed(found[HERE]) | tables.shown_of_gpu(found[GPU])
    pages = HERE.parent / "docs"
    tables.renew(pages / "benchmarks.md", shown, found[HERE])
    tables.renew(pages / "sharp-edges.md", {}, found[HERE])


def write(folder: Path, record: dict[str, Any]) -> None:
    """JSON, tables and picture, each whole or not at all."""
    texts = {"speed.json": json.dumps(record, indent=1) + "\n", "speed.md": tables.speed(record)}
    for name, text in texts.items():
        files.write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    if "steps" in record:
        figure = tables.picture(record)
        files.write_atomically(
            folder / "speed.png", lambda file: figure.savefig(file, format="png")
        )


if __name__ == "__main__":
    main()
