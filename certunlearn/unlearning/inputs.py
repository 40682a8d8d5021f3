"""What callers of the loop may pass: each error names the argument and says what would be right."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from certunlearn._numerics import checks
from certunlearn.mechanisms import Mechanism, base
from certunlearn.unlearning.history import UnlearningState


def function(name: str, value: Any, signature: str, optional: bool = False) -> None:
    """Raises TypeError if `value` cannot be called; None passes where it is optional."""
    if not callable(value) and not (optional and value is None):
        none = " or None" if optional else ""
        raise TypeError(f"{name} must be a function, {signature}{none}; got {_kind(value)}")


def flag(name: str, value: Any) -> bool:
    """Returns `value` as a bool, or raises TypeError if it is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def transform(name: str, value: Any) -> None:
    """Raises TypeError if `value` is not an Optax transform: a pair of `init` and `update`."""
    if not all(callable(getattr(value, part, None)) for part in ("init", "update")):
        raise TypeError(
            f"{name} must be an Optax transform with init and update, such as optax.adam(1e-3); "
            f"got {_kind(value)}"
        )


def finetuning(value: Any) -> tuple[optax.GradientTransformation | None, int]:
    """The optimizer and the number of steps in `unlearn(finetune=...)`; (None, 0) for None."""
    if value is None:
        return None, 0
    if not (isinstance(value, tuple) and len(value) == 2):
        found = f"{len(value)} values" if isinstance(value, tuple) else _kind(value)
        raise TypeError(f"finetune must be (Optax optimizer, steps) or None, got {found}")
    transform("the first of finetune", value[0])
    return value[0], checks.positive_int("finetune steps", value[1])


def finetuning_loss(
    mechanism: Mechanism,
    optimizer: optax.GradientTransformation | None,
    loss_fn: Callable[..., Any] | None,
    noisy_loss_fn: Callable[..., Any],
) -> Callable[..., Any]:
    """The loss of the steps after the noisy ones, which must not hold the trained model.

    Raises:
      ValueError: if there is one without fine-tuning, or none where that of the noisy steps may
        hold the trained model.
    """
    if loss_fn is not None:
        if optimizer is None:
            raise ValueError("finetune_loss_fn needs finetune=(optimizer, steps)")
        return loss_fn
    if optimizer is not None and not base.is_memoryless(mechanism):
        raise ValueError(
            "finetune needs a finetune_loss_fn with a mechanism of memoryless=False, whose loss_fn "
            "may depend on the trained model: give the loss of the steps without noise, which must "
            "not hold anything made from the trained model"
        )
    return noisy_loss_fn


def microbatch(value: Any, per_example: bool) -> int | None:
    """Returns `microbatch_size` as an int or None, or raises if it is out of place."""
    if value is None:
        return None
    if not per_example:
        raise ValueError(f"microbatch_size={value!r} needs per_example=True")
    return checks.positive_int("microbatch_size", value)


def check_resume(value: Any, key: Any) -> None:
    """Raises TypeError if it is no saved state, ValueError if there is a key besides."""
    if value is None:
        return
    if not isinstance(value, UnlearningState):
        raise TypeError(
            "resume must be the state of a stopped run, history.state or load_state(path); got "
            f"{_kind(value)}"
        )
    if key is not None:
        raise ValueError("key must be None with resume: the saved state carries the keys")


def arrays(name: str, tree: Any, *, keys: bool = False) -> Any:
    """The same pytree with JAX arrays as leaves.

    Args:
      name: the argument's name, for error messages.
      tree: a pytree of arrays: JAX's, NumPy's, or anything that NumPy takes for an array with a
        dtype and a shape.
      keys: whether typed PRNG keys may be among them.

    Raises:
      TypeError: if a leaf is no array, or one that holds no numbers, is masked or sparse.
      ValueError: if a number does not fit JAX's type, as beyond 32 bits without 64-bit mode.
    """
    sparse = getattr(sys.modules.get("jax.experimental.sparse"), "JAXSparse", ())
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _array(name + jax.tree_util.keystr(path), leaf, keys),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, sparse),  # a pytree, but its parts are no examples
    )


def check_real(name: str, tree: Any) -> None:
    """Raises TypeError if a leaf holds anything but real numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            at = jax.tree_util.keystr(path)
            raise TypeError(f"{name}{at} must hold real numbers, got {leaf.dtype}")


def _array(where: str, leaf: Any, keys: bool) -> jax.Array:
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and not keys:
            raise TypeError(f"{where} must hold numbers, got a PRNG key")
        return leaf
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(
            f"{where} must not be a masked array, whose mask would be lost: drop the masked "
            "examples, or fill them with x.filled(...)"
        )
    scalar = isinstance(leaf, bool | int | float | complex)
    if not scalar and not all(hasattr(leaf, part) for part in ("__array__", "dtype", "shape")):
        raise TypeError(
            f"{where} must be an array of numbers, got {_kind(leaf)}: make it one, all of it in "
            "memory (np.asarray, np.stack, x.toarray(), frame.to_numpy())"
        )
    try:
        host = np.asarray(leaf)
        host = host.astype(host.dtype.newbyteorder("="), copy=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{where} cannot be made an array of numbers: {error}") from error
    try:
        target = jnp.asarray(np.zeros(0, host.dtype)).dtype
    except TypeError as error:
        raise TypeError(f"{where} must hold numbers, got dtype {host.dtype}") from error
    if not (jnp.issubdtype(target, np.number) or target == np.bool_):
        raise TypeError(f"{where} must hold numbers, got dtype {host.dtype}")
    if target != host.dtype:
        _check_fit(where, host, target)
    return jnp.asarray(host, target)


def _check_fit(where: str, host: np.ndarray, target: np.dtype) -> None:
    """Refuses numbers that JAX's narrower type would turn into others altogether."""
    if host.size == 0:
        return
    if jnp.issubdtype(target, np.integer):
        least, largest = host.min(), host.max()
        bounds = np.iinfo(target)
        if least >= bounds.min and largest <= bounds.max:
            return
        worst = largest if largest > bounds.max else least
    else:
        with np.errstate(over="ignore"):
            lost = np.isinf(host.astype(target)) & ~np.isinf(host)
        if not lost.any():
            return
        worst = host[lost].flat[0]
    raise ValueError(
        f"{where} holds {worst}, which does not fit {target}; turn on JAX's 64-bit mode "
        "(jax_enable_x64) or make the numbers smaller"
    )


def _kind(value: Any) -> str:
    """What a value is, without its content, which may be long or private."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:60]
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"the class {name}" if isinstance(value, type) else f"an object of type {name}"
