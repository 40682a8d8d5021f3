"""Issuing certificates: `certify` for any loop, and what a plan must keep to be certified."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable
from typing import Any

from chex import ArrayTree

from certunlearn import _version, accounting, mechanisms
from certunlearn._numerics import checks, files, model_trees, processes
from certunlearn._numerics.checks import ScalarOrSchedule
from certunlearn.certificates import claims, covered_leaves, record_format, strict_json
from certunlearn.certificates.record import Certificate, record_digest
from certunlearn.mechanisms import Mechanism, noisy_optimizer, rounding

# Recomputing on another machine may differ in the last digits of a special function.
TOLERANCE = 1e-9
# Coupling sums up millions of those.
COUPLING_TOLERANCE = 1e-5
# The attack is a search: one that stops a round earlier loses about this much at most.
ATTACK_TOLERANCE = 1e-4


def certify(
    mechanism: Mechanism,
    *,
    noise_scale: ScalarOrSchedule | None = None,
    delta: float | None = None,
    params: ArrayTree,
    state: ArrayTree | None = None,
    steps_run: int | None = None,
    epsilon: float | None = None,
    accountant: str | None = None,
    frozen: Iterable[str] = (),
    key_source: str = "not said",
    retain_size: int | None = None,
    forget_size: int | None = None,
    finetune_steps: int = 0,
    streamed: bool = False,
) -> Certificate:
    """Issues the certificate of a run, for `unlearn` and for hand-written loops.

    Args:
      mechanism: the planned run. Of one that is not the package's the certificate records the
        separations too, from which the claim is derived.
      noise_scale: standard deviation in parameter units: a number, `[steps]` numbers or a schedule.
        None or 0 for an exact mechanism, such as `Retraining`, and for no other.
      delta: the claim's delta; None or 0 for an exact mechanism, and for no other.
      params: the released parameters, a pytree of arrays; or a Flax NNX or Equinox module or a
        `TrainState`, of which the certificate covers the parameters and nothing else. If they span
        processes, all of these must call this, and get the same certificate, the first one's.
      state: the state of `noisy_sgd` after the last step, by itself or within that of a wrapper or
        a `TrainState`: evidence that the steps were taken. It is looked at and not kept. Without
        it, `steps_run` must be given and is taken at its word, which the certificate says. An exact
        mechanism has neither.
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
      streamed: whether batches were drawn by other means than the run's keys, as by a loader. The
        certificate then has one more assumption: that they did not depend on the data.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if one is out of range, the calibrated epsilon does not hold, `state` counted
        other steps, sizes contradict the mechanism, or the released parameters are not finite or
        too large for the noise (see `mechanisms.rounding`).

    Guarantee:
      The certificate claims only what `accounting.epsilon` derives from the recorded numbers.
      That the run was really so is the issuer's word, listed in `assumptions`.
    """
    mechanisms.check(mechanism)
    if mechanism.of_sums:
        raise ValueError(
            f"mechanism must be one of runs, got {type(mechanism).__name__}, whose certificate "
            "names the sums: use certunlearn.exact.certify(stats, head)"
        )
    return issue(
        mechanism,
        noise_scale=noise_scale,
        delta=delta,
        params=params,
        state=state,
        steps_run=steps_run,
        epsilon=epsilon,
        accountant=accountant,
        frozen=frozen,
        key_source=key_source,
        retain_size=retain_size,
        forget_size=forget_size,
        finetune_steps=finetune_steps,
        streamed=streamed,
    )


def issue(
    mechanism: Mechanism,
    *,
    noise_scale: ScalarOrSchedule | None,
    delta: float | None,
    params: ArrayTree,
    state: ArrayTree | None,
    steps_run: int | None,
    epsilon: float | None,
    accountant: str | None,
    frozen: Iterable[str],
    key_source: str,
    retain_size: int | None,
    forget_size: int | None,
    finetune_steps: int,
    streamed: bool = False,
    sums_digest: str | None = None,
) -> Certificate:
    """`certify` for every mechanism; `sums_digest` is that of a head's sums."""
    params = model_trees.parameters(params)
    delta = mechanisms.checked_delta(mechanism, delta)
    forget_size = checks.optional_count("forget_size", forget_size)
    retain_size = checks.optional_count("retain_size", retain_size)
    tuned = checks.optional_count("finetune_steps", finetune_steps) or 0
    checks.choice("key_source", key_source, record_format.KEY_SOURCES)
    basis = claims.basis_of(mechanism)
    assumptions = claims.with_stream(basis) if streamed else list(basis.assumptions)
    accountant = claims.check_accountant(accountant)
    frozen = covered_leaves.paths(frozen)
    contradictions = mechanism.size_problems(retain_size, forget_size)
    if contradictions:
        raise ValueError(contradictions[0])
    scale = mechanisms.checked_noise(mechanism, noise_scale)
    steps_run, evidence = _steps_run(mechanism, state, steps_run)
    run, run_scale = basis.planned.first(steps_run), claims.first_steps(scale, steps_run)
    rounding.check(mechanism, scale, covered_leaves.leaves(params, frozen))
    actual, accountant = _epsilon(mechanism.steps, run, run_scale, delta, epsilon, accountant)
    lower_bound = None
    if mechanism.attackable:
        lower_bound = accounting.affordable_lower_bound(run, noise_scale=run_scale, delta=delta)
    record: dict[str, Any] = {
        "schema": record_format.SCHEMA,
        "mechanism": mechanisms.to_record(mechanism),
        "noise_scale": list(scale) if isinstance(scale, tuple) else scale,
        "epsilon": actual,
        "epsilon_lower_bound": lower_bound,
        "delta": delta,
        "mu": accounting.mu(run, noise_scale=run_scale),
        "total_variation": accounting.total_variation(
            run, noise_scale=run_scale, accountant=accountant, delta=delta
        ),
        "accountant": accountant,
        "steps_run": steps_run,
        "evidence": evidence,
        "separations": basis.separations,
        "coverage": covered_leaves.record(params, frozen),
        "assumptions": assumptions,
        "key_source": key_source,
        "versions": _versions(),
        "retain_size": retain_size,
        "forget_size": forget_size,
        "finetune_steps": tuned,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "params_digest": files.params_digest(params),
        "sums_digest": sums_digest,
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
    return _agreed(certificate) if processes.spans_processes(params) else certificate


def _agreed(certificate: Certificate) -> Certificate:
    """The one certificate of all processes: that of the first, if they ran the same."""
    names = ("params_digest", "mechanism", "noise_scale", "steps_run", "finetune_steps")
    run = {name: dataclasses.asdict(certificate)[name] for name in names}
    content = json.dumps(run, sort_keys=True).encode()
    processes.check_agreed("what is certified (parameters, mechanism, noise, steps)", content)
    return Certificate(**strict_json.parse(processes.from_first(certificate.to_json().encode())))


def check_plan(
    mechanism: Mechanism,
    noise_scale: ScalarOrSchedule | None,
    frozen: Iterable[str],
    accountant: str | None,
) -> None:
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
    scale = mechanisms.checked_noise(mechanism, noise_scale)
    basis = claims.basis_of(mechanism)
    name = claims.check_accountant(accountant) or accounting.supported_names(basis.planned)[0]
    claims.check_affordable(name, basis.planned, scale)
    noise = list(scale) if isinstance(scale, tuple) else scale
    paths = list(covered_leaves.paths(frozen))
    record = mechanisms.to_record(mechanism)
    problem = record_format.plan_problem(record, basis.separations, noise, paths)
    if problem is not None:
        raise ValueError(f"no such run can be certified: {problem}")


def _steps_run(
    mechanism: Mechanism, state: ArrayTree | None, steps_run: int | None
) -> tuple[int, str]:
    """How many noisy steps were run, and how that is known."""
    if mechanism.exact:
        if state is not None or steps_run not in (None, 0) or isinstance(steps_run, bool):
            raise ValueError(
                f"state and steps_run must be None for {type(mechanism).__name__}, which has no "
                f"noisy steps, got steps_run={checks.shown(steps_run)}: its training goes by "
                "finetune_steps"
            )
        return 0, record_format.SAID
    if steps_run is not None:
        steps_run = checks.positive_int("steps_run", steps_run)
    if state is None:
        if steps_run is None:
            raise ValueError(
                "state must be the state of noisy_sgd after the last step, which has counted the "
                "steps, got None; without it say steps_run yourself"
            )
        return steps_run, record_format.SAID
    counted = noisy_optimizer.evidence(state)
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
    planned_steps: int,
    run: Mechanism,
    run_scale: checks.PerStep,
    delta: float,
    epsilon: float | None,
    accountant: str | None,
) -> tuple[float, str]:
    """The epsilon to certify, and the accountant that derives it."""
    claim: dict[str, Any] = {"noise_scale": run_scale, "delta": delta}
    if run.exact:
        if epsilon is not None and checks.real("epsilon", epsilon) != 0:
            raise ValueError(
                f"epsilon must be 0 or None for {type(run).__name__}, which is exact, got "
                f"{epsilon!r}"
            )
        epsilon = None
    if accountant is None:
        actual, accountant = accounting.least_epsilon(run, **claim)
    else:
        try:
            claims.check_affordable(accountant, run, run_scale)
            actual = accounting.epsilon(run, **claim, accountant=accountant)
        except ValueError:
            if run.steps == planned_steps:
                raise
            accountant = "interpolation"
            actual = accounting.epsilon(run, **claim, accountant=accountant)
    if not math.isfinite(actual):
        raise ValueError(f"noise_scale={run_scale!r:.80} is too small to certify a finite epsilon")
    if epsilon is not None and run.steps == planned_steps:
        epsilon = checks.positive("epsilon", epsilon)
        if actual > epsilon * (1 + TOLERANCE):
            raise ValueError(
                f"epsilon={epsilon!r} does not hold: noise_scale={run_scale!r:.80} gives {actual!r}"
            )
        if actual >= epsilon * (1 - TOLERANCE):
            actual = epsilon
    return actual, accountant


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "optax", "numpy", "scipy")
    own = {"python": platform.python_version(), "certunlearn": _version.__version__}
    return own | {name: importlib.metadata.version(name) for name in packages}
