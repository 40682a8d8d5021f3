"""Loops as Flax's guides write them: only the optimizer is another, or `unlearn` is the loop.

A convolutional network with BatchNorm and Dropout (NNX), a `TrainState` with batch statistics and a
dropout key (Linen), and a small transformer (NNX).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import certunlearn as cu

pytestmark = pytest.mark.slow

STEPS, BATCH, SIZE = 4, 8, 24
MECHANISM = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=STEPS)
PLAN = {"noise_scale": 0.01, "delta": 1e-5, "accountant": "interpolation"}
RUN = PLAN | {"batch_size": BATCH, "progress": False}
IMAGES = {
    "image": np.random.default_rng(0).uniform(size=(SIZE, 8, 8, 1)).astype(np.float32),
    "label": np.random.default_rng(1).integers(0, 3, SIZE),
}
TOKENS = {"tokens": np.random.default_rng(2).integers(0, 11, (SIZE, 7))}


def batches(data):
    for step in range(STEPS):
        at = np.arange(step * BATCH, (step + 1) * BATCH) % SIZE
        yield jax.tree.map(lambda leaf, at=at: jnp.asarray(leaf[at]), data)


def tx():
    return cu.noisy_sgd(MECHANISM, 0.01, key=cu.unlearning.system_keys().noise)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits=logits, labels=labels).mean()


def all_keys(tree):
    return [
        tuple(np.asarray(jax.random.key_data(leaf)).reshape(-1).tolist())
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]


# ------------------------------------------------------------------------------- NNX


class CNN(nnx.Module):
    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.1)
        self.linear1 = nnx.Linear(64, 8, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.1, rngs=rngs)  # one with keys of its own
        self.linear2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x), rngs=rngs)))
        x = nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = self.dropout2(nnx.relu(self.linear1(x.reshape(x.shape[0], -1))))
        return self.linear2(x)


def cnn_loss(model, rngs, batch):
    logits = model(batch["image"], rngs)
    return cross_entropy(logits, batch["label"]), logits


def test_the_nnx_loop_with_batch_norm_and_dropout():
    model, rngs = CNN(rngs=nnx.Rngs(0)), nnx.Rngs(1)
    nnx.update(model, cu.clip_params(nnx.state(model, nnx.Param), MECHANISM.init_radius))
    before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx(), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    @nnx.jit
    def train_step(model, optimizer, metrics, rngs, batch):
        grad_fn = nnx.value_and_grad(cnn_loss, has_aux=True)
        (loss, logits), grads = grad_fn(model, rngs, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)

    model.train()
    for batch in batches(IMAGES):
        train_step(model, optimizer, metrics, rngs, batch)
    assert np.isfinite(metrics.compute()["loss"])
    certificate = cu.certify(MECHANISM, **PLAN, params=model, state=optimizer)
    assert cu.verify(certificate, model)
    assert certificate.steps_run == STEPS
    assert not cu.verify(certificate, before)


def test_unlearn_in_the_place_of_the_nnx_loop():
    model = CNN(rngs=nnx.Rngs(0))
    model.train()
    model(IMAGES["image"], nnx.Rngs(1))  # it has been trained

    def recompute(model, data):
        for _ in range(3):
            model(data["image"], nnx.Rngs(2))

    result = cu.unlearn(
        lambda model, batch, key: cnn_loss(model, nnx.Rngs(key), batch),
        model,
        IMAGES,
        MECHANISM,
        **RUN,
        finetune=(optax.adamw(1e-3), 2),
        options=cu.Options(recompute_state=recompute),
    )
    released = result.params
    assert type(released) is CNN
    assert cu.verify(result.certificate, released)
    assert released.batch_norm1.mean.shape == (4,)
    assert float(jnp.abs(released.batch_norm1.mean[...]).max()) > 0
    mine = all_keys(nnx.state(released, nnx.RngState))
    assert mine
    assert not set(mine) & set(all_keys(nnx.state(model, nnx.RngState)))
    released.eval()
    assert np.all(np.isfinite(released(IMAGES["image"])))


# ------------------------------------------------------------------------------- Linen


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2)).reshape(x.shape[0], -1)
        x = nn.Dropout(0.2, deterministic=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(x)


class State(TrainState):
    batch_stats: dict
    key: jax.Array


def linen_state(optimizer):
    net = LinenCNN()
    variables = net.init(jax.random.key(0), IMAGES["image"], train=False)
    return State.create(
        apply_fn=net.apply,
        params=cu.clip_params(variables["params"], MECHANISM.init_radius),
        tx=optimizer,
        batch_stats=variables["batch_stats"],
        key=jax.random.key(1),
    )


def test_the_linen_loop_with_batch_norm_and_dropout():
    state = linen_state(tx())

    @jax.jit
    def train_step(state, batch):
        dropout_key = jax.random.fold_in(state.key, state.step)

        def loss_fn(params):
            logits, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            return cross_entropy(logits, batch["label"]), updates

        (_, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])

    for batch in batches(IMAGES):
        state = train_step(state, batch)
    certificate = cu.certify(MECHANISM, **PLAN, params=state, state=state)
    assert cu.verify(certificate, state)
    assert cu.verify(certificate, state.params)


def test_unlearn_in_the_place_of_the_linen_loop():
    state = linen_state(optax.adam(1e-3))

    def loss_fn(params, batch, key):
        logits, updates = state.apply_fn(
            {"params": params},
            batch["image"],
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, batch["label"]), updates

    def recompute(params, data):
        def update(stats, batch):
            variables = {"params": params, "batch_stats": stats}
            _, updates = state.apply_fn(
                variables,
                batch["image"],
                train=True,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )
            return updates["batch_stats"]

        fresh = jax.tree.map(jnp.zeros_like, state.batch_stats)
        return cu.unlearning.recompute_statistics(update, fresh, data, batch_size=SIZE, passes=9)

    more = cu.Options(recompute_state=recompute)
    result = cu.unlearn(loss_fn, state, IMAGES, MECHANISM, **RUN, options=more)
    released = result.params
    assert type(released) is State
    assert int(released.step) == 0
    assert cu.verify(result.certificate, released)
    assert set(released.batch_stats) == {"BatchNorm_0"}
    logits = released.apply_fn(
        {"params": released.params, "batch_stats": released.batch_stats},
        IMAGES["image"],
        train=False,
    )
    assert np.all(np.isfinite(logits))


# ------------------------------------------------------------------------------- transformer


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=width, dropout_rate=0.1, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A decoder whose head is its embedding."""

    def __init__(self, *, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.places = nnx.Embed(16, 8, rngs=rngs)
        self.block = Block(8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.places(jnp.arange(tokens.shape[1]))
        x = self.norm(self.block(x, nnx.make_causal_mask(tokens)))
        return self.embed.attend(x)


def token_losses(model, batch):
    """Each example's mean loss of the next token."""
    tokens = batch["tokens"]
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(-1)


def test_the_transformers_loop():
    model = Transformer(rngs=nnx.Rngs(0))
    model.train()
    nnx.update(model, cu.clip_params(nnx.state(model, nnx.Param), MECHANISM.init_radius))
    optimizer = nnx.Optimizer(model, tx(), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        grads = nnx.grad(lambda model: token_losses(model, batch).mean())(model)
        optimizer.update(model, grads)

    for batch in batches(TOKENS):
        train_step(model, optimizer, batch)
    certificate = cu.certify(MECHANISM, **PLAN, params=model, state=optimizer)
    assert cu.verify(certificate, model)


def test_unlearn_in_the_place_of_the_transformers_loop():
    model = Transformer(rngs=nnx.Rngs(0))
    model.train()
    result = cu.unlearn(
        token_losses,
        model,
        TOKENS,
        MECHANISM,
        **RUN,
        center=Transformer(rngs=nnx.Rngs(5)),
        options=cu.Options(per_example=True, microbatch_size=2),
    )
    assert cu.verify(result.certificate, result.params)
    assert result.params(TOKENS["tokens"]).shape == (SIZE, 7, 11)
    assert result.certificate.coverage["leaves"] == len(
        jax.tree.leaves(nnx.state(model, nnx.Param))
    )
