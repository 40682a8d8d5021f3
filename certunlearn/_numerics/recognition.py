"""Whether an object of another library is what it looks like: arrays, optimizers, models, keys.

The rest of the package asks the functions here and never guesses by attributes itself. Where a
class is at hand it is asked for. Else a protocol names what the object must have: any library may
bring its own arrays and optimizers, and Flax is optional.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Protocol, SupportsFloat, SupportsIndex, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree


@runtime_checkable
class _Typed(Protocol):
    """Something with a dtype: arrays and array scalars of NumPy, JAX and others."""

    dtype: Any


@runtime_checkable
class _ArrayLike(Protocol):
    """What NumPy takes for an array without a guess: a pandas series, a PyTorch tensor."""

    dtype: Any
    shape: Any

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray: ...


@runtime_checkable
class _Shaped(Protocol):
    """Something with a dtype and a shape."""

    dtype: Any
    shape: Any


@runtime_checkable
class _Convertible(Protocol):
    """Something with a dtype that NumPy can take for an array."""

    dtype: Any

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray: ...


@runtime_checkable
class _HasKind(Protocol):
    """NumPy's dtypes and those made after them, not those of JAX's keys."""

    kind: str


@runtime_checkable
class _OptaxTransform(Protocol):
    """A pair of functions, as Optax and its users write them: named tuples or classes."""

    init: Any
    update: Any


@runtime_checkable
class _TrainState(Protocol):
    """What Flax's `TrainState` and others written after it have."""

    params: Any
    opt_state: Any
    tx: Any


@runtime_checkable
class _ManualAxes(Protocol):
    """An abstract value of JAX after 0.8."""

    manual_axis_type: Any


@runtime_checkable
class _Unreduced(Protocol):
    """What such a value says of sums that were not carried out yet."""

    unreduced: Any


@runtime_checkable
class _Varying(Protocol):
    """An abstract value of JAX 0.8."""

    vma: Any


@runtime_checkable
class RandomAccess(Protocol):
    """Examples with a length and an index: `source[i]` is a pytree of numbers or arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@runtime_checkable
class BatchedAccess(Protocol):
    """Examples of which several can be had at once, as PyTorch and Hugging Face name it."""

    def __getitems__(self, keys: list[int], /) -> Any: ...


@runtime_checkable
class NumpyDataset(Protocol):
    """What `tf.data.Dataset` has."""

    def as_numpy_iterator(self) -> Any: ...


@runtime_checkable
class _MadeArray(Protocol):
    """What turns itself into an array: a data frame, say, whose index names columns."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray: ...


@runtime_checkable
class _FindsDuplicates(Protocol):
    """What `flax.nnx` has from some version on."""

    def find_duplicates(self, node: Any, /) -> list[list[tuple[Any, ...]]]: ...


# The fields of Flax's `TrainState` that hold no model state, or whose content is left behind.
_TRAIN_STATE_FIELDS = ("step", "apply_fn", "params", "tx", "opt_state")


def is_shaped(value: object) -> TypeGuard[_Shaped]:
    """Whether it has a dtype and a shape, as arrays have, abstract ones too."""
    return isinstance(value, jax.Array | _Shaped)  # a traced array may pass its attributes on


def is_convertible(value: object) -> TypeGuard[_Convertible]:
    """Whether it has a dtype and can be made a NumPy array."""
    return isinstance(value, jax.Array | _Convertible)


def dtype_of(value: object) -> Any:
    """An array's or array scalar's dtype; None for what has none."""
    return value.dtype if isinstance(value, jax.Array | _Typed) else None


def kind_of(dtype: object) -> str:
    """A dtype's kind: "f" for floats, "i" and "u" for integers, "b" for bools, "V" for others.

    Empty for what has no kind, such as the dtype of a random key.
    """
    return dtype.kind if isinstance(dtype, _HasKind) else ""


def is_real_scalar(value: object) -> bool:
    """Whether it converts itself to a float or an index, as numbers do."""
    return isinstance(value, SupportsFloat | SupportsIndex)


def varying_axes(value: ArrayTree) -> frozenset[str]:
    """The mesh axes over which a value inside `shard_map` differs from device to device.

    Raises:
      ValueError: if the value is a sum over the mesh that was not carried out yet.
    """
    aval = jax.typeof(value)
    if isinstance(aval, _ManualAxes):
        if isinstance(aval.manual_axis_type, _Unreduced) and aval.manual_axis_type.unreduced:
            raise ValueError("values must be summed over the mesh before they come here, got a sum")
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(aval.vma) if isinstance(aval, _Varying) else frozenset()


def is_array_like(value: object) -> TypeGuard[_ArrayLike]:
    """Whether NumPy can take it for an array that knows its own dtype and shape."""
    return isinstance(value, jax.Array | _ArrayLike)


def is_leaf(value: object) -> bool:
    """Whether JAX takes it for one leaf, and not for a container of others."""
    leaves = jax.tree.leaves([value])
    return len(leaves) == 1 and leaves[0] is value


def is_random_access(value: object) -> TypeGuard[RandomAccess]:
    """Whether it is a source of examples by index, and neither an array nor a container."""
    if not is_leaf(value) or is_array_or_text(value) or isinstance(value, type | Mapping):
        return False
    return isinstance(value, RandomAccess)


def is_array_or_text(value: object) -> bool:
    """Whether its items are no examples: those of arrays, data frames, sparse matrices, texts."""
    return isinstance(value, jax.Array | _Shaped | _MadeArray | str | bytes | bytearray)


def is_batched_access(value: object) -> TypeGuard[BatchedAccess]:
    """Whether several examples can be had at once."""
    return isinstance(value, BatchedAccess)


def is_numpy_dataset(value: object) -> TypeGuard[NumpyDataset]:
    """Whether it is a `tf.data.Dataset`, or iterates over NumPy's arrays by the same name."""
    return isinstance(value, NumpyDataset)


def is_jax_sparse(value: object) -> bool:
    """Whether it is one of JAX's sparse arrays: pytrees, the parts of which are no examples."""
    # Whoever has one has imported their module, which takes half a second.
    module = sys.modules.get("jax.experimental.sparse")
    return module is not None and isinstance(value, module.JAXSparse)


def has_numpy_dtype(value: object) -> bool:
    """Whether it is an array or a scalar of numbers; JAX's typed keys have a dtype of their own."""
    return isinstance(dtype_of(value), np.dtype)


def is_prng_key(leaf: object) -> bool:
    """Whether it is a typed random key or an array of some."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_any_prng_key(leaf: object) -> bool:
    """Whether it is a random key or an array of some, typed, or raw as `jax.random.PRNGKey`'s."""
    if is_prng_key(leaf):
        return True
    words = jax.random.key_data(jax.random.key(0)).shape
    return is_array_like(leaf) and leaf.dtype == np.uint32 and leaf.shape[-1:] == words


def is_optax_transform(value: object) -> TypeGuard[optax.GradientTransformation]:
    """Whether it has `init` and `update`, two functions."""
    return isinstance(value, _OptaxTransform) and callable(value.init) and callable(value.update)


def is_variable_dict(model: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether it is a Flax Linen variable dict with collections besides its parameters."""
    return isinstance(model, Mapping) and "params" in model and len(model) > 1


def train_state_extras(model: object) -> dict[str, Any] | None:
    """The fields that a Flax `TrainState` has besides the usual; None if it is no such state."""
    if isinstance(model, type) or not dataclasses.is_dataclass(model):
        return None
    if not isinstance(model, _TrainState):
        return None
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return {name: value for name, value in values.items() if name not in _TRAIN_STATE_FIELDS}


def train_state_settings(state: Any) -> dict[str, Any]:
    """Those of a `TrainState`'s fields that are no parts of the pytree: functions and settings."""
    return {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if not field.metadata.get("pytree_node", True)
    }


def is_loss_scale(value: object) -> bool:
    """Whether it is Flax's `DynamicScale`."""
    module = sys.modules.get("flax.training.dynamic_scale")
    return module is not None and isinstance(value, module.DynamicScale)


def nnx_of(model: object) -> Any:
    """The module `flax.nnx`, if `model` is one of its modules; else None."""
    # Whoever has a module has imported Flax; nobody else must have it installed.
    nnx = sys.modules.get("flax.nnx")
    return nnx if nnx is not None and isinstance(model, nnx.Module) else None


def holds_arrays(value: object) -> bool:
    """Whether there is an array in a pytree."""
    return any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))


def nnx_shared_paths(model: Any) -> list[list[tuple[Any, ...]]]:
    """Groups of paths at which an NNX module holds one thing; none if this Flax cannot say."""
    nnx = nnx_of(model)
    return nnx.find_duplicates(model) if isinstance(nnx, _FindsDuplicates) else []


def is_filter(value: object, nnx_model: bool = False) -> bool:
    """Whether it is what picks parameters in NNX: a type, a function, a tag, or `...`.

    Of an NNX model it may also be a list of these, which for others is a pytree.
    """
    if nnx_model and isinstance(value, list | tuple):
        return True
    return is_leaf(value) and (value is ... or isinstance(value, str) or callable(value))


def holds_equinox_module(tree: object) -> bool:
    """Whether it is an Equinox module, or dicts, lists and tuples with one in them."""
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return False
    # Not by `jax.tree`: with `is_leaf` it breaks the interpreter on a tree that holds itself.
    todo, seen = [tree], set()
    while todo:
        node = todo.pop()
        if isinstance(node, equinox.Module):
            return True
        if isinstance(node, dict | list | tuple) and id(node) not in seen:
            seen.add(id(node))
            todo.extend(node.values() if isinstance(node, dict) else node)
    return False


def is_inexact_array(leaf: object) -> bool:
    """Whether it is an array of floats or complex numbers, of JAX or NumPy, as Equinox has it."""
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.inexact)
