"""What a certificate costs in memory: the peak of each compiled step, in copies of the parameters.

    python -m benchmarks.memory

from the repository's root writes memory.json and memory.md into benchmarks/ and the table into
docs/benchmarks.md, in a minute. The peak is what the compiler plans: arguments, results and
temporary arrays, less what results share with arguments; the data set is left out. Steps
use the old parameters' memory again, as `unlearn` does, except where it says that they are kept.
The networks have small batches, so that activations are few.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.steps import loops, networks, tables, timing
from benchmarks.steps.networks import Network
from certunlearn._numerics import files

HERE = Path(__file__).parent
WAYS: dict[str, Callable[[Network], loops.Loop]] = {
    "plain SGD": loops.plain,
    "Optax clip + normal": loops.optax_parts,
    "noisy_sgd": loops.noisy_sgd,
}
KEPT = ", old parameters kept"
ROWS: dict[str, Callable[[], Network]] = {
    "MLP": lambda: networks.mlp("MLP 4.2M, batch 8", (1024, 2048, 1024, 10), 8),
    "transformer": lambda: networks.transformer("transformer 10M, 1 x 16", 384, 4, 6, 4096, 16, 1),
}


def peak(planned: Any) -> int:
    """Bytes of a compiled step, of what `memory_analysis` says of it."""
    return (
        planned.argument_size_in_bytes
        + planned.output_size_in_bytes
        + planned.temp_size_in_bytes
        - planned.alias_size_in_bytes
    )


def bytes_of(tree: Any) -> int:
    """Of all leaves together."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def of_loop(loop: loops.Loop, keep: bool = False) -> int:
    """Peak of a step of a loop of one's own, without the data set.

    With `keep`, the memory of the old parameters is not used again.
    """
    batch = jax.tree.map(lambda leaf: leaf[loop.batches[0]], loop.data)
    step = jax.jit(loop.on_batch, donate_argnums=() if keep else 0)
    compiled = step.lower(loop.carry, batch).compile()
    return peak(compiled.memory_analysis()) - bytes_of(batch)


def of_unlearn(network: Network) -> int:
    """Peak of `cu.unlearn`'s step: the largest of what it has compiled between two pauses."""
    seen: list[set[Any]] = []
    largest: list[int] = []

    def between(step: int) -> None:
        found = {one.fingerprint or id(one): one for one in loops.executables()}
        if step:
            new = [one for mark, one in found.items() if mark not in seen[0]]
            largest.append(max(peak(one.get_compiled_memory_stats()) for one in new))
        seen.append(set(found))

    jax.clear_caches()  # or the step is no new one, if the same was compiled before
    loops.unlearn(network, 2, 2, between)
    batch = jax.tree.map(lambda leaf: leaf[: network.batch_size], network.data)
    return largest[0] - bytes_of(batch)


def row(network: Network) -> dict[str, Any]:
    """Peaks of every way, in copies of the parameters."""
    size = bytes_of(network.params)
    peaks = {name: of_loop(make(network)) for name, make in WAYS.items()}
    peaks["unlearn"] = of_unlearn(network)
    peaks |= {f"{n}{KEPT}": of_loop(WAYS[n](network), True) for n in ("plain SGD", "noisy_sgd")}
    copies = {name: each / size for name, each in peaks.items()}
    print(network.name, {name: round(each, 2) for name, each in copies.items()}, flush=True)
    return {"network": network.name, "parameter_bytes": size, "copies": copies}


def main() -> None:
    """Asks the compiler and writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny network only")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    makes = [networks.TINY] if args.quick else list(ROWS.values())
    record = {
        "command": "python -m benchmarks.memory" + " --quick" * args.quick,
        **timing.machine(),
        "rows": [row(make()) for make in makes],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    texts = {"memory.json": json.dumps(record, indent=1) + "\n", "memory.md": tables.memory(record)}
    for name, text in texts.items():
        files.write_atomically(args.out / name, lambda file, text=text: file.write(text.encode()))
    if args.out == HERE and not args.quick:
        page = HERE.parent / "docs" / "benchmarks.md"
        tables.renew(page, {"### Memory": tables.peaks(record)})
    print(f"\n{texts['memory.md']}")


if __name__ == "__main__":
    main()
