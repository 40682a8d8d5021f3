"""What the tests of accounting share."""

import functools
import types

import certunlearn as cu
from certunlearn import accounting


def make(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, weight_decay=0.0, steps=30, **rest):
    return cu.GradientClipping(
        init_radius=init_radius,
        clip_norm=clip_norm,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        steps=steps,
        **rest,
    )


# Most tests here are of interpolation's numbers; the default has tests of its own.
interpolated = types.SimpleNamespace(
    **{
        name: functools.partial(getattr(accounting, name), accountant="interpolation")
        for name in ("epsilon", "delta", "noise_scale", "epsilon_curve", "total_variation")
    }
)
