"""The check of a certificate: deriving its claim again from what it records."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from chex import ArrayTree

from certunlearn import accounting
from certunlearn._numerics import checks, files, model_trees
from certunlearn._numerics.safe_rounding import rounded_down, rounded_up
from certunlearn.certificates import (
    claims,
    covered_leaves,
    head_claims,
    issuing,
    record_format,
)
from certunlearn.certificates.record import Certificate, record_digest
from certunlearn.mechanisms import Mechanism, checked_noise, rounding
from certunlearn.sums.kept import Kept
from certunlearn.sums.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class Verification:
    """The outcome of `verify`; true in a boolean context only if nothing is wrong.

    Attributes:
      ok: whether the claim holds as recorded.
      problems: what is wrong, a sentence each; empty if `ok`.
      summary: what the certificate says, for people, if `ok`; else why it does not hold.
    """

    ok: bool
    problems: tuple[str, ...]
    summary: str

    def __bool__(self) -> bool:
        """Whether the claim holds as recorded."""
        return self.ok


def verify(
    certificate: Certificate,
    params: ArrayTree | None = None,
    *,
    mechanisms: Sequence[type[Mechanism]] = (),
    stats: Statistics | Kept | None = None,
) -> Verification:
    """Derives a certificate's claim again from what it records.

    Checks go from cheap to costly and end at the first that fails: the form, the digest, the
    parameters, the sizes and assumptions, then epsilon. A claim takes some ten seconds at most,
    whatever the record holds.

    Args:
      certificate: as issued or loaded.
      params: the released parameters, to be held against the recorded digest: a pytree, or the
        flat dict that `load_params` returns, or a Flax NNX or Equinox module or a `TrainState`, of
        which the parameters are checked and nothing else. Without them the claim is checked, but
        not which parameters it is for.
      mechanisms: classes of your own. If the certificate is for one of them, by its name, the
        recorded separations must be what that class states for the recorded fields. Without it
        they are taken on trust, which the certificate's assumptions and the summary say.
      stats: of a head of integer sums: the sums. Settings and digest must be the recorded ones, and
        the head is computed from them again.

    Returns:
      A `Verification`: test it like a boolean; `problems` says what is wrong. Its texts are lines
      of printable ASCII, whatever the record or the parameters hold.

    Raises:
      TypeError: if `certificate` is not a `Certificate`, or `stats` are no sums.
      ModuleNotFoundError: if the claim is by dp-accounting and that package is missing.

    Guarantee:
      A true outcome means that the recorded mechanism and noise give the recorded (epsilon,
      delta), provided the recorded assumptions hold, and, given `params`, that they are the ones
      the certificate was issued for; given `stats`, that these are the head of these sums, bit for
      bit. It cannot tell whether the issuer told the truth; who that is
      a signature tells (`certificates.signing`). Only the package's accountants are asked.
    """
    if not isinstance(certificate, Certificate):
        raise TypeError(f"certificate must be a Certificate, got {type(certificate).__name__}")
    record = claims.recorded_fields(certificate)
    problems = record_format.problems(record) or _digest_problems(record)
    if not problems and params is not None:
        problems = _params_problems(certificate, params)
    problems = problems or _class_problems(certificate, mechanisms)
    problems = problems or _claim_problems(certificate)
    if not problems and stats is not None:
        problems = head_claims.stats_problems(certificate, stats)
    return outcome(certificate, problems)


def outcome(certificate: Certificate, problems: list[str]) -> Verification:
    """The outcome of a check that found these problems."""
    shown = tuple(record_format.printable(text, 1_000) for text in problems)
    # Of one that fails nothing is shown that it says of itself.
    summary = f"not verified: {shown[0]}" if shown else _summary(certificate)
    return Verification(ok=not shown, problems=shown, summary=summary)


def _digest_problems(record: dict[str, Any]) -> list[str]:
    if record["record_digest"] != record_digest(record):
        return [
            "record_digest does not match: a field was altered after the certificate was issued"
        ]
    if record["schema"] == record_format.FIRST_SCHEMA:
        return [
            f"schema is {record['schema']!r}, whose assumptions leave out what they must name: "
            "have the certificate issued anew"
        ]
    return []


def _class_problems(certificate: Certificate, kinds: Sequence[type[Mechanism]]) -> list[str]:
    """Whether the user's class of that name states other separations."""
    try:
        problem = claims.class_problem(certificate, kinds)
    except Exception as error:  # of whatever the user's class is made of
        return [f"mechanism is not what its class can be made from: {error}"]
    return [] if problem is None else [problem]


def _claim_problems(certificate: Certificate) -> list[str]:
    """What is wrong with the claim: the first problem found."""
    try:
        basis = claims.basis_in(certificate)
        planned = basis.planned
        run = planned.first(certificate.steps_run)
        scale = checked_noise(planned, certificate.noise_scale)
        run_scale = claims.first_steps(scale, certificate.steps_run)
        if not claims.are_assumptions(certificate, basis):
            return ["the assumptions are not those of the mechanism"]
        problems = planned.size_problems(certificate.retain_size, certificate.forget_size)
        if problems:
            return problems
        claims.check_affordable(certificate.accountant, run, run_scale)
        return _number_problems(certificate, run, run_scale)
    except (TypeError, ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        return [f"the claim cannot be derived: {error}"]


def _number_problems(
    certificate: Certificate, run: Mechanism, run_scale: checks.PerStep
) -> list[str]:
    """Whether the recorded numbers are what the recorded run gives, the cheap ones first."""
    coupled = certificate.accountant == "coupling"
    tolerance = issuing.COUPLING_TOLERANCE if coupled else issuing.TOLERANCE
    claim: dict[str, Any] = {"noise_scale": run_scale, "accountant": certificate.accountant}
    derive = {
        "mu": lambda: accounting.mu(run, noise_scale=run_scale),
        "epsilon": lambda: accounting.epsilon(run, delta=certificate.delta, **claim),
        "total_variation": lambda: accounting.total_variation(
            run, **claim, delta=certificate.delta
        ),
    }
    for name, derived in derive.items():
        recorded, value = getattr(certificate, name), derived()
        # Coupling's tables get finer: what an older version proved is as true.
        weaker = coupled and name != "mu" and recorded is not None and recorded >= (value or 0.0)
        if (recorded is None) != (value is None) or not (
            weaker or math.isclose(recorded or 0.0, value or 0.0, rel_tol=tolerance, abs_tol=1e-15)
        ):
            return [f"{name} is recorded as {recorded!r}, but recomputing gives {value!r}"]
    return _lower_bound_problems(certificate, run, run_scale)


def _lower_bound_problems(
    certificate: Certificate, run: Mechanism, run_scale: checks.PerStep
) -> list[str]:
    """Whether the recorded lower bound is more than is known: a smaller one is as true."""
    recorded = certificate.epsilon_lower_bound
    if recorded is None:
        return []
    if recorded > certificate.epsilon * (1 + issuing.TOLERANCE):
        return [f"epsilon_lower_bound is recorded as {recorded!r}, above epsilon itself"]
    if not run.attackable:
        return [f"epsilon_lower_bound is recorded as {recorded!r}, but no such attack is known"]
    reached = accounting.affordable_lower_bound(run, noise_scale=run_scale, delta=certificate.delta)
    if reached is None:
        return [
            f"epsilon_lower_bound is recorded as {recorded!r}, but is not worked out for more than "
            f"{accounting.MOST_ATTACKED} steps, a mu above {accounting.COUPLED_MU:g}, or noise of "
            "very different scales"
        ]
    if recorded > reached * (1 + issuing.ATTACK_TOLERANCE):
        return [
            f"epsilon_lower_bound is recorded as {recorded!r}, but the attack reaches {reached!r}"
        ]
    return []


def _params_problems(certificate: Certificate, params: ArrayTree) -> list[str]:
    """Whether the parameters are those that the certificate was issued for, and carry its noise."""
    frozen = certificate.coverage["frozen"]
    try:
        params = model_trees.parameters(params)
        digest = files.params_digest(params)
        if digest != certificate.params_digest:
            return [
                f"params are not the released ones: their SHA-256 is {digest}, the certificate is "
                f"for {certificate.params_digest}"
            ]
        covered = covered_leaves.record(params, frozen)
        if covered != certificate.coverage:
            return [f"coverage is recorded as {certificate.coverage}, but params give {covered}"]
        planned = claims.basis_in(certificate).planned
        rounding.check(planned, certificate.noise_scale, covered_leaves.leaves(params, frozen))
    except Exception as error:  # of whatever the parameters are made of
        return [f"params are not what a certificate can be for: {error}"]
    return []


def interval(certificate: Certificate) -> str:
    """Where the true epsilon lies, for people."""
    if certificate.epsilon_lower_bound is None:
        return f"at most {rounded_up(certificate.epsilon)} (certified); no lower bound is recorded"
    return (
        f"between {rounded_down(certificate.epsilon_lower_bound)} (an attack reaches it) and "
        f"{rounded_up(certificate.epsilon)} (certified)"
    )


def _summary(certificate: Certificate) -> str:
    planned = claims.basis_in(certificate).planned
    claim = (
        f"({rounded_up(certificate.epsilon, 6)}, {rounded_up(certificate.delta, 6)})-unlearning, "
        f"reference {certificate.reference!r}, by the {certificate.accountant} accountant"
    )
    covered = certificate.coverage
    lines = [
        claim,
        *(_exact_lines if planned.exact else _noisy_lines)(certificate, planned),
        f"covers              {covered['parameters']} parameters in {covered['leaves']} leaves "
        f"({', '.join(map(str, covered['dtypes']))}); frozen: {covered['frozen_parameters']}",
        f"retain / forget     {certificate.retain_size} / {certificate.forget_size} examples",
    ]
    if not planned.exact:
        lines += [
            f"steps known by      {certificate.evidence}",
            f"noise key           {certificate.key_source}",
        ]
    lines += [
        f"created             {certificate.created}",
        f"parameters SHA-256  {certificate.params_digest}",
    ]
    if certificate.sums_digest is not None:
        lines.append(f"sums SHA-256        {certificate.sums_digest}")
    lines += ["It holds provided that:", *(f"  - {each}" for each in certificate.assumptions)]
    return "\n".join(lines)


def _exact_lines(certificate: Certificate, planned: Mechanism) -> list[str]:
    """What was run without noise, and why nothing is left."""
    name, steps = certificate.mechanism["name"], certificate.finetune_steps
    trained = f", {steps} steps" if steps else ""
    return [
        f"mechanism           {name}{trained}, no noise",
        f"exact               {planned.why_exact}",
    ]


def _noisy_lines(certificate: Certificate, planned: Mechanism) -> list[str]:
    """What was run with noise, and what that leaves."""
    name = certificate.mechanism["name"]
    trusted = "" if certificate.separations is None else " (the issuer's own: separations on trust)"
    noise = np.asarray(certificate.noise_scale)
    noise_text = f"{noise:.6g}" if noise.ndim == 0 else f"{noise.min():.6g} to {noise.max():.6g}"
    return [
        f"mechanism           {name}{trusted}, {certificate.steps_run} of "
        f"{planned.steps} steps, then {certificate.finetune_steps} without noise",
        f"noise scale         {noise_text} (standard deviation, parameter units)",
        f"true epsilon        {interval(certificate)}",
        f"total variation     at most {rounded_up(certificate.total_variation)} from the reference",
    ]
