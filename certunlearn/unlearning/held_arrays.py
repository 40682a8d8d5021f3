"""Whether a loss that must not depend on the trained model holds it, as far as can be seen.

Functions hold what they close over: a teacher, a penalty on the distance from the trained model.
Its very arrays are found here, and copies of them. What was computed from them is not.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import recognition


def check(name: str, held: Sequence[Any], trained: Sequence[Any]) -> None:
    """Refuses a loss that holds an array of the trained model.

    Args:
      name: of the loss.
      held: arrays that the loss depends on, besides its arguments.
      trained: those of the trained model.

    Raises:
      ValueError: if one of the first is one of the second.
    """
    for array in held:
        for leaf in trained:
            if _same(array, leaf):
                raise ValueError(
                    f"{name} must not hold the trained model, got an array {np.shape(leaf)} of it: "
                    "the certificate compares with a run that never had it. In noisy steps this "
                    "needs a mechanism of memoryless=False, in fine-tuning it is never allowed"
                )


def secret(trained: Sequence[Any], center: ArrayTree | None) -> list[Any]:
    """Arrays of the trained model that are not the public centre's, which a loss may hold.

    They are in runs that start from the centre, such as others are compared with.
    """
    if center is None:
        return list(trained)
    public = jax.tree.leaves(center)
    return [leaf for leaf, at in zip(trained, public, strict=True) if not _same(at, leaf)]


def _same(held: Any, leaf: Any) -> bool:
    """Whether they are one array, or equal ones that no two would be by chance."""
    if recognition.is_prng_key(held) or not np.size(held):
        return False
    if held is leaf:
        return True
    if np.shape(held) != np.shape(leaf) or not (_is_here(held) and _is_here(leaf)):
        return False
    mine, theirs = np.asarray(held), np.asarray(leaf).astype(held.dtype)
    return bool(np.any(mine != mine.flat[0])) if np.array_equal(mine, theirs) else False


def _is_here(array: Any) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable
