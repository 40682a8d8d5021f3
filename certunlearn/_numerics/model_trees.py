"""The parameters of a model of another library, as a pytree of arrays.

The names of leaves in certificates, files and digests are the paths in this pytree.
"""

from typing import Any

import jax
from chex import ArrayTree

from certunlearn._numerics import recognition


def parameters(model: Any) -> ArrayTree:
    """The pytree of a model's parameters; what is no model comes back as it is.

    Args:
      model: a Flax NNX module, whose `nnx.state(model, nnx.Param)` is taken, subclasses of
        `nnx.Param` such as `nnx.LoRAParam` among them; a Flax `TrainState`, whose `params` are; an
        Equinox module or a pytree of some, of which the arrays of floats remain and None where the
        others were, as of `eqx.filter(model, eqx.is_inexact_array)`; or any other pytree.
    """
    if recognition.train_state_extras(model) is not None:
        inner = model.params
        return parameters(inner["params"] if recognition.is_variable_dict(inner) else inner)
    nnx = recognition.nnx_of(model)
    if nnx is not None:
        return nnx.state(model, nnx.Param)
    if recognition.holds_equinox_module(model):
        return jax.tree.map(
            lambda leaf: leaf if recognition.is_inexact_array(leaf) else None, model
        )
    return model
