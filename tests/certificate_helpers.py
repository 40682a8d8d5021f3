"""A certificate to test with."""

import jax.numpy as jnp

from certunlearn import accounting
from certunlearn.certificates.issuing import certify
from certunlearn.mechanisms import GradientClipping

MECHANISM = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=9)
PARAMS = {"w": jnp.arange(4.0), "b": jnp.ones(2)}
EXACT = {"accountant": "interpolation"}
SIGMA = accounting.noise_scale(MECHANISM, epsilon=1.0, delta=1e-5, **EXACT)


def issue(**changes):
    arguments = {
        "noise_scale": SIGMA,
        "delta": 1e-5,
        "epsilon": 1.0,
        "params": PARAMS,
        "retain_size": 90,
        "forget_size": 10,
        "finetune_steps": 3,
        **EXACT,
    }
    mechanism = changes.pop("mechanism", MECHANISM)
    arguments["steps_run"] = mechanism.steps
    return certify(mechanism, **(arguments | changes))
