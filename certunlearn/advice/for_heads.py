"""The answer for a linear head on public features: what was measured decides."""

import dataclasses
import math

from certunlearn.advice import candidates, measurements
from certunlearn.advice.answers import Option
from certunlearn.advice.situation import Situation

_ASK_SIZE = (
    "rows, features, classes: costs depend on them; say yours, and the answer says whether they "
    "are those that were measured."
)


def answer(said: Situation) -> tuple[str, list[str], list[Option], list[str]]:
    """The verdict, the reasons for it, the options in order, and what to ask."""
    exact = candidates.exact_heads(said)
    retraining = candidates.retraining(
        said,
        yardstick="Every other method here is measured beside it, at the same accuracy.",
    )
    noisy = [candidates.perturbed_minimizer(said), candidates.gradient_clipping(said)]
    if not said.trained:
        noisy.append(candidates.private_training(said))
    # What starts from the old model is never put before training anew: it was never cheaper than
    # the same run from the centre, which is a retraining, too.
    options = sorted([*exact, retraining], key=lambda option: relative(option, said))
    options += sorted(noisy, key=lambda option: relative(option, said))
    best = options[0]
    if best is retraining:
        verdict, why = _against(said, min(exact, key=lambda option: relative(option, said)))
    else:
        verdict, why = _in_favour(said, best)
    why.append(
        "An exact head needs no tuning, no held-out rows and no rule for stopping, all of which "
        "the retraining that it is compared with has for nothing."
    )
    asked = None in (said.rows, said.features, said.classes)
    return verdict, why, options, [_ASK_SIZE] if asked else []


def relative(option: Option, said: Situation) -> float:
    """The cost beside the cheapest retraining, which is 1; infinite where none was measured.

    An exact route works on the square of the features, a gradient on the features. So with more
    features than were measured its cost is taken to grow in proportion; with fewer it is kept.
    """
    if option.cost is None:
        return 1.0 if option.epsilon == 0 else math.inf
    return option.cost.mean * (_growth(said) if option.method == "exact" else 1.0)


def _growth(said: Situation) -> float:
    measured = measurements.shipped()["deletion"]["features"]
    return 1.0 if said.features is None else max(1.0, said.features / measured)


def _in_favour(said: Situation, best: Option) -> tuple[str, list[str]]:
    """Of the exact route that takes the least."""
    assert best.cost is not None
    other = {"operations": "seconds", "seconds": "operations"}[said.unit]
    (beside,) = (
        option.cost
        for option in candidates.exact_heads(dataclasses.replace(said, unit=other))
        if option.title == best.title
    )
    assert beside is not None
    verdict = (
        f"Keep an exact head and subtract the rows: epsilon = 0, and {best.cost.mean:.0%} of the "
        f"{said.unit} of the cheapest retraining ({beside.mean:.0%} of its {other}) where "
        f"{_rows(best.cost.measured_deletions)} deleted."
    )
    why = [best.cost_words]
    if best.cost.mean + 2 * best.cost.standard_error > 1:
        why.append("Within two standard errors that is a draw with the cheapest retraining.")
    return verdict, why


def _against(said: Situation, rival: Option) -> tuple[str, list[str]]:
    """Of training again: where exact routes took more, or may do so in a case not measured."""
    assert rival.cost is not None
    size, share = rival.cost.measured_deletions, rival.cost.mean
    why = [f"The best exact route: {rival.cost_words}"]
    if share < 1:
        record = measurements.shipped()["deletion"]
        return (
            "Train again on what remains, or measure an exact head on your data: it took "
            f"{share:.0%} of the {said.unit} of the cheapest retraining with {record['features']} "
            f"features, and you have {said.features:,}.",
            [*why, "Its operations grow with the square of the features, a gradient's do not."],
        )
    fewer = measurements.size_below(said.deletions)
    if fewer is not None and size > said.deletions:
        less = dataclasses.replace(said, deletions=fewer)
        found = min(candidates.exact_heads(less), key=lambda option: relative(option, less))
        if relative(found, less) < 1:
            assert found.cost is not None
            return (
                "Train again on what remains, or measure an exact head on your data: it took "
                f"{found.cost.mean:.0%} of the {said.unit} of the cheapest retraining where "
                f"{_rows(fewer)} deleted, and {share:.0%} where {_rows(size)}.",
                why,
            )
    return (
        f"Train again on what remains: an exact head took {share:.0%} of the {said.unit} of the "
        f"cheapest retraining where {_rows(size)} deleted.",
        why,
    )


def _rows(count: int) -> str:
    return "one row was" if count == 1 else f"{count} rows were"
