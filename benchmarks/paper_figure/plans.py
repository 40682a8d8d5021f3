"""Sizes of a run: the full one, and a quick one whose numbers mean nothing."""

from typing import Any, NamedTuple

from benchmarks.paper_figure.experiment import Grid, Sweep
from benchmarks.paper_figure.running import Schedule
from benchmarks.paper_figure.scales import STEPS


class Part(NamedTuple):
    """One problem: its sizes, its schedule and its grid."""

    validation: int
    train: int | None
    schedule: Schedule
    grid: Grid


class Plan(NamedTuple):
    """All that the cells depend on."""

    seeds: int
    epsilons: tuple[float, ...]
    parts: dict[str, Part]
    sweep: Sweep

    def record(self) -> dict[str, Any]:
        """As JSON."""
        parts = {
            name: {
                **part._asdict(),
                "schedule": part.schedule._asdict(),
                "grid": part.grid._asdict(),
            }
            for name, part in self.parts.items()
        }
        return {**self._asdict(), "parts": parts, "sweep": self.sweep._asdict()}


RADII = (0.001, 0.01, 0.1)


def full(seeds: int) -> Plan:
    """About half an hour on one core."""
    mnist = Part(
        validation=5_000,
        train=None,
        schedule=Schedule(250, STEPS, (20, 40, 80, 180), train_epochs=5),
        grid=Grid(RADII, (3e-3, 1e-2), (2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2)),
    )
    cifar = Part(
        validation=5_000,
        train=None,
        schedule=Schedule(100, STEPS, (20, 40, 80, 180), train_epochs=4),
        grid=Grid(RADII, (3e-3, 1e-2), (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)),
    )
    sweep = Sweep((0.001, 0.01, 0.1, 1.0, 10.0), (1.0, 64.0), (0.5, 1, 2, 4, 8, 16, 32, 64), 0.1)
    return Plan(seeds, (0.5, 1.0, 2.0, 4.0, 8.0), {"mnist": mnist, "cifar10": cifar}, sweep)


def quick(seeds: int) -> Plan:
    """Up to two minutes, of which loading the data takes most."""
    schedule = Schedule(50, 3, (3, 6), train_epochs=1)
    part = Part(200, 1000, schedule, Grid((0.01, 0.1), (1e-2,), (3e-3, 1e-2)))
    sweep = Sweep((0.01, 0.1), (1.0,), (1.0, 8.0), 0.1)
    return Plan(seeds, (1.0,), {"mnist": part, "cifar10": part}, sweep)
