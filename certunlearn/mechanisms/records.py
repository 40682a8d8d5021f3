"""Mechanisms as JSON-ready records, and back."""

import dataclasses
import math
from typing import Any

from certunlearn._numerics import checks
from certunlearn.mechanisms import base
from certunlearn.mechanisms.base import Mechanism
from certunlearn.mechanisms.descent_to_delete import DescentToDelete
from certunlearn.mechanisms.dp_training import DPSGD
from certunlearn.mechanisms.exact_head import ExactHead
from certunlearn.mechanisms.gradient_clipping import GradientClipping
from certunlearn.mechanisms.model_clipping import ModelClipping
from certunlearn.mechanisms.output_perturbation import OutputPerturbation
from certunlearn.mechanisms.perturbed_minimizer import PerturbedMinimizer
from certunlearn.mechanisms.plain_separations import Separations
from certunlearn.mechanisms.projected_noisy_sgd import ProjectedNoisySGD
from certunlearn.mechanisms.retraining import Retraining
from certunlearn.mechanisms.rewind_to_delete import RewindToDelete

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
        PerturbedMinimizer,
        Retraining,
        ExactHead,
        Separations,
    )
}

# What a record of separations holds: all but the transform, which is the caller's affair.
_SEPARATIONS_FIELDS = tuple(
    field.name for field in dataclasses.fields(Separations) if field.name != "transform"
)


def is_own(mechanism: Mechanism) -> bool:
    """Whether it is one of the package's mechanisms, and no subclass of one."""
    return MECHANISMS.get(type(mechanism).__name__) is type(mechanism)


def to_record(mechanism: Mechanism) -> dict[str, Any]:
    """The mechanism as a JSON-ready dict: its class's name and its fields, schedules as lists.

    Fields of a user's class that JSON cannot hold, such as functions, are left out.
    """
    name = type(mechanism).__name__
    if type(mechanism) is Separations:
        return {"name": name, **separations_to_record(mechanism)}
    fields = base.field_values(mechanism)
    if not is_own(mechanism):
        fields = {field: value for field, value in fields.items() if _is_recordable(value)}
    return {"name": name, **_listed(fields)}


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
    if name == Separations.__name__:
        return separations_from_record(fields, fill)
    return _made(MECHANISMS[name], fields, fill)


def separations_to_record(separations: Separations) -> dict[str, Any]:
    """Separations as a JSON-ready dict, their transform left out; an infinite diameter is None."""
    values = base.field_values(separations)
    fields = {name: values[name] for name in _SEPARATIONS_FIELDS}
    if math.isinf(separations.diameter):
        fields["diameter"] = None
    return _listed(fields)


def separations_from_record(record: dict[str, Any], fill: bool = False) -> Separations:
    """The separations that `separations_to_record` wrote; arguments, errors as `from_record`."""
    if not isinstance(record, dict):
        raise TypeError(f"separations must be an object, got {checks.shown(record)}")
    fields = dict(record)
    if not fill:
        _check_names(fields, set(_SEPARATIONS_FIELDS))
    if fields.get("diameter", 0.0) is None:
        fields["diameter"] = math.inf
    found = _made(Separations, fields, True)
    assert isinstance(found, Separations)
    return found


def _made(kind: type[Mechanism], fields: dict[str, Any], fill: bool) -> Mechanism:
    declared = dataclasses.fields(kind)  # type: ignore[arg-type]
    if fill:
        defaults = {f.name: f.default for f in declared if f.default is not dataclasses.MISSING}
        fields = defaults | fields
    _check_names(fields, {field.name for field in declared})
    return kind(**fields)


def _check_names(fields: dict[str, Any], expected: set[str]) -> None:
    if set(fields) != expected:
        difference = sorted(map(str, set(fields) ^ expected))
        raise ValueError(f"mechanism has missing or unknown fields: {checks.shown(difference)}")


def _listed(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


def _is_recordable(value: object) -> bool:
    values = value if isinstance(value, tuple | list) else (value,)
    return all(
        each is None or isinstance(each, bool | int | str) or _is_finite(each) for each in values
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
