"""The demo's experiment: training, unlearning, and the models that they are compared with."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax
from chex import ArrayTree

from certunlearn import accounting, mechanisms
from certunlearn.certificates.record import Certificate
from certunlearn.demo import data as data_lib
from certunlearn.demo import linear_heads, membership, network
from certunlearn.unlearning import Finetune, Options, UnlearningResult, unlearn

# The centre of the ball: fresh random weights from a seed that is published here. It depends on no
# data, which is what the certificate assumes of it.
PUBLIC_SEED = 2025

FORGET_FRACTION = 0.1

# The rates that the cheapest retraining is tried with, in times `Settings.learning_rate`.
RETRAINING_RATES = (1, 3, 10)

# What is measured on the parameters after some steps: (step, {name: number}).
Curve = Sequence[tuple[int, dict[str, float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that is fixed before any data are seen.

    Attributes:
      hidden: hidden units.
      batch_size: of all phases.
      learning_rate: of Adam, in training and in fine-tuning.
      train_steps: of the original model, enough to memorise.
      noisy_steps: T.
      finetune_steps: without noise, after the noisy ones.
      total_noise: standard deviation, per parameter, of all noise in x_T, beside initial weights of
        1 / sqrt(pixels). Fine-tuning has to overcome it.
      clip_norm: C1.
      evaluate_every: steps between points of the curve.
    """

    hidden: int
    batch_size: int
    learning_rate: float
    train_steps: int
    noisy_steps: int
    finetune_steps: int
    total_noise: float
    clip_norm: float = 1.0
    evaluate_every: int = 20


SETTINGS = {
    "digits": Settings(
        hidden=64,
        batch_size=64,
        learning_rate=2e-3,
        train_steps=4000,
        noisy_steps=200,
        finetune_steps=1000,
        total_noise=0.05,
    ),
    "mnist": Settings(
        hidden=64,
        batch_size=128,
        learning_rate=1e-3,
        train_steps=14000,
        noisy_steps=400,
        finetune_steps=3200,
        total_noise=0.02,
        evaluate_every=100,
    ),
    "cifar10": Settings(
        hidden=64,
        batch_size=128,
        learning_rate=2e-3,
        train_steps=6000,
        noisy_steps=200,
        finetune_steps=1000,
        total_noise=0.05,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: a model, what is measured on it, and what it cost.

    `auc` is the calibrated attack's, `loss_auc` the plain one's (see `membership`). `certified` is
    its (epsilon, delta), (0, 0) if it never saw the forget set, None if nothing is certified.
    """

    name: str
    test: float
    retain: float
    forget: float
    auc: float
    loss_auc: float
    steps: int
    seconds: float
    certified: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What the report is made of. `curve` shows hidden iterates: for the operator only."""

    dataset: str
    origin: str
    seed: int
    settings: Settings
    rows: tuple[Row, ...]
    curve: tuple[tuple[int, dict[str, float]], ...]
    mechanism: mechanisms.GradientClipping
    certificate: Certificate
    params: ArrayTree
    sizes: dict[str, int]
    auc_error: float


def make_mechanism(
    settings: Settings, epsilon: float, delta: float, progress: bool = False
) -> tuple[mechanisms.GradientClipping, float]:
    """The noisy phase whose total noise in x_T is about `settings.total_noise`, and its noise.

    By interpolation and without weight decay, the noise per step is least where gamma C1 T = C0;
    so they are the same here. Noise is then proportional to the radius C0, which is chosen such
    that the least noise of all accountants is what the settings ask for.
    """
    steps = settings.noisy_steps
    unit = mechanisms.GradientClipping(
        init_radius=1.0, clip_norm=1.0, learning_rate=1 / steps, steps=steps
    )
    noise = accounting.noise_scale(unit, epsilon=epsilon, delta=delta, progress=progress)
    radius = _round(settings.total_noise / (noise * math.sqrt(steps)))
    mechanism = mechanisms.GradientClipping(
        init_radius=radius,
        clip_norm=settings.clip_norm,
        learning_rate=radius / (settings.clip_norm * steps),
        steps=steps,
    )
    return mechanism, radius * noise


def run(
    dataset: data_lib.Dataset,
    settings: Settings,
    *,
    epsilon: float,
    delta: float,
    seed: int,
    say: Callable[[str], object] = lambda text: None,
    progress: bool = False,
) -> Result:
    """Runs the whole experiment.

    Args:
      dataset: the images.
      settings: the network and its schedules.
      epsilon: target of the certificate.
      delta: target of the certificate.
      seed: of everything, the noise included: fit for an experiment, not for a deletion request.
      say: told what is being done.
      progress: whether to draw progress bars.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if epsilon or delta is out of range.
    """
    mechanism, noise_scale = make_mechanism(settings, epsilon, delta, progress)
    retain, forget = data_lib.split_forget(dataset.train, FORGET_FRACTION, seed)
    net = network.MLP(settings.hidden)
    pixels = dataset.train["x"].shape[1]
    center = network.init(net, PUBLIC_SEED, pixels)
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    finetune_steps = settings.finetune_steps

    def trained(data: data_lib.Examples, steps: int, title: str) -> ArrayTree:
        params = network.init(net, next(keys), pixels)
        with _bar(steps, title, progress) as advance:
            optimizer = optax.adam(settings.learning_rate)
            batch = settings.batch_size
            return network.train(net, params, data, optimizer, steps, batch, next(keys), advance)

    def unlearned(params: Any) -> tuple[UnlearningResult, list[tuple[int, Any]]]:
        result = unlearn(
            functools.partial(network.mean_loss, net),
            params,
            retain,
            mechanism,
            noise_scale=noise_scale,
            delta=delta,
            batch_size=settings.batch_size,
            # Each run has its own key: two runs with the same noise would differ by what the noise
            # is there to hide.
            key=next(keys),
            center=center,
            finetune=Finetune(optax.adam(settings.learning_rate), finetune_steps),
            options=Options(
                forget_size=len(forget["y"]),
                evaluate=_Watch(evaluate),
                evaluate_every=settings.evaluate_every,
            ),
            progress=progress,
        )
        curve = result.history.evaluations
        if curve[-1][0] != mechanism.steps + finetune_steps:
            raise KeyboardInterrupt  # the loop notes Ctrl-C and stops early; here that ends it all
        return result, curve

    say(f"{dataset.name}: training the attack's reference model, {settings.train_steps} steps")
    reference = trained(retain, settings.train_steps, "reference")
    evaluate = network.evaluator(net, dataset.test, retain, forget, reference)
    evaluate(center)  # compiles it, so that no row's seconds include that
    original, rows = _trained_rows(trained, evaluate, dataset.train, retain, settings, say)
    say(f"unlearning, {mechanism.steps} noisy steps, then {finetune_steps} without noise")
    result, curve = unlearned(original)
    say("the same from the centre, which never saw the forget set")
    _, center_curve = unlearned(center)
    rows += _unlearned_rows(result.certificate, curve, center_curve, mechanism.steps)
    spare = [jax.random.fold_in(jax.random.key(seed), each) for each in range(3)]
    rows.append(_cheapest_row(net, retain, evaluate, settings, rows[-1], spare[:2], say))
    sets = {"test": dataset.test, "retain": retain, "forget": forget}
    say("deleting from linear heads on public features")
    rows += _linear_rows(dataset, sets, epsilon, delta, spare[2])
    sizes = {name: len(part["y"]) for name, part in {"train": dataset.train, **sets}.items()}
    return Result(
        dataset=dataset.name,
        origin=dataset.origin,
        seed=seed,
        settings=settings,
        rows=tuple(rows),
        curve=tuple(curve),
        mechanism=mechanism,
        certificate=result.certificate,
        params=result.params,
        sizes=sizes,
        auc_error=membership.chance_error(sizes["forget"], sizes["test"]),
    )


def _trained_rows(
    trained: Callable[[data_lib.Examples, int, str], ArrayTree],
    evaluate: Callable[[ArrayTree], dict[str, float]],
    train: data_lib.Examples,
    retain: data_lib.Examples,
    settings: Settings,
    say: Callable[[str], object],
) -> tuple[ArrayTree, list[Row]]:
    """The original model, and the rows of the models that are trained without unlearning."""
    say(f"training the original model, {settings.train_steps} steps")
    watch = _Watch(evaluate)
    original = trained(train, settings.train_steps, "original")
    rows = [Row(name="original", steps=settings.train_steps, certified=None, **watch(original))]
    # As many steps as unlearning takes, so that the two can be compared.
    comparable = settings.noisy_steps + settings.finetune_steps
    say(f"retraining without the forget set, {comparable} steps")
    watch = _Watch(evaluate)
    retrained = trained(retain, comparable, "retrained")
    name = "retrained from scratch"
    rows.append(Row(name=name, steps=comparable, certified=(0, 0), **watch(retrained)))
    return original, rows


def _cheapest_row(
    net: network.MLP,
    retain: data_lib.Examples,
    evaluate: Callable[[ArrayTree], dict[str, float]],
    settings: Settings,
    goal: Row,
    keys: Sequence[jax.Array],
    say: Callable[[str], object],
) -> Row:
    """Retraining that stops once it fits the retain data as well as the unlearned model does.

    The fewest steps over `RETRAINING_RATES`; the other rates' steps are not counted.
    """
    say("retraining until it is as accurate on retain data")
    start = network.init(net, keys[0], retain["x"].shape[1])
    steps, kept = goal.steps, dict[str, float]()
    for times in RETRAINING_RATES:
        optimizer, watch = optax.adam(times * settings.learning_rate), _Watch(evaluate)
        models = network.training(
            net, start, retain, optimizer, steps, settings.batch_size, keys[1]
        )
        for step, params in enumerate(models, 1):
            if step % settings.evaluate_every == 0 or step == steps:
                measured = watch(params)
                if measured["retain"] >= goal.retain:
                    break
        if not kept or (measured["retain"] >= goal.retain and step < steps):
            kept, steps = measured, step
    return Row(name="retrained, stopped when as good", steps=steps, certified=(0, 0), **kept)


def _linear_rows(
    dataset: data_lib.Dataset,
    sets: dict[str, data_lib.Examples],
    epsilon: float,
    delta: float,
    key: jax.Array,
) -> list[Row]:
    """The rows of the linear heads, after the same deletion."""
    made = sets if dataset.is_features else linear_heads.random_features(PUBLIC_SEED, sets)
    return [Row(**each) for each in linear_heads.rows(made, epsilon, delta, key)]


def _unlearned_rows(
    certificate: Certificate, curve: Curve, center_curve: Curve, noisy_steps: int
) -> list[Row]:
    """The rows of the run from the centre, and of the unlearned model at two of its steps."""
    last, measured = center_curve[-1]
    rows = [Row(name="started from the centre", steps=last, certified=(0, 0), **measured)]
    claim = (certificate.epsilon, certificate.delta)
    for name, step in (
        ("unlearned, after the noisy phase", noisy_steps),
        ("unlearned and fine-tuned", curve[-1][0]),
    ):
        rows.append(Row(name=name, steps=step, certified=claim, **dict(curve)[step]))
    return rows


class _Watch:
    """Evaluates, and adds the seconds since it was made, less those spent evaluating."""

    def __init__(self, evaluate: Callable[[ArrayTree], dict[str, float]]) -> None:
        self._evaluate, self._mark, self._seconds = evaluate, time.perf_counter(), 0.0

    def __call__(self, params: ArrayTree) -> dict[str, float]:
        jax.block_until_ready(params)
        self._seconds += time.perf_counter() - self._mark
        numbers = self._evaluate(params)
        self._mark = time.perf_counter()
        return {**numbers, "seconds": self._seconds}


def _round(number: float) -> float:
    """Two significant digits, so that the plan can be read out."""
    return float(f"{number:.2g}")


@contextlib.contextmanager
def _bar(total: int, title: str, progress: bool) -> Iterator[Callable[[int], object]]:
    try:
        from tqdm import tqdm
    except ImportError:
        progress = False
    if not progress:
        yield lambda count: None
        return
    with tqdm(total=total, desc=title, unit="step") as bar:
        yield bar.update
