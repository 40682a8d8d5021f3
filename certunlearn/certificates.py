"""The public record of an unlearning run, and its check by recomputing.

A certificate holds nothing that depends on the private run except the digest of the released
parameters: it can be published beside the model. Everything it claims follows from the numbers it
records, so whoever holds it can derive the claim again without trusting whoever issued it.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from typing import Any

from certunlearn import accounting, checks, files, mechanisms

SCHEMA = "certunlearn.certificate/1"

# Recomputing on another machine may differ in the last digits of a special function.
TOLERANCE = 1e-9
# Coupling sums up millions of those.
COUPLING_TOLERANCE = 1e-5
# The attack is a search: one that stops a round earlier loses about this much at most.
ATTACK_TOLERANCE = 1e-4

_NUMBER = (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (str,),
    "mechanism": (dict,),
    "noise_scale": (int, float, list),
    "epsilon": _NUMBER,
    "epsilon_lower_bound": (int, float, type(None)),
    "delta": _NUMBER,
    "mu": (int, float, type(None)),
    "total_variation": _NUMBER,
    "accountant": (str,),
    "steps_run": (int,),
    "coverage": (dict,),
    "assumptions": (list,),
    "key_source": (str,),
    "versions": (dict,),
    "retain_size": (int, type(None)),
    "forget_size": (int, type(None)),
    "finetune_steps": (int,),
    "created": (str,),
    "params_digest": (str,),
    "record_digest": (str,),
}
# Absent from certificates issued before there were such fields, which stay valid; absent is None.
_OPTIONAL = ("epsilon_lower_bound",)
_COVERAGE: dict[str, type] = {
    "parameters": int,
    "leaves": int,
    "dtypes": list,
    "frozen": list,
    "frozen_parameters": int,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was done, what it guarantees, and what that rests on.

    Guarantee:
      If every sentence of `assumptions` holds, the released parameters are (epsilon, delta)-
      indistinguishable, in both directions, from those of the reference process, which never saw
      the forget set: for every event E, P(E) <= e^epsilon * P_reference(E) + delta and the other
      way round.

    Attributes:
      schema: version of this record's format.
      mechanism: the mechanism's name and all its parameters, schedules as lists, for the whole
        plan; `steps_run` of its steps were run.
      noise_scale: standard deviation of the noise in every coordinate, in parameter units, one
        number or one for each planned step.
      epsilon: the claim's epsilon, for the steps that were run.
      epsilon_lower_bound: no claim, but how loose the claim may be: an attack on such a run, with a
        loss and data of its own choice, reaches that much, so the true epsilon lies between this
        and `epsilon`. None if it is not known, as for more than 2,000 steps.
      delta: the claim's delta.
      mu: Gaussian-DP parameter of the run by shifted interpolation; None for DP-SGD, which is no
        pair of runs with separations.
      total_variation: no event is more likely than under the reference by more than this.
      accountant: which accountant derived epsilon and total_variation.
      steps_run: number of noisy steps that were run.
      coverage: how many parameters and leaves the guarantee covers, their dtypes, and the paths
        and number of the frozen ones, which it does not.
      assumptions: what the claim rests on, in sentences.
      key_source: how the noise key was drawn; never the key.
      versions: of the software that ran.
      retain_size: number of retain examples, or None if not said.
      forget_size: number of forget examples, or None if not said.
      finetune_steps: noiseless steps after the noisy ones (free: post-processing).
      created: when, in UTC (ISO 8601).
      params_digest: SHA-256 of the released parameters, as `params_digest` computes it.
      record_digest: SHA-256 of all other fields. It catches accidents and careless edits; it is
        no signature, so it does not say *who* issued the certificate.
    """

    schema: str
    mechanism: dict[str, Any]
    noise_scale: float | list[float]
    epsilon: float
    epsilon_lower_bound: float | None = None
    delta: float
    mu: float | None
    total_variation: float
    accountant: str
    steps_run: int
    coverage: dict[str, Any]
    assumptions: list[str]
    key_source: str
    versions: dict[str, str]
    retain_size: int | None
    forget_size: int | None
    finetune_steps: int
    created: str
    params_digest: str
    record_digest: str

    @property
    def reference(self) -> str:
        """What the claim compares with: `"retrained"` or `"center"`."""
        return self.mechanism.get("reference", "retrained")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the certificate as JSON; `path` is replaced whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
        files.write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Certificate":
        """Reads a certificate and checks its format; `verify` checks what it claims.

        Raises:
          OSError: if the file cannot be read.
          ValueError: if it is not a well-formed certificate, saying what is wrong.
        """
        with open(path, "rb") as file:
            content = file.read()
        try:
            record = json.loads(content.decode(), parse_constant=_refuse_constant)
        except ValueError as error:
            raise ValueError(
                f"{os.fspath(path)!r} is not a certificate: not valid JSON ({error})"
            ) from error
        problems = format_problems(record)
        if problems:
            raise ValueError(f"{os.fspath(path)!r} is not a certificate: {'; '.join(problems)}")
        return cls(**record)


def certify(
    mechanism: Any,
    *,
    noise_scale: Any,
    delta: float,
    params: Any,
    epsilon: float | None = None,
    accountant: str | None = None,
    steps_run: int | None = None,
    frozen: Any = (),
    key_source: str = "not said",
    retain_size: int | None = None,
    forget_size: int | None = None,
    finetune_steps: int = 0,
) -> Certificate:
    """Issues the certificate of a run, for `unlearn` and for hand-written loops.

    Args:
      mechanism: the planned run, any of `certunlearn.mechanisms`.
      noise_scale: standard deviation in parameter units: a number, `[steps]` numbers or a schedule.
      delta: the claim's delta.
      params: the released parameters, a pytree of arrays.
      epsilon: the epsilon that `noise_scale` was calibrated for, refused if the whole plan was run
        and it does not hold. Recorded is what recomputing gives (coupling's noise leaves a little
        room, so that is less), or this number where they differ in the last digits only.
      accountant: see `certunlearn.epsilon`; None for the one that certifies the least epsilon.
        Which that was is recorded. A run stopped before its plan's end where the closed form does
        not hold is certified by interpolation.
      steps_run: noisy steps that were run, if fewer than planned.
      frozen: paths of the leaves that were kept fixed, as `named_leaves` names them.
      key_source: how the noise key was drawn, in words. Never the key.
      retain_size: number of retain examples.
      forget_size: number of forget examples.
      finetune_steps: noiseless steps after the noisy ones.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if one is out of range, or the calibrated epsilon does not hold.

    Guarantee:
      The certificate claims only what `accounting.epsilon` derives from the recorded numbers.
      That the run was really so is the issuer's word, listed in `assumptions`.
    """
    delta = checks.open_unit("delta", delta)
    forget_size = checks.optional_count("forget_size", forget_size)
    retain_size = checks.optional_count("retain_size", retain_size)
    mechanisms.check(mechanism)
    scale = checks.per_step("noise_scale", noise_scale, mechanism.steps)
    steps_run = mechanism.steps if steps_run is None else steps_run
    run, run_scale = mechanism.first(steps_run), first_steps(scale, steps_run)
    claim: dict[str, Any] = {"noise_scale": run_scale, "delta": delta}
    if accountant is None:
        actual, accountant = accounting.least_epsilon(run, **claim)
    else:
        try:
            actual = accounting.epsilon(run, **claim, accountant=accountant)
        except ValueError:
            if steps_run == mechanism.steps:
                raise
            accountant = "interpolation"
            actual = accounting.epsilon(run, **claim, accountant=accountant)
    if not math.isfinite(actual):
        raise ValueError(f"noise_scale={noise_scale!r} is too small to certify any finite epsilon")
    if epsilon is not None and steps_run == mechanism.steps:
        epsilon = checks.positive("epsilon", epsilon)
        if actual > epsilon * (1 + TOLERANCE):
            raise ValueError(
                f"epsilon={epsilon!r} does not hold: noise_scale={noise_scale!r} gives {actual!r}"
            )
        if actual >= epsilon * (1 - TOLERANCE):
            actual = epsilon
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "mechanism": mechanisms.to_record(mechanism),
        "noise_scale": list(scale) if isinstance(scale, tuple) else scale,
        "epsilon": actual,
        "epsilon_lower_bound": accounting.affordable_lower_bound(run, **claim),
        "delta": delta,
        "mu": accounting.mu(run, noise_scale=run_scale),
        "total_variation": accounting.total_variation(
            run, noise_scale=run_scale, accountant=accountant
        ),
        "accountant": accountant,
        "steps_run": steps_run,
        "coverage": coverage_of(params, frozen),
        "assumptions": list(mechanism.assumptions),
        "key_source": key_source,
        "versions": _versions(),
        "retain_size": retain_size,
        "forget_size": forget_size,
        "finetune_steps": finetune_steps,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "params_digest": files.params_digest(params),
    }
    record["record_digest"] = record_digest(record)
    problems = format_problems(record)
    if problems:
        raise ValueError("; ".join(problems))
    return Certificate(**record)


def format_problems(record: Any) -> list[str]:
    """What is wrong with a record's form, a sentence each; nothing about what it claims."""
    if not isinstance(record, dict):
        return ["not a JSON object"]
    record = dict.fromkeys(_OPTIONAL) | record
    if set(record) != set(_FIELDS):
        missing = sorted(set(_FIELDS) - set(record))
        unknown = sorted(set(record) - set(_FIELDS))
        return [f"missing fields: {missing}"] * bool(missing) + [
            f"unknown fields: {unknown}"
        ] * bool(unknown)
    problems = [
        f"{name} has the wrong type: {record[name]!r}"
        for name, kinds in _FIELDS.items()
        if not isinstance(record[name], kinds) or isinstance(record[name], bool)
    ]
    if problems:
        return problems
    if record["schema"] != SCHEMA:
        problems.append(f"schema must be {SCHEMA!r}, got {record['schema']!r}")
    coverage = record["coverage"]
    if set(coverage) != set(_COVERAGE) or any(
        not isinstance(coverage[name], kind) or isinstance(coverage[name], bool)
        for name, kind in _COVERAGE.items()
    ):
        problems.append(f"coverage must hold {', '.join(_COVERAGE)}, got {coverage!r}")
    elif coverage["parameters"] < 1:
        problems.append(f"coverage must name at least one parameter, got {coverage!r}")
    for name in ("retain_size", "forget_size", "finetune_steps"):
        least = 0 if name != "retain_size" else 1
        if record[name] is not None and record[name] < least:
            problems.append(f"{name} must be at least {least}, got {record[name]}")
    for name in ("params_digest", "record_digest"):
        digest = record[name]
        if len(digest) != 64 or any(c not in "0123456789abcdef" for c in digest):
            problems.append(f"{name} must be 64 hexadecimal digits, got {digest!r}")
    for name in ("epsilon", "mu", "total_variation"):
        if record[name] is not None and not (math.isfinite(record[name]) and record[name] >= 0):
            problems.append(f"{name} must be finite and not negative, got {record[name]!r}")
    least = record["epsilon_lower_bound"]
    if least is not None and not 0 <= least < math.inf:
        problems.append(f"epsilon_lower_bound must be finite and not negative, got {least!r}")
    if not 0 < record["delta"] < 1:
        problems.append(f"delta must be strictly between 0 and 1, got {record['delta']!r}")
    return problems


def coverage_of(params: Any, frozen: Any) -> dict[str, Any]:
    """The `coverage` of a certificate for `params` with these frozen paths."""
    named = files.named_leaves(params)
    frozen = sorted(frozen)
    unknown = [name for name in frozen if name not in named]
    if unknown:
        raise ValueError(f"frozen names no leaf of params: {unknown}; there are {list(named)}")
    covered = [leaf for name, leaf in named.items() if name not in frozen]
    return {
        "parameters": sum(leaf.size for leaf in covered),
        "leaves": len(covered),
        "dtypes": sorted({leaf.dtype.name for leaf in covered}),
        "frozen": frozen,
        "frozen_parameters": sum(named[name].size for name in frozen),
    }


def first_steps(scale: checks.PerStep, steps: int) -> checks.PerStep:
    """The noise scale of the first `steps` steps."""
    return scale[:steps] if isinstance(scale, tuple) else scale


def record_digest(record: dict[str, Any]) -> str:
    """SHA-256 of every field but `record_digest`, and of no absent one, in canonical JSON."""
    absent = {"record_digest", *(name for name in _OPTIONAL if record.get(name) is None)}
    content = {name: value for name, value in record.items() if name not in absent}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    packages = ("certunlearn", "jax", "jaxlib", "optax", "numpy", "scipy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that a certificate may hold")
