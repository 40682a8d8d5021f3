"""The compiled steps: noisy ones in calls of one or many, and the noiseless ones after them."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

from certunlearn._numerics import checks
from certunlearn.mechanisms import Mechanism
from certunlearn.transforms import gradients
from certunlearn.unlearning import data_feeds, kept_steps, model_loss, noisy_step, placement
from certunlearn.unlearning.model_loss import Loss
from certunlearn.unlearning.noisy_step import Carry, StepStats, asked_for

# Steps in one compiled call, for models of at most so many parameters. Steps of larger ones take
# so long that starting each by itself costs little, and a loop holds two more copies of them.
_STEPS_PER_CALL = {"cpu": ((2**18, 32),)}
_STEPS_PER_CALL_ELSEWHERE = ((2**22, 32), (2**25, 8))


def longest_call(params: ArrayTree, convolutions: bool) -> int:
    """Most steps in one compiled call.

    On CPU, convolutions are not put into a loop: XLA runs them there about 30 times slower.

    Args:
      params: of the model, frozen ones too.
      convolutions: whether the loss computes any.
    """
    backend = jax.default_backend()
    if backend == "cpu" and convolutions:
        return 1
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    allowed = _STEPS_PER_CALL.get(backend, _STEPS_PER_CALL_ELSEWHERE)
    return next((steps for most, steps in allowed if size <= most), 1)


class NoisySteps:
    """The compiled noisy steps of one run; see `noisy_steps`.

    Attributes:
      fixed: what they are traced from.
      varied: what else they depend on.
      looked_at: `fixed`, as parts that `snapshots.snapshot` can look into.
    """

    def __init__(self, fixed: noisy_step.Fixed, varied: noisy_step.Varied, loss: Loss) -> None:
        """`loss` is the one that `fixed` has the structure of."""
        self.fixed, self.varied = fixed, varied
        structure = (loss.function, loss.layout, loss.treedef, loss.is_frozen)
        self.looked_at = (structure, *fixed[1:])
        self._found: list[Callable[..., tuple[Carry, StepStats]]] = []

    def __call__(
        self,
        carry: Carry,
        data: ArrayTree,
        sampling_key: jax.Array | None,
        step: int,
        *,
        count: int,
        most: int = 1,
        layout: placement.Layout = (),
    ) -> tuple[Carry, StepStats]:
        """Takes `count` steps."""
        if not self._found:
            shapes, make = (self.varied, carry, data, sampling_key), noisy_step.compiled_noisy
            run = kept_steps.compiled("noisy", self.fixed, self.looked_at, shapes, make)
            self._found.append(run)
        carry, stats = self._found[0](
            self.varied, carry, data, sampling_key, step, count, most=most, layout=layout
        )
        if count < most:  # of steps that were not taken there are no numbers
            stats = jax.tree.map(lambda numbers: np.asarray(numbers)[:count], stats)
        return carry, stats


def noisy_steps(
    loss: Loss,
    mechanism: Mechanism,
    noise_scale: checks.PerStep,
    *,
    center: ArrayTree | None = None,
    before_clip: optax.GradientTransformation | None = None,
    per_example: bool = False,
    microbatch_size: int | None = None,
    key: jax.Array,
) -> NoisySteps:
    """Compiles `run(carry, data, sampling_key, step, *, count, most=1, layout=())`.

    `run` takes `count` noisy steps and returns (carry, stats); the arguments are those of
    `data_feeds.Call`. The old carry, whose optimizer state is that of `noisy_sgd`, is used up: its
    memory is used again. The new carry lies as `layout` says, see `placement.automatic`. `key` is
    that of the batches, from which the loss's keys are made.

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
        key,
    )
    return NoisySteps(fixed, varied, loss)


def noise_alone(tx: optax.GradientTransformation) -> Callable[..., tuple[Carry, StepStats]]:
    """The step of a mechanism that has minimised before: its noise, on no gradient.

    Called like what `noisy_steps` returns. It looks at no data, and has no numbers to show. It is
    taken once, so it is not compiled: compiling it takes longer than minimising often does.
    """

    def run(
        carry: Carry,
        data: ArrayTree,
        sampling_key: jax.Array | None,
        step: int,
        *,
        count: int,
        most: int = 1,
        layout: placement.Layout = (),
    ) -> tuple[Carry, StepStats]:
        del data, sampling_key, step, count, most, layout
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
    key: jax.Array,
    microbatch_size: int | None = None,
) -> Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]]:
    """Compiles `one(params, state, batch, step, layout=())`.

    `one` takes step number `step`, without noise, and returns (params, state, batch loss). The
    memory of the old parameters and state is used again, and the new ones lie as `layout` says.

    Args:
      loss: of these steps.
      optimizer: what takes them.
      key: that of the batches, from which the loss's keys are made.
      microbatch_size: examples handled at a time, or None for all.
    """

    arrays, structure = jax.tree.flatten(loss)
    fixed = _Noiseless(structure, optimizer, microbatch_size)
    looked_at = ((loss.function, loss.layout, loss.treedef, loss.is_frozen), *fixed[1:])
    loss_key = model_loss.loss_key(key)
    found: list[Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]]] = []

    def one(
        params: ArrayTree,
        state: optax.OptState,
        batch: ArrayTree,
        step: int,
        layout: placement.Layout = (),
    ) -> tuple[ArrayTree, optax.OptState, jax.Array]:
        if not found:
            shapes, make = (arrays, params, state, batch), _compiled_noiseless
            found.append(kept_steps.compiled("noiseless", fixed, looked_at, shapes, make))
        return found[0](arrays, loss_key, params, state, batch, step, layout)

    return one


class _Noiseless(NamedTuple):
    """What noiseless steps are traced from besides their arguments; see `noisy_step.Fixed`."""

    loss: Any
    optimizer: optax.GradientTransformation
    microbatch_size: int | None


def _compiled_noiseless(
    this: kept_steps.Compiled[_Noiseless],
) -> Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]]:
    @functools.partial(jax.jit, donate_argnums=(2, 3), static_argnums=6)
    def one(
        arrays: list[jax.Array],
        loss_key: jax.Array,
        params: ArrayTree,
        state: optax.OptState,
        batch: ArrayTree,
        step: int,
        layout: placement.Layout,
    ) -> tuple[ArrayTree, optax.OptState, jax.Array]:
        fixed = this.fixed
        loss_fn: Loss = jax.tree.unflatten(fixed.loss, arrays)
        key = jax.random.fold_in(loss_key, step)
        parts = fixed.microbatch_size
        loss, grads = gradients.mean_value_and_grad(loss_fn, parts)(params, batch, key)
        updates, state = optax.with_extra_args_support(fixed.optimizer).update(
            grads, state, params, **asked_for(loss_fn, parts, loss, grads, batch, key)
        )
        changed = optax.apply_updates(params, updates), state
        return *placement.constrained(changed, layout), loss

    return one


def finetuning_steps(
    one: Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]],
    optimizer: optax.GradientTransformation,
    params: ArrayTree,
    calls: Iterable[data_feeds.Call],
) -> Iterator[tuple[ArrayTree, jax.Array]]:
    """Noiseless steps with a fresh optimizer state; yields (params, batch loss) after each.

    Args:
      one: see `noiseless_step`.
      optimizer: of these steps.
      params: where to start.
      calls: of one step each.
    """
    whole = owned((params, optimizer.init(params)))
    params, state = placement.together(whole, placement.mesh_of(None, params))
    layout = placement.automatic((params, state))
    for call in calls:
        params, state, loss = one(params, state, call.data, call.step, layout)
        yield params, loss


def owned(tree: Any) -> Any:
    """A copy of which no two leaves share memory: a step may then use all of it again.

    Parameters may be tied, and an optimizer's state may begin as the parameters themselves.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
