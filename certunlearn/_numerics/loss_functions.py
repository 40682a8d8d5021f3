"""What a loss function may take and return, and how it is brought into one form.

The form is `loss(params, batch, key) -> scalar`, float32 or float64.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import recognition

# How the functions are described to their authors.
SIGNATURE = "f(params, batch) -> loss or f(params, batch, key) -> loss"


def takes_key(loss_fn: Callable[..., Any]) -> bool:
    """Whether it takes a random key: a third argument without default, or one named `key`.

    >>> takes_key(lambda params, batch: 0.0), takes_key(lambda params, batch, rng: 0.0)
    (False, True)
    >>> takes_key(lambda params, batch, train=True: 0.0)
    False
    """
    return _third(loss_fn) or _named(loss_fn)


def call(loss_fn: Callable[..., Any], params: Any, batch: Any, key: Any) -> Any:
    """What the function returns; it gets the key if it takes one."""
    if _third(loss_fn):
        return loss_fn(params, batch, key)
    return loss_fn(params, batch, key=key) if _named(loss_fn) else loss_fn(params, batch)


def problem(result: Any, size: int) -> str | None:
    """What is wrong with what a loss returned for a batch of `size` examples, or None."""
    if isinstance(result, tuple) and len(result) == 2:
        result = result[0]
    if isinstance(result, tuple | list | dict):
        return f"got a {type(result).__name__}; return the loss alone, or (loss, anything else)"
    if result is None:
        return "got None"
    if not isinstance(result, float | np.ndarray | np.generic | jax.Array):
        return f"got an object of type {type(result).__name__}"
    shape, dtype = np.shape(result), jnp.result_type(result)
    if shape not in ((), (size,)):
        return f"got an array of shape {shape}; return its mean, or one loss for each example"
    return None if jnp.issubdtype(dtype, jnp.floating) else f"got dtype {dtype}"


def scalar(result: Any, batch: ArrayTree) -> jax.Array:
    """The mean loss of a batch as one number of at least float32.

    Args:
      result: what a loss returned: one number, one for each example, or a pair of such a loss and
        anything else, which is dropped.
      batch: what it was called on.

    Raises:
      TypeError: if it is none of these.
    """
    wrong = problem(result, size_of(batch))
    if wrong is not None:
        raise TypeError(f"loss_fn must return the mean loss of the batch, one real number: {wrong}")
    value = jnp.asarray(result[0] if isinstance(result, tuple) else result)
    if jnp.finfo(value.dtype).bits < 32:
        value = value.astype(jnp.float32)  # before the mean, which would round at every term
    return jnp.mean(value)


def in_one_form(loss_fn: Callable[..., Any]) -> Callable[[Any, Any, Any], jax.Array]:
    """The same loss as `loss(params, batch, key) -> scalar`."""

    def loss(params: Any, batch: Any, key: Any) -> jax.Array:
        return scalar(call(loss_fn, params, batch, key), batch)

    return loss


def size_of(batch: ArrayTree) -> int:
    """How many examples a batch holds; 0 if it holds no array with an axis of examples."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(batch) if recognition.is_shaped(leaf)]
    return shapes[0][0] if shapes and shapes[0] else 0


def _third(loss_fn: Callable[..., Any]) -> bool:
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        parameter
        for parameter in _parameters(loss_fn)
        if parameter.kind in places and parameter.default is inspect.Parameter.empty
    ]
    return len(needed) == 3


def _named(loss_fn: Callable[..., Any]) -> bool:
    names = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = _parameters(loss_fn)
    return any(each.name == "key" and each.kind in names for each in found[2:])


def _parameters(loss_fn: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(loss_fn).parameters.values())
    except (TypeError, ValueError):  # of some functions that are not written in Python
        return []
