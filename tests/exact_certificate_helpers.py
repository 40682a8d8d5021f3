"""Certificates of each kind that needs no noise, or none that grows with what is deleted."""

import numpy as np

import certunlearn as cu
from certunlearn import exact

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, 5)) / 3
LABELS = np.arange(40) % 3
SETTINGS = {"feature_norm": 1.0, "bits": 12}
KEPT = np.arange(40) >= 3
PARAMS = {"w": np.arange(3, dtype=np.float32)}

STATS = exact.remove(exact.collect(ROWS, LABELS, **SETTINGS), ROWS[~KEPT], LABELS[~KEPT])
HEADS = {"ridge": exact.ridge(STATS, 1e-2), "lda": exact.lda(STATS, 1e-2)}
NOISY = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=3)
MINIMIZER = cu.PerturbedMinimizer(gradient_norm=1e-3, strong_convexity=0.1)


def certificates():
    head = HEADS["ridge"]
    noise = cu.noise_scale(MINIMIZER, epsilon=1.0, delta=1e-5)
    return {
        "retraining": (cu.certify(cu.Retraining(), params=PARAMS, retain_size=9), PARAMS),
        "head": (exact.certify(STATS, head, forget_size=3), head),
        "minimizer": (
            cu.certify(MINIMIZER, noise_scale=noise, delta=1e-5, params=PARAMS, steps_run=1),
            PARAMS,
        ),
        "noisy": (
            cu.certify(
                NOISY,
                noise_scale=9.0,
                delta=1e-5,
                params=PARAMS,
                steps_run=3,
                accountant="interpolation",
            ),
            PARAMS,
        ),
    }


ISSUED = certificates()
