"""The loss of a run: what it gets, and one form for all kinds of losses and models.

The key of a step's loss is `fold_in(loss_key(run's key), step)`; where gradients are per example,
that of an example is folded once more with its place in the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from certunlearn._numerics import loss_functions
from certunlearn.unlearning import leaf_split, model_layouts
from certunlearn.unlearning.model_forms import ModelForm
from certunlearn.unlearning.model_layouts import Layout


def loss_key(key: jax.Array) -> jax.Array:
    """The key of the losses of a phase, from that of the phase's batches.

    It is as private as the batches' key, and independent of that of the noise.
    """
    return jax.random.fold_in(key, model_layouts.OTHER_USE)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["frozen", "kept"],
    meta_fields=["function", "treedef", "is_frozen", "layout"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A loss in the one form of the steps: `loss(trainable, batch, key) -> scalar`.

    A pytree: its leaves are the arrays that the steps do not change. It is hashable, and equal to
    another with the same function, layout and arrays (the same objects, for their values may be
    large); so is its `jax.tree.structure` without the arrays.

    Attributes:
      function: the caller's, with two arguments or three; see `loss_functions`.
      treedef: structure of all parameters.
      is_frozen: for each of them, whether it is not trained.
      layout: what the function gets.
      frozen: the leaves that are not trained.
      kept: the model's other arrays; see `Layout`.
    """

    function: Callable[..., Any]
    treedef: Any
    is_frozen: tuple[bool, ...]
    layout: Layout
    frozen: tuple[jax.Array, ...] = ()
    kept: tuple[jax.Array, ...] = ()

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        split: leaf_split.Split,
        form: ModelForm | None = None,
    ) -> "Loss":
        """The loss of a split model; of one that is its own pytree if there is no form."""
        layout = model_layouts.AsGiven() if form is None else form.layout
        kept = () if form is None else form.kept
        frozen = tuple(
            leaf for leaf, flag in zip(split.leaves, split.is_frozen, strict=True) if flag
        )
        return cls(_hashable(function), split.treedef, tuple(split.is_frozen), layout, frozen, kept)

    def result(
        self, trainable: Any, batch: Any, key: Any, blanks: dict[str, jax.Array] | None = None
    ) -> Any:
        """What `function` returns; `blanks` are as for `Layout.build`."""
        params = leaf_split.merge(self.treedef, self.is_frozen, self.frozen, trainable)
        model = self.layout.build(params, self.kept, key, blanks)
        return loss_functions.call(self.function, model, batch, key)

    def __call__(self, trainable: Any, batch: Any, key: Any) -> jax.Array:
        """The mean loss of the batch, one number of at least float32."""
        return loss_functions.scalar(self.result(trainable, batch, key), batch)

    def __eq__(self, other: object) -> bool:
        """Whether both do the same, with the same arrays."""
        return isinstance(other, Loss) and self._identity() == other._identity()

    def __hash__(self) -> int:
        """Of what it does."""
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        arrays = tuple(map(id, self.frozen + self.kept))
        return self.function, self.treedef, self.is_frozen, self.layout, arrays


@dataclasses.dataclass(frozen=True, eq=False)
class _Called:
    """A function that has no hash, equal to itself only."""

    function: Callable[..., Any]

    def __call__(self, params: Any, batch: Any, key: Any) -> Any:
        return loss_functions.call(self.function, params, batch, key)


def _hashable(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        hash(function)
    except TypeError:
        return _Called(function)
    return function
