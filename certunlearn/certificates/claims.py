"""What a certificate's claim is derived from: the same when it is issued and when it is checked.

The package's own mechanisms are derived from their fields. Any other is derived from the
separations that it states, which the certificate records: so whoever lacks the class derives the
same claim, and takes on trust that the class has these separations.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from certunlearn import accounting
from certunlearn._numerics import checks
from certunlearn.certificates import record_format
from certunlearn.certificates.record import Certificate
from certunlearn.mechanisms import MECHANISMS, Mechanism, records, sentences


class Basis(NamedTuple):
    """What a claim is derived from.

    Attributes:
      planned: a mechanism of the package.
      separations: its record, if it stands for a mechanism that is not the package's; else None.
      assumptions: what the claim rests on, in sentences.
    """

    planned: Mechanism
    separations: dict[str, Any] | None
    assumptions: tuple[str, ...]


def basis_of(mechanism: Mechanism) -> Basis:
    """What a certificate for this mechanism is derived from.

    Raises:
      ValueError: if the mechanism is none of the package's and has no separations, or its class
        has the name of one of the package's.
    """
    if records.is_own(mechanism):
        return Basis(mechanism, None, tuple(mechanism.rests_on()))
    name, stated = type(mechanism).__name__, mechanism.separations()
    if name in MECHANISMS:
        raise ValueError(
            f"mechanism must have a class name of its own, got {name!r}, which is certunlearn's"
        )
    if stated is None:
        raise ValueError(
            f"{name} must state separations to be certified, got None: a claim about a mechanism "
            "that is not certunlearn's is derived from them"
        )
    return _stated(name, records.separations_to_record(stated))


def with_stream(basis: Basis) -> list[str]:
    """The assumptions of a run whose batches came from a stream.

    Raises:
      ValueError: if the mechanism's steps draw samples, which no stream does, or are functions of
        sums.
    """
    if not _takes_batches(basis.planned):
        raise ValueError(
            f"streamed must be False for {type(basis.planned).__name__}, which takes no batches"
        )
    return [*basis.assumptions, sentences.STREAMED]


def are_assumptions(certificate: Certificate, basis: Basis) -> bool:
    """Whether the recorded assumptions are those of the mechanism, with a stream or without."""
    if certificate.assumptions == list(basis.assumptions):
        return True
    # Formats before the fourth knew no streams.
    said = certificate.schema == record_format.SCHEMA and _takes_batches(basis.planned)
    return said and certificate.assumptions == [*basis.assumptions, sentences.STREAMED]


def _takes_batches(planned: Mechanism) -> bool:
    """Whether steps take batches: no samples of their own, and no sums."""
    return planned.poisson_sampling() is None and not planned.of_sums


def basis_in(certificate: Certificate) -> Basis:
    """What a certificate says that its claim is derived from; errors as for malformed records."""
    if certificate.separations is None:
        planned = records.from_record(certificate.mechanism)
        return Basis(planned, None, tuple(planned.rests_on()))
    return _stated(certificate.mechanism["name"], certificate.separations)


def class_problem(certificate: Certificate, kinds: Sequence[type[Mechanism]]) -> str | None:
    """Why the recorded separations are not those of the user's class of that name, or None.

    None, too, if the certificate is for none of these classes.
    """
    name = certificate.mechanism["name"]
    named = [kind for kind in kinds if kind.__name__ == name]
    if certificate.separations is None or not named:
        return None
    fields = {
        field: tuple(value) if isinstance(value, list) else value
        for field, value in certificate.mechanism.items()
        if field != "name"
    }
    stated = named[0](**fields).separations()
    if stated is not None and records.separations_to_record(stated) == certificate.separations:
        return None
    return f"separations are not those that {name} states for the recorded fields"


def check_accountant(accountant: Any) -> str | None:
    """An accountant's name, or ValueError if it is none of the package's."""
    if accountant is None:
        return None
    if not isinstance(accountant, str):
        raise ValueError(
            "accountant must be one of certunlearn's for a certificate, "
            f"{', '.join(accounting.ACCOUNTANTS)}, got {checks.shown(accountant)}: whoever "
            "verifies has no other. Calibrate with yours, and pass noise_scale"
        )
    return checks.choice("accountant", accountant, accounting.ACCOUNTANTS)


def check_affordable(accountant: str, run: Mechanism, scale: checks.PerStep) -> None:
    """Raises ValueError for claims that would take long to derive, and that nobody issues."""
    reason = accounting.unaffordable_reason(accountant, run, scale)
    if reason is not None:
        raise ValueError(reason)


def first_steps(scale: checks.PerStep, steps: int) -> checks.PerStep:
    """The noise scale of the first `steps` steps."""
    return scale[:steps] if isinstance(scale, tuple) else scale


def _stated(name: str, record: dict[str, Any]) -> Basis:
    planned = records.separations_from_record(record)
    trust = sentences.trusted_separations(name)
    return Basis(planned, record, (*planned.rests_on(), trust))


def recorded_fields(certificate: Certificate) -> dict[str, Any]:
    """A certificate's fields by name."""
    fields = dataclasses.fields(certificate)
    return {field.name: getattr(certificate, field.name) for field in fields}
