"""How the cost of a certificate grows: with parameters, batch, steps and devices.

    python -m benchmarks.scaling

from the repository's root writes scaling.json and scaling.md into benchmarks/ and the tables into
docs/scaling.md, in about three minutes on two cores. Times are of the same process, in turn.
Devices are eight virtual ones of the CPU, in a process of its own: their times would mean nothing,
so collectives are counted in the compiled step, and bytes on one device. Then it works out an
estimate for a large model, in which only the assumptions listed on that page are not measured.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import certunlearn as cu
from benchmarks import memory
from benchmarks.steps import loops, networks, tables, timing
from benchmarks.steps.networks import Network
from certunlearn._numerics import files

HERE = Path(__file__).parent
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
DEVICES = 8
WIDTHS = (64, 256, 1024, 2048)
BATCHES = (1, 8, 64, 512)
STEPS = (10, 100, 1_000)


def beside_plain(network: Network, rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds that a noisy step takes more than a plain one."""
    runs = {"plain": loops.plain(network).run, "noisy_sgd": loops.noisy_sgd(network).run}
    times = timing.in_turn(runs, timing.steps_for(runs["plain"], seconds), rounds)
    more = [
        ours[0] - plain[0] for ours, plain in zip(times["noisy_sgd"], times["plain"], strict=True)
    ]
    found = {
        "parameters": network.parameters,
        "batch": network.batch_size,
        "plain_seconds": float(np.median([clock for clock, _ in times["plain"]])),
        "more_seconds": float(np.median(more)),
        "ratio": timing.summary(times["noisy_sgd"], times["plain"])["ratio"],
    }
    print(found, flush=True)
    return found


def square(width: int, batch_size: int) -> Network:
    """Two hidden layers of one width."""
    return networks.mlp(f"MLP {width}", (width, width, width, 10), batch_size)


def by_steps(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Seconds of `unlearn` in all, and of `noise_scale`, for T steps."""
    network = networks.TINY()
    found = []
    for count in counts:
        loops.unlearn(network, count, count, lambda step: None)  # what is compiled once
        clock, _ = timing.timed(lambda n=count: loops.unlearn(network, n, n, lambda step: None))
        ask = lambda n=count: cu.noise_scale(  # noqa: E731
            loops.mechanism(n), epsilon=1.0, delta=1e-5, accountant="interpolation"
        )
        accounting, _ = timing.timed(ask)
        found.append({"steps": count, "seconds": clock, "noise_scale_seconds": accounting})
        print(found[-1], flush=True)
    return found


# ------------------------------------------------------------------------------ devices


def sharded_step(devices: int, width: int, noisy: bool) -> dict[str, Any]:
    """The compiled step with parameters cut over all devices, and examples likewise."""
    network = square(width, 8 * DEVICES)
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def placed(leaf: jax.Array) -> jax.Array:
        cut = leaf.ndim > 0 and leaf.shape[0] % devices == 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("d" if cut else None)))

    params = jax.tree.map(placed, network.params)
    batch = jax.tree.map(lambda leaf: placed(leaf[: network.batch_size]), network.data)
    loop = (loops.noisy_sgd if noisy else loops.plain)(network)
    state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec())), loop.carry[1]
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))

    step = jax.jit(loop.on_batch, donate_argnums=0, out_shardings=shardings)
    compiled = step.lower((params, state), batch).compile()
    pattern = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")
    counted = Counter(pattern.findall(compiled.as_text()))
    return {
        "devices": devices,
        "noisy": noisy,
        "collectives": dict(sorted(counted.items())),
        "copies_of_all_parameters": memory.peak(compiled.memory_analysis())
        / memory.bytes_of(network.params),
    }


def devices_alone(width: int) -> list[dict[str, Any]]:
    """What a process with eight devices finds."""
    counts = [2**i for i in range(4)]
    return [sharded_step(count, width, noisy) for count in counts for noisy in (False, True)]


def by_devices(width: int) -> list[dict[str, Any]]:
    """The same, in a process that is given eight devices."""
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "benchmarks.scaling", "--devices-alone", str(width)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------ an estimate

# A decoder of 7 billion parameters, and low-rank leaves on all of its dense layers.
WIDTH, INNER, BLOCKS, WORDS, RANK = 4096, 11008, 32, 32_000, 16
TOKENS = 16 * 2048  # in a batch
# Assumed of an accelerator: half of its peak in bfloat16, and its bandwidth.
SECONDS_PER_FLOP, SECONDS_PER_BYTE = 1 / 200e12, 1 / 2e12


def of_update(size: int) -> dict[str, float]:
    """Operations and bytes a coordinate of clip, noise and update, as the compiler counts them."""
    params = {"w": jnp.zeros(size)}
    tx = cu.noisy_sgd(loops.mechanism(), loops.NOISE, key=loops.KEY)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p)[0])
    compiled = update.lower(params, tx.init(params), params).compile()
    counted = compiled.cost_analysis()
    return {
        "flops_a_coordinate": counted.get("flops", 0.0) / size,
        "bytes_a_coordinate": counted.get("bytes accessed", 0.0) / size,
        "copies": memory.peak(compiled.memory_analysis()) / (4 * size),
    }


def estimate(update: dict[str, float]) -> dict[str, float]:
    """Bytes and operations of a step: base in bfloat16 and frozen, low-rank leaves in float32."""
    dense = [(WIDTH, WIDTH)] * 4 + [(WIDTH, INNER)] * 3
    base = BLOCKS * sum(a * b for a, b in dense) + 2 * WORDS * WIDTH
    leaves = BLOCKS * sum(RANK * (a + b) for a, b in dense)
    # Two operations a weight and token forward, two back through the activations; the frozen
    # weights need no gradient of their own. A low-rank weight takes all six.
    model = TOKENS * (4 * (base - WORDS * WIDTH) + 6 * leaves)  # looking a word up costs nothing
    certified = update["flops_a_coordinate"] * leaves
    return {
        "base_parameters": base,
        "low_rank_parameters": leaves,
        "base_bytes": 2 * base,
        "low_rank_bytes": 4 * leaves,
        "update_bytes": update["copies"] * 4 * leaves,
        "model_flops": model,
        "update_flops": certified,
        "update_share_of_flops": certified / model,
        "model_seconds": model * SECONDS_PER_FLOP,
        "update_seconds": update["bytes_a_coordinate"] * leaves * SECONDS_PER_BYTE,
    }


def main() -> None:
    """Measures and writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds, tiny networks")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--devices-alone", type=int, metavar="WIDTH", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.devices_alone:
        print(json.dumps(devices_alone(args.devices_alone)))
        return
    widths, batches, counts = (WIDTHS, BATCHES, STEPS) if not args.quick else ((16,), (8,), (2,))
    rounds, seconds = (2, 0.01) if args.quick else (args.rounds, 0.3)
    middle = 16 if args.quick else 512
    record: dict[str, Any] = {
        "command": "python -m benchmarks.scaling" + " --quick" * args.quick,
        "rounds": rounds,
        **timing.machine(),
        "parameters": [beside_plain(square(width, 8), rounds, seconds) for width in widths],
        "batches": [beside_plain(square(middle, size), rounds, seconds) for size in batches],
        "steps": by_steps(counts),
        "devices": by_devices(middle),
        "update": of_update(1000 if args.quick else 10**6),
    }
    record["estimate"] = estimate(record["update"])
    args.out.mkdir(parents=True, exist_ok=True)
    texts = {
        "scaling.json": json.dumps(record, indent=1) + "\n",
        "scaling.md": tables.scaling(record),
    }
    for name, text in texts.items():
        files.write_atomically(args.out / name, lambda file, text=text: file.write(text.encode()))
    if args.out == HERE and not args.quick:
        tables.renew(HERE.parent / "docs" / "scaling.md", tables.shown_of_scaling(record))
    print(f"\n{texts['scaling.md']}")


if __name__ == "__main__":
    main()
