"""The tables and the answers, all from the record."""

from collections.abc import Sequence
from typing import Any

from benchmarks.paper_figure import numbers, scales
from benchmarks.paper_figure.experiment import CENTER, DEFAULT, METHODS, TUNED, chosen, curve
from certunlearn.demo.run import FORGET_FRACTION

TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


def rows_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers are to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def answer(record: dict[str, Any]) -> str:
    """The first question's, in a sentence."""
    center = numbers.comparisons(record, DEFAULT, CENTER)
    better, worse = numbers.better_and_worse(center)
    ahead, behind = numbers.better_and_worse(numbers.comparisons(record, DEFAULT, TUNED))
    return (
        f"Gradient clipping with the default accountant is better than the same run from the "
        f"public centre in {better} of {len(center)} comparisons at equal compute and worse in "
        f"{worse}; it is better than a tuned retraining in {ahead} and worse in {behind}."
    )


def sweep_answer(record: dict[str, Any]) -> str:
    """The second question's, in a sentence; differences are those after the noisy steps and
    after the last step."""
    places = list(numbers.swept(record))
    ends = [
        [numbers.difference(p.unlearned["accuracy"][at], p.center["accuracy"][at]) for p in places]
        for at in (0, -1)
    ]
    better, worse = numbers.better_and_worse(ends[1])
    early, late = numbers.better_and_worse(ends[0])
    gain, place = max(zip(ends[1], places, strict=True), key=lambda pair: pair[0].mean)
    return (
        f"After all steps the unlearned model is better than the run from the centre in {better} "
        f"of {len(places)} places and worse in {worse} (after the noisy steps alone: {early} and "
        f"{late}); the largest gain is {gain.mean:.1f} points, on {TITLES[place.problem]} at "
        f"radius {place.radius:g} and epsilon {place.epsilon:g}."
    )


def final_table(record: dict[str, Any], problem: str) -> str:
    """Accuracy after all steps, by method and epsilon."""
    epsilons = record["plan"]["epsilons"]
    rows = []
    for method in METHODS:
        cells = []
        for epsilon in epsilons:
            if numbers.refusal(record, method, epsilon):
                cells.append("no certificate")
            else:
                found = curve(record["cells"], problem, method, epsilon)
                cells.append(numbers.percent(found["accuracy"][-1]))
        rows.append([method, *cells])
    return rows_text(["method", *(f"epsilon = {each:g}" for each in epsilons)], rows)


def compute_table(record: dict[str, Any], problem: str, epsilon: float) -> str:
    """Accuracy at one epsilon, by method and number of example gradients."""
    rows, header = [], []
    for method in METHODS:
        if numbers.refusal(record, method, epsilon):
            continue
        found = curve(record["cells"], problem, method, epsilon)
        header = [f"{each:,} gradients" for each in found["gradients"]]
        rows.append([method, *(numbers.percent(each) for each in found["accuracy"])])
    return rows_text(["method", *header], rows)


def tuned_table(record: dict[str, Any], problem: str) -> str:
    """Radius and rate that the validation split chose."""
    epsilons, rows = record["plan"]["epsilons"], []
    for method in (*scales.CERTIFIED, TUNED):
        cells = []
        for epsilon in epsilons:
            if numbers.refusal(record, method, epsilon):
                cells.append("—")
                continue
            best = chosen(record["cells"], problem, method, epsilon)
            cells.append(
                f"{best['radius']:g}, {best['rate']:g}" if best["radius"] else f"{best['rate']:g}"
            )
        rows.append([method, *cells])
    return rows_text(["method", *(f"epsilon = {each:g}" for each in epsilons)], rows)


def sweep_table(record: dict[str, Any], problem: str) -> str:
    """Unlearned and from the centre, by radius and epsilon."""
    rows = []
    for place in numbers.swept(record):
        if place.problem != problem:
            continue
        scale = record["cells"][f"scale/{DEFAULT}/{place.epsilon:g}"]["scale"]
        mechanism = scales.mechanism(DEFAULT, place.radius, _steps(record, problem))
        noise = mechanism.total_noise_scale(place.radius * scale) or 0.0
        cells = [
            numbers.percent(run["accuracy"][at])
            for at in (0, -1)
            for run in (place.unlearned, place.center)
        ]
        rows.append([f"{place.radius:g}", f"{place.epsilon:g}", f"{noise:.3g}", *cells])
    header = ["radius", "epsilon", "noise in all"]
    for when in ("noisy steps", "all steps"):
        header += [f"unlearned, {when}", f"{CENTER}, {when}"]
    return rows_text(header, rows)


def refusals(record: dict[str, Any]) -> list[str]:
    """Why methods certify nothing somewhere."""
    found = {
        (method, epsilon): numbers.refusal(record, method, epsilon)
        for method in scales.CERTIFIED
        for epsilon in record["plan"]["epsilons"]
    }
    return [f"{m} at epsilon = {e:g}: {reason}" for (m, e), reason in found.items() if reason]


def _steps(record: dict[str, Any], problem: str) -> int:
    return int(record["plan"]["parts"][problem]["schedule"]["noisy_steps"])


def said(record: dict[str, Any]) -> str:
    """What was compared, and how."""
    plan = record["plan"]
    grid = next(iter(plan["parts"].values()))["grid"]
    held_out = next(iter(plan["parts"].values()))["validation"]
    sizes = " ".join(_size(record, name) for name in plan["parts"])
    tried = ", ".join(f"{radius:g}" for radius in grid["radii"])
    return f"""\
Test accuracy in per cent, mean +- standard error over {plan["seeds"]} seeds, which vary the
original model, the public centre, the forget set ({FORGET_FRACTION:.0%} of the training images, at
random), the batches and the noise. Epsilon is what each accountant certifies, at delta =
{scales.DELTA:g}.
{sizes} These are short runs, of an epoch or less. CIFAR-10 is shrunk to 16 x 16 pixels.

**Compute** is the number of example gradients. Noisy steps count as much as those of fine-tuning;
output perturbation has no noisy step on data, and fine-tunes for all steps. All methods take the
same batches. Training the original model is not counted.

**Tuning**: {len(grid["radii"]) * len(grid["rates"])} trials for every method at each epsilon, with
one seed of its own, on {held_out:,} training images that no model is trained on. A trial's score is
its mean accuracy over the computes. Certified methods try radii ({tried}) and rates of
fine-tuning by Adam; the tuned retraining tries as many rates. The run from the centre and the
retraining with the same schedule have no tuning of their own: they take what was best for
{DEFAULT}. The centre is fresh random weights, and retraining starts
there, too: else the luck of a start would differ. Steps of gradient clipping are as long
together as the radius; model clipping has one radius for starts and models. Where
tuning chose the edge of a grid, a wider one might do better.

**From the centre**: the same noisy run with the same noise scale and other noise, which never saw
the forget set. **Better** and **worse**: the {numbers.CONFIDENCE:.0%} interval of the difference of
paired seeds (Student's t) does not hold 0; by chance alone one comparison in 40 is better, and one
in 40 worse."""


def _size(record: dict[str, Any], name: str) -> str:
    cells, schedule = record["cells"], record["plan"]["parts"][name]["schedule"]
    if f"original/{name}" not in cells:
        return ""
    return (
        f"{TITLES[name]}: {cells[f'parameters/{name}']:,} parameters, batches of "
        f"{schedule['batch_size']}, {schedule['noisy_steps']} noisy steps, "
        f"{schedule['checkpoints'][-1]} steps in all; {schedule['train_epochs']} epochs for the "
        f"original models, test {numbers.percent(cells[f'original/{name}'])}."
    )


def to_text(record: dict[str, Any]) -> str:
    """The whole page."""
    parts = ["# The paper's figure, redone", f"**{answer(record)}**", said(record)]
    parts += ["![Accuracy against compute](picture.png)"]
    for problem in numbers.problems(record):
        last = record["plan"]["parts"][problem]["schedule"]
        gradients = last["checkpoints"][-1] * last["batch_size"]
        epsilon = 1.0
        parts += [
            f"## {TITLES[problem]}, after {gradients:,} example gradients",
            final_table(record, problem),
            f"### {TITLES[problem]}, by compute, at epsilon = {epsilon:g}",
            compute_table(record, problem, epsilon),
            f"### {TITLES[problem]}, what tuning chose: radius and rate",
            tuned_table(record, problem),
        ]
    parts += refusals(record)
    if list(numbers.swept(record)):
        parts += ["# Where it does not pay", f"**{sweep_answer(record)}**"]
        parts += ["![Accuracy against radius and epsilon](radii.png)"]
    for problem in record["plan"]["parts"]:
        if any(place.problem == problem for place in numbers.swept(record)):
            parts += [f"## {TITLES[problem]}, by radius and epsilon", sweep_table(record, problem)]
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts.append(f"On {record['device']}, {record['processor']}, with {packages}.")
    return "\n\n".join(parts) + "\n"
