"""Losses with clipped gradients: of every example, or of the batch as a whole."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree
from jax.typing import ArrayLike

from certunlearn._numerics import checks, float_formats, loss_functions, norms, parallel

# Microbatches that are compiled one by one, and not as a loop.
_MOST_WRITTEN_OUT = 16


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
        takes the whole batch at once. Memory then depends on this and not on the batch size. More
        than 16 parts run in a loop, in which convolutions are far slower on a CPU.
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


def mean_value_and_grad(
    loss_fn: Callable[..., jax.Array], microbatch_size: int | None
) -> Callable[..., tuple[jax.Array, ArrayTree]]:
    """`jax.value_and_grad` of a batch's mean loss, not clipped, in microbatches.

    Value and gradient are the means of those of the microbatches, which are equally large: of a
    loss that is a mean over examples, those of the batch up to rounding.

    Args:
      loss_fn: `loss_fn(params, batch, key)`, one number; see `loss_functions.in_one_form`.
      microbatch_size: examples to hold in memory at once; None for all. Each microbatch gets
        `fold_in(key, place of its first example)`; without microbatches the batch gets `key`.

    Returns:
      `f(params, batch, key) -> (value, grads)`, which raises ValueError if `microbatch_size` does
      not divide the batch size.
    """

    def value_and_grad(
        params: ArrayTree, batch: ArrayTree, key: jax.Array | None = None
    ) -> tuple[jax.Array, ArrayTree]:
        def of_part(part: ArrayTree, places: jax.Array) -> tuple[ArrayTree, jax.Array]:
            first = jnp.min(places)  # not `places[0]`, which cannot be had of a sharded axis
            value, grads = jax.value_and_grad(loss_fn)(params, part, _folded(key, first))
            return grads, value[None]

        if microbatch_size is None:
            return jax.value_and_grad(loss_fn)(params, batch, key)
        _check_batch(batch, microbatch_size)
        total, values = _sum_over_parts(of_part, microbatch_size, batch)
        return jnp.mean(values), jax.tree.map(lambda leaf: leaf / values.size, total)

    return value_and_grad


def mean_value(
    loss_fn: Callable[..., jax.Array], microbatch_size: int | None
) -> Callable[..., jax.Array]:
    """The value of `mean_value_and_grad` alone, `f(params, batch, key)`, for line searches.

    Its gradient needs the memory of one microbatch, too, for which it computes each once more.
    """

    def value(params: ArrayTree, batch: ArrayTree, key: jax.Array | None = None) -> jax.Array:
        @jax.checkpoint
        def of_part(
            params: ArrayTree, part: ArrayTree, places: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            value = loss_fn(params, part, _folded(key, jnp.min(places)))
            return value, value[None]

        if microbatch_size is None:
            return loss_fn(params, batch, key)
        _check_batch(batch, microbatch_size)
        of_each = functools.partial(of_part, params)
        return jnp.mean(_sum_over_parts(of_each, microbatch_size, batch)[1])

    return value


def _by_example(
    loss_fn: Callable[..., jax.Array],
    clip_norm: float | jax.Array,
    microbatch_size: int | None,
    params: ArrayTree,
    batch: ArrayTree,
    key: jax.Array | None,
    taken: ArrayLike = True,
) -> tuple[jax.Array, ClipStats, ArrayTree]:
    def of_example(example: ArrayTree, place: jax.Array) -> tuple[jax.Array, ArrayTree]:
        alone = jax.tree.map(lambda leaf: leaf[None], example)
        return jax.value_and_grad(loss_fn)(params, alone, _folded(key, place))

    def of_part(part: ArrayTree, places: jax.Array) -> tuple[ArrayTree, tuple[jax.Array, ...]]:
        values, grads = jax.vmap(of_example)(part, places)
        result = norms.sum_of_clipped(grads, clip_norm)
        return result.tree, (values, result.clipped, result.nonfinite)

    total, (values, clipped, nonfinite) = _sum_over_parts(of_part, microbatch_size, batch)
    size = values.size
    # The mean of vectors in the ball is in the ball, up to rounding.
    grads = norms.clip_tree(jax.tree.map(lambda leaf: leaf / size, total), clip_norm).tree
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
    value, grads = mean_value_and_grad(loss_fn, microbatch_size)(params, batch, key)
    result = norms.clip_tree(grads, clip_norm)
    stats = ClipStats(result.clipped.astype(jnp.float32), result.nonfinite.astype(jnp.int32))
    return value, stats, result.tree


def _sum_over_parts(
    of_part: Callable[[ArrayTree, jax.Array], tuple[ArrayTree, Any]],
    microbatch_size: int | None,
    batch: ArrayTree,
) -> tuple[ArrayTree, Any]:
    """The sum of `of_part`'s first results over microbatches, and its second results in a row.

    One after the other, so that one part is held in memory at once. A few parts are written out: on
    a CPU, convolutions in a loop are slow.
    """
    batch, places = jax.tree.map(jnp.asarray, batch), _places(batch)
    size = places.size
    parts = 1 if microbatch_size is None else size // microbatch_size
    if parts == 1:
        return of_part(batch, places)
    # Every part takes examples from all of the batch, so that all devices have some of each.
    split = jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]), (batch, places))

    def add(total: ArrayTree, number: ArrayLike) -> tuple[ArrayTree, Any]:
        part, places = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, axis=1, keepdims=False), split
        )
        more, rest = of_part(part, places)
        return jax.tree.map(jnp.add, total, more), rest

    part, places = jax.tree.map(lambda leaf: leaf[:, 0], split)
    total, first = of_part(part, places)
    if parts <= _MOST_WRITTEN_OUT:
        rows = [first]
        for number in range(1, parts):
            total, rest = add(total, _after(total, number))
            rows.append(rest)
        rest = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *rows)
    else:
        total, more = jax.lax.scan(add, total, jnp.arange(1, parts))
        rest = jax.tree.map(
            lambda head, tail: jnp.concatenate([head[:, None], jnp.moveaxis(tail, 0, 1)], axis=1),
            first,
            more,
        )
    return total, jax.tree.map(lambda leaf: leaf.reshape(-1), rest)


def _after(total: ArrayTree, number: int) -> jax.Array:
    """The number, but not before the total is known: else a compiler may hold all parts at once.

    A loop that has no round, unless a sum is the one NaN whose bits are all ones. Such a total
    comes to nothing, anyway. A compiler does not know that, and not all of them keep a barrier.
    """
    smallest = min(jax.tree.leaves(total), key=lambda leaf: leaf.size)
    bits = float_formats.bits_of(jnp.sum(smallest, dtype=jnp.float32))

    def once(state: Any) -> Any:
        odd, number = state
        return odd & False, jnp.where(odd, 0, number)

    # In `shard_map` the number must count as differing between devices if the total does.
    return jax.lax.while_loop(lambda state: state[0], once, (bits == -1, number + (bits & 0)))[1]


def _places(batch: ArrayTree) -> jax.Array:
    """int32 `[batch size]`: each example's place in the batch, where that example lies."""
    size = loss_functions.size_of(batch)
    # On a mesh with explicit axes, what goes through `vmap` together must be spread alike.
    sharding = parallel.explicit_sharding(jax.tree.leaves(batch)[0])
    if sharding is not None:
        sharding = sharding.update(spec=jax.sharding.PartitionSpec(*sharding.spec[:1]))
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0, out_sharding=sharding)


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
