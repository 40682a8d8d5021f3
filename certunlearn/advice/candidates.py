"""The options, one function each: what it promises, what it costs, what survives, and why."""

import dataclasses
import math

from certunlearn import accounting, mechanisms
from certunlearn._numerics.safe_rounding import percent_up
from certunlearn.advice import clipping_search, measurements
from certunlearn.advice.answers import LayerNoise, NoiseEffect, Option, Survival
from certunlearn.advice.measurements import RelativeCost
from certunlearn.advice.situation import Situation
from certunlearn.mechanisms import Mechanism, sentences

_NEVER_SAW = (
    "epsilon = delta = 0: what is released never saw the deleted rows. It holds for any number of "
    "requests, in any order, chosen by looking at earlier releases or not."
)
# Exact routes by their name in the measurements: the call, and when it is meant.
_EXACT_ROUTES = {
    "exact, fast": (
        "an exact head, an inverse kept",
        "kept = cu.exact.keep(stats, l2=1e-3)  # once\n"
        "kept = cu.exact.remove(kept, forget_features, forget_labels)\n"
        "head = cu.exact.ridge(kept)",
    ),
    "exact, fresh": (
        "an exact head, solved anew",
        "stats = cu.exact.remove(stats, forget_features, forget_labels)\n"
        "head = cu.exact.ridge(stats, l2=1e-3)",
    ),
}


def retraining(situation: Situation, *, yardstick: str) -> Option:
    """Training from a public start on what remains: exact, and what all else is compared with."""
    mechanism = mechanisms.Retraining()
    from_center = situation.has_center
    seconds = situation.retraining_seconds
    words = [
        "It is the yardstick: 100%. Tune it on rows that remain, and stop it early: the cheapest "
        "retraining to your accuracy is seldom the schedule of the first training."
    ]
    if seconds is not None:
        total = "" if situation.requests == 1 else f", {seconds * situation.requests:.6g} s in all"
        words.append(
            f"With the schedule of the first training: {situation.epochs:g} epochs of "
            f"{situation.epoch_seconds:g} s = {seconds:.6g} s a request{total}."
        )
    elif situation.epoch_seconds is not None:
        words.append(
            f"Each epoch takes {situation.epoch_seconds:g} s; how many you need, a run of the "
            "tuned schedule tells."
        )
    if situation.requests > 1:
        words.append("Requests that can wait share one retraining.")
    return Option(
        title="restart from your public centre" if from_center else "train again on what remains",
        method=type(mechanism).__name__,
        call=(
            "cu.unlearn(loss_fn, params, retain, cu.Retraining(), center="
            f"{'center' if from_center else 'fresh_params'},\n"
            "           finetune=(optimizer, steps), batch_size=batch_size)"
        ),
        guarantee=_NEVER_SAW,
        epsilon=0.0,
        delta=0.0,
        cost_words=" ".join(words),
        seconds=seconds,
        reasons=(yardstick,),
        assumes=mechanism.rests_on(),
        mechanism=mechanism,
    )


def exact_heads(situation: Situation) -> list[Option]:
    """A head of whole-number sums, by each of its routes."""
    return [_exact_head(situation, route) for route in _EXACT_ROUTES]


def _exact_head(situation: Situation, route: str) -> Option:
    cost = _measured(situation, route)
    assert cost is not None  # of these the benchmark has every number
    title, call = _EXACT_ROUTES[route]
    accuracy = measurements.shipped()["deletion"]["test_accuracy"]
    ridge, best = (accuracy[name] for name in ("exact ridge", "softmax minimiser"))
    other = {"operations": "seconds", "seconds": "operations"}[situation.unit]
    beside = _measured(dataclasses.replace(situation, unit=other), route)
    words = [measurements.in_words(cost)]
    if beside is not None:
        words.append(f"In {other} it was {measurements.percent(beside)}.")
    return Option(
        title=title,
        method="exact",
        call=call,
        guarantee=f"{_NEVER_SAW} Bit for bit: the head is the same array of numbers as without "
        "the rows.",
        epsilon=0.0,
        delta=0.0,
        cost=cost,
        cost_words=" ".join(words),
        reasons=(
            "A deletion is a subtraction of whole numbers; nothing accumulates, nothing is tuned, "
            "and no rule says when to stop.",
            "Its cost grows with the deleted rows and the square of the features, not with the "
            "rows that remain.",
            f"It is least squares: {ridge[0]:.1%} +- {ridge[1]:.1%} test accuracy where the best "
            f"head on the same features had {best[0]:.1%} +- {best[1]:.1%} ({cost.source}).",
        ),
        assumes=(
            sentences.PUBLIC_MAP,
            "l2, bits, bounds and the number of classes were chosen without looking at rows that "
            "may be deleted.",
            "The sums and their index are private, and hold a row's traces until it is removed.",
            sentences.DOWNSTREAM,
        ),
    )


def perturbed_minimizer(situation: Situation) -> Option:
    """A solution to a fixed tolerance, and one Gaussian."""
    unit = mechanisms.PerturbedMinimizer(gradient_norm=1.0, strong_convexity=1.0)
    noise = accounting.noise_scale(unit, epsilon=situation.epsilon, delta=situation.delta)
    cost = _measured(situation, "perturbed minimiser")
    size = measurements.nearest_size(situation.deletions)
    passes = measurements.shipped()["deletion"]["passes"][str(size)]
    words = [] if cost is None else [measurements.in_words(cost)]
    words.append(
        f"It took {passes[0]:.1f} passes over the data for {measurements.count_of_rows(size)} "
        f"({measurements.shipped()['deletion']['source']})."
    )
    return Option(
        title="a certified minimiser",
        method=type(unit).__name__,
        call=(
            "mechanism = cu.PerturbedMinimizer(gradient_norm=1e-4,\n"
            "                                  strong_convexity=loss.strong_convexity)\n"
            "cu.unlearn(loss, params, retain, mechanism, "
            f"epsilon={situation.epsilon:g}, delta={situation.delta:g}, batch_size=len(retain[1]))"
        ),
        guarantee=(
            f"({situation.epsilon:g}, {situation.delta:g})-indistinguishable from the exact "
            "minimiser on what remains with the same noise, for any requests, chosen by looking at "
            "earlier releases or not. Nothing accumulates."
        ),
        epsilon=situation.epsilon,
        delta=situation.delta,
        cost=cost,
        cost_words=" ".join(words),
        reasons=(
            "The old model is only where the solver starts, so how many rows left and which does "
            "not enter.",
            f"Noise per weight is {noise:.3g} * gradient_norm / strong_convexity: with a small "
            "gradient norm the release is as accurate as the minimiser.",
            "It costs more than a retraining that is stopped early: take it for the certificate.",
        ),
        assumes=unit.rests_on(),
    )


def output_perturbation(situation: Situation) -> Option:
    """The projected model and one Gaussian: what keeps the most for its noise."""
    noise_of_unit = accounting.noise_scale(
        mechanisms.OutputPerturbation(init_radius=1.0),
        epsilon=situation.epsilon,
        delta=situation.delta,
    )
    total = 1.0 if situation.total_noise is None else situation.total_noise
    radius = clipping_search.rounded_down(total / noise_of_unit)
    mechanism = mechanisms.OutputPerturbation(init_radius=radius)
    shown = "radius" if situation.total_noise is None else f"{radius:.6g}"
    return _from_ball(
        situation,
        mechanism,
        title="one noise on the old model",
        call=f"mechanism = cu.OutputPerturbation(init_radius={shown})\n{_run(situation)}",
        noise_scale=radius * noise_of_unit,
        kept=radius,
        cost_words="One noise, then fine-tuning as after a restart.",
        reasons=(
            "Gradient clipping keeps no more of the old model for the same noise, whatever its "
            "accountant: with zero gradients it is this method.",
        ),
    )


def gradient_clipping(situation: Situation) -> Option:
    """Noisy clipped steps from the projected model, with the hyperparameters of the search."""
    known = situation.total_noise is not None
    grid = {} if situation.search else {"steps": (1,), "decays": (0.0,)}
    found = clipping_search.suggest_clipping(
        total_noise=situation.total_noise if known else 1.0,  # type: ignore[arg-type]
        epsilon=situation.epsilon,
        delta=situation.delta,
        accountant=None if situation.search else "interpolation",
        progress=situation.progress,
        **grid,  # type: ignore[arg-type]
    )
    m, steps = found.mechanism, found.mechanism.steps
    reasons = [
        "Each noisy step follows a clipped gradient, which the noise has to hide, too: it keeps "
        f"{found.kept_radius / found.most_kept_radius:.0%} of what one noise alone keeps.",
    ]
    if not situation.search:
        reasons.append(
            "Proposed by interpolation, which charges every gradient in full. search=True (of the "
            "command --search) lets coupling search over steps and decay, for half a minute; it "
            "keeps at most as much as one noise alone."
        )
    if known:
        call = (
            f"mechanism = cu.GradientClipping(init_radius={m.init_radius:.6g}, "
            f"clip_norm={m.clip_norm:g},\n"
            f"                                learning_rate={m.learning_rate:.6g}, "
            f"weight_decay={m.weight_decay:.6g}, steps={steps})\n{_run(situation)}"
        )
    else:
        call = (
            "mechanism = cu.advice.suggest_clipping(total_noise=0.1 * scale_of_fresh_weights,\n"
            f"                                       epsilon={situation.epsilon:g}, "
            f"delta={situation.delta:g}).mechanism\n{_run(situation)}"
        )
    # Where there are no public rows, the benchmark's fine-tuning, which uses them, is not possible.
    measured_here = situation.public_features and situation.public_rows
    cost = _measured(situation, "gradient clipping") if measured_here else None
    cost_words = f"{steps} noisy step{'s' * (steps > 1)}, then fine-tuning as after a restart."
    if cost is not None:
        cost_words = f"{measurements.in_words(cost)} {cost_words}"
    if situation.epoch_seconds is not None:
        most = steps * situation.epoch_seconds
        cost_words += f" With batches of at most all rows the noisy steps take {most:g} s at most."
    return _from_ball(
        situation,
        m,
        title="noisy steps from the old model",
        call=call,
        noise_scale=found.noise_scale,
        kept=found.kept_radius,
        cost_words=cost_words,
        reasons=tuple(reasons),
        cost=cost,
    )


def private_training(situation: Situation) -> Option:
    """Noise in training, where that is still ahead."""
    group = situation.deletions * situation.requests
    return Option(
        title="train with noise from the start",
        method="DPSGD",
        call=(
            "mechanism = cu.DPSGD(clip_norm=1.0, sampling_rate=0.01, batch_size=batch_size,\n"
            f"                     learning_rate=0.1, steps=1000, deletions={group})"
        ),
        guarantee=(
            f"({situation.epsilon:g}, {situation.delta:g})-indistinguishable from training without "
            f"any {group} rows, if the noise of training is set for as many. The number must be "
            f"fixed before training.{_if_adaptive(situation)}"
        ),
        epsilon=situation.epsilon,
        delta=situation.delta,
        cost_words="A deletion costs nothing. The price is accuracy, in training; it is not "
        "measured here.",
        reasons=(
            "It is for trainings that are still ahead, and few deletions: the noise grows with "
            "their number.",
        ),
        assumes=(
            "Each step draws every row independently (Poisson sampling), and adds the noise.",
            sentences.REQUESTS,
        ),
    )


def covers(option: Option, situation: Situation) -> bool:
    """Whether its guarantee holds for requests such as these."""
    return not (situation.adaptive and sentences.REQUESTS in option.assumes)


def _from_ball(
    situation: Situation,
    mechanism: Mechanism,
    *,
    title: str,
    call: str,
    noise_scale: float,
    kept: float,
    cost_words: str,
    reasons: tuple[str, ...],
    cost: RelativeCost | None = None,
) -> Option:
    """What all methods that start from a ball around a public centre have in common."""
    known = situation.total_noise is not None
    total = mechanism.total_noise_scale(noise_scale)
    assert total is not None
    names = {"accountant": None if situation.search else "interpolation"}
    tv, to_center = (
        accounting.total_variation(
            dataclasses.replace(mechanism, reference=reference),  # type: ignore[type-var]
            noise_scale=noise_scale,
            delta=situation.delta,
            **names,
        )
        for reference in ("retrained", "center")
    )
    distance, size = situation.distance, situation.parameters
    share = None
    if known and distance is not None:
        share = min(1.0, kept / distance)
    layers = tuple(
        LayerNoise(
            name=layer.name,
            size=layer.size,
            fresh_scale=layer.fresh_scale,
            noise_over_fresh=None if layer.fresh_scale is None else total / layer.fresh_scale,
        )
        for layer in (situation.layers if known else ())
    )
    guarantee = (
        f"({situation.epsilon:g}, {situation.delta:g})-indistinguishable, both ways, from the same "
        "procedure on a model that was trained without the rows. Nothing is assumed of model, loss "
        "or data."
    )
    if situation.requests > 1:
        guarantee += " Each request is served from the current model, with the same certificate."
    guarantee += _if_adaptive(situation)
    return Option(
        title=title,
        method=type(mechanism).__name__,
        call=call,
        guarantee=guarantee,
        epsilon=situation.epsilon,
        delta=situation.delta,
        cost=cost,
        cost_words=f"{cost_words} {_bounded_saving(to_center)}",
        survival=Survival(
            tv_limit=tv,
            tv_limit_to_center=to_center,
            kept_radius=kept if known else None,
            share_of_distance=share,
        ),
        noise=NoiseEffect(
            total=total if known else None,
            norm=total * math.sqrt(size) if known and size is not None else None,
            norm_over_kept=None if size is None else total * math.sqrt(size) / kept,
            layers=layers,
        ),
        reasons=reasons,
        assumes=mechanism.rests_on(),
        mechanism=mechanism if known else None,
        noise_scale=noise_scale if known else None,
    )


def _if_adaptive(situation: Situation) -> str:
    """What to add to a guarantee that takes requests to be chosen without looking."""
    if not situation.adaptive:
        return ""
    return " It does not hold for requests that were chosen by looking at earlier releases."


def _bounded_saving(tv: float) -> str:
    """What the law leaves of a saving, for costs that a budget limits."""
    return (
        f"On average all of it costs at least as much as the same run from the centre, less "
        f"{percent_up(tv)} of the budget at which you would stop a run."
    )


def _run(situation: Situation) -> str:
    target = f"epsilon={situation.epsilon:g}, delta={situation.delta:g}"
    return (
        f"cu.unlearn(loss_fn, params, retain, mechanism, {target}, batch_size=batch_size,\n"
        "           center=center, finetune=(optimizer, steps))"
    )


def _measured(situation: Situation, method: str) -> RelativeCost | None:
    return measurements.cost_of(
        method,
        deletions=situation.deletions,
        rows=situation.rows,
        features=situation.features,
        classes=situation.classes,
        unit=situation.unit,
        public_rows=situation.public_rows,
    )
