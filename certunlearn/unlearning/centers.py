"""The public centre of a run, which must not be the trained model."""

import jax
from chex import ArrayTree

from certunlearn.unlearning import held_arrays, inputs, leaf_split, placement


def of(center: ArrayTree | None, split: leaf_split.Split, exact: bool) -> ArrayTree | None:
    """What is trained of the centre, where the trained parameters lie.

    Args:
      center: as it was given, structured like the parameters; or None.
      split: the parameters.
      exact: whether they are the centre's own, as no trained model is used.

    Raises:
      TypeError: if it does not hold real numbers.
      ValueError: if its structure is another, or it is the trained model: nothing would be clipped,
        and all of the model would be left.
    """
    if center is None:
        return None
    middle = split.like_params("center", center)
    inputs.check_real("center", middle)
    pairs = zip(jax.tree.leaves(middle), jax.tree.leaves(split.trainable), strict=True)
    if not exact and held_arrays.all_same(list(pairs)):
        raise ValueError(
            "center must be public: parameters that do not depend on what is to be forgotten, such "
            "as those that training started from; got the trained parameters"
        )
    return placement.like(middle, split.trainable)
