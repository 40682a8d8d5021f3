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

from certunlearn import accounting, mechanisms
from certunlearn._numerics import checks, files
from certunlearn.certificates import covered_leaves, record_format
from certunlearn.mechanisms import optimizer, rounding

# Recomputing on another machine may differ in the last digits of a special function.
TOLERANCE = 1e-9
# Coupling sums up millions of those.
COUPLING_TOLERANCE = 1e-5
# The attack is a search: one that stops a round earlier loses about this much at most.
ATTACK_TOLERANCE = 1e-4

# Most deletions that private training is certified for.
MOST_DELETIONS = 10_000
# Absent from certificates issued before there were such fields; absent is None.
_OPTIONAL = ("epsilon_lower_bound", "evidence")


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
      evidence: how the issuer knows `steps_run`: `"optimizer state"` if the count in the
        optimizer's state was compared with it, or `"word of the issuer"`.
      coverage: how many parameters and leaves the guarantee covers, their dtypes, and the paths
        and number of the frozen ones, which it does not.
      assumptions: what the claim rests on, in sentences.
      key_source: how the noise key was drawn; never the key.
      versions: of the software that ran.
      retain_size: number of retain examples, or None if not said; always None for DP-SGD.
      forget_size: number of forget examples, or None if not said.
      finetune_steps: noiseless steps after the noisy ones (free: post-processing).
      created: when, in UTC (ISO 8601).
      params_digest: SHA-256 of the released parameters, as `params_digest` computes it.
      record_digest: SHA-256 of all other fields. It catches accidents and careless edits; it is
        no signature, so it does not say *who* issued the certificate: see `certificates.signing`.

    Why it may be published:
      No field may tell a run that saw the forget set from the reference. The mechanism, the noise,
      delta and the counts of steps were fixed without looking at the model (an assumption);
      epsilon, its bounds, mu and total variation follow from them; coverage is the architecture;
      the digest is a function of what is released. `retain_size` is the same in both runs, which
      use the same retain data, but for DP-SGD, whose reference lacks examples: there it is absent.
      `forget_size` is the request's, which both runs are given. Time and versions are the
      operator's.
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
    evidence: str | None = None
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

    def to_json(self) -> str:
        """The certificate as its file holds it."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the certificate as JSON; `path` is replaced whole or not at all."""
        text = self.to_json()
        files.write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Certificate":
        """Reads a certificate and checks its format; `verify` checks what it claims.

        One of format 1 is read too, but no longer verifies.

        Raises:
          OSError: if the file cannot be read.
          TypeError: if `path` is no path.
          ValueError: if it is not a well-formed certificate, saying what is wrong.
        """
        with open(os.fspath(path), "rb") as file:  # not a number, which would be an open file
            # No more is read than an honest certificate has.
            content = file.read(record_format.MOST_BYTES + 1)
        try:
            record = record_format.parse(content)
            problems = record_format.problems(record)
        except ValueError as error:
            problems = [str(error)]
        if problems:
            name = record_format.printable(os.fspath(path), most=1_000)
            raise ValueError(f"{name!r} is not a certificate: {problems[0]}")
        return cls(**record)


def certify(
    mechanism: Any,
    *,
    noise_scale: Any,
    delta: float,
    params: Any,
    state: Any = None,
    steps_run: int | None = None,
    epsilon: float | None = None,
    accountant: str | None = None,
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
      state: the state of `noisy_sgd` after the last step, by itself or within that of a wrapper or
        a `TrainState`: evidence that the steps were taken. It is looked at and not kept. Without
        it, `steps_run` must be given and is taken at its word, which the certificate says.
      steps_run: noisy steps that were run; with `state` None means all that were planned.
      epsilon: the epsilon that `noise_scale` was calibrated for, refused if the whole plan was run
        and it does not hold. Recorded is what recomputing gives (coupling's noise leaves a little
        room, so that is less), or this number where they differ in the last digits only.
      accountant: see `certunlearn.epsilon`; None for the one that certifies the least epsilon.
        Which that was is recorded. A run stopped before its plan's end where the closed form does
        not hold is certified by interpolation.
      frozen: paths of the leaves that were kept fixed, as `named_leaves` names them.
      key_source: how the noise key was drawn: `keys.FROM_SYSTEM`, `keys.FROM_CALLER` or
        `"not said"`.
      retain_size: number of retain examples; None for `DPSGD`, where it is private.
      forget_size: number of forget examples.
      finetune_steps: noiseless steps after the noisy ones.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if one is out of range, the calibrated epsilon does not hold, `state` counted
        other steps, sizes contradict the mechanism, or the released parameters are not finite or
        too large for the noise (see `mechanisms.rounding`).

    Guarantee:
      The certificate claims only what `accounting.epsilon` derives from the recorded numbers.
      That the run was really so is the issuer's word, listed in `assumptions`.
    """
    delta = checks.open_unit("delta", delta)
    forget_size = checks.optional_count("forget_size", forget_size)
    retain_size = checks.optional_count("retain_size", retain_size)
    tuned = checks.optional_count("finetune_steps", finetune_steps) or 0
    checks.choice("key_source", key_source, record_format.KEY_SOURCES)
    mechanisms.check(mechanism)
    frozen = covered_leaves.paths(frozen)
    contradictions = mechanism.size_problems(retain_size, forget_size)
    if contradictions:
        raise ValueError(contradictions[0])
    scale = checks.per_step("noise_scale", noise_scale, mechanism.steps)
    steps_run, evidence = _steps_run(mechanism, state, steps_run)
    run, run_scale = mechanism.first(steps_run), first_steps(scale, steps_run)
    rounding.check(mechanism, scale, covered_leaves.leaves(params, frozen))
    actual, accountant = _epsilon(mechanism, run, run_scale, delta, epsilon, accountant)
    record: dict[str, Any] = {
        "schema": record_format.SCHEMA,
        "mechanism": mechanisms.to_record(mechanism),
        "noise_scale": list(scale) if isinstance(scale, tuple) else scale,
        "epsilon": actual,
        "epsilon_lower_bound": accounting.affordable_lower_bound(
            run, noise_scale=run_scale, delta=delta
        ),
        "delta": delta,
        "mu": accounting.mu(run, noise_scale=run_scale),
        "total_variation": accounting.total_variation(
            run, noise_scale=run_scale, accountant=accountant, delta=delta
        ),
        "accountant": accountant,
        "steps_run": steps_run,
        "evidence": evidence,
        "coverage": covered_leaves.record(params, frozen),
        "assumptions": list(mechanism.rests_on()),
        "key_source": key_source,
        "versions": _versions(),
        "retain_size": retain_size,
        "forget_size": forget_size,
        "finetune_steps": tuned,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "params_digest": files.params_digest(params),
    }
    record["record_digest"] = record_digest(record)
    problems = record_format.problems(record)
    if problems:
        raise ValueError(f"no such certificate can be issued: {problems[0]}")
    certificate = Certificate(**record)
    if len(certificate.to_json()) > record_format.MOST_BYTES:
        raise ValueError(
            f"mechanism must fit into a certificate of {record_format.MOST_BYTES} bytes: "
            f"its {mechanism.steps} steps with schedules do not"
        )
    return certificate


def check_plan(mechanism: Any, noise_scale: Any, frozen: Any, accountant: str | None) -> None:
    """Refuses, before any step is run, a plan that no certificate could be issued of.

    Args:
      mechanism: the planned run.
      noise_scale: its noise, as `certify` takes it.
      frozen: paths of the leaves that are kept fixed.
      accountant: as `certify` takes it.

    Raises:
      ValueError: if the plan has too many steps for whoever verifies, magnitudes that no
        certificate holds, or schedules that do not fit into one.
    """
    scale = checks.per_step("noise_scale", noise_scale, mechanism.steps)
    names = accounting.supported_names(mechanism)[:1] if accountant is None else (accountant,)
    refuse_costly(mechanism, scale, names[0])
    noise = list(scale) if isinstance(scale, tuple) else scale
    paths = list(covered_leaves.paths(frozen))
    problem = record_format.plan_problem(mechanisms.to_record(mechanism), noise, paths)
    if problem is not None:
        raise ValueError(f"no such run can be certified: {problem}")


def _steps_run(mechanism: Any, state: Any, steps_run: Any) -> tuple[int, str]:
    """How many noisy steps were run, and how that is known."""
    if steps_run is not None:
        steps_run = checks.positive_int("steps_run", steps_run)
    if state is None:
        if steps_run is None:
            raise ValueError(
                "state must be the state of noisy_sgd after the last step, which has counted the "
                "steps, got None; without it say steps_run yourself"
            )
        return steps_run, record_format.SAID
    counted = optimizer.evidence(state)
    claimed = mechanism.steps if steps_run is None else steps_run
    if counted.steps != claimed:
        raise ValueError(
            f"steps_run is {claimed}, but state has counted {counted.steps} noisy steps: something "
            "left updates out, or the run ended early. If it was stopped for a reason that does "
            f"not depend on the model, say so with steps_run={counted.steps}"
        )
    if counted.nonfinite and not mechanism.tolerates_nonfinite:
        raise ValueError(
            f"state has counted {counted.nonfinite} gradients that were not finite: without those "
            f"steps {type(mechanism).__name__} does not bring models as close as it certifies"
        )
    return claimed, record_format.COUNTED


def _epsilon(
    planned: Any,
    run: Any,
    run_scale: checks.PerStep,
    delta: float,
    epsilon: float | None,
    accountant: str | None,
) -> tuple[float, str]:
    """The epsilon to certify, and the accountant that derives it."""
    claim: dict[str, Any] = {"noise_scale": run_scale, "delta": delta}
    if accountant is None:
        actual, accountant = accounting.least_epsilon(run, **claim)
    else:
        try:
            refuse_costly(run, run_scale, accountant)
            actual = accounting.epsilon(run, **claim, accountant=accountant)
        except ValueError:
            if run.steps == planned.steps:
                raise
            accountant = "interpolation"
            actual = accounting.epsilon(run, **claim, accountant=accountant)
    if not math.isfinite(actual):
        raise ValueError(f"noise_scale={run_scale!r:.80} is too small to certify a finite epsilon")
    if epsilon is not None and run.steps == planned.steps:
        epsilon = checks.positive("epsilon", epsilon)
        if actual > epsilon * (1 + TOLERANCE):
            raise ValueError(
                f"epsilon={epsilon!r} does not hold: noise_scale={run_scale!r:.80} gives {actual!r}"
            )
        if actual >= epsilon * (1 - TOLERANCE):
            actual = epsilon
    return actual, accountant


def refuse_costly(run: Any, run_scale: checks.PerStep, accountant: str) -> None:
    """Refuses claims that would take long to derive and that nobody issues.

    Raises:
      ValueError: if coupling is asked about a run whose epsilon is in the hundreds anyway, or more
        deletions are claimed of private training than any table of them could hold.
    """
    if accountant == "coupling":
        mu = accounting.mu(run, noise_scale=run_scale)
        if mu is None or not mu <= accounting.COUPLED_MU:
            raise ValueError(
                f"accountant must be another than coupling where interpolation gives mu above "
                f"{accounting.COUPLED_MU:g}, got mu = {mu!r}"
            )
    deletions = getattr(run, "deletions", 0)
    if accountant == "dp-accounting" and deletions > MOST_DELETIONS:
        raise ValueError(f"deletions must be at most {MOST_DELETIONS}, got {deletions}")


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
