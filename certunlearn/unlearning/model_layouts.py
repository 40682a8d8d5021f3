"""How a model is put together from its parameters: what a loss gets, and what leaves.

Nothing of the trained model's other state goes into it. Random keys are drawn anew from a given
key, statistics are those of a new model (0, and 1 for variances), and counters are 0.
"""

import dataclasses
import sys
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from certunlearn._numerics import recognition

# Steps, epochs and places of examples are folded into the same keys, and never reach this number.
OTHER_USE = np.uint32(2**32 - 1)


class Layout(Protocol):
    """How a model is put together. Hashable, and equal if it does the same."""

    @property
    def blanks(self) -> dict[str, jax.Array]:
        """Arrays that stand for what the trained model has seen, under their names."""
        ...

    def build(
        self,
        params: Any,
        kept: tuple[jax.Array, ...],
        key: jax.Array,
        blanks: dict[str, jax.Array] | None = None,
    ) -> Any:
        """What `loss_fn` gets.

        Args:
          params: the pytree of parameters.
          kept: the model's other arrays that stay as they are.
          key: for random keys in the model.
          blanks: None for those of the layout.
        """
        ...


@dataclasses.dataclass(frozen=True)
class AsGiven:
    """The layout of models that are their own pytree of parameters."""

    @property
    def blanks(self) -> dict[str, jax.Array]:
        """None."""
        return {}

    def build(
        self,
        params: Any,
        kept: tuple[jax.Array, ...],
        key: jax.Array,
        blanks: dict[str, jax.Array] | None = None,
    ) -> Any:
        """The parameters."""
        return params


@dataclasses.dataclass(frozen=True)
class Renewed:
    """An array of a model's other state, without what it holds.

    Attributes:
      shape: of the array; of the words of random keys.
      dtype: of the array; None for random keys.
      keys: the kind of typed random keys; None for arrays of numbers.
      is_random: whether it is a random key, typed or raw.
      value: what numbers become.
    """

    shape: tuple[int, ...]
    dtype: Any
    keys: Any
    is_random: bool
    value: int

    @classmethod
    def like(cls, leaf: Any, value: int = 0) -> "Renewed":
        """What is left of an array."""
        if recognition.is_prng_key(leaf):
            words = jax.random.key_data(leaf)
            return cls(words.shape, None, jax.random.key_impl(leaf), True, 0)
        random = recognition.is_any_prng_key(leaf)
        return cls(tuple(np.shape(leaf)), jnp.result_type(leaf), None, random, value)

    def array(self, key: jax.Array) -> jax.Array:
        """Keys drawn from `key`, or the number."""
        if not self.is_random:
            return jnp.full(self.shape, self.value, self.dtype)
        words = jax.random.bits(key, self.shape, jnp.uint32)
        return words if self.keys is None else jax.random.wrap_key_data(words, impl=self.keys)


def renewed(value: Any, key: jax.Array) -> Any:
    """The same pytree with all its arrays without what they hold."""
    leaves, structure = jax.tree.flatten(value)
    fresh = [
        Renewed.like(leaf).array(jax.random.fold_in(key, number))
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, fresh)


@dataclasses.dataclass(frozen=True)
class NnxLayout:
    """The layout of Flax NNX modules.

    Attributes:
      graph: the module's graph, with all settings such as whether it trains.
      treedef: structure of the state that is no parameter.
      names: of its arrays.
      arrays: what is left of them.
      is_seen: for each of them, whether it could have seen data.
    """

    graph: Any
    treedef: Any
    names: tuple[str, ...]
    arrays: tuple[Renewed, ...]
    is_seen: tuple[bool, ...]

    @classmethod
    def of(cls, model: Any, nnx: Any) -> "NnxLayout":
        """The layout of a module."""
        graph, _, random, _ = nnx.split(model, nnx.Param, nnx.RngState, ...)
        _, _, rest = nnx.split(model, nnx.Param, ...)
        state, treedef = jax.tree_util.tree_flatten_with_path(rest)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in state]
        unseen = {path for path, _ in jax.tree_util.tree_leaves_with_path(random)}
        arrays = [
            Renewed.like(leaf, int("var" in name.split("/")[-2:]))
            for name, (_, leaf) in zip(names, state, strict=True)
        ]
        seen = [
            path not in unseen and not array.is_random
            for (path, _), array in zip(state, arrays, strict=True)
        ]
        return cls(graph, treedef, tuple(names), tuple(arrays), tuple(seen))

    @property
    def blanks(self) -> dict[str, jax.Array]:
        """Statistics of a new model."""
        found = zip(self.names, self.arrays, self.is_seen, strict=True)
        return {name: array.array(jax.random.key(0)) for name, array, seen in found if seen}

    def build(
        self,
        params: Any,
        kept: tuple[jax.Array, ...],
        key: jax.Array,
        blanks: dict[str, jax.Array] | None = None,
    ) -> Any:
        """A new module."""
        key = jax.random.fold_in(key, OTHER_USE)
        blanks = self.blanks if blanks is None else blanks
        state = [
            blanks[name] if name in blanks else array.array(jax.random.fold_in(key, number))
            for number, (name, array) in enumerate(zip(self.names, self.arrays, strict=True))
        ]
        nnx = sys.modules["flax.nnx"]
        # The module gets variables of its own: who changes them in place changes nothing else.
        params = jax.tree.map(lambda leaf: leaf, params)
        return nnx.merge(self.graph, params, jax.tree.unflatten(self.treedef, state))


@dataclasses.dataclass(frozen=True)
class _Same:
    """A leaf that is no array; 1, 1.0 and True are not equal here."""

    kind: type
    value: Any


@dataclasses.dataclass(frozen=True)
class EquinoxLayout:
    """The layout of pytrees with Equinox modules in them.

    Attributes:
      treedef: structure of the whole.
      leaves: for each leaf None if it is a parameter, 0 if it is another array, what is left of it
        if it is a random key, or else the leaf.
    """

    treedef: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, model: Any) -> tuple["EquinoxLayout", tuple[jax.Array, ...]]:
        """The layout of a model, and its arrays that are no parameters."""
        given, treedef = jax.tree.flatten(model)
        leaves: list[Any] = []
        kept: list[jax.Array] = []
        for leaf in given:
            if recognition.is_inexact_array(leaf):
                leaves.append(None)
            elif recognition.is_prng_key(leaf):
                leaves.append(Renewed.like(leaf))
            elif isinstance(leaf, jax.Array | np.ndarray):
                leaves.append(0)
                kept.append(jnp.asarray(leaf))
            else:
                leaves.append(_Same(type(leaf), leaf))
        return cls(treedef, tuple(leaves)), tuple(kept)

    @property
    def blanks(self) -> dict[str, jax.Array]:
        """None: Equinox keeps such state outside of modules."""
        return {}

    def build(
        self,
        params: Any,
        kept: tuple[jax.Array, ...],
        key: jax.Array,
        blanks: dict[str, jax.Array] | None = None,
    ) -> Any:
        """A new module."""
        key = jax.random.fold_in(key, OTHER_USE)
        trained, others = iter(jax.tree.leaves(params)), iter(kept)
        leaves = []
        for number, leaf in enumerate(self.leaves):
            if leaf is None:
                leaves.append(next(trained))
            elif isinstance(leaf, Renewed):
                leaves.append(leaf.array(jax.random.fold_in(key, number)))
            else:
                leaves.append(leaf.value if isinstance(leaf, _Same) else next(others))
        return jax.tree.unflatten(self.treedef, leaves)
