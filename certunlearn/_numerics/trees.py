"""Checks of parameter trees: each error names the argument, the leaf and the remedy."""

from typing import Any

import jax
import jax.numpy as jnp
from chex import ArrayTree

from certunlearn._numerics import schedules


def check_wide(params: ArrayTree) -> None:
    """Raises ValueError if a leaf is narrower than float32, or not real."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
            raise ValueError(
                f"params must be float32 or float64, got {dtype} at {_name(path)}; keep float32 "
                "master weights, and freeze what is not a parameter"
            )


def check_finite(name: str, tree: ArrayTree) -> None:
    """Raises ValueError if a concrete leaf holds a NaN or an infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if schedules.is_traced(leaf):
            continue
        # A constant may be checked while a function around it is traced.
        with jax.ensure_compile_time_eval():
            finite = bool(jnp.all(jnp.isfinite(leaf)))
        if not finite:
            raise ValueError(f"{name} must be finite, got a NaN or an infinity at {_name(path)}")


def check_same_structure(params: ArrayTree, center: ArrayTree) -> None:
    """Raises ValueError if the centre differs from the parameters in structure or shapes."""
    expected: Any = jax.tree.structure(params)
    given: Any = jax.tree.structure(center)
    if given != expected:
        raise ValueError(
            f"center must have the structure of the parameters, {expected}, got {given}"
        )
    check_same_shapes(params, jax.tree.leaves(center))


def check_same_shapes(params: ArrayTree, middles: list) -> None:
    """Raises ValueError if the centre's leaves differ from the parameters' in number or shape."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if len(leaves) != len(middles):
        raise ValueError(f"center must have {len(leaves)} leaves, got {len(middles)}")
    for (path, leaf), middle in zip(leaves, middles, strict=True):
        if jnp.shape(leaf) != jnp.shape(middle):
            raise ValueError(
                f"center must have shape {jnp.shape(leaf)} at {_name(path)}, "
                f"got {jnp.shape(middle)}"
            )


def center_leaves(leaves: list, params: ArrayTree, center: ArrayTree | None) -> list:
    """The centre's leaves, or zeros without one; ValueError if they do not fit."""
    if center is None:
        return [0.0] * len(leaves)
    middles = jax.tree.leaves(center)
    check_same_shapes(params, middles)
    return middles


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path) or "the root"
