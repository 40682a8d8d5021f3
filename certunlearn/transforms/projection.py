"""Projections onto a ball around a public centre: of parameters, and of updates to them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree

from certunlearn._numerics import float_formats, norms, parallel, trees


def clip_params(params: ArrayTree, radius: float, center: ArrayTree | None = None) -> ArrayTree:
    """Projects parameters onto the L2 ball of the given radius around a public centre.

    Args:
      params: a pytree of float32 or float64 arrays.
      radius: C0, between 1e-30 and 1e30, over all leaves together.
      center: pytree like `params`; None is the origin. It is used in the parameters' dtypes.

    Returns:
      The projection, in the same dtypes; `params` themselves, bit for bit, if they lie inside. If
      `radius` is below the spacing of floating-point numbers around the centre, the centre. Works
      in any trace; the derivative is that of the exact projection.

    Raises:
      TypeError: if `radius` is not a number.
      ValueError: if a leaf is narrower than float32 or not real, if `center` differs in structure
        or shape, if anything is not finite, if `radius` is out of range, or inside
        `shard_map(check_vma=False)`.

    Guarantee:
      `||result - center|| <= radius` in exact arithmetic on the returned numbers, see
      `norms.clip_tree`. With a centre, the numbers returned are those whose difference from it was
      checked, or the centre itself. The difference is taken in floating point: with u the unit
      roundoff it errs by at most u of itself, or by 2^-126 in each of N coordinates if that counts
      as zero, so the check is on a radius smaller by 8 u of itself and 2^-125 sqrt(N). Traced
      parameters that are not finite give the centre.

    Source:
      Koloskova et al. (ICML 2025), Certified Unlearning for Neural Networks: the first step.

    >>> print(clip_params({"w": jnp.array([3.0, 4.0])}, radius=1.0)["w"].round(3))
    [0.6 0.8]
    """
    norms.check_norm("radius", radius)
    parallel.check_tracked()
    trees.check_wide(params)
    trees.check_finite("params", params)
    if center is not None:
        trees.check_same_structure(params, center)
        trees.check_finite("center", center)
    return jax.jit(_project)(params, radius, center)


def project_onto_ball(
    radius: float, center: ArrayTree | None = None
) -> optax.GradientTransformation:
    """Changes updates so that the updated parameters are in the L2 ball around a public centre.

    Args:
      radius: between 1e-30 and 1e30, over all leaves together.
      center: pytree like the parameters; None is the origin.

    Returns:
      A stateless transform, whose update needs the parameters.

    Raises:
      TypeError: if `radius` is not a number.
      ValueError: if it is out of range; by update, if the parameters are missing, `center`
        differs from them in structure or shape, or inside `shard_map(check_vma=False)`.

    Guarantee:
      In exact arithmetic, both the updated parameters as `optax.apply_updates` rounds them and the
      unrounded sum `params + updates` (to which a later transform may add noise) are within
      `radius` of the centre, taken in the parameters' dtypes. The updates returned are those for
      which this was checked: with u the unit roundoff, s the rounded sum and c the centre, the
      computed `s - c` (see `clip_params`) is within a radius smaller by 2 u (||c|| + radius), and
      the unrounded sum differs from s by at most u ||s||.
      Updates that fail are replaced, in this order: by the difference to the projection; by
      `center - params`, which for the origin is exact; by NaN, if no representable update leads
      into the ball from where the parameters are (or they are not finite), so that nothing can be
      released by mistake. Only with a centre other than the origin, and parameters farther from it
      than about radius / u, does that happen. Updated parameters that are not finite become the
      centre.

    Source:
      Koloskova et al. (ICML 2025), model clipping.

    >>> tx, params = project_onto_ball(1.0), jnp.array([0.0, 0.5])
    >>> updates, _ = tx.update(jnp.array([3.0, 3.5]), tx.init(params), params)
    >>> print((params + updates).round(3))
    [0.6 0.8]
    """
    norms.check_norm("radius", radius)

    def init(params: ArrayTree) -> optax.EmptyState:
        if center is not None:
            trees.check_same_structure(params, center)
        return optax.EmptyState()

    def update(
        updates: ArrayTree, state: ArrayTree, params: ArrayTree | None = None
    ) -> tuple[ArrayTree, ArrayTree]:
        if params is None:
            raise ValueError("project_onto_ball needs params: call update(updates, state, params)")
        parallel.check_tracked()
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
        middles = [
            jnp.asarray(c, p.dtype)
            for p, c in zip(leaves, trees.center_leaves(leaves, params, center), strict=True)
        ]
        moves, treedef = jax.tree.flatten(updates)
        moves = [
            jnp.asarray(u, float_formats.common_dtype([u, p]))
            for u, p in zip(moves, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, _into_ball(moves, leaves, middles, radius)), state

    return optax.GradientTransformation(init, update)


def noise_then_projection(
    noise: optax.GradientTransformation, project: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Adds noise, then projects; an update whose noise is NaN stays NaN.

    The projection alone would turn NaN into the centre. Whether noise is lost may depend on private
    gradients, so a step without its noise must not pass for a step with it.

    Args:
      noise: a transform that adds noise, such as `add_gaussian_noise`.
      project: a transform without state, such as `project_onto_ball`.

    Returns:
      A transform with the state of `noise`, whose update needs the parameters.

    Guarantee:
      If the noised update holds a NaN, all of the update is NaN. Otherwise it is that of `project`.

    >>> from certunlearn.transforms import add_gaussian_noise
    >>> noise = add_gaussian_noise(9.0, jax.random.key(0))
    >>> tx, params = noise_then_projection(noise, project_onto_ball(1.0)), jnp.zeros(3)
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(f"{jnp.linalg.norm(updates):.3f}")
    1.000
    """

    def update(
        updates: ArrayTree, state: ArrayTree, params: ArrayTree | None = None
    ) -> tuple[ArrayTree, ArrayTree]:
        noised, state = noise.update(updates, state, params)
        projected, _ = project.update(noised, project.init(params), params)
        lost = float_formats.holds_nan(noised)
        return jax.tree.map(lambda leaf: float_formats.nan_where(lost, leaf), projected), state

    return optax.GradientTransformation(noise.init, update)


@jax.custom_jvp
def _project(params: ArrayTree, radius: jax.Array, center: ArrayTree | None) -> ArrayTree:
    params = jax.tree.map(jnp.asarray, params)
    if center is None:
        return norms.clip_tree(params, radius).tree
    center = jax.tree.map(lambda p, c: jnp.asarray(c, p.dtype), params, center)
    checked, target = _radii(params, radius, center)

    def difference(candidate: ArrayTree) -> ArrayTree:
        return jax.tree.map(jnp.subtract, candidate, center)

    def toward_center(candidate: ArrayTree) -> ArrayTree:
        moved = norms.clip_tree(difference(candidate), target).tree
        return jax.tree.map(jnp.add, center, moved)

    def the_center(candidate: ArrayTree) -> ArrayTree:
        # In `shard_map` the centre, too, must count as differing between devices if `z` does.
        return jax.tree.map(
            lambda z, c: jnp.where(jnp.zeros_like(z, bool), z, c), candidate, center
        )

    return _first_that_holds(
        params, lambda z: norms.within(difference(z), checked), [toward_center, the_center]
    )


@_project.defjvp
def _derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """The derivative of the exact projection: the loop of the strict one has none in reverse."""
    return _project(*primals), jax.jvp(_exact_projection, primals, tangents)[1]


def _exact_projection(params: ArrayTree, radius: jax.Array, center: ArrayTree | None) -> ArrayTree:
    """The formula, as it is rounded: what leaves is never this."""
    params = jax.tree.map(jnp.asarray, params)
    zeros = jax.tree.map(jnp.zeros_like, params) if center is None else center
    center = jax.tree.map(lambda p, c: jnp.asarray(c, p.dtype), params, zeros)
    moved = jax.tree.map(jnp.subtract, params, center)
    length = _length(jax.tree.leaves(moved))
    factor = jnp.where(length <= radius, 1.0, radius / length)
    return jax.tree.map(lambda m, c: c + m * factor.astype(m.dtype), moved, center)


def _length(leaves: list[jax.Array]) -> jax.Array:
    """The norm of all pieces, scaled so that squares do not overflow; 1 for zeros."""
    largest = jnp.zeros(())
    for leaf in leaves:
        peak = jax.lax.stop_gradient(jnp.max(jnp.abs(leaf), initial=0))
        axes = parallel.pieces_axes(leaf)
        largest = jnp.maximum(largest, jax.lax.pmax(peak, axes) if axes else peak)
    largest = jnp.where(largest > 0, largest, 1.0)
    square = jnp.zeros(())
    for leaf in leaves:
        part = jnp.sum((leaf / largest) ** 2)
        axes = parallel.pieces_axes(leaf)
        square += jax.lax.psum(part, axes) if axes else part
    return largest * jnp.sqrt(jnp.where(square > 0, square, 1.0))


def _radii(params: ArrayTree, radius: jax.Array, center: ArrayTree) -> tuple[ArrayTree, Any]:
    """What differences from the centre are checked against, and what they are clipped to."""
    roundoff = float_formats.coarsest_eps(params) / 2
    count = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
    checked = radius * (1 - 8 * roundoff) - 2.0**-125 * math.sqrt(count)
    # A target below zero, or not a number, counts as a radius of zero: the centre.
    return checked, checked - 4 * roundoff * (norms.norm_bound(center) + radius)


def _first_that_holds(
    value: Any, holds: Callable[[Any], jax.Array], remedies: Sequence[Callable[[Any], Any]]
) -> Any:
    """The value, or what the remedies make of it one by one; what the last one makes is not tested.

    A loop, so that the very numbers that are tested are returned: see `norms.clip_tree`.
    """

    def fails(state: Any) -> jax.Array:
        tries, candidate = state
        return (tries < len(remedies)) & ~holds(candidate)

    def remedy(state: Any) -> Any:
        tries, candidate = state
        return tries + 1, jax.lax.switch(tries, remedies, candidate)

    return jax.lax.while_loop(fails, remedy, (jnp.zeros((), jnp.int32), value))[1]


@jax.jit
def _into_ball(
    moves: list[jax.Array], params: list[jax.Array], middles: list[jax.Array], radius: jax.Array
) -> list[jax.Array]:
    """The moves, changed as `project_onto_ball` says."""
    roundoff = float_formats.coarsest_eps(params) / 2
    rounding = 2 * roundoff * (norms.norm_bound(middles) + radius)
    checked, target = (r - rounding for r in _radii(params, radius, middles))

    def differences(moves: list[jax.Array]) -> list[jax.Array]:
        moved = optax.apply_updates(params, moves)
        return [new - c for new, c in zip(moved, middles, strict=True)]

    def to(targets: list[jax.Array], moves: list[jax.Array]) -> list[jax.Array]:
        return [(z - p).astype(u.dtype) for z, p, u in zip(targets, params, moves, strict=True)]

    def to_projection(moves: list[jax.Array]) -> list[jax.Array]:
        clipped = norms.clip_tree(differences(moves), target).tree
        return to([c + y for c, y in zip(middles, clipped, strict=True)], moves)

    def to_center(moves: list[jax.Array]) -> list[jax.Array]:
        return to(middles, moves)

    def nowhere(moves: list[jax.Array]) -> list[jax.Array]:
        return [jnp.full_like(u, jnp.nan) for u in moves]

    return _first_that_holds(
        moves, lambda u: norms.within(differences(u), checked), [to_projection, to_center, nowhere]
    )
