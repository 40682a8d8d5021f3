"""Models of other libraries: taken apart before a run, and put together after it.

What leaves is the released parameters in a model like the given one. Of its other state nothing
comes along that training has left in it: not the step, not the optimizer's state, not a statistic.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from chex import ArrayTree

from certunlearn._numerics import model_trees, recognition
from certunlearn.unlearning import model_filters, model_layouts
from certunlearn.unlearning.model_layouts import AsGiven, EquinoxLayout, Layout, NnxLayout


class ModelForm(abc.ABC):
    """A model, taken apart.

    Attributes:
      kind: what it is, for errors.
      params: the pytree of its parameters.
      seen: names of its other state that could remember data.
      layout: what a loss gets.
      kept: arrays that the layout keeps.
    """

    kind: str
    params: ArrayTree
    seen: tuple[str, ...] = ()
    layout: Layout = AsGiven()
    kept: tuple[jax.Array, ...] = ()

    def view(self, params: ArrayTree, key: jax.Array | None = None) -> Any:
        """What a loss gets; with random keys from `key`, or fixed ones for what needs none."""
        return self.layout.build(params, self.kept, jax.random.key(0) if key is None else key)

    def flags(self, frozen: Any) -> Any:
        """`Options.frozen`, structured like `params` if it is structured like the model.

        Raises:
          TypeError: if it is a filter, and this is no NNX model.
        """
        if recognition.is_filter(frozen):
            raise TypeError(
                f"frozen must be a pytree of bools structured like params, a {self.kind}; filters "
                f"are for NNX modules; got {frozen!r:.80}"
            )
        return frozen

    @abc.abstractmethod
    def rebuilt(self, params: ArrayTree, remade: Any, key: jax.Array) -> Any:
        """What leaves.

        Args:
          params: the released parameters.
          remade: the state that was recomputed from them, or None.
          key: where random keys come from.
        """

    def state_of(self, remade: Any, view: Any) -> Any:
        """What `recompute_state` has made, as `UnlearningResult.model_state`.

        Args:
          remade: what it returned.
          view: what it was given, which it may have changed.
        """
        return remade


@dataclasses.dataclass(frozen=True)
class Plain(ModelForm):
    """A pytree of parameters."""

    params: ArrayTree
    kind = "pytree"

    def rebuilt(self, params: ArrayTree, remade: Any, key: jax.Array) -> Any:
        """The parameters."""
        return params


class Variables(ModelForm):
    """A Flax Linen variable dict with more than parameters; the parameters leave alone."""

    kind = "variable dict"

    def __init__(self, model: Mapping[str, Any]) -> None:
        """Takes it apart."""
        self.params = model["params"]
        self._model = model
        self._others = {name: value for name, value in model.items() if name != "params"}
        self.seen = _remembering(self._others)

    def rebuilt(self, params: ArrayTree, remade: Any, key: jax.Array) -> Any:
        """The parameters."""
        return params

    def whole(self, params: ArrayTree, remade: Any, key: jax.Array) -> Any:
        """The dict, with its state made anew."""
        others = _renewed(self._others, self.seen, remade, key)
        made = {name: value for name, value in others.items() if value is not None}
        return type(self._model)({**made, "params": params})  # type: ignore[call-arg]


class TrainState(ModelForm):
    """A Flax `TrainState`, or what has its fields."""

    kind = "TrainState"

    def __init__(self, state: Any, extras: dict[str, Any]) -> None:
        """Takes it apart."""
        self._state, self._inner = state, form_of(state.params)
        settings = recognition.train_state_settings(state)
        self._extras = {
            name: value
            for name, value in extras.items()
            if name not in settings or recognition.holds_arrays(value)
        }
        self.params, self.layout, self.kept = (
            self._inner.params,
            self._inner.layout,
            self._inner.kept,
        )
        self._own = _remembering(self._extras)
        self.seen = self._own + self._inner.seen

    def flags(self, frozen: Any) -> Any:
        """Those of its parameters."""
        extras = recognition.train_state_extras(frozen)
        return self._inner.flags(frozen if extras is None else frozen.params)

    def state_of(self, remade: Any, view: Any) -> Any:
        """As of its parameters' model."""
        return self._inner.state_of(remade, view)

    def rebuilt(self, params: ArrayTree, remade: Any, key: jax.Array) -> Any:
        """The state with the new parameters, at step 0, with a fresh optimizer state."""
        state, inner = self._state, self._inner
        mine, others = jax.random.split(key)
        if isinstance(inner, Variables):
            model = inner.whole(params, remade, others)
        else:
            model = inner.rebuilt(params, remade, others)
        optimizer = None
        if recognition.is_optax_transform(state.tx):
            optimizer = state.tx.init(model)
        return dataclasses.replace(
            state,
            step=jnp.zeros_like(state.step) if isinstance(state.step, jax.Array) else 0,
            params=model,
            opt_state=optimizer,
            **_renewed(self._extras, self._own, remade, mine),
        )


class Nnx(ModelForm):
    """A Flax NNX module."""

    kind = "NNX model"

    def __init__(self, model: Any, nnx: Any) -> None:
        """Takes it apart."""
        self.params = model_trees.parameters(model)
        layout = NnxLayout.of(model, nnx)
        self.layout, self._nnx = layout, nnx
        self.seen = tuple(layout.blanks)
        self._shared = recognition.nnx_shared_paths(model)

    def flags(self, frozen: Any) -> Any:
        """What a filter says of each parameter; bools as they are."""
        nnx = self._nnx
        if isinstance(frozen, nnx.Module) or not recognition.is_filter(frozen, nnx_model=True):
            return frozen
        return model_filters.flags(nnx, frozen, self.params, self._shared)

    def state_of(self, remade: Any, view: Any) -> Any:
        """The state of a module that was returned, or changed in place; else what was returned."""
        model = view if remade is None else remade
        if recognition.nnx_of(model) is None:
            return remade
        _, _, _, state = self._nnx.split(model, self._nnx.Param, self._nnx.RngState, ...)
        return state

    def rebuilt(self, params: ArrayTree, remade: Any, key: jax.Array) -> Any:
        """A new module, which holds the recomputed state if it is that of such a module."""
        blanks = dict(self.layout.blanks)
        if remade is not None:
            for path, leaf in jax.tree_util.tree_leaves_with_path(remade):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                if name in blanks and jnp.shape(leaf) == blanks[name].shape:
                    blanks[name] = jnp.asarray(leaf, blanks[name].dtype)
        return self.layout.build(params, (), key, blanks)


class Equinox(ModelForm):
    """An Equinox module, or a pytree with some in it."""

    kind = "Equinox model"

    def __init__(self, model: Any) -> None:
        """Takes it apart."""
        self.params = model_trees.parameters(model)
        self._model = model
        self.layout, self.kept = EquinoxLayout.of(model)

    def flags(self, frozen: Any) -> Any:
        """Those of its parameters, of a pytree of bools like the model or a part of one."""
        frozen = super().flags(frozen)
        structure: Any = jax.tree.structure(self.params)
        if frozen is None or structure == jax.tree.structure(frozen):
            return frozen
        try:
            flags = jax.tree.leaves(jax.tree.broadcast(frozen, self._model))
        except ValueError:
            return frozen  # which is refused where structures are compared
        leaves = zip(flags, jax.tree.leaves(self._model), strict=True)
        return jax.tree.unflatten(
            structure, [flag for flag, leaf in leaves if recognition.is_inexact_array(leaf)]
        )

    def rebuilt(self, params: ArrayTree, remade: Any, key: jax.Array) -> Any:
        """The model with the new parameters."""
        return self.layout.build(params, self.kept, key)


def form_of(model: Any) -> ModelForm:
    """A model, taken apart.

    Args:
      model: a pytree of parameters; or a Flax Linen variable dict, a Flax `TrainState`, an NNX
        module, or a pytree with Equinox modules.
    """
    if recognition.is_variable_dict(model):
        return Variables(model)
    extras = recognition.train_state_extras(model)
    if extras is not None:
        return TrainState(model, extras)
    nnx = recognition.nnx_of(model)
    if nnx is not None:
        return Nnx(model, nnx)
    return Equinox(model) if recognition.holds_equinox_module(model) else Plain(model)


def _remembering(state: dict[str, Any]) -> tuple[str, ...]:
    """Names of what could remember data: not random keys or loss scales, which are made anew."""
    is_key = recognition.is_any_prng_key
    return tuple(
        name
        for name, value in state.items()
        if not recognition.is_loss_scale(value) and not all(map(is_key, jax.tree.leaves(value)))
    )


def _renewed(
    state: dict[str, Any], seen: tuple[str, ...], remade: Any, key: jax.Array
) -> dict[str, Any]:
    """Other state as it leaves: recomputed, or as of a new model, or None."""
    found: dict[str, Any] = dict.fromkeys(seen)
    if isinstance(remade, Mapping) and set(remade) == set(seen):
        found = dict(remade)
    elif len(seen) == 1:
        found = {seen[0]: remade}
    for number, (name, value) in enumerate(state.items()):
        if recognition.is_loss_scale(value):
            found[name] = _new_loss_scale(value)
        elif name not in seen:
            found[name] = model_layouts.renewed(value, jax.random.fold_in(key, number))
    return found


def _new_loss_scale(scale: Any) -> Any:
    """A loss scale with the same settings, as before its first step."""
    settings = recognition.train_state_settings(scale)
    return dataclasses.replace(
        scale,
        **{
            field.name: field.default
            for field in dataclasses.fields(scale)
            if field.name not in settings
        },
    )
