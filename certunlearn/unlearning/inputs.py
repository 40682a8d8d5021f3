"""What callers of the loop may pass: each error names the argument and says what would be right."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import checks, recognition


def function(name: str, value: object, signature: str, optional: bool = False) -> None:
    """Raises TypeError if `value` cannot be called; None passes where it is optional."""
    if not callable(value) and not (optional and value is None):
        none = " or None" if optional else ""
        raise TypeError(f"{name} must be a function, {signature}{none}; got {kind(value)}")


def flag(name: str, value: object) -> bool:
    """Returns `value` as a bool, or raises TypeError if it is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def transform(name: str, value: object) -> None:
    """Raises TypeError if `value` is not an Optax transform: a pair of `init` and `update`."""
    if not recognition.is_optax_transform(value):
        raise TypeError(
            f"{name} must be an Optax transform with init and update, such as optax.adam(1e-3); "
            f"got {kind(value)}"
        )


def arrays(name: str, tree: Any, *, keys: bool = False, copied: bool = False) -> ArrayTree:
    """The same pytree with JAX arrays as leaves.

    Args:
      name: the argument's name, for error messages.
      tree: a pytree of arrays: JAX's, NumPy's, or anything that NumPy takes for an array with a
        dtype and a shape.
      keys: whether typed PRNG keys may be among them.
      copied: whether memory of the host is left to its owner, who may use it again; JAX may else
        take it as it is.

    Raises:
      TypeError: if a leaf is no array, or one that holds no numbers, is masked or sparse.
      ValueError: if a number does not fit JAX's type, as beyond 32 bits without 64-bit mode.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _array(name + jax.tree_util.keystr(path), leaf, keys, copied),
        tree,
        is_leaf=recognition.is_jax_sparse,
    )


def check_real(name: str, tree: ArrayTree) -> None:
    """Raises TypeError if a leaf holds anything but real numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            at = jax.tree_util.keystr(path)
            raise TypeError(f"{name}{at} must hold real numbers, got {leaf.dtype}")


def _array(where: str, leaf: Any, keys: bool, copied: bool) -> jax.Array:
    if isinstance(leaf, jax.Array):
        if recognition.is_prng_key(leaf) and not keys:
            raise TypeError(f"{where} must hold numbers, got a PRNG key")
        return leaf
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(
            f"{where} must not be a masked array, whose mask would be lost: drop the masked "
            "examples, or fill them with x.filled(...)"
        )
    scalar = isinstance(leaf, bool | int | float | complex)
    if not scalar and not recognition.is_array_like(leaf):
        raise TypeError(
            f"{where} must be an array of numbers, got {kind(leaf)}: make it one, all of it in "
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
    return jnp.asarray(np.array(host) if copied else host, target)


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


def stop_after(value: int | None, steps: int) -> int:
    """After how many of `steps` noisy steps to stop: all if it is None."""
    stop = steps if value is None else checks.positive_int("stop_after", value)
    if stop > steps:
        raise ValueError(f"stop_after must be at most steps={steps}, got {stop}")
    return stop


def kind(value: object) -> str:
    """What a value is, without its content, which may be long or private."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:60]
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"the class {name}" if isinstance(value, type) else f"an object of type {name}"
