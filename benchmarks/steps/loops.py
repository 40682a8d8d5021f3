"""Ways to take the same training step: without noise, with Optax's parts, with the library's.

Each loop is a user's own: one compiled step on a batch of the data, whose old parameters' memory is
used again. Clip norm, rate and noise are equal, and so are the batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import certunlearn as cu
from benchmarks.steps.networks import Network

CLIP, RATE, NOISE = 1.0, 0.01, 1e-4  # the noise is so small that long runs stay where they are
KEY = jax.random.key(0)
MANY = 10**6  # steps of a mechanism: more than a benchmark takes


@dataclasses.dataclass
class Loop:
    """A loop in which `step(carry, data, indices) -> carry` is compiled.

    `on_batch(carry, batch) -> carry` is the same step, not compiled, on a batch that was cut out.
    """

    step: Callable[..., Any]
    on_batch: Callable[..., Any]
    carry: Any
    data: Any
    batches: np.ndarray
    taken: int = 0

    def run(self, steps: int) -> None:
        """Takes so many steps, and waits for the last."""
        for _ in range(steps):
            indices = self.batches[self.taken % len(self.batches)]
            self.carry = self.step(self.carry, self.data, indices)
            self.taken += 1
        jax.block_until_ready(self.carry)


def loop(network: Network, tx: Any, value_and_grad: Any = None) -> Loop:
    """The loop of an Optax optimizer, and of a gradient of one's own."""
    gradient = value_and_grad or jax.value_and_grad(network.loss_fn)

    def on_batch(carry: Any, batch: Any) -> Any:
        params, state = carry
        _, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, data: Any, indices: jax.Array) -> Any:
        return on_batch(carry, jax.tree.map(lambda leaf: leaf[indices], data))

    params = jax.tree.map(jnp.copy, network.params)
    size = len(jax.tree.leaves(network.data)[0])
    batches = np.random.default_rng(0).permutation(size).reshape(-1, network.batch_size)
    return Loop(step, on_batch, (params, tx.init(params)), network.data, batches)


def plain(network: Network) -> Loop:
    """What everything is compared with."""
    return loop(network, optax.sgd(RATE))


def plain_noise(size_of_noise: float) -> optax.GradientTransformation:
    """Noise of `jax.random.normal`, from a key for each step and leaf."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(jax.random.fold_in(KEY, state), len(leaves))
        noisy = [
            leaf + size_of_noise * jax.random.normal(key, leaf.shape, leaf.dtype)
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(structure, noisy), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def optax_parts(network: Network) -> Loop:
    """Optax's clip and JAX's normal draws: no strict bound, no true tails."""
    parts = optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(RATE), plain_noise(NOISE))
    return loop(network, parts)


def mechanism(steps: int = MANY) -> cu.GradientClipping:
    """The same update as a mechanism."""
    return cu.GradientClipping(init_radius=1e3, clip_norm=CLIP, learning_rate=RATE, steps=steps)


def noisy_sgd(network: Network) -> Loop:
    """The library's optimizer in the user's loop."""
    return loop(network, cu.noisy_sgd(mechanism(), NOISE, key=KEY))


def per_example(network: Network, microbatch_size: int | None = None) -> Loop:
    """Each example's gradient clipped, then the library's optimizer."""
    gradient = cu.clipped_value_and_grad(network.loss_fn, CLIP, microbatch_size=microbatch_size)
    return loop(network, cu.noisy_sgd(mechanism(), NOISE, key=KEY), gradient)


def request(network: Network, steps: int, key: jax.Array) -> dict[str, Any]:
    """The arguments of `unlearn`, and of `prepare`."""
    return {
        "loss_fn": network.loss_fn,
        "params": network.params,
        "retain_data": network.data,
        "mechanism": mechanism(steps),
        "noise_scale": NOISE,
        "delta": 1e-5,
        "batch_size": network.batch_size,
        "key": key,
        "accountant": "interpolation",
        "progress": False,
    }


def unlearn(
    network: Network, steps: int, every: int, between: Callable[[int], None], **options: Any
) -> Any:
    """`cu.unlearn`, which calls `between(step)` at step 0 and then every so many steps."""
    at = iter(range(0, steps + 1, every))

    def evaluate(params: Any) -> None:
        jax.block_until_ready(params)
        between(next(at))

    more = cu.Options(evaluate=evaluate, evaluate_every=every, **options)
    return cu.unlearn(**request(network, steps, KEY), options=more)


def prepared(network: Network, steps: int, number: int) -> Any:
    """Run number so and so, with a key of its own, ready to start."""
    return cu.unlearning.prepare(**request(network, steps, jax.random.key(number)))


def one_by_one(runs: list[Any]) -> None:
    """The noisy steps of one run after the other."""
    jax.block_until_ready([cu.unlearning.run_noisy_steps(run).trainable for run in runs])


def together(runs: list[Any]) -> None:
    """The same in one call."""
    jax.block_until_ready([noisy.trainable for noisy in cu.unlearning.run_replicas(runs)])


def parts(size: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Noise, clip and both with the update, without a gradient: Optax's and the library's."""
    params = {"w": jnp.zeros(size)}
    gradient = {"w": jax.random.normal(KEY, (size,))}

    def compiled(tx: Any, apply: bool = False) -> Callable[[], Any]:
        state = tx.init(params)

        @jax.jit
        def run(gradient: Any, state: Any, params: Any) -> Any:
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates) if apply else updates), state

        return lambda: jax.block_until_ready(run(gradient, state, params))

    clip, rate = optax.clip_by_global_norm(CLIP), optax.sgd(RATE)
    return {
        "noise": (
            compiled(plain_noise(NOISE)),
            compiled(cu.transforms.add_gaussian_noise(NOISE, KEY)),
        ),
        "clip": (compiled(clip), compiled(cu.clip_by_global_norm(CLIP))),
        "step": (
            compiled(optax.chain(clip, rate, plain_noise(NOISE)), True),
            compiled(cu.noisy_sgd(mechanism(), NOISE, key=KEY), True),
        ),
    }


def executables() -> Iterator[Any]:
    """What the backend has compiled and not dropped."""
    yield from jax.devices()[0].client.live_executables()
