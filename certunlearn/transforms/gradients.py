"""Losses with clipped gradients: of every example, or of the batch as a whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree
from jax.typing import ArrayLike
from optax import microbatching

from certunlearn._numerics import checks, loss_functions, norms, parallel


class ClipStats(NamedTuple):
    """What clipping did to one batch. Private: it depends on the hidden parameters.

    Attributes:
      clipped_fraction: share of the gradients (of examples, or of the one batch) scaled down.
      nonfinite: int32, how many were not finite and counted as zero.
    """

    clipped_fraction: jax.Array
    nonfinite: jax.Array


def clipped_value_and_grad(
    loss_fn: Callable[..., jax.Array],
    clip_norm: float | jax.Array,
    per_example: bool = True,
    microbatch_size: int | None = None,
    with_stats: bool = False,
) -> Callable[..., tuple[Any, ArrayTree]]:
    """A version of `jax.value_and_grad` whose gradient has norm at most `clip_norm`.

    Args:
      loss_fn: `loss_fn(params, batch)`, the *mean* loss of a batch: a pytree of arrays with a
        common leading axis. With `per_example` it is called on batches of one example, under
        `vmap`. It may take a random key as a third argument (one without default, or named
        `key`), return one loss for each example, which are averaged, or (loss, aux), of which aux
        is dropped. Losses narrower than float32 are cast up.
      clip_norm: largest L2 norm over all leaves together.
      per_example: clip every example's gradient, then average over the batch. Otherwise clip the
        gradient of the batch's mean loss, as Koloskova et al. (2025) do.
      microbatch_size: examples to hold in memory at once; it must divide the batch size. None
        takes the whole batch at once. Memory then depends on this and not on the batch size. On
        a CPU, convolutions run far slower inside the loop that this makes.
      with_stats: also return a `ClipStats`.

    Returns:
      `f(params, batch, key=None) -> (value, grads)`, or `((value, stats), grads)` with
      `with_stats`. `value` is the mean loss; with `per_example`, of the examples whose loss and
      gradient are finite. `key` is for a loss that takes one: give a fresh one at every step.
      With `per_example` each example gets `fold_in(key, place in the batch)`; without it the batch
      gets `key`, and each microbatch `fold_in(key, place of its first example)`.

    Raises:
      TypeError: if an argument is of the wrong type; by `f`, if the loss is not one real number, or
        takes a key and there is none.
      ValueError: if `clip_norm` is out of range; by `f`, if the batch is empty or ragged,
        `microbatch_size` does not divide its size, or with `per_example` inside `shard_map` if
        examples are spread over devices.

    Guarantee:
      The gradient's norm is at most `clip_norm`, strictly (see `norms.clip_tree`), whatever the
      loss, NaN included: an example whose gradient is not finite counts as zero, and does not
      disturb the others. The mean of clipped gradients, which rounds, is clipped once more. This is
      the clip that `GradientClipping` asks for. It says nothing about the privacy of single
      examples.

    Source:
      Abadi et al. (2016), Deep Learning with Differential Privacy, Algorithm 1 (per example).

    >>> f = clipped_value_and_grad(lambda w, x: jnp.mean((x - w) ** 2), clip_norm=1.0)
    >>> value, grad = f(jnp.array(0.0), jnp.array([0.25, -100.0]))
    >>> print(f"{grad:.2f}")  # the mean of -0.5 and +1
    0.25
    """
    norms.check_norm("clip_norm", clip_norm)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of params and batch, got {loss_fn!r}")
    for name, flag in (("per_example", per_example), ("with_stats", with_stats)):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if microbatch_size is not None:
        microbatch_size = checks.positive_int("microbatch_size", microbatch_size)
    run = _by_example if per_example else _by_batch
    keyed, loss = loss_functions.takes_key(loss_fn), loss_functions.in_one_form(loss_fn)

    def value_and_grad(
        params: ArrayTree, batch: ArrayTree, key: jax.Array | None = None
    ) -> tuple[Any, ArrayTree]:
        if keyed and key is None:
            raise TypeError("key must be given, for loss_fn takes one: a fresh one at every step")
        _check_batch(batch, microbatch_size)
        if per_example:
            parallel.check_whole("batch", batch)
        parallel.check_tracked()
        value, stats, grads = run(loss, clip_norm, microbatch_size, params, batch, key)
        return ((value, stats) if with_stats else value), grads

    return value_and_grad


def sample_value_and_grad(
    loss_fn: Callable[..., jax.Array], clip_norm: float | jax.Array, microbatch_size: int | None
) -> Callable[..., tuple[tuple[jax.Array, ClipStats], ArrayTree]]:
    """As `clipped_value_and_grad` with examples and stats, for a Poisson sample with empty places.

    The batch of the function returned is (examples, taken), as `batches.PoissonSampling.sample`
    makes it. Its gradient is the mean over all places; a place where no example was taken counts as
    a gradient of 0. The value, the clipped fraction and the number of gradients that are not finite
    are of the examples taken only, 0 if none was taken.
    """

    loss = loss_functions.in_one_form(loss_fn)

    def of_place(params: ArrayTree, sample: Any, key: jax.Array | None) -> jax.Array:
        examples, taken = sample
        value = loss(params, examples, key)
        # An empty place holds an example, too. If that example's gradient is not finite, this one
        # is NaN, and clipped to zero like any other.
        return jnp.where(taken[0], value, jnp.zeros_like(value))

    def value_and_grad(
        params: ArrayTree, sample: Any, key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, ClipStats], ArrayTree]:
        _check_batch(sample, microbatch_size)
        value, stats, grads = _by_example(
            of_place, clip_norm, microbatch_size, params, sample, key, sample[1]
        )
        return (value, stats), grads

    return value_and_grad


def _by_example(
    loss_fn: Callable[..., jax.Array],
    clip_norm: float | jax.Array,
    microbatch_size: int | None,
    params: ArrayTree,
    batch: ArrayTree,
    key: jax.Array | None,
    taken: ArrayLike = True,
) -> tuple[jax.Array, ClipStats, ArrayTree]:
    def clipped_gradient(
        params: ArrayTree, example: ArrayTree, place: jax.Array
    ) -> tuple[ArrayTree, tuple[jax.Array, ...]]:
        alone = jax.tree.map(lambda leaf: leaf[None], example)
        value, grads = jax.value_and_grad(loss_fn)(params, alone, _folded(key, place))
        clipped = norms.clip_tree(grads, clip_norm)
        return clipped.tree, (value, clipped.clipped, clipped.nonfinite)

    kinds = microbatching.AccumulationType
    grads, (values, clipped, nonfinite) = microbatching.micro_vmap(
        clipped_gradient,
        in_axes=(None, 0, 0),
        microbatch_size=microbatch_size,
        accumulator=(kinds.MEAN, kinds.CONCAT),
    )(params, jax.tree.map(jnp.asarray, batch), _places(batch))
    # The mean of vectors in the ball is in the ball, up to rounding.
    grads = norms.clip_tree(grads, clip_norm).tree
    taken = jnp.broadcast_to(taken, nonfinite.shape)
    counted = jnp.isfinite(values) & ~nonfinite & taken
    total = jnp.sum(jnp.where(counted, values, 0))
    value = total / jnp.maximum(jnp.sum(counted), 1).astype(total.dtype)
    share = jnp.sum(clipped & taken, dtype=jnp.float32) / jnp.maximum(
        jnp.sum(taken, dtype=jnp.float32), 1
    )
    return value, ClipStats(share, jnp.sum(nonfinite & taken, dtype=jnp.int32)), grads


def _by_batch(
    loss_fn: Callable[..., jax.Array],
    clip_norm: float | jax.Array,
    microbatch_size: int | None,
    params: ArrayTree,
    batch: ArrayTree,
    key: jax.Array | None,
) -> tuple[jax.Array, ClipStats, ArrayTree]:
    def of_part(
        params: ArrayTree, part: ArrayTree, places: jax.Array
    ) -> tuple[jax.Array, ArrayTree]:
        part_key = key if microbatch_size is None else _folded(key, places[0])
        return jax.value_and_grad(loss_fn)(params, part, part_key)

    value, grads = microbatching.microbatch(
        of_part,
        argnums=(1, 2),
        microbatch_size=microbatch_size,
        accumulator=microbatching.AccumulationType.MEAN,
    )(params, jax.tree.map(jnp.asarray, batch), _places(batch))
    result = norms.clip_tree(grads, clip_norm)
    stats = ClipStats(result.clipped.astype(jnp.float32), result.nonfinite.astype(jnp.int32))
    return value, stats, result.tree


def _places(batch: ArrayTree) -> jax.Array:
    """int32 `[batch size]`: each example's place in the batch."""
    return jnp.arange(loss_functions.size_of(batch), dtype=jnp.int32)


def _folded(key: jax.Array | None, place: jax.Array) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, place)


def _check_batch(batch: ArrayTree, microbatch_size: int | None) -> None:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or any(not shape for shape in shapes):
        raise ValueError("batch must be a pytree of arrays with a leading axis of examples")
    sizes = sorted({shape[0] for shape in shapes})
    if len(sizes) > 1 or sizes[0] == 0:
        raise ValueError(f"batch must have one leading axis of at least 1, got lengths {sizes}")
    if microbatch_size is not None and sizes[0] % microbatch_size:
        raise ValueError(
            f"microbatch_size must divide the batch size {sizes[0]}, got {microbatch_size}"
        )
