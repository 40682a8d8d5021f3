"""Sentences that certificates rest on, where several mechanisms share them."""

UNSEEN = (
    "The steps of the run use retain data only, in batches drawn by a rule that does not see the "
    "forget set."
)
LAST_ONLY = (
    "Only the parameters after the last noisy step leave: no intermediate parameters, losses, "
    "gradient norms, counters, running statistics or optimizer state."
)
POST = "What follows the last noisy step uses the released parameters and retain data only."
REQUESTS = (
    "Which examples are forgotten was decided without looking at earlier releases of models "
    "trained on them."
)
FIXED = (
    "The step count and every hyperparameter were fixed without looking at the trained model or at "
    "the run."
)
SECRET = (
    "The noise key is secret and is never used again, and all other randomness of the run is "
    "independent of it."
)
REAL = (
    "The noise is exactly Gaussian, and the rounding of gradients and of noisy steps moves no two "
    "runs farther apart."
)
ON_THE_WAY = (
    "On the way to the noise no parameter, and no change of one in a step, reached the next power "
    "of two above the largest parameter that was checked for rounding."
)
# What every run on retain data rests on.
RUN = (UNSEEN, LAST_ONLY, POST, FIXED, REQUESTS, SECRET, REAL)
CENTER = (
    "The centre of the ball, the frozen parameters, the architecture and the input preprocessing "
    "do not depend on the forget set."
)
PUBLIC = (
    "The frozen parameters, the architecture and the input preprocessing do not depend on the "
    "forget set."
)
NO_MEMORY = (
    "Each update depends on the past only through the current parameters: no momentum or other "
    "optimizer state, no running averages, no teacher, mask or penalty computed from the trained "
    "model."
)
FRESH_STATE = (
    "State that updates carry from step to step starts fresh, not from the original training, and "
    "is discarded after the last noisy step."
)
ANY_START = (
    "Each request is served from the current model, whatever it is, with the same certificate for "
    "the union of all deletions so far: the start is any point of the ball. What earlier releases "
    "say of examples that are deleted later no certificate covers. If a request depends on earlier "
    "releases, what remains true is conditional: given all that was released and requested before, "
    "the release is as close as certified to the same procedure on the same remaining data; which "
    "examples were deleted may itself tell of them."
)
UNION = (
    "What earlier releases say of examples that are deleted later no certificate covers, and which "
    "examples were deleted may itself tell of them."
)
PUBLIC_MAP = (
    "Features come from a public map that looks at one row alone: neither it nor any constant that "
    "rows are centred, scaled, clipped or weighted by depends on the forget set."
)
DOWNSTREAM = (
    "After a deletion everything that was computed from an earlier release, such as fine-tuned "
    "models, shards and checkpoints, is redone from this one: nothing of it is kept."
)
# Of data that comes in batches of somebody else's making.
STREAMED = (
    "Batches came from a stream of the issuer's: which example was in which batch was decided by "
    "keys and sizes alone, not by looking at the data, the forget set or the model; no batch held "
    "a forgotten example, and those of an epoch hold each retained example at most once."
)
# Of methods of the user's own.
STATED_SEPARATIONS = (
    "Every update, before its noise, brings points that are r apart to points at most "
    "contraction * r + shift apart, with the contraction and shift recorded for its step (L2 norm, "
    "parameter units), whatever its batch and the data that is retained."
)
STATED_ROUNDING = "The rounding of steps without noise moves no two runs farther apart either."
OWN_REQUEST = "A certificate is for one request; what several say together it does not cover."


def compared(reference: str) -> str:
    """The sentence that names the reference process of a method."""
    start = {
        "retrained": "the same procedure started from a model trained without the forget set",
        "center": "the same procedure started from the centre itself",
        "minimizer": (
            "the exact minimiser of the objective on the retain data, with Gaussian noise of the "
            "same standard deviation"
        ),
    }[reference]
    return f"The guarantee compares the released parameters with {start}."


def stated_diameter(diameter: float) -> str:
    """What a claim rests on that counts a projection."""
    return (
        "No step, its noise included, ends at points farther apart than "
        f"{diameter!r} (L2 norm, parameter units)."
    )


def stated_start_noise(noise_scale: float) -> str:
    """What a claim rests on that counts noise on the starts."""
    return (
        f"The start has Gaussian noise of standard deviation {noise_scale!r} in every coordinate "
        "(parameter units), independent of all later noise."
    )


def trusted_separations(name: str) -> str:
    """What a certificate takes on trust of a mechanism that certunlearn does not have."""
    return (
        f"That {name} has the recorded separations is the issuer's word: it is not one of "
        "certunlearn's mechanisms, and verification derives the claim from these numbers."
    )
