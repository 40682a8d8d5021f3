"""Mechanisms as JSON-ready records, and back."""

import dataclasses
from typing import Any

import numpy as np

from certunlearn._numerics import checks
from certunlearn.mechanisms import base
from certunlearn.mechanisms.base import Mechanism
from certunlearn.mechanisms.descent_to_delete import DescentToDelete
from certunlearn.mechanisms.dp_training import DPSGD
from certunlearn.mechanisms.gradient_clipping import GradientClipping
from certunlearn.mechanisms.model_clipping import ModelClipping
from certunlearn.mechanisms.output_perturbation import OutputPerturbation
from certunlearn.mechanisms.projected_noisy_sgd import ProjectedNoisySGD
from certunlearn.mechanisms.rewind_to_delete import RewindToDelete
from certunlearn.mechanisms.separations import Separations

# The package's mechanisms, by name: those that `verify` trusts to have the separations they state.
MECHANISMS: dict[str, type[Mechanism]] = {
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


def is_own(mechanism: Mechanism) -> bool:
    """Whether it is one of the package's mechanisms, and no subclass of one."""
    return MECHANISMS.get(type(mechanism).__name__) is type(mechanism)


def to_record(mechanism: Mechanism) -> dict[str, Any]:
    """The mechanism as a JSON-ready dict: its class's name and its fields, schedules as lists.

    Fields of a user's class that JSON cannot hold, such as functions, are left out.
    """
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in base.field_values(mechanism).items()
        if is_own(mechanism) or _is_recordable(value)
    }
    return {"name": type(mechanism).__name__, **fields}


def from_record(record: dict[str, Any], fill: bool = False) -> Mechanism:
    """The package's mechanism that `to_record` wrote.

    Args:
      record: what `to_record` returned.
      fill: whether fields that have defaults may be missing.

    Raises:
      TypeError: if a value has the wrong type.
      ValueError: if the mechanism is unknown, a field is missing or surplus, or out of range.
    """
    if not isinstance(record, dict):
        raise TypeError(f"mechanism must be an object, got {checks.shown(record)}")
    fields = dict(record)
    name = checks.choice("mechanism name", fields.pop("name", None), tuple(MECHANISMS))
    return _made(MECHANISMS[name], fields, fill)


def separations_to_record(separations: Separations) -> dict[str, Any]:
    """Separations as a JSON-ready dict, their transform left out; infinity is None."""
    fields = base.field_values(separations)
    del fields["transform"]
    record = {n: list(v) if isinstance(v, tuple) else v for n, v in fields.items()}
    return record | {"diameter": None if np.isinf(separations.diameter) else separations.diameter}


def separations_from_record(record: dict[str, Any]) -> Separations:
    """The separations that `separations_to_record` wrote; errors as for `from_record`."""
    fields = {n: tuple(v) if isinstance(v, list) else v for n, v in record.items()}
    if fields.get("diameter", 0) is None:
        fields["diameter"] = np.inf
    if "transform" in fields:
        raise ValueError("separations have an unknown field: transform")
    found = _made(Separations, fields | {"transform": None}, False)
    assert isinstance(found, Separations)
    return found


def _made(kind: type[Mechanism], fields: dict[str, Any], fill: bool) -> Mechanism:
    declared = dataclasses.fields(kind)  # type: ignore[arg-type]
    if fill:
        defaults = {f.name: f.default for f in declared if f.default is not dataclasses.MISSING}
        fields = defaults | fields
    expected = {field.name for field in declared}
    if set(fields) != expected:
        difference = sorted(map(str, set(fields) ^ expected))
        raise ValueError(f"mechanism has missing or unknown fields: {checks.shown(difference)}")
    return kind(**fields)


def _is_recordable(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(each, bool | int | float | str) for each in value)
    return value is None or isinstance(value, bool | int | float | str)
