"""The compiled steps: noisy ones in calls of one or many, and the noiseless ones after them."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree

from certunlearn import transforms
from certunlearn._numerics import random_keys
from certunlearn.mechanisms import Mechanism
from certunlearn.transforms import gradients
from certunlearn.unlearning import model_loss
from certunlearn.unlearning.model_loss import Loss

# The parameters that are trained, and the optimizer's state.
Carry = tuple[ArrayTree, optax.OptState]

# Steps in one compiled call where a rolled loop is cheap. On CPU it is not: XLA runs a convolution
# inside a rolled loop about 30 times slower than outside, so there one call is one step.
_STEPS_PER_CALL = 32


def rolled() -> bool:
    """Whether many steps go into one compiled call."""
    return jax.default_backend() != "cpu"


def longest_call() -> int:
    """Most steps in one compiled call."""
    return _STEPS_PER_CALL if rolled() else 1


class StepStats(NamedTuple):
    """Private numbers of the steps of one call; arrays `[steps in the call]`.

    `largest` has one for each leaf, its largest magnitude after the step, where all of a run must
    be held against rounding; else it is empty.
    """

    loss: jax.Array
    clip_fraction: jax.Array
    nonfinite: jax.Array
    largest: tuple[jax.Array, ...] = ()


def noisy_steps(
    loss: Loss,
    tx: optax.GradientTransformation,
    mechanism: Mechanism,
    batch_size: int,
    per_example: bool,
    microbatch_size: int | None,
    key: jax.Array,
) -> Callable[..., tuple[Carry, StepStats]]:
    """Compiles `run(carry, data, order, position, step, *, count) -> (carry, stats)`.

    `run` takes `count` noisy steps on consecutive batches of the epoch's `order`, from batch number
    `position` on; `step` is the number of the first. The old carry's memory is used again. For
    Poisson sampling every step draws its own sample; `order` is then the sampling key's
    data. `key` is that of the batches, from which the loss's keys are made.
    """
    sampling, limit = mechanism.poisson_sampling(), mechanism.example_clip_norm()
    per_example = per_example or sampling is not None

    @functools.partial(jax.jit, static_argnames="count", donate_argnums=2)
    def run(
        loss_fn: Loss,
        loss_key: jax.Array,
        carry: Carry,
        data: ArrayTree,
        order: jax.Array,
        position: int,
        step: int,
        *,
        count: int,
    ) -> tuple[Carry, StepStats]:
        def one(carry: Carry, offset: jax.Array) -> tuple[Carry, StepStats]:
            leaves, opt_state = carry
            before = _counts(opt_state)
            factor = 1.0
            key = jax.random.fold_in(loss_key, step + offset)
            if sampling is not None:
                step_key = jax.random.fold_in(random_keys.as_key(order), step + offset)
                batch, factor = sampling.sample(data, step_key, microbatch_size)
            else:
                batch = batch_at(data, order, position + offset, batch_size)
            if per_example:
                # A Python float where it is constant, so that it is checked and rounded exactly.
                norm: Any = jnp.asarray(limit)[step + offset] if isinstance(limit, tuple) else limit
                if sampling is not None:
                    value_and_grad = gradients.sample_value_and_grad(loss_fn, norm, microbatch_size)
                else:
                    value_and_grad = gradients.clipped_value_and_grad(
                        loss_fn, norm, microbatch_size=microbatch_size, with_stats=True
                    )
                (loss, stats), grads = value_and_grad(leaves, batch, key)
                grads = jax.tree.map(lambda g: factor * g, grads)
            else:
                loss, grads = jax.value_and_grad(loss_fn)(leaves, batch, key)
            updates, opt_state = optax.with_extra_args_support(tx).update(
                grads, opt_state, leaves, **_asked_for(loss_fn, loss, grads, batch, key)
            )
            leaves = optax.apply_updates(leaves, updates)
            after = _counts(opt_state)
            clipped, nonfinite = after[0] - before[0], after[1] - before[1]
            if per_example:
                clipped, nonfinite = stats.clipped_fraction, stats.nonfinite
            largest: tuple[jax.Array, ...] = ()
            if mechanism.watches_magnitudes:
                largest = tuple(jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(leaves))
            numbers = StepStats(
                jnp.asarray(loss, jnp.float32),
                jnp.asarray(clipped, jnp.float32),
                nonfinite,
                largest,
            )
            return (leaves, opt_state), numbers

        if count > 1:
            return jax.lax.scan(one, carry, jnp.arange(count))
        # No scan, unrolled or not: it lowers to a `while`, where XLA on CPU leaves convolutions in
        # layouts for which it has no fast kernel.
        carry, stats = one(carry, jnp.zeros((), jnp.int32))
        return carry, jax.tree.map(lambda number: number[None], stats)

    return functools.partial(run, loss, model_loss.loss_key(key))


def noise_alone(tx: optax.GradientTransformation) -> Callable[..., tuple[Carry, StepStats]]:
    """The step of a mechanism that has minimised before: its noise, on no gradient.

    Called like what `noisy_steps` returns. It looks at no data, and has no numbers to show. It is
    taken once, so it is not compiled: compiling it takes longer than minimising often does.
    """

    def run(
        carry: Carry, data: ArrayTree, order: jax.Array, position: int, step: int, *, count: int
    ) -> tuple[Carry, StepStats]:
        del data, order, position, step, count
        leaves, opt_state = carry
        zeros = jax.tree.map(jnp.zeros_like, leaves)
        updates, opt_state = tx.update(zeros, opt_state, leaves)
        none = jnp.zeros(0, jnp.float32)
        stats = StepStats(none, none, jnp.zeros(0, jnp.int32))
        return (optax.apply_updates(leaves, updates), opt_state), stats

    return run


def noiseless_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    key: jax.Array,
) -> Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]]:
    """Compiles `one(params, state, data, order, position, step) -> (params, state, batch loss)`.

    `one` takes step number `step`, without noise, on batch number `position` of the epoch's
    `order`. The memory of the old parameters and state is used again. `key` is that of the batches,
    from which the loss's keys are made.
    """

    @functools.partial(jax.jit, donate_argnums=(2, 3))
    def one(
        loss_fn: Loss,
        loss_key: jax.Array,
        params: ArrayTree,
        state: optax.OptState,
        data: ArrayTree,
        order: jax.Array,
        position: int,
        step: int,
    ) -> tuple[ArrayTree, optax.OptState, jax.Array]:
        batch, key = batch_at(data, order, position, batch_size), jax.random.fold_in(loss_key, step)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, key)
        updates, state = optax.with_extra_args_support(optimizer).update(
            grads, state, params, **_asked_for(loss_fn, loss, grads, batch, key)
        )
        return optax.apply_updates(params, updates), state, loss

    return functools.partial(one, loss, model_loss.loss_key(key))


def finetuning_steps(
    one: Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]],
    optimizer: optax.GradientTransformation,
    params: ArrayTree,
    calls: Iterable[tuple[ArrayTree, jax.Array, int, int, int]],
) -> Iterator[tuple[ArrayTree, jax.Array]]:
    """Noiseless steps with a fresh optimizer state; yields (params, batch loss) after each.

    Args:
      one: see `noiseless_step`.
      optimizer: of these steps.
      params: where to start.
      calls: of one step each; see `data_feeds.Call`.
    """
    params, state = owned((params, optimizer.init(params)))
    for data, order, position, step, _ in calls:
        params, state, loss = one(params, state, data, order, position, step)
        yield params, loss


def owned(tree: Any) -> Any:
    """A copy of which no two leaves share memory: a step may then use all of it again.

    Parameters may be tied, and an optimizer's state may begin as the parameters themselves.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def _asked_for(
    loss_fn: Loss, loss: jax.Array, grads: ArrayTree, batch: ArrayTree, key: jax.Array
) -> dict[str, Any]:
    """What optimizers with a line search or a plateau to look for ask for, by Optax's names."""
    return {"value": loss, "grad": grads, "value_fn": lambda params: loss_fn(params, batch, key)}


def batch_at(
    data: ArrayTree, order: jax.Array, position: int | jax.Array, batch_size: int
) -> ArrayTree:
    """Batch number `position` of an epoch's order."""
    indices = jax.lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
    return jax.tree.map(lambda x: x[indices], data)


def _counts(opt_state: optax.OptState) -> tuple[jax.Array, jax.Array]:
    """How many gradients were clipped so far, and how many were not finite."""
    clips = _find(opt_state, transforms.ClipByGlobalNormState)[-1:]  # before_clip may have its own
    zeroed = [state.zeroed for state in _find(opt_state, transforms.ZeroNonfiniteState)]
    zeroed += [clip.nonfinite for clip in clips]
    none = jnp.zeros((), jnp.int32)
    return sum((clip.clipped for clip in clips), none), sum(zeroed, none)


def _find(opt_state: optax.OptState, kind: type) -> list[Any]:
    is_kind = lambda state: isinstance(state, kind)  # noqa: E731
    return [state for state in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(state)]
