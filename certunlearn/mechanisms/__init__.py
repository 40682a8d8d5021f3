"""What an unlearning step may do: separation functions, initial distances and assumptions.

A mechanism is all that an accountant ever sees of a method. Adding a method is adding one here; see
`base.Mechanism` for what it answers.
"""

import dataclasses
from typing import Any

from certunlearn import checks
from certunlearn.mechanisms.base import REFERENCES, Mechanism
from certunlearn.mechanisms.clipped_models import ModelClipping, OutputPerturbation
from certunlearn.mechanisms.convex import DescentToDelete, ProjectedNoisySGD
from certunlearn.mechanisms.dp_sgd import DPSGD
from certunlearn.mechanisms.gradient_clipping import GradientClipping
from certunlearn.mechanisms.rewind import RewindToDelete

MECHANISMS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        GradientClipping,
        ModelClipping,
        OutputPerturbation,
        ProjectedNoisySGD,
        DescentToDelete,
        RewindToDelete,
        DPSGD,
    )
}

__all__ = [
    "DPSGD",
    "MECHANISMS",
    "REFERENCES",
    "DescentToDelete",
    "GradientClipping",
    "Mechanism",
    "ModelClipping",
    "OutputPerturbation",
    "ProjectedNoisySGD",
    "RewindToDelete",
    "check",
    "from_record",
    "to_record",
]


def check(mechanism: Any) -> None:
    """Raises TypeError if it is not one of the mechanisms."""
    if not isinstance(mechanism, tuple(MECHANISMS.values())):
        names = ", ".join(MECHANISMS)
        raise TypeError(f"mechanism must be one of {names}, got {checks.shown(mechanism)}")


def to_record(mechanism: Any) -> dict[str, Any]:
    """The mechanism as a JSON-ready dict: its class's name and every field, schedules as lists."""
    fields = {
        field.name: list(value)
        if isinstance(value := getattr(mechanism, field.name), tuple)
        else value
        for field in dataclasses.fields(mechanism)
    }
    return {"name": type(mechanism).__name__, **fields}


def from_record(record: dict[str, Any], fill: bool = False) -> Any:
    """The mechanism that `to_record` wrote; with `fill`, fields that have defaults may be missing.

    Raises:
      TypeError: if a value has the wrong type.
      ValueError: if the mechanism is unknown, a field is missing or surplus, or out of range.
    """
    if not isinstance(record, dict):
        raise TypeError(f"mechanism must be an object, got {checks.shown(record)}")
    fields = dict(record)
    name = fields.pop("name", None)
    checks.choice("mechanism name", name, tuple(MECHANISMS))
    kind = MECHANISMS[name]
    expected = {field.name for field in dataclasses.fields(kind)}
    if fill:
        defaults = {f.name: f.default for f in dataclasses.fields(kind)}
        known = {name: d for name, d in defaults.items() if d is not dataclasses.MISSING}
        fields = known | fields
    if set(fields) != expected:
        difference = sorted(map(str, set(fields) ^ expected))
        raise ValueError(f"mechanism has missing or unknown fields: {checks.shown(difference)}")
    return kind(**fields)
