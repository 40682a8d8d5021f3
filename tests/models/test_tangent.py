"""The tangent model against its explicit Jacobian, its constants, and its memory."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from certunlearn.models.tangent import linearized
from certunlearn.transforms.gradients import clipped_value_and_grad

FEATURES, WIDTH, CLASSES, SIZE = 4, 5, 3, 7


def net(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def problem(classes=CLASSES, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    columns = () if classes is None else (classes,)
    params = {
        "w": rng.normal(size=(FEATURES, WIDTH)),
        "b": rng.normal(size=WIDTH),
        "v": rng.normal(size=(WIDTH, *columns)),
    }
    # Examples of small and of large Jacobians: the first layer's grows with x.
    x = rng.normal(size=(SIZE, FEATURES)) * np.geomspace(0.1, 10, SIZE)[:, None]
    w = {name: rng.normal(size=value.shape) for name, value in params.items()}
    labels = rng.integers(0, 2 if classes is None else classes, SIZE)
    params, w = (jax.tree.map(lambda a: jnp.asarray(a, dtype), tree) for tree in (params, w))
    return params, w, jnp.asarray(x, dtype), jnp.asarray(labels)


def jacobians(apply_fn, params, x):
    """float64 [batch, outputs, parameters], by reverse mode."""
    flat, unravel = ravel_pytree(params)
    rows = jax.jit(jax.jacrev(lambda p: apply_fn(unravel(p), x)))(flat)
    return np.asarray(rows, np.float64).reshape(len(x), -1, flat.size)


def frobenius(rows):
    return np.sqrt(np.sum(np.square(rows), axis=(1, 2)))


def example_gradients(loss, w, batch, l2):
    """Each example's gradient without the L2 term, float64 [batch, parameters]."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def each(w, example):
        grads = jax.grad(loss.loss_fn)(w, jax.tree.map(lambda a: a[None], example))
        return ravel_pytree(grads)[0]

    flat = each(w, batch)
    return np.asarray(flat, np.float64) - l2 * np.asarray(ravel_pytree(w)[0], np.float64)


@pytest.mark.parametrize("classes", [CLASSES, 1])
@pytest.mark.slow
def test_equals_the_explicit_linear_model(classes):
    with jax.enable_x64(True):
        params, w, x, labels = problem(classes, jnp.float64)
        radius = 3.0 if classes == CLASSES else 2.0
        model = linearized(net, params, radius)
        scales = model.scales(x)
        assert scales.dtype == jnp.float32
        rows = jacobians(net, params, x)
        exact = np.minimum(1, radius / frobenius(rows))
        assert 0 < np.sum(exact == 1) < SIZE
        np.testing.assert_allclose(scales, exact, rtol=1e-6)
        assert np.all(np.asarray(scales, np.float64) * frobenius(rows) <= radius)
        np.testing.assert_array_equal(np.asarray(scales) == 1, exact == 1)

        binary = classes != CLASSES
        labels = jnp.minimum(labels, 1) if binary else labels
        loss = model.logistic_loss(0.1, binary)
        features = scales[:, None, None] * jnp.asarray(rows)
        base = net(params, x).reshape(SIZE, -1)

        def explicit(flat):
            outputs = base + features @ flat
            if binary:
                entropy = optax.sigmoid_binary_cross_entropy(outputs[:, 0], labels)
            else:
                entropy = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
            return jnp.mean(entropy) + 0.05 * flat @ flat

        flat, unravel = ravel_pytree(w)
        outputs = model.apply(w, x, scales)
        assert outputs.shape == net(params, x).shape
        np.testing.assert_allclose(outputs.reshape(SIZE, -1), base + features @ flat, rtol=1e-9)
        implicit = lambda flat: loss.loss_fn(unravel(flat), (x, scales, labels))  # noqa: E731
        ours, hand = (jax.jit(jax.value_and_grad(f))(flat) for f in (implicit, explicit))
        np.testing.assert_allclose(ours[0], hand[0], rtol=1e-10)
        np.testing.assert_allclose(ours[1], hand[1], rtol=1e-9, atol=1e-12)


def test_outputs_are_affine_in_w():
    params, w, x, _ = problem()
    model = linearized(net, params, radius=2.0)
    scales = jnp.linspace(0.1, 1, SIZE)
    at = jax.jit(lambda c: model.apply(jax.tree.map(lambda a: c * a, w), x, scales))
    base = at(0.0)
    np.testing.assert_allclose(base, net(params, x), rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda z, p: np.testing.assert_array_equal(z, 0 * p), model.zeros(), params)
    np.testing.assert_allclose(at(5.0) - base, 5 * (at(1.0) - base), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(at(-1.0) - base, base - at(1.0), rtol=1e-4, atol=1e-4)
    merged = model.merge(w)
    jax.tree.map(lambda m, p, d: np.testing.assert_array_equal(m, p + d), merged, params, w)


@pytest.mark.parametrize("radius", [1e-6, 0.7, 1e6])
def test_scaled_jacobians_stay_strictly_inside(radius):
    # f(p, x) = x p has Jacobian x, without any rounding in the network.
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 50)) * np.geomspace(1e-3, 1e3, 200)[:, None]
    x = jnp.asarray(x, jnp.float32)
    model = linearized(lambda p, x: x @ p, jnp.zeros((50, 2)), radius)
    scales = np.asarray(jax.jit(lambda m, x: m.scales(x, 64))(model, x), np.float64)
    exact = math.sqrt(2) * np.linalg.norm(np.asarray(x, np.float64), axis=1)
    assert np.all(scales * exact <= radius)
    np.testing.assert_allclose(scales, np.minimum(1, radius / exact), rtol=5e-5)
    assert np.all(scales[exact < radius * (1 - 5e-5)] == 1)


@pytest.mark.slow
def test_microbatches_and_jit_agree():
    params, _, x, _ = problem()
    model = linearized(net, params, radius=2.0)
    expected = model.scales(x)
    for size in (3, 100):
        compiled = jax.jit(lambda x, size=size: model.scales(x, size))
        np.testing.assert_allclose(compiled(x), expected, rtol=1e-5)


@pytest.mark.parametrize("classes", [CLASSES, None])
def test_constants_are_never_exceeded(classes):
    with jax.enable_x64(True):
        params, w, x, labels = problem(classes, jnp.float64)
        model = linearized(net, params, radius=0.8)
        loss = model.logistic_loss(0.05, binary=classes is None)
        batch = (x, model.scales(x), labels)
        flat, unravel = ravel_pytree(w)
        value = lambda flat, batch: loss.loss_fn(unravel(flat), batch)  # noqa: E731
        hessian = jax.jit(jax.hessian(value))
        for size in (0.0, 1.0, 30.0):
            each = [
                hessian(size * flat, jax.tree.map(lambda a, i=i: a[i : i + 1], batch))
                for i in range(SIZE)
            ]
            for matrix in (*each, np.mean(each, axis=0)):
                eigenvalues = np.linalg.eigvalsh(matrix)
                assert eigenvalues[0] >= loss.strong_convexity - 1e-9
                assert eigenvalues[-1] <= loss.smoothness
        grads = example_gradients(loss, unravel(30 * flat), batch, 0.05)
        assert np.max(np.linalg.norm(grads, axis=1)) <= loss.gradient_bound


@pytest.mark.slow
def test_constants_are_nearly_attained():
    radius, l2 = 1.5, 0.25
    x = jnp.array([[3.0, 4.0]])
    for binary, apply_fn in (
        (False, lambda p, x: jnp.stack([x @ p, -(x @ p)], axis=1)),
        (True, lambda p, x: x @ p),
    ):
        model = linearized(apply_fn, jnp.zeros(2), radius)
        loss = model.logistic_loss(l2, binary)
        batch = (x, model.scales(x), jnp.array([1]))
        value = lambda w: loss.loss_fn(w, batch)  # noqa: B023, E731
        hessian = jax.jit(jax.hessian(value))(jnp.zeros(2))
        np.testing.assert_allclose(np.linalg.eigvalsh(hessian), [l2, loss.smoothness], rtol=1e-4)
        # The first class is certain, the second is true; in binary the sign of x w turns.
        far = x[0] * (-20 if binary else 20)
        grads = example_gradients(loss, far, batch, l2)
        assert 0.9999 < np.linalg.norm(grads) / loss.gradient_bound <= 1 + 1e-4


def test_labels():
    params, w, x, labels = problem(None)
    model = linearized(net, params, radius=1.0)
    loss = model.logistic_loss(0.1, binary=True)
    value = jax.jit(lambda labels: loss.loss_fn(w, (x, jnp.ones(SIZE), labels)))
    np.testing.assert_array_equal(value(2 * labels - 1), value(labels))

    params, w, x, _ = problem()
    model = linearized(net, params, radius=1.0)
    loss = model.logistic_loss(0.1)
    batch = (x, model.scales(x), jnp.full(SIZE, -1))
    grads = example_gradients(loss, w, batch, 0.1)
    assert np.max(np.linalg.norm(grads, axis=1)) <= 1.0


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(WIDTH)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def flax_network(kind):
    if kind == "linen":
        module = Linen()
        params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, FEATURES)))
        return module.apply, params
    graph, params = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)
    return lambda params, x: nnx.merge(graph, params)(x), params


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_gradient_descent_on_flax_networks(kind):
    apply_fn, params = flax_network(kind)
    _, _, x, labels = problem()
    model = linearized(apply_fn, params, radius=1.0)
    loss = model.logistic_loss(0.1)
    batch = (x, model.scales(x), labels)
    # The step 2 / (m + L) contracts by (L - m) / (L + m).
    m, smooth = loss.strong_convexity, loss.smoothness
    tx = optax.sgd(2 / (m + smooth))

    @jax.jit
    def step(w, state):
        grads = jax.grad(loss.loss_fn)(w, batch)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state, optax.global_norm(grads)

    w = model.zeros()
    state = tx.init(w)
    lengths = []
    for _ in range(12):
        w, state, length = step(w, state)
        lengths.append(float(length))
    rate = (smooth - m) / (smooth + m)
    assert lengths[-1] <= lengths[0] * rate**11 * (1 + 1e-3) + 1e-6
    assert jax.tree.structure(model.merge(w)) == jax.tree.structure(params)


def test_held_out_weights_and_pytrees_of_inputs():
    params, w, x, _ = problem()
    frozen = {"w": params["w"], "b": params["b"]}
    head = linearized(lambda p, x: net({**frozen, **p}, x["x"]), {"v": params["v"]}, radius=100.0)
    inputs = {"x": x, "unused": jnp.arange(SIZE)}
    scales = head.scales(inputs)
    np.testing.assert_array_equal(scales, np.ones(SIZE))
    expected = net({**frozen, "v": params["v"] + w["v"]}, x)
    outputs = head.apply({"v": w["v"]}, inputs, scales)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_jit_and_vmap():
    params, w, x, labels = problem()
    model = linearized(net, params, radius=1.0)
    scales = jnp.linspace(0.1, 1, SIZE)
    expected = jax.jit(lambda model, w: model.apply(w, x, scales))(model, w)
    many = jax.tree.map(lambda a: jnp.stack([a, 0 * a]), w)
    over_w = jax.jit(jax.vmap(lambda w: model.apply(w, x, scales)))(many)
    np.testing.assert_allclose(over_w[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(over_w[1], net(params, x), rtol=1e-4, atol=1e-5)
    over_x = jax.jit(jax.vmap(lambda x, s: model.apply(w, x[None], s[None])[0]))(x, scales)
    np.testing.assert_allclose(over_x, expected, rtol=1e-4, atol=1e-5)
    loss = model.logistic_loss(0.1)
    _, grads = jax.jit(clipped_value_and_grad(loss.loss_fn, 100.0))(w, (x, scales, labels))
    whole = jax.jit(jax.grad(loss.loss_fn))(w, (x, scales, labels))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, whole)


def test_bad_examples_have_scale_zero_and_harm_no_other():
    params, w, x, labels = problem()
    bad = x.at[1, 0].set(jnp.nan).at[4, 2].set(jnp.inf)
    model = linearized(net, params, radius=1.0)
    scales = model.scales(bad)
    good = np.isin(np.arange(SIZE), [1, 4], invert=True)
    np.testing.assert_array_equal(np.asarray(scales)[~good], 0)
    np.testing.assert_allclose(scales[good], model.scales(x)[good], rtol=1e-5)
    outputs = model.apply(w, bad, scales)
    np.testing.assert_array_equal(outputs[~good], 0)
    loss = model.logistic_loss(0.1)
    grads = example_gradients(loss, w, (bad, scales, labels), 0.1)
    np.testing.assert_allclose(grads[~good], 0, atol=1e-6)
    whole = jax.jit(jax.grad(loss.loss_fn))(w, (bad, scales, labels))
    expected = np.mean(grads, axis=0) + 0.1 * ravel_pytree(w)[0]
    np.testing.assert_allclose(ravel_pytree(whole)[0], expected, rtol=1e-4, atol=1e-5)
    # So far out that the scale would be subnormal: rounding is then no longer relative.
    tiny = linearized(lambda p, x: x @ p, jnp.zeros(2), 1e-30)
    # And a Jacobian of finite entries whose norm overflows.
    assert tiny.scales(jnp.array([[1e10, 1e10], [3e38, 3e38]])).tolist() == [0, 0]


def test_narrow_outputs_do_not_round_the_scales():
    network = lambda p, x: (x @ p).astype(jnp.bfloat16)  # noqa: E731
    model = linearized(network, jnp.ones((2, 3)), radius=1.0)
    x = jnp.array([[3.0, 4.0]])
    outputs = model.apply(model.zeros(), x, jnp.ones(1))
    assert outputs.dtype == jnp.float32


def sizes(jaxpr):
    """The element counts of all arrays in a jaxpr, and in those inside it."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield math.prod(getattr(variable.aval, "shape", ()))
    for inner in subjaxprs(jaxpr):
        yield from sizes(inner)


def subjaxprs(jaxpr):
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield getattr(value, "jaxpr", value)


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_no_array_is_as_large_as_a_jacobian():
    params, x = jnp.zeros((64, 40)), jnp.ones((8, 64))
    model = linearized(lambda p, x: jnp.tanh(x @ p), params, radius=1.0)
    batch = (x, jnp.ones(8), jnp.zeros(8, jnp.int32))
    loss = model.logistic_loss(0.1)
    for function, arguments in (
        (model.apply, (params, *batch[:2])),
        (loss.loss_fn, (params, batch)),
        (jax.grad(loss.loss_fn), (params, batch)),
        (model.scales, (x,)),
    ):
        largest = max(sizes(jax.make_jaxpr(function)(*arguments).jaxpr))
        assert largest <= params.size
    # The same look finds the Jacobians where they are.
    everything = jax.make_jaxpr(jax.jacrev(lambda p: model.apply_fn(p, x)))(params).jaxpr
    assert max(sizes(everything)) >= 8 * 40 * params.size
    together = jax.make_jaxpr(lambda x: model.scales(x, 4))(x).jaxpr
    assert max(sizes(together)) == 4 * params.size


def test_bad_arguments():
    params, w, x, labels = problem()
    with pytest.raises(TypeError, match="apply_fn must be a function"):
        linearized(params, params, 1.0)
    with pytest.raises(TypeError, match="radius must be one real number"):
        linearized(net, params, "1")
    for bad in (0.0, -1.0, np.nan, np.inf, 1e-31):
        with pytest.raises(ValueError, match="radius must be"):
            linearized(net, params, bad)
    with pytest.raises(ValueError, match="public_params must hold at least one array"):
        linearized(net, {}, 1.0)
    with pytest.raises(ValueError, match="float32"):
        linearized(net, {"w": jnp.zeros(2, jnp.bfloat16)}, 1.0)
    with pytest.raises(ValueError, match="public_params must be finite"):
        linearized(net, {"w": jnp.array([jnp.nan])}, 1.0)

    model = linearized(net, params, 1.0)
    scales = jnp.ones(SIZE)
    with pytest.raises(ValueError, match="microbatch_size must be at least 1"):
        model.scales(x, 0)
    with pytest.raises(ValueError, match="one leading axis of at least 1"):
        model.scales({})
    with pytest.raises(ValueError, match=r"lengths \[\(6,\), \(7,\)\]"):
        model.apply(w, {"a": x, "b": x[:6]}, scales)
    with pytest.raises(ValueError, match=r"scales must have shape \(7,\), got \(6,\)"):
        model.apply(w, x, scales[:6])
    for other in ({"w": w["w"]}, {**w, "b": w["b"][:1]}):
        with pytest.raises(ValueError, match="w must have the leaves of public_params"):
            model.apply(other, x, scales)
    with pytest.raises(ValueError, match="apply_fn must return outputs"):
        linearized(lambda p, x: jnp.sum(net(p, x)), params, 1.0).scales(x)

    with pytest.raises(ValueError, match="l2 must be positive"):
        model.logistic_loss(0.0)
    with pytest.raises(TypeError, match="binary must be True or False"):
        model.logistic_loss(0.1, binary=1)
    with pytest.raises(ValueError, match=r"labels must have shape \(7,\)"):
        model.logistic_loss(0.1).loss_fn(w, (x, scales, jax.nn.one_hot(labels, CLASSES)))
    with pytest.raises(ValueError, match="binary=True needs one output each"):
        model.logistic_loss(0.1, binary=True).loss_fn(w, (x, scales, labels))
    one = problem(None)
    single = linearized(net, one[0], 1.0)
    with pytest.raises(ValueError, match="binary=False needs two outputs or more"):
        single.logistic_loss(0.1).loss_fn(one[1], (x, scales, labels))
