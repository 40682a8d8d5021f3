"""Times of several ways in turn, in one process; and what they were measured on."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("certunlearn", "jax", "jaxlib", "optax", "numpy", "scipy")
RIVALS = ("jax-privacy", "opacus", "torch")
Times = list[tuple[float, float]]  # seconds of the clock and of the processor, one pair a round


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock, and of all of the process's threads."""
    clock, processor = now()
    run()
    after = now()
    return after[0] - clock, after[1] - processor


def now() -> tuple[float, float]:
    """The clock, and what the processor gave to this process and to those it waited for."""
    times = os.times()
    return time.perf_counter(), time.process_time() + times.children_user + times.children_system


def in_turn(runs: dict[str, Callable[[int], Any]], steps: int, rounds: int) -> dict[str, Times]:
    """Seconds a step of each, after a first round that is not counted."""
    times: dict[str, Times] = {name: [] for name in runs}
    for run in runs.values():
        run(1)
    for number in range(rounds):
        for name in turned(list(runs), number):
            clock, processor = timed(lambda name=name: runs[name](steps))
            times[name].append((clock / steps, processor / steps))
    return times


def turned(names: list[str], number: int) -> list[str]:
    """The names, each round beginning with another: none is always measured after the same."""
    start = number % len(names)
    return names[start:] + names[:start]


def steps_for(run: Callable[[int], Any], seconds: float) -> int:
    """How many steps take about so long; at least 1."""
    run(1)
    clock, _ = timed(lambda: run(3))
    return max(1, round(seconds / (clock / 3)))


def summary(times: Times, base: Times) -> dict[str, Any]:
    """Medians, and the ratio to the base: median and middle half of the rounds' ratios."""
    ratios = [
        [
            ours[which] / plain[which]
            for ours, plain in zip(times, base, strict=True)
            if plain[which]
        ]
        for which in (0, 1)
    ]
    return {
        "seconds": statistics.median(clock for clock, _ in times),
        "processor_seconds": statistics.median(processor for _, processor in times),
        "ratio": statistics.median(ratios[0]),
        "ratio_middle_half": middle_half(ratios[0]),
        "processor_ratio": statistics.median(ratios[1]) if ratios[1] else None,
        "processor_ratio_middle_half": middle_half(ratios[1]) if ratios[1] else None,
    }


def middle_half(numbers: list[float]) -> list[float]:
    """Where the middle half of them lies."""
    if len(numbers) < 2:
        return numbers * 2
    first, _, third = statistics.quantiles(numbers, n=4, method="inclusive")
    return [first, third]


@contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of each compilation by the backend, while in the block."""
    found: list[float] = []
    inside = [True]

    def listen(event: str, seconds: float, **_: Any) -> None:
        if inside[0] and event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        inside[0] = False


def machine() -> dict[str, Any]:
    """What it was measured on, and with which versions."""
    versions: dict[str, str] = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in RIVALS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unnamed'} ({platform.machine()})"
