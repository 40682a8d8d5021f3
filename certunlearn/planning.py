"""How much noise a run needs, before it is run: the numbers behind `certunlearn plan`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from certunlearn import accounting, mechanisms
from certunlearn._numerics import checks
from certunlearn._numerics.safe_rounding import rounded_down, rounded_up
from certunlearn.mechanisms import Mechanism, Separations, base

# What a plan takes where nothing is said: a ball whose noise at epsilon = 1 is about 0.01 in all,
# gradients of norm 1, and a rate at which so many steps go as far as the radius, which is then the
# best number of steps.
INIT_RADIUS, CLIP_NORM, STEPS_TO_THE_RADIUS = 0.001, 1.0, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccountantPlan:
    """The noise that one accountant asks for; all numbers are None where it refuses.

    Attributes:
      accountant: its name.
      noise_scale: standard deviation of each step's noise, in parameter units.
      total_noise: standard deviation of all steps' noise together, in each coordinate of x_T and
        in parameter units; None where updates do more than contract.
      total_noise_norm: root mean square norm of that noise over all parameters; None if their
        number or `total_noise` is not known.
      total_variation: the most by which any event is more likely than under the reference.
      true_epsilon_at_least: the epsilon that an attack reaches at this noise and the target delta;
        None if no attack is known or it would take long (more than 2,000 steps).
      refused: why there is no number, or None.
    """

    accountant: str
    noise_scale: float | None = None
    total_noise: float | None = None
    total_noise_norm: float | None = None
    total_variation: float | None = None
    true_epsilon_at_least: float | None = None
    refused: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of `certunlearn plan`.

    Attributes:
      mechanism: what would be run.
      epsilon: the target.
      delta: the target.
      params: number of parameters, or None if it was not given.
      best_steps: the number of steps at which interpolation asks for the least noise per step; None
        if steps are not all alike, or if each further step lowers the noise.
      best_noise_scale: that noise, a standard deviation in parameter units.
      accountants: one entry for each accountant that applies to the mechanism.
    """

    mechanism: Mechanism
    epsilon: float
    delta: float
    params: int | None
    best_steps: int | None
    best_noise_scale: float | None
    accountants: tuple[AccountantPlan, ...]


def make_plan(
    *,
    epsilon: float,
    delta: float,
    init_radius: float = INIT_RADIUS,
    clip_norm: float = CLIP_NORM,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
    steps: int | None = None,
    reference: str = "retrained",
    params: int | None = None,
    accountants: Sequence[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Plans a run of `GradientClipping` with constant parameters.

    Args:
      epsilon: the target.
      delta: the target.
      init_radius: see `GradientClipping`, as for the next four.
      clip_norm: largest norm of a gradient.
      learning_rate: of the noisy steps; None for one at which four steps go as far as the radius.
      weight_decay: towards the centre.
      steps: number of noisy steps; the best number if None.
      reference: `"retrained"` or `"center"`.
      params: number of parameters, for the norm of the noise.
      accountants: names of those to show, all if None; `"coupling"` takes seconds, the others are
        fast.
      progress: whether to show a progress bar while coupling searches (needs tqdm).

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if one is out of range.

    >>> ball = {"init_radius": 1, "clip_norm": 1, "learning_rate": 0.1}
    >>> fast = ("interpolation", "closed-form")
    >>> plan = make_plan(epsilon=1, delta=1e-5, **ball, accountants=fast)
    >>> plan.mechanism.steps, [round(a.noise_scale, 2) for a in plan.accountants]
    (10, [4.72, 6.44])
    """
    if learning_rate is None:
        radius = checks.positive("init_radius", init_radius)
        learning_rate = radius / checks.positive("clip_norm", clip_norm) / STEPS_TO_THE_RADIUS
    mechanism = mechanisms.GradientClipping(
        init_radius=init_radius,
        clip_norm=clip_norm,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        steps=1 if steps is None else steps,
        reference=reference,
    )
    if steps is None:
        mechanism = dataclasses.replace(mechanism, steps=accounting.best_steps(mechanism))
    return plan_for(
        mechanism,
        epsilon=epsilon,
        delta=delta,
        params=params,
        accountants=accountants,
        progress=progress,
    )


def plan_for(
    mechanism: Mechanism,
    *,
    epsilon: float,
    delta: float,
    params: int | None = None,
    accountants: Sequence[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Plans a run of any mechanism; arguments and errors as for `make_plan`.

    >>> m = mechanisms.OutputPerturbation(init_radius=1.0)
    >>> plan = plan_for(m, epsilon=1, delta=1e-5, accountants=("interpolation", "closed-form"))
    >>> [round(a.noise_scale, 2) for a in plan.accountants]
    [7.46, 9.69]
    """
    epsilon, delta = checks.positive("epsilon", epsilon), checks.open_unit("delta", delta)
    if params is not None:
        params = checks.positive_int("params", params)
    mechanism = mechanisms.check(mechanism)
    best = _with_best_steps(mechanism.separations())
    best_noise_scale = None
    if best is not None:
        best_noise_scale = accounting.noise_scale(
            best, epsilon=epsilon, delta=delta, accountant="interpolation"
        )
    names = _shown_accountants(mechanism) if accountants is None else accountants
    return Plan(
        mechanism=mechanism,
        epsilon=epsilon,
        delta=delta,
        params=params,
        best_steps=None if best is None else best.steps,
        best_noise_scale=best_noise_scale,
        accountants=tuple(
            _by_accountant(name, mechanism, epsilon, delta, params, progress) for name in names
        ),
    )


def _shown_accountants(mechanism: Mechanism) -> tuple[str, ...]:
    """The accountants that apply, less those that would repeat what interpolation says exactly."""
    names = tuple(accounting.supported_names(mechanism))
    stated = mechanism.separations()
    if stated is None or np.any(stated.shift):
        return names
    return tuple(name for name in names if name not in ("coupling", "product"))


def _with_best_steps(stated: Separations | None) -> Separations | None:
    """The separations with the number of steps that needs the least noise per step.

    None if steps are not all alike, forget the step before, or drive no two runs apart.
    """
    if stated is None or stated.init_noise_scale > 0:
        return None
    if not (np.all(stated.noisy_steps) and np.all(stated.contraction)):
        return None
    try:
        steps = accounting.best_steps(stated)
    except ValueError:
        return None
    # Constant, as best_steps has checked; a sequence has one number for each of the old steps.
    contraction, shift = (float(np.max(v)) for v in (stated.contraction, stated.shift))
    return dataclasses.replace(stated, steps=steps, contraction=contraction, shift=shift)


def to_record(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON-ready dict; what an accountant refuses is null, with the reason."""
    stated = plan.mechanism.separations()
    recorded = mechanisms.to_record(plan.mechanism)
    return {
        "epsilon": plan.epsilon,
        "delta": plan.delta,
        # JSON has no infinity: null stands for no bound.
        "mechanism": {
            name: None if value == math.inf else value for name, value in recorded.items()
        },
        "initial_distance": None if stated is None else stated.initial_distance,
        "params": plan.params,
        "best_steps": plan.best_steps,
        "best_noise_scale": plan.best_noise_scale,
        "accountants": {
            entry.accountant: {
                name: value
                for name, value in dataclasses.asdict(entry).items()
                if name != "accountant"
            }
            for entry in plan.accountants
        },
    }


def to_table(plan: Plan) -> str:
    """The plan for people.

    >>> ball = {"init_radius": 1, "clip_norm": 1, "learning_rate": 0.1}
    >>> plan = make_plan(epsilon=1, delta=1e-5, **ball, accountants=("interpolation",))
    >>> print(to_table(plan).splitlines()[0])
    (1, 1e-05)-unlearning with 10 noisy steps, reference 'retrained'
    """
    mechanism = plan.mechanism
    header = ["accountant", "noise per step", "total noise in x_T", "TV limit", "true epsilon"]
    if plan.params is not None:
        header.insert(3, f"its norm (N = {plan.params})")
    widths = [max(13, len(title)) for title in header]
    lines = ["  ".join(t.ljust(w) for t, w in zip(header, widths, strict=True)).rstrip()]
    for entry in plan.accountants:
        cells = [entry.accountant]
        if entry.refused is not None:
            cells.append(f"refused: {entry.refused}")
        else:
            numbers = [entry.noise_scale, entry.total_noise, entry.total_variation]
            if plan.params is not None:
                numbers.insert(2, entry.total_noise_norm)
            cells += ["-" if number is None else rounded_up(number, 6) for number in numbers]
            cells.append(_true_epsilon(plan, entry.true_epsilon_at_least))
        lines.append("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=False)).rstrip())
    return "\n".join(
        [
            f"({rounded_up(plan.epsilon, 6)}, {rounded_up(plan.delta, 6)})-unlearning with "
            f"{_steps(mechanism)}, reference {mechanism.reference!r}",
            "",
            *lines,
            "",
            *_remarks(plan),
            "",
            "Noise is a standard deviation per coordinate, in parameter units. TV limit: no event "
            "is more\nlikely than under the reference by more than this. True epsilon: from what "
            "the best known\nattack reaches with this noise to what is certified. Unlearning uses "
            "the accountant that asks\nfor the least noise, unless it is told which.",
        ]
    )


def _true_epsilon(plan: Plan, least: float | None) -> str:
    """Where the true epsilon lies."""
    if plan.mechanism.exact:
        return "0"
    if least is None:
        return "not attacked"
    return f"{rounded_down(least, 3)} to {rounded_up(plan.epsilon, 3)}"


def _steps(mechanism: Mechanism) -> str:
    """How many steps, of what kind."""
    if mechanism.exact:
        return f"no noise: {mechanism.why_exact}"
    noisy = base.noise_of_steps(mechanism)
    count, noise = mechanism.steps, int(np.count_nonzero(noisy))
    steps = f"step{'s' * (count > 1)}"
    if noise == count:
        return f"{count} noisy {steps}"
    if noise == 1 and noisy[-1]:
        return f"{count} {steps} and noise after the last"
    return f"{count} {steps}, {noise} of them noisy"


def _remarks(plan: Plan) -> list[str]:
    mechanism, lines = plan.mechanism, []
    if mechanism.start_radius is not None:
        lines.append(
            f"radius of the ball of starts  {mechanism.start_radius:.6g}   (norm of what the start "
            "may keep of the old model)"
        )
    else:
        # The first sentence says what is compared, which the table's title says too.
        lines += [f"- {sentence}" for sentence in mechanism.rests_on()[1:3]]
    if plan.best_steps is not None:
        run = "this plan" if mechanism.steps == plan.best_steps else f"not {mechanism.steps}"
        lines.append(
            f"best number of steps          {plan.best_steps}   ({run}; noise per step "
            f"{plan.best_noise_scale:.6g} by interpolation)"
        )
    return lines


def _by_accountant(
    name: str,
    mechanism: Mechanism,
    epsilon: float,
    delta: float,
    params: int | None,
    progress: bool,
) -> AccountantPlan:
    try:
        scale = accounting.noise_scale(
            mechanism, epsilon=epsilon, delta=delta, accountant=name, progress=progress
        )
    except ValueError as error:
        return AccountantPlan(accountant=name, refused=str(error))
    noise = mechanism.total_noise_scale(scale)
    return AccountantPlan(
        accountant=name,
        noise_scale=scale,
        total_noise=noise,
        total_noise_norm=None if params is None or noise is None else noise * math.sqrt(params),
        total_variation=accounting.total_variation(mechanism, noise_scale=scale, accountant=name),
        true_epsilon_at_least=accounting.affordable_lower_bound(
            mechanism, noise_scale=scale, delta=delta
        ),
    )
