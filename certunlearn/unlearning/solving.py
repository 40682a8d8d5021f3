"""Minimising the objective on the retain data, verified, before a mechanism's only noise."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn import solvers
from certunlearn.mechanisms import Mechanism
from certunlearn.models.loss import ConvexLoss
from certunlearn.solvers import data_passes
from certunlearn.unlearning import inputs
from certunlearn.unlearning.run_options import Options


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Solved:
    """Where the solver stopped. Private: it is the model without its noise.

    Attributes:
      params: float64 NumPy arrays, structured like the parameters.
      gradient_norm: a verified upper bound on the objective's gradient norm there.
      passes: over the retain data, as the package's solver counts them; None for another's.
    """

    params: ArrayTree
    gradient_norm: float
    passes: int | None

    def __repr__(self) -> str:
        """Nothing that is secret."""
        return "Solved(<private>)"


def precision(mechanism: Mechanism) -> contextlib.AbstractContextManager[Any]:
    """Where the mechanism's arithmetic takes place: in float64 if it adds its noise there."""
    return contextlib.nullcontext() if mechanism.solve_to is None else jax.enable_x64(True)


def check(mechanism: Mechanism, loss_fn: object, more: Options, tuned: bool) -> None:
    """Refuses what cannot be solved, or certified if it were.

    Raises:
      TypeError: if the loss is no `ConvexLoss`.
      ValueError: if it is less convex than the mechanism says, leaves are frozen, a solver is
        given where nothing is solved, or the size of microbatches where there is no batch.
    """
    name = type(mechanism).__name__
    if mechanism.solve_to is None:
        if more.solver is not None or more.gradient_allowance is not None:
            raise ValueError(
                f"solver and gradient_allowance must be None for {name}, which solves nothing"
            )
        return
    if not isinstance(loss_fn, ConvexLoss):
        raise TypeError(
            f"loss_fn must be a certunlearn.convex.ConvexLoss for {name}, such as "
            "convex.logistic_regression(...), whose strong convexity is known; got "
            f"{inputs.kind(loss_fn)}"
        )
    problem = mechanism.loss_problem(loss_fn.strong_convexity)
    if problem is not None:
        raise ValueError(problem)
    if more.frozen is not None:
        raise ValueError(
            f"frozen must be None for {name}: the objective is minimised in all parameters"
        )
    if more.microbatch_size is not None and not tuned:
        raise ValueError(
            f"microbatch_size must be None for {name} without finetune: solvers choose how many "
            "examples they hold in memory"
        )


def solve(
    mechanism: Mechanism,
    loss: ConvexLoss,
    params: ArrayTree,
    data: Any,
    more: Options,
) -> Solved:
    """Minimises the objective to the mechanism's tolerance, and verifies that it is reached.

    Args:
      mechanism: says to which gradient norm.
      loss: the objective.
      params: where to start; float64.
      data: all retain data.
      more: its `solver` and `gradient_allowance`.

    Raises:
      TypeError: if the solver returns no real numbers.
      ValueError: if the tolerance is not reached, or the solver returns another structure.
    """
    tolerance = mechanism.solve_to
    assert tolerance is not None
    if more.solver is None:
        found = solvers.minimize(
            loss,
            _on_host(params),
            data,
            tolerance=tolerance,
            allowance=more.gradient_allowance,
        )
        point, norm, passes = found.params, found.gradient_norm, found.passes
    else:
        point, passes = _on_host(more.solver(loss, params, data, tolerance)), None
        _check_like(point, params)
        norm = _verified_norm(loss, point, data, more.gradient_allowance)
    if not norm <= tolerance:  # NaN, too
        raise ValueError(
            f"solver must reach a gradient norm of {tolerance!r}, got a verified bound of "
            f"{norm:.6g}: nothing is released. Give it more passes; the tolerance and the noise "
            "stay as they were fixed"
        )
    return Solved(params=point, gradient_norm=float(norm), passes=passes)


def as_wide(tree: ArrayTree) -> ArrayTree:
    """The same in float64; within `precision` only."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def as_released(tree: ArrayTree, like: ArrayTree) -> ArrayTree:
    """Float64 parameters rounded to the dtypes of others: post-processing of the noised ones."""
    return jax.tree.map(
        lambda leaf, other: jnp.asarray(np.asarray(leaf).astype(other.dtype)), tree, like
    )


def _verified_norm(loss: ConvexLoss, point: ArrayTree, data: Any, allowance: float | None) -> float:
    """An upper bound on the exact gradient norm, in one pass that trusts nobody."""
    aim = data_passes.objective(loss, point, data, allowance)
    return aim.at(data_passes.flatten(point), check=True).bound


def _on_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.array(leaf, np.float64), tree)


def _check_like(found: Any, params: ArrayTree) -> None:
    wanted: Any = jax.tree.structure(params)
    if jax.tree.structure(found) != wanted:
        raise ValueError(
            f"solver must return parameters structured like params, {wanted}, got "
            f"{jax.tree.structure(found)}"
        )
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (params, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"solver must keep the shapes of params, {shapes[0]}, got {shapes[1]}")
