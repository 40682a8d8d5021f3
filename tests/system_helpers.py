"""What the tests of the systems' accounting share."""

import mpmath

import certunlearn as cu

DESCENT = {"learning_rate": 0.1, "strong_convexity": 1.0, "smoothness": 5.0, "steps": 6}
FAR = {"initial_distance": 2.0}
SGD = cu.ProjectedNoisySGD(**FAR, **DESCENT)
DESCENT_TO_DELETE = cu.DescentToDelete(**FAR, **DESCENT)
REWIND = cu.RewindToDelete(
    learning_rate=[0.1, 0.2, 0.1],
    smoothness=1.5,
    gradient_bound=3.0,
    training_learning_rate=0.05,
    trained_steps=20,
    steps=3,
    size=500,
    deletions=7,
)
OUTPUT = cu.OutputPerturbation(init_radius=1.5)
CLIPPING = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=3)
PRIVATE = cu.DPSGD(
    clip_norm=2.0, learning_rate=0.5, steps=50, sampling_rate=0.1, batch_size=20, deletions=1
)


def clipped(model_radius=0.5, steps=3, init_radius=1.0, **rest):
    return cu.ModelClipping(
        init_radius=init_radius, model_radius=model_radius, learning_rate=0.1, steps=steps, **rest
    )


def exact(epsilon, mu):
    """The divergence at e^epsilon of two Gaussians mu standard deviations apart, in mpmath."""
    upper = lambda x: mpmath.erfc(x / mpmath.sqrt(2)) / 2  # noqa: E731
    return upper(epsilon / mu - mu / 2) - mpmath.exp(epsilon) * upper(epsilon / mu + mu / 2)
