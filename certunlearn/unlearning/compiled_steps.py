"""The compiled steps: noisy ones in calls of one or many, and the noiseless ones after them."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree

from certunlearn._numerics import checks
from certunlearn.mechanisms import Mechanism
from certunlearn.unlearning import kept_steps, model_loss, noisy_step, placement
from certunlearn.unlearning.model_loss import Loss
from certunlearn.unlearning.noisy_step import Carry, StepStats, asked_for, batch_at

# Steps in one compiled call where a rolled loop is cheap. On CPU it is not: XLA runs a convolution
# inside a rolled loop about 30 times slower than outside, so there one call is one step.
_STEPS_PER_CALL = 32


def rolled() -> bool:
    """Whether many steps go into one compiled call."""
    return jax.default_backend() != "cpu"


def longest_call() -> int:
    """Most steps in one compiled call."""
    return _STEPS_PER_CALL if rolled() else 1


def noisy_steps(
    loss: Loss,
    mechanism: Mechanism,
    noise_scale: checks.PerStep,
    *,
    center: ArrayTree | None = None,
    before_clip: optax.GradientTransformation | None = None,
    batch_size: int,
    per_example: bool = False,
    microbatch_size: int | None = None,
    key: jax.Array,
) -> Callable[..., tuple[Carry, StepStats]]:
    """Compiles `run(carry, data, order, position, step, *, count, layout=()) -> (carry, stats)`.

    `run` takes `count` noisy steps on consecutive batches of the epoch's `order`, from batch number
    `position` on; `step` is the number of the first. The old carry, whose optimizer state is that
    of `noisy_sgd`, is used up: its memory is used again. For Poisson sampling every step draws its
    own sample; `order` is then the sampling key's data. With `order` None, `data` is the batch or
    the sample. The new carry lies as `layout` says, see `placement.automatic`. `key` is that of the
    batches, from which the loss's keys are made.

    What was compiled for an earlier run of the same structure and shapes is used again; the
    numbers of the mechanism, the noise, the centre and the loss's arrays are arguments of it.
    """
    fixed, varied = noisy_step.parts(
        loss,
        mechanism,
        noise_scale,
        center,
        before_clip,
        per_example,
        microbatch_size,
        batch_size,
        key,
    )
    structure = (loss.function, loss.layout, loss.treedef, loss.is_frozen)
    looked_at = (structure, *fixed[1:])
    found: list[Callable[..., tuple[Carry, StepStats]]] = []

    def run(
        carry: Carry,
        data: ArrayTree,
        order: jax.Array | None,
        position: int,
        step: int,
        *,
        count: int,
        layout: placement.Layout = (),
    ) -> tuple[Carry, StepStats]:
        if not found:
            shapes, make = (varied, carry, data, order), noisy_step.compiled_noisy
            found.append(kept_steps.compiled("noisy", fixed, looked_at, shapes, make))
        return found[0](varied, carry, data, order, position, step, count=count, layout=layout)

    return run


def noise_alone(tx: optax.GradientTransformation) -> Callable[..., tuple[Carry, StepStats]]:
    """The step of a mechanism that has minimised before: its noise, on no gradient.

    Called like what `noisy_steps` returns. It looks at no data, and has no numbers to show. It is
    taken once, so it is not compiled: compiling it takes longer than minimising often does.
    """

    def run(
        carry: Carry,
        data: ArrayTree,
        order: jax.Array | None,
        position: int,
        step: int,
        *,
        count: int,
        layout: placement.Layout = (),
    ) -> tuple[Carry, StepStats]:
        del data, order, position, step, count, layout
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
    """Compiles `one(params, state, data, order, position, step, layout=())`.

    `one` takes step number `step`, without noise, on batch number `position` of the epoch's
    `order`, or on `data` if that is None, and returns (params, state, batch loss). The memory of
    the old parameters and state is used again, and the new ones lie as `layout` says. `key` is that
    of the batches, from which the loss's keys are made.
    """

    arrays, structure = jax.tree.flatten(loss)
    fixed = _Noiseless(structure, optimizer, batch_size)
    looked_at = ((loss.function, loss.layout, loss.treedef, loss.is_frozen), *fixed[1:])
    loss_key = model_loss.loss_key(key)
    found: list[Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]]] = []

    def one(
        params: ArrayTree,
        state: optax.OptState,
        data: ArrayTree,
        order: jax.Array | None,
        position: int,
        step: int,
        layout: placement.Layout = (),
    ) -> tuple[ArrayTree, optax.OptState, jax.Array]:
        if not found:
            shapes = (arrays, params, state, data, order)
            make = _compiled_noiseless
            found.append(kept_steps.compiled("noiseless", fixed, looked_at, shapes, make))
        return found[0](arrays, loss_key, params, state, data, order, position, step, layout)

    return one


class _Noiseless(NamedTuple):
    """What noiseless steps are traced from besides their arguments; see `noisy_step.Fixed`."""

    loss: Any
    optimizer: optax.GradientTransformation
    batch_size: int


def _compiled_noiseless(
    this: kept_steps.Compiled[_Noiseless],
) -> Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]]:
    @functools.partial(jax.jit, donate_argnums=(2, 3), static_argnums=8)
    def one(
        arrays: list[jax.Array],
        loss_key: jax.Array,
        params: ArrayTree,
        state: optax.OptState,
        data: ArrayTree,
        order: jax.Array | None,
        position: int,
        step: int,
        layout: placement.Layout,
    ) -> tuple[ArrayTree, optax.OptState, jax.Array]:
        fixed = this.fixed
        loss_fn: Loss = jax.tree.unflatten(fixed.loss, arrays)
        batch = batch_at(data, order, position, fixed.batch_size)
        key = jax.random.fold_in(loss_key, step)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, key)
        updates, state = optax.with_extra_args_support(fixed.optimizer).update(
            grads, state, params, **asked_for(loss_fn, loss, grads, batch, key)
        )
        changed = optax.apply_updates(params, updates), state
        return *placement.constrained(changed, layout), loss

    return one


def finetuning_steps(
    one: Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]],
    optimizer: optax.GradientTransformation,
    params: ArrayTree,
    calls: Iterable[tuple[ArrayTree, jax.Array | None, int, int, int]],
) -> Iterator[tuple[ArrayTree, jax.Array]]:
    """Noiseless steps with a fresh optimizer state; yields (params, batch loss) after each.

    Args:
      one: see `noiseless_step`.
      optimizer: of these steps.
      params: where to start.
      calls: of one step each; see `data_feeds.Call`.
    """
    whole = owned((params, optimizer.init(params)))
    params, state = placement.together(whole, placement.mesh_of(None, params))
    layout = placement.automatic((params, state))
    for data, order, position, step, _ in calls:
        params, state, loss = one(params, state, data, order, position, step, layout)
        yield params, loss


def owned(tree: Any) -> Any:
    """A copy of which no two leaves share memory: a step may then use all of it again.

    Parameters may be tied, and an optimizer's state may begin as the parameters themselves.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
