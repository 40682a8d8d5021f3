"""The check of a certificate: deriving its claim again from what it records."""

import dataclasses
import math
from typing import Any

import numpy as np

from certunlearn import accounting, certificates, checks, files, mechanisms
from certunlearn.certificates import Certificate


@dataclasses.dataclass(frozen=True)
class Verification:
    """The outcome of `verify`; true in a boolean context only if nothing is wrong.

    Attributes:
      ok: whether the claim holds as recorded.
      problems: what is wrong, a sentence each; empty if `ok`.
      summary: what the certificate says, for people.
    """

    ok: bool
    problems: tuple[str, ...]
    summary: str

    def __bool__(self) -> bool:
        """Whether the claim holds as recorded."""
        return self.ok


def verify(certificate: Certificate, params: Any = None) -> Verification:
    """Derives a certificate's claim again from what it records.

    Args:
      certificate: as issued or loaded.
      params: the released parameters, to be held against the recorded digest; a pytree, or the
        flat dict that `load_params` returns. Without them the claim is checked, not whose it is.

    Returns:
      A `Verification`: test it like a boolean; `problems` says what is wrong.

    Raises:
      TypeError: if `certificate` is not a `Certificate`.

    Guarantee:
      A true outcome means that the recorded mechanism and noise give the recorded (epsilon,
      delta), provided the recorded assumptions hold, and, given `params`, that they are the ones
      the certificate was issued for. It cannot tell whether the issuer told the truth.
    """
    if not isinstance(certificate, Certificate):
        raise TypeError(f"certificate must be a Certificate, got {certificate!r}")
    record = dataclasses.asdict(certificate)
    problems = certificates.format_problems(record)
    if problems:
        return Verification(ok=False, problems=tuple(problems), summary="malformed certificate")
    problems = _digest_problems(record) + _claim_problems(certificate)
    if params is not None:
        problems += _params_problems(certificate, params)
    return Verification(ok=not problems, problems=tuple(problems), summary=_summary(certificate))


def _digest_problems(record: dict[str, Any]) -> list[str]:
    if record["record_digest"] == certificates.record_digest(record):
        return []
    return ["record_digest does not match: a field was altered after the certificate was issued"]


def _claim_problems(certificate: Certificate) -> list[str]:
    try:
        planned = mechanisms.from_record(certificate.mechanism)
        run = planned.first(certificate.steps_run)
        scale = checks.per_step("noise_scale", certificate.noise_scale, planned.steps)
        run_scale = certificates.first_steps(scale, certificate.steps_run)
        derived = {
            "epsilon": accounting.epsilon(
                run,
                noise_scale=run_scale,
                delta=certificate.delta,
                accountant=certificate.accountant,
            ),
            "mu": accounting.mu(run, noise_scale=run_scale),
            "total_variation": accounting.total_variation(
                run, noise_scale=run_scale, accountant=certificate.accountant
            ),
        }
    except (TypeError, ValueError) as error:
        return [f"the claim cannot be derived: {error}"]
    problems = []
    coupled = certificate.accountant == "coupling"
    tolerance = certificates.COUPLING_TOLERANCE if coupled else certificates.TOLERANCE
    for name, value in derived.items():
        recorded = getattr(certificate, name)
        if (recorded is None) != (value is None) or not math.isclose(
            recorded or 0.0, value or 0.0, rel_tol=tolerance, abs_tol=1e-15
        ):
            problems.append(f"{name} is recorded as {recorded!r}, but recomputing gives {value!r}")
    if certificate.assumptions != list(planned.assumptions):
        problems.append("the assumptions are not those of the mechanism")
    return problems + _lower_bound_problems(certificate, run, run_scale)


def _lower_bound_problems(
    certificate: Certificate, run: Any, run_scale: checks.PerStep
) -> list[str]:
    """Whether the recorded lower bound is more than is known: a smaller one is as true."""
    recorded = certificate.epsilon_lower_bound
    if recorded is None:
        return []
    if recorded > certificate.epsilon * (1 + certificates.TOLERANCE):
        return [f"epsilon_lower_bound is recorded as {recorded!r}, above epsilon itself"]
    if not run.attackable:
        return [f"epsilon_lower_bound is recorded as {recorded!r}, but no such attack is known"]
    reached = accounting.affordable_lower_bound(run, noise_scale=run_scale, delta=certificate.delta)
    if reached is None:
        return [
            f"epsilon_lower_bound is recorded as {recorded!r}, but is not worked out for more than "
            f"{accounting.MOST_ATTACKED} steps"
        ]
    if recorded > reached * (1 + certificates.ATTACK_TOLERANCE):
        return [
            f"epsilon_lower_bound is recorded as {recorded!r}, but the attack reaches {reached!r}"
        ]
    return []


def _params_problems(certificate: Certificate, params: Any) -> list[str]:
    digest = files.params_digest(params)
    if digest == certificate.params_digest:
        coverage = certificates.coverage_of(params, certificate.coverage["frozen"])
        if coverage == certificate.coverage:
            return []
        return [f"coverage is recorded as {certificate.coverage}, but params give {coverage}"]
    return [
        f"params are not the released ones: their SHA-256 is {digest}, the certificate is for "
        f"{certificate.params_digest}"
    ]


def interval(certificate: Certificate) -> str:
    """Where the true epsilon lies, for people."""
    if certificate.epsilon_lower_bound is None:
        return f"at most {certificate.epsilon:.4g} (certified); no lower bound is recorded"
    return (
        f"between {certificate.epsilon_lower_bound:.4g} (an attack reaches it) and "
        f"{certificate.epsilon:.4g} (certified)"
    )


def _summary(certificate: Certificate) -> str:
    record, coverage = certificate.mechanism, certificate.coverage
    noise = np.asarray(certificate.noise_scale)
    noise_text = f"{noise:.6g}" if noise.ndim == 0 else f"{noise.min():.6g} to {noise.max():.6g}"
    lines = [
        f"({certificate.epsilon:.6g}, {certificate.delta:.6g})-unlearning, reference "
        f"{certificate.reference!r}, by the {certificate.accountant} accountant",
        f"mechanism           {record.get('name')}, {certificate.steps_run} of "
        f"{record.get('steps', 1)} steps, then {certificate.finetune_steps} without noise",
        f"noise scale         {noise_text} (standard deviation, parameter units)",
        f"true epsilon        {interval(certificate)}",
        f"total variation     at most {certificate.total_variation:.4g} from the reference",
        f"covers              {coverage['parameters']} parameters in {coverage['leaves']} leaves "
        f"({', '.join(map(str, coverage['dtypes']))}); frozen: {coverage['frozen_parameters']}",
        f"retain / forget     {certificate.retain_size} / {certificate.forget_size} examples",
        f"noise key           {certificate.key_source}",
        f"created             {certificate.created}",
        f"parameters SHA-256  {certificate.params_digest}",
        "It holds provided that:",
        *(f"  - {sentence}" for sentence in certificate.assumptions),
    ]
    return "\n".join(lines)
