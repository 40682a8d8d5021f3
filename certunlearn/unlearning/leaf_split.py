"""A pytree of parameters, of which some leaves are trained and others stay as they are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

from certunlearn._numerics import files, trees


@dataclasses.dataclass(frozen=True)
class Split:
    """A pytree of parameters, some of its leaves frozen.

    What is trained is the same tree with `optax.MaskedNode()`, a node without leaves, in the frozen
    places: optimizers find leaves by their names, labels and masks fit, and no frozen leaf is seen.

    Attributes:
      treedef: structure of the whole.
      leaves: all leaves, in tree order.
      is_frozen: for each leaf, whether it stays as it is.
    """

    treedef: jax.tree_util.PyTreeDef
    leaves: list[Any] = dataclasses.field(repr=False)
    is_frozen: list[bool]

    @classmethod
    def make(cls, params: ArrayTree, frozen: ArrayTree | None = None) -> "Split":
        """Splits `params` by a pytree of bools of the same structure, or freezes nothing.

        A bool may stand in the place of a whole subtree.

        Raises:
          TypeError: if `frozen` holds anything but bools.
          ValueError: if the structures differ, nothing is left to train, or there are no leaves.
        """
        leaves = jax.tree.leaves(params)
        treedef: Any = jax.tree.structure(params)
        if not leaves:
            raise ValueError("params must have at least one array, got none")
        if frozen is None:
            return cls(treedef, leaves, [False] * len(leaves))
        try:  # one bool may stand for all leaves below it
            flags = jax.tree.leaves(jax.tree.broadcast(frozen, params))
        except ValueError as error:
            raise ValueError(
                f"frozen must be structured like params, {treedef}; got "
                f"{jax.tree.structure(frozen)}"
            ) from error
        wrong = [flag for flag in flags if not isinstance(flag, bool | np.bool_)]
        if wrong:
            raise TypeError(f"frozen must hold True or False for each leaf, got {wrong[0]!r}")
        if all(flags):
            raise ValueError("frozen must leave at least one leaf to train, got True for all")
        if {id(leaf) for leaf, flag in zip(leaves, flags, strict=True) if flag} & {
            id(leaf) for leaf, flag in zip(leaves, flags, strict=True) if not flag
        }:
            raise ValueError(
                "frozen must say the same of one array in two places: frozen in one of them it "
                "would leave as it was trained. If it is tied, freeze all its places or none; if "
                "not, copy it"
            )
        return cls(treedef, leaves, [bool(flag) for flag in flags])

    @property
    def trainable(self) -> ArrayTree:
        """The tree of what is trained."""
        return self._masked(self.leaves)

    @property
    def frozen_names(self) -> list[str]:
        """Paths of the frozen leaves, as in certificates."""
        flags = jax.tree.unflatten(self.treedef, self.is_frozen)
        return [name for name, flag in files.named_leaves(flags).items() if flag]

    @property
    def by_name(self) -> dict[str, Any]:
        """The trained leaves under their paths, as in certificates."""
        named = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(self.treedef, self.leaves))
        return {
            files.leaf_name(path): leaf
            for (path, leaf), frozen in zip(named, self.is_frozen, strict=True)
            if not frozen
        }

    def like_params(self, name: str, tree: ArrayTree) -> ArrayTree:
        """What is trained, of another tree of the same structure and shapes.

        Raises:
          ValueError: naming the argument `name`, if structure or shapes differ.
        """
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.treedef:
            raise ValueError(
                f"{name} must be structured like params, {self.treedef}; got {structure}"
            )
        for mine, theirs in zip(self.leaves, leaves, strict=True):
            if np.shape(mine) != np.shape(theirs):
                raise ValueError(
                    f"{name} must have the shapes of params, got {np.shape(theirs)} "
                    f"where params have {np.shape(mine)}"
                )
        return self._masked(leaves)

    def replaced(self, name: str, tree: ArrayTree) -> "Split":
        """The same split of another tree of the same structure and shapes, in these dtypes.

        Raises:
          TypeError, ValueError: naming the argument `name`, if it does not fit, or holds anything
            but finite real numbers.
        """
        self.like_params(name, tree)
        leaves = [
            jnp.asarray(leaf, mine.dtype)
            for mine, leaf in zip(self.leaves, jax.tree.leaves(tree), strict=True)
        ]
        other = dataclasses.replace(self, leaves=leaves)
        trees.check_finite(name, other.by_name)
        return other

    def trained_of(self, tree: ArrayTree) -> list[Any]:
        """The leaves of another tree of the same structure that are trained."""
        leaves = zip(jax.tree.leaves(tree), self.is_frozen, strict=True)
        return [leaf for leaf, frozen in leaves if not frozen]

    def merge(self, trainable: ArrayTree) -> ArrayTree:
        """The whole tree with these trained leaves and the frozen ones."""
        frozen = [leaf for leaf, flag in zip(self.leaves, self.is_frozen, strict=True) if flag]
        return merge(self.treedef, self.is_frozen, frozen, trainable)

    def _masked(self, leaves: list[Any]) -> Any:
        nodes = [
            optax.MaskedNode() if frozen else leaf
            for leaf, frozen in zip(leaves, self.is_frozen, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, nodes)


def merge(
    treedef: jax.tree_util.PyTreeDef,
    is_frozen: Sequence[bool],
    frozen: Sequence[Any],
    trainable: ArrayTree,
) -> ArrayTree:
    """The tree with the frozen leaves in their places and the trained ones in the others."""
    kept, trained = iter(frozen), iter(jax.tree.leaves(trainable))
    leaves = [jnp.asarray(next(kept)) if flag else next(trained) for flag in is_frozen]
    return jax.tree.unflatten(treedef, leaves)
