"""Whether noise survives the rounding of floating-point numbers, and what rounding costs.

The theorem and its proof are in `docs/theory/rounding.md`. In short, with h the spacing of a leaf's
dtype at its largest parameter:

* After the last noise, rounding is free, if the noise has a standard deviation of at least
  `NOISE_SPACINGS` spacings h and its largest draws do not overflow. `check` refuses other noise.
* Between two noises, rounding is not accounted for. The certificate's assumptions say so.
* Before the only noise, rounding counts: two runs are at most D_T apart there, which is what
  `distance_before_noise` computes:

      D_0 = (initial distance) (1 + 4 u)^(past steps) + 2 h sqrt(d) (past error),
      D_{t+1} = (c_t + u max(2, c_t)) D_t + 2 h sqrt(d)   for noiseless steps,
      D_{t+1} = (c_t + u max(2, c_t)) D_t + h sqrt(d)     for the last, noisy one,

  with u half the dtype's epsilon, d the number of parameters that the certificate covers, and c_t
  the factors of the steps. The accountants count 1 + `rounding_share` times the exact distance, and
  `check` requires that D_T is no more than that.

Rounding inside the gradient depends on the loss and is not bounded here: the certificate names it
among its assumptions.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import checks, processes
from certunlearn._numerics.normal_draws import NOISE_SPACINGS
from certunlearn.mechanisms import base

# Standard deviations, more than the largest draw.
_LARGEST_DRAW = 10.0


class NoiselessRun(NamedTuple):
    """Steps before a single last noise, as `docs/theory/rounding.md` has them.

    Attributes:
      initial_distance: of the two starts, in parameter units.
      factors: float64 `[steps]`, how far each step moves two points at distance 1.
      past_steps: how many steps without noise led to the start.
      past_error: how far these lead two runs apart that differ by 1 more at each of them: the sum
        of the later factors' products.
      final_distance: what the steps leave of the distance in exact arithmetic.
      rounding_share: which share of that is kept in reserve for rounding.
    """

    initial_distance: float
    factors: np.ndarray
    past_steps: int
    past_error: float
    final_distance: float
    rounding_share: float


def check(
    mechanism: base.Mechanism, noise_scale: checks.ScalarOrSchedule, leaves: Iterable[Any]
) -> None:
    """Refuses noise that parameters of these sizes and dtypes cannot carry.

    Args:
      mechanism: what the steps do.
      noise_scale: standard deviation of the noise in parameter units, one number or one a step.
      leaves: the arrays that the certificate covers, at the start of the run or after its last
        noisy step.

    Raises:
      ValueError: if the noise of a step is below `NOISE_SPACINGS` spacings at the largest parameter
        or overflows; if parameters are not finite; or if the rounding of noiseless steps needs more
        than the share of the distance that is kept in reserve for it.

    Guarantee:
      See `docs/theory/rounding.md`; `leaves` must hold the largest parameters of the run.

    >>> from certunlearn.mechanisms import OutputPerturbation
    >>> check(OutputPerturbation(init_radius=1.0), 1e-3, [np.ones(3, np.float32)])
    """
    arrays = [array for array in map(_stand_in, leaves) if array.size]
    for array in arrays:
        if array.dtype not in (np.float32, np.float64):
            raise ValueError(f"params must be float32 or float64, got {array.dtype}")
        if not np.isfinite(_magnitude(array)):
            raise ValueError("params must be finite, got a NaN or an infinity")
    if mechanism.exact:  # no noise that rounding could swallow
        return
    scales = _noises(mechanism, noise_scale)
    for array in arrays:
        # Noise that was added in float64 is rounded with the parameters: post-processing.
        dtype = array.dtype if mechanism.solve_to is None else np.dtype(np.float64)
        _check_noise(scales, dtype, _magnitude(array))
    problem = mechanism.rounding_problem(arrays) if arrays else None
    if problem is not None:
        raise ValueError(problem)


def check_start(
    mechanism: base.Mechanism, noise_scale: checks.ScalarOrSchedule, params: ArrayTree
) -> None:
    """Refuses noise that concrete parameters cannot carry; traced and abstract ones pass.

    Raises:
      ValueError: as `check` does for noise; steps and dtypes are not looked at.
    """
    unknown = (jax.core.Tracer, jax.ShapeDtypeStruct)
    leaves = [leaf for leaf in jax.tree.leaves(params) if not isinstance(leaf, unknown)]
    with jax.ensure_compile_time_eval():  # constants, in a function that is traced
        sizes = [(jnp.result_type(x), float(jnp.max(jnp.abs(x), initial=0))) for x in leaves]
    for dtype, largest in sizes:
        _check_noise(_noises(mechanism, noise_scale), np.dtype(dtype), largest)


def spacing(array: np.ndarray) -> float:
    """Distance of neighbouring numbers of the array's dtype at its largest magnitude."""
    return _spacing(array.dtype, _magnitude(array))


def _magnitude(array: np.ndarray) -> Any:
    """The largest magnitude; NaN if a number is one."""
    if array.ndim and not any(array.strides):  # one number in all places: see `_stand_in`
        array = array[(0,) * array.ndim]
    return np.max(np.abs(array))


def _stand_in(leaf: Any) -> np.ndarray:
    """The leaf, or, if it is spread over devices, its largest magnitude in its shape.

    No more of it is needed, so that it need not leave the devices.
    """
    if not processes.is_spread(leaf):
        return np.asarray(leaf)
    return np.broadcast_to(processes.largest(leaf), leaf.shape)


def _spacing(dtype: np.dtype, largest: Any) -> float:
    return float(max(np.spacing(dtype.type(largest)), np.finfo(dtype).tiny))


def distance_before_noise(run: NoiselessRun, leaves: Iterable[Any]) -> float:
    """Largest distance of two rounded runs before the only noise, D_T of the module's docstring."""
    arrays = [np.asarray(leaf) for leaf in leaves]
    roundoff = max(float(np.finfo(array.dtype).eps) / 2 for array in arrays)
    step_error = float(np.sqrt(sum(array.size * spacing(array) ** 2 for array in arrays)))
    distance = run.initial_distance * (1 + 4 * roundoff) ** run.past_steps
    distance += 2 * step_error * run.past_error
    for step, factor in enumerate(run.factors.tolist()):
        distance = (factor + roundoff * max(2.0, factor)) * distance
        distance += step_error * (1 if step == len(run.factors) - 1 else 2)
    return distance


def steps_problem(run: NoiselessRun, arrays: list[np.ndarray]) -> str | None:
    """Why the rounding of these parameters needs more than the run's reserve, or None."""
    exact, rounded = run.final_distance, distance_before_noise(run, arrays)
    if rounded <= exact * (1 + run.rounding_share):
        return None
    share = (rounded / exact - 1) * 1.1 if exact > 0 else math.inf
    more = f"declare rounding_share={share:.2g}, " if share <= 1 else ""
    return (
        f"steps={len(run.factors)} leave a distance of {exact:.3g} in exact arithmetic, but "
        f"rounding {arrays[0].dtype} parameters of spacing {max(map(spacing, arrays)):.3g} "
        f"leaves up to {rounded:.3g}, more than rounding_share={run.rounding_share:g} "
        f"allows: run fewer steps, {more}or use float64 parameters (jax.enable_x64)"
    )


def _noises(mechanism: base.Mechanism, noise_scale: checks.ScalarOrSchedule) -> np.ndarray:
    """Standard deviations of all noises of a run."""
    scale = np.broadcast_to(
        checks.per_step("noise_scale", noise_scale, mechanism.steps), (mechanism.steps,)
    )
    used = scale[base.noise_of_steps(mechanism)]
    stated = mechanism.separations()
    if stated is None or stated.init_noise_scale == 0:
        return used
    return np.append(used, stated.init_noise_scale)


def _check_noise(scales: np.ndarray, dtype: np.dtype, largest: Any) -> None:
    least, most, largest = float(scales.min()), float(scales.max()), float(largest)
    needed = NOISE_SPACINGS * _spacing(dtype, largest)
    if least < needed:
        raise ValueError(
            f"noise_scale must be at least {needed:.3g} for {dtype} parameters of magnitude "
            f"up to {largest:.3g}, {NOISE_SPACINGS:g} times their spacing, got {least:.3g}, which "
            "rounding would swallow: ask for a smaller epsilon, run fewer steps if they have no "
            "noise, or use float64 parameters (jax.enable_x64)"
        )
    limit = float(np.finfo(dtype).max)
    if not _LARGEST_DRAW * most + largest < limit:
        raise ValueError(
            f"noise_scale must be below {limit / _LARGEST_DRAW:.3g} for {dtype} parameters, "
            f"so that no draw overflows, got {most:.3g}"
        )
