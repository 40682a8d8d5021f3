"""What runs of the mechanisms differ in besides their updates: start, data, what is allowed."""

from typing import Any

import jax
import jax.numpy as jnp

from certunlearn import transforms
from certunlearn.mechanisms import (
    DPSGD,
    GradientClipping,
    ModelClipping,
    OutputPerturbation,
    ProjectedNoisySGD,
    RewindToDelete,
    base,
)

# A step number that no run reaches: the noise on the start is not that of any step.
_BEFORE = 2**31 - 1


def start(mechanism: Any, params: Any, center: Any, key: jax.Array) -> Any:
    """The parameters before the first step: projected, and with noise, if the mechanism says so."""
    radius = ball_radius(mechanism)
    if radius is not None:
        params = transforms.clip_params(params, radius, center)
    if isinstance(mechanism, ModelClipping) and mechanism.init_noise_scale > 0:
        tx = transforms.add_gaussian_noise(
            mechanism.init_noise_scale, jax.random.fold_in(key, _BEFORE)
        )
        params, _ = tx.update(params, tx.init(params))
    return params


def before_noise(mechanism: Any, scale: Any, params: Any, opt_state: Any) -> Any:
    """The last parameters without the one noise, for the next request; None if there were more."""
    if not isinstance(mechanism, base.LastNoisy):
        return None
    is_noise = lambda state: isinstance(state, transforms.AddGaussianNoiseState)  # noqa: E731
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_noise) if is_noise(s)]
    last = states[-1]._replace(count=states[-1].count - 1)
    sigma = scale[-1] if isinstance(scale, tuple) else scale
    noise, _ = transforms.add_gaussian_noise(sigma, last.key_data).update(
        jax.tree.map(jnp.zeros_like, params), last
    )
    return jax.tree.map(jnp.subtract, params, noise)


def ball_radius(mechanism: Any) -> float | None:
    """Radius of the ball that the start is projected onto, or None."""
    if isinstance(mechanism, GradientClipping | ModelClipping | OutputPerturbation):
        return mechanism.init_radius
    return mechanism.radius if isinstance(mechanism, ProjectedNoisySGD) else None


def can_stop(mechanism: Any, step: int) -> bool:
    """Whether there is a guarantee after so many steps."""
    return isinstance(mechanism, DPSGD) or bool(mechanism.noisy[:step].any())


def samples(mechanism: Any) -> bool:
    """Whether steps draw Poisson samples instead of batches of an epoch."""
    return isinstance(mechanism, DPSGD)


def check_run(
    mechanism: Any,
    *,
    size: int,
    batch_size: int,
    per_example: bool,
    centered: bool,
    finetuned: bool,
) -> None:
    """Refuses what a mechanism does not allow.

    Raises:
      ValueError: saying what would be right.
    """
    name = type(mechanism).__name__
    if per_example and getattr(mechanism, "clip_norm", None) is None:
        raise ValueError(f"per_example=True needs a clip norm, which this {name} has not")
    if centered and ball_radius(mechanism) is None:
        raise ValueError(f"center must be None: this {name} projects onto no ball")
    if isinstance(mechanism, DPSGD):
        if batch_size != mechanism.batch_size:
            raise ValueError(
                f"batch_size must be the mechanism's, {mechanism.batch_size}, got {batch_size}"
            )
        if finetuned:
            raise ValueError(
                "finetune and recompute_state must be None with DPSGD: its data is all the data, "
                "of which they would keep a trace; fine-tune on retain data once it is known"
            )
    if isinstance(mechanism, RewindToDelete):
        least = mechanism.size - mechanism.deletions
        if not least <= size < mechanism.size or batch_size != size:
            raise ValueError(
                f"RewindToDelete takes full batches of the {least} or more examples that are left "
                f"of {mechanism.size}, got {size} examples and batch_size={batch_size}"
            )
