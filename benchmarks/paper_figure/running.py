"""Runs of all methods: equal batches, equal numbers of example gradients, all seeds at once.

A run takes `Schedule.steps` steps on batches of one size. Those of them that are noisy count as
much as the others; retraining has no noisy ones. Runs of several settings go together as replicas:
their leading axis is that of settings, then of seeds.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import certunlearn as cu
from benchmarks.coupling_mnist import compiled_step, descend, fold, noisy_update
from benchmarks.paper_figure import datasets, scales
from certunlearn._numerics import batches, schedules
from certunlearn.demo import data as data_lib
from certunlearn.demo import network
from certunlearn.demo.run import FORGET_FRACTION, PUBLIC_SEED
from certunlearn.mechanisms import Mechanism

TRAIN_RATE = 3e-3  # of the original models
direction = optax.scale_by_adam()


class Schedule(NamedTuple):
    """What a run takes, and when it is measured.

    Attributes:
      batch_size: example gradients of a step.
      noisy_steps: of gradient and model clipping; output perturbation and retraining have none.
      checkpoints: numbers of steps, the noisy ones among them, after which to measure; the last is
        the run's length.
      train_epochs: of the original models.
    """

    batch_size: int
    noisy_steps: int
    checkpoints: tuple[int, ...]
    train_epochs: int

    @property
    def steps(self) -> int:
        """Of a whole run."""
        return self.checkpoints[-1]


class Lab(NamedTuple):
    """What the runs of one problem share; arrays have a leading axis of seeds."""

    problem: datasets.Problem
    schedule: Schedule
    data: Any
    center: Any
    original: Any
    keys: jax.Array
    batches: list[np.ndarray]


def adam(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """Adam with the rate in its state, so that replicas may differ in it."""
    inner, rate = state
    updates, inner = direction.update(grads, inner, params)
    return jax.tree.map(lambda update: -rate * update, updates), (inner, rate)


def adam_state(params: Any, rates: jax.Array) -> Any:
    """Of replicas, each with its own rate."""
    return jax.vmap(direction.init)(params), rates


def batches_of(examples: np.ndarray, keys: jax.Array, size: int, steps: int) -> list[np.ndarray]:
    """Indices `[seeds, size]` for each step: every seed's own orders of its own examples."""
    per_epoch = examples.shape[1] // size
    made: list[np.ndarray] = []
    for epoch in range(-(-steps // per_epoch)):
        orders = [
            own[batches.epoch_order(key, epoch, len(own))]
            for own, key in zip(examples, keys, strict=True)
        ]
        order = np.stack(orders)
        made += [order[:, i * size : (i + 1) * size] for i in range(per_epoch)]
    return made[:steps]


def prepare(problem: datasets.Problem, schedule: Schedule, seeds: Sequence[int]) -> Lab:
    """Draws the forget sets and trains the original models on everything."""
    net, size, batch = problem.net, len(problem.train["y"]), schedule.batch_size
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    init = jax.vmap(functools.partial(datasets.init, problem))
    everything = np.tile(np.arange(size), (len(seeds), 1))
    kept = size - round(size * FORGET_FRACTION)
    retain = np.stack([np.asarray(jax.random.permutation(k, size)) for k in fold(keys, 0)])[
        :, :kept
    ]
    step, data = _adam_step(net), jax.tree.map(jnp.asarray, problem.train)
    steps = schedule.train_epochs * (size // batch)
    params = init(fold(keys, 1))
    state = adam_state(params, jnp.full(len(seeds), TRAIN_RATE))
    training = batches_of(everything, fold(keys, 2), batch, steps)
    return Lab(
        problem=problem,
        schedule=schedule,
        data=data,
        center=init(fold(keys, PUBLIC_SEED)),
        original=descend(step, params, state, data, training)[0],
        keys=keys,
        batches=batches_of(retain, fold(keys, 4), batch, schedule.steps),
    )


@functools.partial(jax.jit, static_argnums=0)
def _accuracies(net: Any, params: Any, examples: data_lib.Examples) -> jax.Array:
    # One replica after the other: together their activations take too much memory.
    return jax.lax.map(lambda own: jnp.mean(network.losses(net, own, examples)[1]), params)


def measured(lab: Lab, params: Any, examples: data_lib.Examples) -> np.ndarray:
    """Accuracies `[settings, seeds]`."""
    found = np.asarray(_accuracies(lab.problem.net, params, examples), np.float64)
    return found.reshape(-1, len(lab.keys)).round(6)


def repeated(tree: Any, settings: int) -> Any:
    """The seeds' arrays once for every setting; they are copies, which steps may overwrite."""
    tiled = lambda x: jnp.tile(x, (settings, *[1] * (x.ndim - 1)))  # noqa: E731
    return jax.tree.map(lambda x: jnp.array(tiled(x), copy=True), tree)


def finished(
    lab: Lab, params: Any, rates: Sequence[float], taken: int, examples: data_lib.Examples
) -> list[Any]:
    """Fine-tunes what has taken so many steps. By setting a curve of accuracies."""
    step = functools.partial(_together, _adam_step(lab.problem.net), len(rates))
    state = adam_state(params, jnp.repeat(jnp.asarray(rates, jnp.float32), len(lab.keys)))
    points = []
    for checkpoint in lab.schedule.checkpoints:
        params, state = descend(step, params, state, lab.data, lab.batches[taken:checkpoint])
        taken = max(taken, checkpoint)
        points.append(measured(lab, params, examples))
    gradients = [checkpoint * lab.schedule.batch_size for checkpoint in lab.schedule.checkpoints]
    return [
        {"gradients": gradients, "accuracy": [point[setting].tolist() for point in points]}
        for setting in range(len(rates))
    ]


def retrained(lab: Lab, rates: Sequence[float], examples: data_lib.Examples) -> list[Any]:
    """By rate the curve of models that take all steps without noise, from the centre.

    It is fresh random weights; from others the luck of the start would differ between methods.
    """
    return finished(lab, repeated(lab.center, len(rates)), rates, 0, examples)


class Trial(NamedTuple):
    """Hyperparameters of a run, and the noise scale at radius 1 that its certificate asks for."""

    radius: float
    rate: float
    unit_scale: float


def unlearned(
    lab: Lab,
    method: str,
    trials: Sequence[Trial],
    examples: data_lib.Examples,
    from_center: bool = False,
) -> list[Any]:
    """By trial the curve of a run of a certified method, from the originals or the centre.

    The run is that of the mechanism of radius 1 in coordinates y, where the parameters are
    centre + radius * y: so one compiled step serves all radii, and they are replicas, too.
    """
    start, count = lab.center if from_center else lab.original, len(trials)
    center = repeated(lab.center, count)
    each = lambda values: jnp.repeat(jnp.asarray(values, jnp.float32), len(lab.keys))  # noqa: E731
    radii = each([trial.radius for trial in trials])
    rounded = each([schedules.round_up(trial.unit_scale, np.float32) for trial in trials])
    unit = scales.mechanism(method, 1.0, lab.schedule.noisy_steps)
    keys = jnp.concatenate([_noise_keys(lab, method, trial, from_center) for trial in trials])
    inside, state = _started(unit, center, repeated(start, count), radii, keys)
    state, taken = (state, rounded, radii, center), 0
    if scales.takes_gradients(unit):
        taken = unit.steps
        step = functools.partial(_together, _noisy_step(lab.problem.net, unit), count)
        inside, _ = descend(step, inside, state, lab.data, lab.batches[:taken])
    else:
        inside = _perturbed(unit, inside, state)
    params = jax.vmap(_outside)(center, radii, inside)
    return finished(lab, params, [trial.rate for trial in trials], taken, examples)


def _noise_keys(lab: Lab, method: str, trial: Trial, from_center: bool) -> jax.Array:
    """Each seed's: two runs with the same noise would differ by what it is there to hide.

    Trials have noise of their own, too, so that one draw does not favour a method everywhere.
    """
    own = zlib.crc32(f"{method} {trial}".encode())
    return fold(fold(lab.keys, 7 if from_center else 6), own)


def _outside(center: Any, radius: jax.Array, inside: Any) -> Any:
    """Parameters of coordinates in which the radius is 1."""
    return jax.tree.map(lambda c, y: c + radius * y, center, inside)


@functools.partial(jax.jit, static_argnums=0)
def _started(unit: Mechanism, center: Any, params: Any, radii: Any, keys: Any) -> tuple[Any, Any]:
    def one(own: Any, center: Any, radius: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        inside = jax.tree.map(lambda p, c: (p - c) / radius, own, center)
        inside = cu.clip_params(inside, 1.0)
        return inside, cu.noisy_sgd(unit, 1.0, key=key).init(inside)

    return jax.vmap(one)(params, center, radii, keys)


@functools.cache
def _adam_step(net: Any) -> Callable[..., Any]:
    return compiled_step(net, adam)


@functools.cache
def _noisy_step(net: Any, unit: Mechanism) -> Callable[..., Any]:
    """One step of all replicas; gradients are those with respect to the parameters."""
    update = noisy_update(unit, None)

    def one(inside: Any, state: Any, data: Any, indices: jax.Array) -> tuple[Any, Any]:
        inner, scale, radius, center = state
        batch = jax.tree.map(lambda x: x[indices], data)
        params = _outside(center, radius, inside)
        grads = jax.grad(functools.partial(network.mean_loss, net))(params, batch)
        updates, (inner, _) = update(grads, (inner, scale), inside)
        return optax.apply_updates(inside, updates), (inner, scale, radius, center)

    return jax.jit(jax.vmap(one, in_axes=(0, 0, None, 0)))


@functools.partial(jax.jit, static_argnums=0)
def _perturbed(unit: Mechanism, inside: Any, state: Any) -> Any:
    def one(own: Any, inner: Any, scale: jax.Array) -> Any:
        zero = jax.tree.map(jnp.zeros_like, own)
        updates, _ = noisy_update(unit, None)(zero, (inner, scale), own)
        return optax.apply_updates(own, updates)

    return jax.vmap(one)(inside, *state[:2])


def _together(
    step: Any, settings: int, params: Any, state: Any, data: Any, indices: np.ndarray
) -> Any:
    return step(params, state, data, np.tile(indices, (settings, 1)))
