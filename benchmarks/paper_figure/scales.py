"""The mechanisms that are compared, and how much noise each accountant asks of them.

Radius, and the length of a clipped step, scale together. So noise is proportional to the radius,
and one number for the mechanism of radius 1 serves for all radii.
"""

from typing import Any

import certunlearn as cu
from certunlearn.mechanisms import Mechanism, ModelClipping, OutputPerturbation

DELTA = 1e-5
STEPS = 20  # noisy ones
CLIP_NORM = 0.1  # so small that nearly every gradient is clipped: each step has its full length
MODEL_RATE = 1.0  # times the radius, of model clipping's steps, whose gradients are not clipped
ACCOUNTANTS = ("closed-form", "interpolation", "coupling")
GRADIENT, MODEL, OUTPUT = "gradient clipping", "model clipping", "output perturbation"
CERTIFIED = (*(f"{GRADIENT}, {name}" for name in ACCOUNTANTS), MODEL, OUTPUT)


def kind(method: str) -> str:
    """The mechanism's name in that of a method."""
    return method.split(", ")[0]


def mechanism(method: str, radius: float, steps: int = STEPS) -> Mechanism:
    """The mechanism of a method, with this radius."""
    if kind(method) == OUTPUT:
        return OutputPerturbation(init_radius=radius)
    if kind(method) == MODEL:
        return ModelClipping(
            init_radius=radius,
            model_radius=radius,
            learning_rate=radius * MODEL_RATE,
            steps=steps,
        )
    return cu.GradientClipping(
        init_radius=radius,
        clip_norm=CLIP_NORM,
        # All steps together are as long as the radius: longer ones need more noise.
        learning_rate=radius / (CLIP_NORM * steps),
        steps=steps,
    )


def unit_scale(method: str, epsilon: float, steps: int = STEPS) -> dict[str, Any]:
    """The noise scale at radius 1, or why there is none."""
    accountant = {"accountant": method.split(", ")[1]} if ", " in method else {}
    unit = mechanism(method, 1.0, steps)
    try:
        scale = cu.noise_scale(unit, epsilon=epsilon, delta=DELTA, **accountant)
    except ValueError as error:
        return {"refused": str(error)}
    return {"scale": scale}


def takes_gradients(chosen: Mechanism) -> bool:
    """Whether its noisy steps look at data, and so count as compute."""
    return not isinstance(chosen, OutputPerturbation)
