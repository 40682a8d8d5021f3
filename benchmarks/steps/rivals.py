"""Other libraries' steps with each example's gradient clipped, for the same networks.

They promise less: their clips overshoot in the last places, and their noise has no tails beyond
5.4 standard deviations (JAX) or is drawn in float32 (PyTorch). To import what is not there raises
ImportError, which the benchmark records.
"""

from typing import Any

import jax
import numpy as np
import optax

from benchmarks.steps import loops
from benchmarks.steps.networks import Network


def dpsgd(network: Network) -> loops.Loop:
    """`optax.contrib.dpsgd` on gradients of one example each."""
    tx = optax.contrib.dpsgd(
        learning_rate=loops.RATE,
        l2_norm_clip=loops.CLIP,
        noise_multiplier=loops.NOISE,
        seed=0,
    )

    def of_one(params: Any, example: Any) -> jax.Array:
        return network.loss_fn(params, jax.tree.map(lambda leaf: leaf[None], example))

    each = jax.vmap(jax.grad(of_one), in_axes=(None, 0))
    return loops.loop(network, tx, lambda params, batch: (None, each(params, batch)))


def jax_privacy(network: Network, microbatch_size: int | None = None) -> loops.Loop:
    """jax-privacy's clipped gradient and its Gaussian noise, before plain SGD."""
    import jax_privacy

    gradient = jax_privacy.clipped_grad(
        network.loss_fn,
        l2_clip_norm=loops.CLIP,
        normalize_by=network.batch_size,
        microbatch_size=microbatch_size,
    )
    noise = jax_privacy.noise_addition.gaussian_privatizer(
        stddev=loops.NOISE, prng_key=jax.random.key(0)
    )
    tx = optax.chain(noise, optax.sgd(loops.RATE))
    return loops.loop(network, tx, lambda params, batch: (None, gradient(params, batch)))


class Torch:
    """A loop of PyTorch where JAX runs, too: plain, or with Opacus in one of its modes."""

    def __init__(self, network: Network, mode: str | None) -> None:
        """Builds the equal network and its optimizer. `mode` is "hooks", "ghost" or None."""
        import torch

        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise ImportError("PyTorch was built without CUDA")
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._wait = torch.cuda.synchronize if on_gpu else lambda: None
        torch.manual_seed(0)
        self._module = _module(network).to(self._device)
        self._criterion: Any = torch.nn.CrossEntropyLoss()
        self._optimizer: Any = torch.optim.SGD(self._module.parameters(), lr=loops.RATE)
        x, y = (np.array(leaf) for leaf in network.data)
        x = np.moveaxis(x, -1, 1) if x.ndim == 4 else x
        arrays = torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64))
        self._data = tuple(array.to(self._device) for array in arrays)
        self._batches = np.random.default_rng(0).permutation(len(x)).reshape(-1, network.batch_size)
        self._taken = 0
        count = sum(weight.numel() for weight in self._module.parameters())
        if count != network.parameters:
            raise ValueError(f"the networks must be equal: {count} and {network.parameters}")
        if mode is not None:
            self._private(network, mode)

    def _private(self, network: Network, mode: str) -> None:
        import opacus
        import torch

        rows = torch.utils.data.TensorDataset(*self._data)
        made = opacus.PrivacyEngine().make_private(
            module=self._module,
            optimizer=self._optimizer,
            criterion=self._criterion,
            data_loader=torch.utils.data.DataLoader(rows, batch_size=network.batch_size),
            noise_multiplier=loops.NOISE,
            max_grad_norm=loops.CLIP,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        if mode == "ghost":
            self._module, self._optimizer, self._criterion, _ = made
        else:
            self._module, self._optimizer, _ = made

    def run(self, steps: int) -> None:
        """Takes so many steps. The batch is cut from memory, without Opacus's data loader."""
        for _ in range(steps):
            indices = self._batches[self._taken % len(self._batches)]
            x, y = (leaf[indices] for leaf in self._data)
            self._optimizer.zero_grad()
            self._criterion(self._module(x), y).backward()
            self._optimizer.step()
            self._taken += 1
        self._wait()


def _module(network: Network) -> Any:
    from torch import nn

    parts: list[Any] = []
    for layer in network.layers:
        if layer == "flat":
            parts.append(nn.Flatten())
        elif layer[0] == "dense":
            parts += [nn.Linear(layer[1], layer[2]), nn.ReLU()]
        else:
            parts += [nn.Conv2d(layer[1], layer[2], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*parts[:-1])  # no ReLU on the logits


RIVALS = {
    "optax dpsgd": dpsgd,
    "jax-privacy": jax_privacy,
    "torch SGD": lambda network: Torch(network, None),
    "Opacus flat": lambda network: Torch(network, "hooks"),
    "Opacus ghost": lambda network: Torch(network, "ghost"),
}
