"""A trial of every step by its shapes alone: what cannot work is refused before any noise."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval

from certunlearn._numerics import loss_functions, programs
from certunlearn.unlearning import held_arrays
from certunlearn.unlearning.compiled_steps import Carry
from certunlearn.unlearning.data_feeds import Call
from certunlearn.unlearning.model_loss import Loss


def check_loss(
    name: str, loss: Loss, params: ArrayTree, batch: ArrayTree, trained: Sequence[Any]
) -> bool:
    """Traces a loss on a batch of these shapes; returns whether it computes convolutions.

    Args:
      name: of the loss.
      loss: what is tried.
      params: of which it is one.
      batch: shapes of what it is called on.
      trained: arrays that it must not depend on, besides what it gets.

    Raises:
      TypeError: if it returns no loss.
      ValueError: if it depends on what it must not see.
    """
    found: list[str | None] = []
    size = jax.tree.leaves(batch)[0].shape[0]

    def probe(loss: Loss, params: Any, batch: Any, key: Any) -> Any:
        result = loss.result(params, batch, key)
        found.append(loss_functions.problem(result, size))
        return 0.0 if found[0] else loss_functions.scalar(result, batch)

    try:
        program = jax.make_jaxpr(probe)(loss, params, batch, jax.random.key(0))
    except Exception as error:
        error.add_note(f"{name} raised this on a batch of {size}; no step was run")
        raise
    if found[0] is not None:
        raise TypeError(f"{name} must return one real number, the mean loss of a batch: {found[0]}")
    if trained:
        held_arrays.check(name, _held(program), trained)
    used = _state_used(loss, params, batch)
    if used:
        raise ValueError(
            f"{name} must not use what the model remembers of its training ({', '.join(used)}), "
            "which is left out of it: put the model into training mode (model.train()), where it "
            "computes its statistics from the batch; what is a constant, make a frozen nnx.Param"
        )
    return programs.holds(program.jaxpr, "conv_general_dilated")


def _held(program: ClosedJaxpr) -> list[Any]:
    """The arrays that a program's result depends on, besides its arguments."""
    needed, _ = partial_eval.dce_jaxpr(program.jaxpr, [True])
    read = {id(name) for equation in needed.eqns for name in equation.invars}
    read |= {id(name) for name in needed.outvars}
    held = zip(program.jaxpr.constvars, program.consts, strict=True)
    mine = [array for name, array in held if id(name) in read]
    return mine + list(programs.constants(needed))


def _state_used(loss: Loss, params: ArrayTree, batch: ArrayTree) -> list[str]:
    """Names of the model's other state on which the loss depends."""
    blanks = loss.layout.blanks
    if not blanks:
        return []

    def value(blanks: dict[str, jax.Array], params: Any, batch: Any, key: Any) -> jax.Array:
        return loss_functions.scalar(loss.result(params, batch, key, blanks), batch)

    program = jax.make_jaxpr(value)(blanks, params, batch, jax.random.key(0))
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True])
    return [name for name, needed in zip(sorted(blanks), used, strict=False) if needed]


def try_noisy_steps(
    run: Callable[..., Any],
    carry: Carry,
    call: Call,
    named: bool,
) -> None:
    """Traces the first call of the compiled noisy steps.

    Args:
      run: see `compiled_steps.noisy_steps`.
      carry: parameters and optimizer state.
      call: the first.
      named: whether there is a `before_clip`, which then is to blame.

    Raises:
      ValueError: if it fails because of `before_clip`.
    """
    trial = functools.partial(run, count=call.most, most=call.most)
    try:
        jax.eval_shape(trial, carry, call.data, call.sampling_key, call.step)
    except Exception as error:
        if named:
            raise ValueError(_unfit("before_clip", error)) from error
        error.add_note("raised while the first noisy step was tried; no step was run")
        raise


def try_noiseless_step(
    one: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    params: ArrayTree,
    call: Call,
) -> None:
    """Traces the first two fine-tuning steps; see `compiled_steps.noiseless_step`.

    Raises:
      ValueError: if the optimizer cannot take these parameters, or changes their shapes.
    """
    try:
        state = optimizer.init(params)
        for _ in range(2):  # the second with the state that the first leaves
            changed, state, _ = jax.eval_shape(one, params, state, call.data, 0)
    except Exception as error:
        raise ValueError(_unfit("finetune", error)) from error
    before, after = ([jnp.shape(leaf) for leaf in jax.tree.leaves(t)] for t in (params, changed))
    if before != after:
        raise ValueError(f"finetune must keep the shapes of params, {before}; got {after}")


def _unfit(name: str, error: Exception) -> str:
    return (
        f"{name} does not work with these parameters, data and loss; no step was run. "
        f"{type(error).__name__}: {error}"
    )
