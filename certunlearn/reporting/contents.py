"""What a report says, before it has a form.

Every text may hold what a hostile record holds. Whoever gives it a form escapes it.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from certunlearn import accounting
from certunlearn._numerics.safe_rounding import rounded_down, rounded_up
from certunlearn.certificates import Certificate, Verification, claims
from certunlearn.mechanisms import Mechanism
from certunlearn.reporting import privacy_curve

VERIFIED = "VERIFIED: the recorded numbers give the claim."
NOT_VERIFIED = "NOT VERIFIED: do not rely on this certificate."
_CANNOT_SAY = (
    "Whether the issuer ran what the record says. Only a rerun with the data and the key shows it.",
    "Whether the rows left out of the run are the rows that were asked to be forgotten.",
    "Whether other copies exist: earlier releases, backups, models made from the old model.",
    "What other people's rows reveal. Facts about a person that retained rows hold stay learnable.",
    "Whether the model is any good. The certificate has no accuracy in it.",
    "Who issued it. A signature says that, and is checked by: certunlearn verify --public-key.",
)
_NO_PARAMS = (
    "Whether a model that you have is the released one. The parameters were not given to this "
    "check: compare their SHA-256, or use --params."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a report says of one certificate.

    Attributes:
      verified: whether the claim was derived again from the record.
      headline: the first line.
      problems: what is wrong, a sentence each.
      claim: the claim in words, a paragraph each; empty if it was not verified.
      curve: epsilon against delta, or None where there is no curve.
      no_curve: why there is no curve; empty if there is one.
      assumptions: what the claim rests on.
      numbers: names and values of the record.
      cannot_say: what no certificate can say.
    """

    verified: bool
    headline: str
    problems: tuple[str, ...] = ()
    claim: tuple[str, ...] = ()
    curve: privacy_curve.Curve | None = None
    no_curve: str = ""
    assumptions: tuple[str, ...] = ()
    numbers: tuple[tuple[str, str], ...] = ()
    cannot_say: tuple[str, ...] = ()


def report_of_problem(problem: str) -> Report:
    """The report of a file that holds no certificate."""
    return Report(verified=False, headline=NOT_VERIFIED, problems=(problem,))


def report_of(
    certificate: Certificate, verification: Verification, *, with_params: bool = False
) -> Report:
    """The report of a certificate, and of what came of its verification.

    Args:
      certificate: as loaded; nothing in it is trusted.
      verification: what `verify` returned for it.
      with_params: whether `verify` was given the released parameters.

    Returns:
      A `Report`. Only one of a certificate that verifies has a claim and a curve.
    """
    cannot_say = _CANNOT_SAY if with_params else (*_CANNOT_SAY, _NO_PARAMS)
    shared: dict[str, Any] = {
        "assumptions": tuple(map(str, certificate.assumptions)),
        "numbers": _numbers(certificate),
        "cannot_say": cannot_say,
    }
    if not verification:
        problems = tuple(verification.problems)
        return Report(verified=False, headline=NOT_VERIFIED, problems=problems, **shared)
    planned = claims.basis_in(certificate).planned
    lower = _lower_bound(certificate, planned)
    curve = None if planned.exact else privacy_curve.curve_of(certificate, lower)
    headline = VERIFIED
    if with_params:
        headline = "VERIFIED: the recorded numbers give the claim for the given parameters."
    return Report(
        verified=True,
        headline=headline,
        claim=_exact_claim(planned) if planned.exact else _noisy_claim(certificate, lower),
        curve=curve,
        no_curve="" if curve is not None else _why_no_curve(planned),
        **shared,
    )


def _why_no_curve(planned: Mechanism) -> str:
    if planned.exact:
        return "There is no curve: epsilon and delta are both 0."
    return "There is no curve: the record has no parameter (mu) from which one can be drawn."


def _exact_claim(planned: Mechanism) -> tuple[str, ...]:
    return (
        "The released model is exactly what the reference process gives, which never saw the "
        "forgotten rows: epsilon is 0 and delta is 0.",
        f"Why: {planned.why_exact}",
    )


def _noisy_claim(certificate: Certificate, lower: float | None) -> tuple[str, ...]:
    epsilon, delta = certificate.epsilon, certificate.delta
    factor = math.exp(epsilon) if epsilon < 700 else math.inf
    if lower is None:
        interval = (
            f"The true epsilon is at most {rounded_up(epsilon)}. No lower bound was worked out."
        )
    else:
        interval = (
            f"The true epsilon lies between {rounded_down(lower)}, which an attack on a run with "
            f"these numbers reaches, and {rounded_up(epsilon)}, which is certified."
        )
    return (
        "Compare the released model with one from a reference process that never saw the "
        f"forgotten rows. Nothing that anybody finds out is more than {rounded_up(factor)} times "
        f"as likely as with the other, apart from a probability of {rounded_up(delta)}. This holds "
        "in both directions. In short: "
        f"epsilon = {rounded_up(epsilon)}, delta = {rounded_up(delta)}.",
        "No event, such as recognising a forgotten row, is more likely than for the reference by "
        f"more than {rounded_up(certificate.total_variation)}.",
        interval,
        "All of this holds if every assumption below holds.",
    )


def _lower_bound(certificate: Certificate, planned: Mechanism) -> float | None:
    """The recorded lower bound, or one that is worked out in seconds, or None."""
    if certificate.epsilon_lower_bound is not None or planned.exact or not planned.attackable:
        return certificate.epsilon_lower_bound
    scale = certificate.noise_scale
    noise = tuple(scale) if isinstance(scale, list) else scale
    return accounting.affordable_lower_bound(
        planned.first(certificate.steps_run),
        noise_scale=claims.first_steps(noise, certificate.steps_run),
        delta=certificate.delta,
    )


def _numbers(certificate: Certificate) -> tuple[tuple[str, str], ...]:
    mechanism = certificate.mechanism
    covered = certificate.coverage
    rows = [
        ("mechanism", str(mechanism["name"])),
        *((name, _short(value)) for name, value in mechanism.items() if name != "name"),
        ("noise_scale", _short(certificate.noise_scale)),
        ("epsilon", _short(certificate.epsilon)),
        ("epsilon_lower_bound", _short(certificate.epsilon_lower_bound)),
        ("delta", _short(certificate.delta)),
        ("mu", _short(certificate.mu)),
        ("total_variation", _short(certificate.total_variation)),
        ("accountant", _short(certificate.accountant)),
        ("steps_run", _short(certificate.steps_run)),
        ("evidence for steps_run", _short(certificate.evidence)),
        ("finetune_steps", _short(certificate.finetune_steps)),
        ("retain_size", _short(certificate.retain_size)),
        ("forget_size", _short(certificate.forget_size)),
        ("parameters covered", _short(covered["parameters"])),
        ("parameters frozen, not covered", _short(covered["frozen_parameters"])),
        ("noise key", _short(certificate.key_source)),
        ("created", _short(certificate.created)),
        ("versions", ", ".join(f"{name} {each}" for name, each in certificate.versions.items())),
        ("SHA-256 of the parameters", _short(certificate.params_digest)),
        ("SHA-256 of the record", _short(certificate.record_digest)),
        ("format", _short(certificate.schema)),
    ]
    return tuple(rows)


def _short(value: object) -> str:
    """A value of the record as a short text."""
    if value is None:
        return "not recorded"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        if value and all(isinstance(each, int | float) for each in value):
            return f"{len(value)} numbers from {np.min(value):.6g} to {np.max(value):.6g}"
        return ", ".join(map(str, value))
    return str(value)
