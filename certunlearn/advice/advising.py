"""`advise`: from what a user knows to options from best to worst, with reasons."""

from chex import ArrayTree

from certunlearn._numerics.safe_rounding import percent_up, rounded_up
from certunlearn.advice import candidates, for_heads, measurements, situation, wording
from certunlearn.advice.answers import Advice, Option
from certunlearn.advice.situation import Situation

# Where no event can be more likely than for the run from the centre by more than this, one run in
# ten at most, unlearning is said to save nothing.
NOTHING = 0.1
# The largest total noise, as a share of fresh weights, unless told otherwise: it adds 1% to their
# variance.
NOISE_SHARE = 0.1

_ASK_FEATURES = (
    "public_features: can you freeze the network at public weights and train its last layer only? "
    "Then the head can be deleted from exactly. Ask again with public_features=True."
)
_ASK_CONVEX = (
    "convex: is the loss convex in the parameters, as of a linear model? Then a certified "
    "minimiser is an option. Ask again with convex=True."
)
_ASK_CENTER = (
    "center: is there a public start, such as published pretrained weights? Restarting from it is "
    "most of what can be gained. Fresh random weights of a published seed are one, too."
)
_ASK_SCALE = (
    "params (or fresh_scale): without the shapes of the layers the size of the noise, and so the "
    "radius, cannot be set."
)
_ASK_DISTANCE = (
    "params and center (or distance): how far is the trained model from its public start? Then the "
    "share of it that survives is worked out."
)


def advise(
    *,
    params: ArrayTree | None = None,
    center: ArrayTree | None = None,
    parameters: int | None = None,
    distance: float | None = None,
    public_start: bool | None = None,
    fresh_scale: float | None = None,
    convex: bool | None = None,
    public_features: bool | None = None,
    public_rows: bool = True,
    rows: int | None = None,
    features: int | None = None,
    classes: int | None = None,
    deletions: int = 1,
    requests: int = 1,
    adaptive: bool = False,
    trained: bool = True,
    epsilon: float = 1.0,
    delta: float = 1e-5,
    noise_share: float = NOISE_SHARE,
    epochs: float | None = None,
    epoch_seconds: float | None = None,
    cost: str = "operations",
    search: bool = False,
    progress: bool = False,
) -> Advice:
    """What to do with your model and your request, and what you get: the true answer, ranked.

    Say what you know and leave out the rest: the answer names what would change it.

    Args:
      params: the trained parameters, in any form that `unlearn` takes. The distance to the centre
        is worked out from their values; all proposed hyperparameters from their shapes alone.
      center: the public start, of the same structure: published pretrained weights, or fresh random
        weights of a published seed.
      parameters: how many there are, if you do not give `params`.
      distance: L2 distance of the trained parameters from the public start, likewise.
      public_start: whether there is a public start, if you give neither `center` nor `distance`.
      fresh_scale: standard deviation of fresh weights, of the layer where it is smallest: 1 /
        sqrt(fan_in), typically 0.02 to 0.2. From `params` it is worked out.
      convex: whether the loss is convex in the parameters, as for a linear model.
      public_features: whether the model is a linear head on features of a public map, such as a
        frozen pretrained network.
      public_rows: whether you have unlabelled public rows like yours: their second moments make
        retraining a head much cheaper. False flatters the exact heads, if it is not true.
      rows: of the training data.
      features: of a head, the intercept included.
      classes: of a head.
      deletions: rows to forget in a request.
      requests: how many requests will come.
      adaptive: whether somebody may choose a request by looking at what was released before.
      trained: whether the model is trained already.
      epsilon: of the guarantee, typically 0.5 to 8; smaller is stronger.
      delta: of the guarantee, well below 1 over `rows`.
      noise_share: the most noise of methods that start from the old model, over fresh weights.
      epochs: of the first training.
      epoch_seconds: how long one takes.
      cost: what options are ordered by: `"operations"` or `"seconds"`, as measured.
      search: whether the hyperparameters of gradient clipping are searched with coupling, too,
        which takes half a minute.
      progress: whether that shows its progress (needs tqdm).

    Returns:
      the advice; print it. Numbers in it follow from theorems, from what you said, or from the
      committed benchmarks, whose file is named.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if one is out of range, or two contradict each other.

    Guarantee:
      None; nothing is run. Distances and shares of them are worked out from the trained model and
      are as private as it is: neither publish them, nor choose hyperparameters by them.

    Source:
      The law that no certified model beats the run from the centre by more than the total
      variation: docs/guarantee.md. Measured costs: benchmarks/deletion.

    >>> advice = advise(parameters=20_042, public_start=True, rows=50_000, deletions=500)
    >>> advice.verdict
    'Restart from your public centre: unlearning saves you nothing here.'
    >>> [option.method for option in advice.options]
    ['Retraining', 'OutputPerturbation', 'GradientClipping']
    """
    said = situation.checked(
        params=params,
        center=center,
        parameters=parameters,
        distance=distance,
        public_start=public_start,
        fresh_scale=fresh_scale,
        convex=convex,
        public_features=public_features,
        public_rows=public_rows,
        rows=rows,
        features=features,
        classes=classes,
        deletions=deletions,
        requests=requests,
        adaptive=adaptive,
        trained=trained,
        epsilon=epsilon,
        delta=delta,
        noise_share=noise_share,
        epochs=epochs,
        epoch_seconds=epoch_seconds,
        unit=cost,
        search=search,
        progress=progress,
    )
    if said.public_features and said.convex is not False:
        verdict, why, options, questions = for_heads.answer(said)
        return _advice(said, verdict, why, options, _contracting(said) + _other_balls(), questions)
    return _for_convex(said) if said.convex else _for_networks(said)


# Convex losses without public features.


def _for_convex(said: Situation) -> Advice:
    retraining = candidates.retraining(
        said, yardstick="It has the strongest guarantee, and was cheaper than the minimiser."
    )
    minimizer = candidates.perturbed_minimizer(said)
    options = [retraining, minimizer]
    if not said.trained:
        options.append(candidates.private_training(said))
    verdict = (
        f"{'Restart from your public centre' if said.has_center else 'Train again on what remains'}"
        ", tuned and stopped early; solve to a certified minimiser where full accuracy counts more "
        "than time."
    )
    questions = [] if said.public_features is not None else [_ASK_FEATURES]
    balls = (
        (
            "GradientClipping, OutputPerturbation",
            "they forget the old model as they do for networks; a minimiser that is solved again "
            "loses nothing.",
        ),
        *_other_balls(),
    )
    return _advice(
        said,
        verdict,
        [f"The minimiser: {minimizer.cost_words}"],
        options,
        _contracting(said) + balls,
        questions,
    )


# Networks: theory decides.


def _for_networks(said: Situation) -> Advice:
    perturbation = candidates.output_perturbation(said)
    clipping = candidates.gradient_clipping(said)
    limits = [
        option.survival.tv_limit_to_center
        for option in (perturbation, clipping)
        if option.survival is not None and option.survival.tv_limit_to_center is not None
    ]
    limit = max(limits)
    retraining = candidates.retraining(
        said,
        yardstick=(
            "What starts from the old model has to look as if it had started anywhere in the ball, "
            "at its centre, too. Here you do start at the centre, without any noise."
        ),
    )
    options = [retraining, perturbation, clipping]
    if not said.trained:
        options.insert(1, candidates.private_training(said))
    start = "public centre" if said.has_center else "public start"
    if said.has_center:
        lead = "Restart from your public centre"
    else:
        lead = "Train again on what remains, from fresh weights or any public start"
    if limit <= NOTHING:
        verdict = f"{lead}: unlearning saves you nothing here."
    else:
        verdict = (
            f"{lead}, and use nothing that is not better than that: at epsilon = "
            f"{said.epsilon:g} theory no longer rules out that unlearning saves something."
        )
    why = [
        f"At ({rounded_up(said.epsilon, 6)}, {rounded_up(said.delta, 6)}) nothing, such as "
        f"reaching your accuracy by a given step, is more likely after unlearning "
        f"than after the same run from the {start}, by more than "
        f"{percent_up(limit)}. That is a theorem, for both methods below that use the old "
        "model.",
        *_what_survives(perturbation, said.noise_share),
        _measured_network(),
    ]
    ruled_out = (
        ("cu.exact", "it is for linear heads on public features."),
        ("PerturbedMinimizer, DescentToDelete, ProjectedNoisySGD", "they need a convex loss."),
        *_other_balls(),
    )
    questions = []
    if said.public_features is None:
        questions.append(_ASK_FEATURES)
    if said.convex is None:
        questions.append(_ASK_CONVEX)
    if not said.has_center:
        questions.append(_ASK_CENTER)
    if said.fresh_scale is None:
        questions.append(_ASK_SCALE)
    elif said.distance is None:
        questions.append(_ASK_DISTANCE)
    return _advice(said, verdict, why, options, ruled_out, questions)


def _what_survives(option: Option, noise_share: float) -> list[str]:
    """What the method that keeps the most keeps, and how much noise drowns it."""
    assert option.survival is not None
    assert option.noise is not None
    found = []
    share, ratio = option.survival.share_of_distance, option.noise.norm_over_kept
    if share is not None:
        found.append(
            f"With noise of {noise_share:.0%} of fresh weights, one noise keeps "
            f"{share:.2%} of the trained model's distance from the centre; noisy steps keep no "
            "more."
        )
    if ratio is not None:
        found.append(
            f"Whatever the radius, the norm of the noise is {wording.times(ratio)} times the norm "
            "of what is kept of the old model, or more."
        )
    return found


def _measured_network() -> str:
    record = measurements.shipped()["network"]
    unlearned, center, retrained = (
        f"{record['test_accuracy'][name][0]:.1%} +- {record['test_accuracy'][name][1]:.1%}"
        for name in ("unlearned", "from the centre", "retrained")
    )
    return (
        f"Measured on MNIST at ({record['epsilon']:g}, {record['delta']:g}), after equal steps: "
        f"unlearned {unlearned}, the same run from the centre {center}, retrained {retrained} "
        f"({record['source']}, {record['seeds']} seeds)."
    )


# For all.


def _contracting(said: Situation) -> tuple[tuple[str, str], ...]:
    record = measurements.shipped()["contracting"]
    size = str(measurements.nearest_size(said.deletions))
    times = record["times"][size]["descent-to-delete"][0]
    return (
        (
            "DescentToDelete, ProjectedNoisySGD",
            f"bringing their noise down to a useful size takes {times:,.0f} times the operations "
            f"of the cheapest retraining, for {measurements.count_of_rows(int(size))} of a softmax "
            f"head ({record['source']}). They are for losses with a large strong convexity.",
        ),
    )


def _other_balls() -> tuple[tuple[str, str], ...]:
    return (
        ("ModelClipping", "the same law holds for it, and each step needs noise for a whole ball."),
        (
            "RewindToDelete",
            "it needs a checkpoint of full-batch training of a smooth loss, and its distance grows "
            "exponentially with the steps.",
        ),
    )


def _advice(
    said: Situation,
    verdict: str,
    why: list[str],
    options: list[Option],
    ruled_out: tuple[tuple[str, str], ...],
    questions: list[str],
) -> Advice:
    """The answer; options that promise nothing for such requests go last."""
    notes = [
        "Which rows were deleted may itself tell something of them. No method changes that.",
        "A certificate is of the model alone: logs, backups, caches and earlier releases keep what "
        "they hold.",
    ]
    if said.distance is not None:
        notes.append(
            "The distance, and every share of it, is worked out from the trained model: keep it "
            "private, and choose no hyperparameter by it. The proposals here do not depend on it."
        )
    if said.rows is not None and said.delta >= 1 / said.rows:
        notes.append(
            f"delta = {said.delta:g} is not below 1 over the number of rows, {said.rows:,}: choose "
            "a smaller one."
        )
    return Advice(
        verdict=verdict,
        why=tuple(why),
        options=tuple(sorted(options, key=lambda option: not candidates.covers(option, said))),
        ruled_out=ruled_out,
        questions=tuple(questions),
        notes=tuple(notes),
    )
