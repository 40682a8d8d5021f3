"""What a noisy step is compiled to: no loop around the gradient, and memory that is used again."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import certunlearn as cu
from certunlearn._numerics import programs
from certunlearn.unlearning import compiled_steps, kept_steps, noisy_step
from certunlearn.unlearning.leaf_split import Split
from certunlearn.unlearning.model_loss import Loss

SIZE, BATCH = 16, 4
DATA = (
    np.random.default_rng(0).normal(size=(SIZE, 8, 8, 2)).astype(np.float32),
    np.random.default_rng(1).normal(size=(SIZE, 4)).astype(np.float32),
)
NETWORK = {
    "first": np.full((3, 3, 2, 4), 0.1, np.float32),
    "second": np.full((3, 3, 4, 6), 0.1, np.float32),
    "head": np.full((6, 4), 0.1, np.float32),
}
BALL = {"init_radius": 1.0, "learning_rate": 0.1, "steps": 5}
CURVED = {"initial_distance": 0.5, "strong_convexity": 0.1, "smoothness": 1.0}
MECHANISMS = {
    "clipped": cu.GradientClipping(**BALL, clip_norm=1.0, weight_decay=0.1),
    "projected": cu.ModelClipping(**BALL, model_radius=1.0),
    "noise first": cu.ModelClipping(**BALL, model_radius=1.0, clip_norm=0.5),
    "convex": cu.ProjectedNoisySGD(**CURVED, learning_rate=0.1, steps=5, radius=1.0),
}


def network_loss(params, batch):
    images, wanted = batch
    for name in ("first", "second"):
        shapes = jax.lax.conv_dimension_numbers(
            images.shape, params[name].shape, ("NHWC", "HWIO", "NHWC")
        )
        images = jax.lax.conv_general_dilated(
            images, params[name], (1, 1), "SAME", dimension_numbers=shapes
        )
        images = jnp.tanh(images)
    return jnp.mean((jnp.mean(images, (1, 2)) @ params["head"] - wanted) ** 2)


def step_of(mechanism, loss=network_loss, params=NETWORK):
    """The compiled steps and the arguments of a call."""
    tx = cu.noisy_sgd(mechanism, 1.0, key=jax.random.key(0))
    loss = Loss.of(loss, Split.make(params))
    fixed, varied = noisy_step.parts(
        loss, mechanism, 1.0, None, None, False, None, jax.random.key(1)
    )
    run = kept_steps.Compiled(fixed, noisy_step.compiled_noisy).function
    carry = compiled_steps.owned((params, tx.init(params)))
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:BATCH]), DATA)
    return run, (varied, carry, batch, None, 0, 1)


def several(arguments, most):
    """The arguments of a call of several steps."""
    varied, carry, batch, *rest = arguments
    return varied, carry, jax.tree.map(lambda leaf: jnp.stack([leaf] * most), batch), *rest


def convolutions(jaxpr, in_loop=False):
    """For each convolution of a program, whether it is inside of a loop."""
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "conv_general_dilated":
            found.append(in_loop)
        for inner in programs.inner(equation.params):
            found += convolutions(inner, in_loop or name in ("while", "scan"))
    return found


@pytest.mark.parametrize("name", MECHANISMS)
def test_no_gradient_is_computed_inside_of_a_loop(name):
    run, arguments = step_of(MECHANISMS[name])
    program = jax.make_jaxpr(lambda *args: run(*args, most=1, layout=()))(*arguments)
    inside = convolutions(program.jaxpr)
    assert len(inside) >= 5
    assert not any(inside)
    # Several steps in one call are a loop, which is seen.
    program = jax.make_jaxpr(lambda *args: run(*args, most=2, layout=()))(*several(arguments, 2))
    assert all(convolutions(program.jaxpr))


def looped(text):
    """The text of what runs inside of loops, of a compiled program's."""
    bodies = dict(re.findall(r"^%?(\S+) \(.*?\) -> .*? \{\n(.*?)^\}", text, re.M | re.S))
    todo, seen = re.findall(r"body=%?([\w.\-]+)", text), set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", bodies[name])
            for branches in re.findall(r"branch_computations=\{(.*?)\}", bodies[name]):
                todo += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return "".join(bodies[name] for name in seen)


@pytest.mark.parametrize("name", ["clipped", pytest.param("projected", marks=pytest.mark.slow)])
def test_a_compiled_step_has_fast_convolutions_and_uses_its_memory_again(name):
    run, arguments = step_of(MECHANISMS[name])
    carry = arguments[1]
    compiled = run.lower(*arguments, most=1, layout=()).compile()
    text = compiled.as_text()
    if jax.default_backend() == "cpu":
        # In a loop, or what was one, the gradients' convolutions keep layouts such as f01b_i01o.
        layouts = re.findall(r"convolution\(.*dim_labels=([^,\s]+)", text)
        assert set(layouts) == {"b01f_01io->b01f"}
    inside = looped(text)
    assert "multiply" in inside  # the noise and the clip have loops of their own
    assert " convolution(" not in inside
    leaves = jax.tree.leaves(carry)
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)[1]
    pairs = [(int(i), int(j)) for i, j in re.findall(r"\{(\d+)\}: \((\d+),", aliases)]
    first = min(j for _, j in pairs)  # after the arguments that are kept
    assert sorted((i, j - first) for i, j in pairs) == [(i, i) for i in range(len(leaves))]
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in leaves)
    compiled(*arguments)
    assert all(leaf.is_deleted() for leaf in leaves)


@pytest.mark.parametrize(
    ("backend", "size", "convolutions", "steps"),
    [
        ("cpu", 2**18, False, 32),
        ("cpu", 2**18 + 1, False, 1),
        ("cpu", 10, True, 1),
        ("gpu", 10, True, 32),
        ("gpu", 2**22 + 1, False, 8),
        ("tpu", 2**25 + 1, False, 1),
    ],
)
def test_how_many_steps_go_into_a_call(backend, size, convolutions, steps, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    params = {"a": jax.ShapeDtypeStruct((size - 3,), np.float32), "b": np.zeros(3)}
    assert compiled_steps.longest_call(params, convolutions) == steps


def test_convolutions_are_found_wherever_they_are():
    def inner(kernel, images):
        shapes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=shapes
        )

    kernel, images = jnp.ones((3, 3, 1, 1)), jnp.ones((2, 4, 4, 1))
    ways = [
        inner,
        jax.jit(inner),
        jax.checkpoint(inner),
        lambda k, x: jax.lax.cond(k[0, 0, 0, 0] > 0, inner, lambda k, x: x, k, x),
        lambda k, x: jax.lax.scan(lambda x, _: (inner(k, x), None), x, None, length=2)[0],
        lambda k, x: jax.vmap(lambda one: inner(k, one[None]))(x),
    ]
    for way in ways:
        program = jax.make_jaxpr(jax.grad(lambda k, w=way: jnp.sum(w(k, images))))(kernel)
        assert programs.holds(program.jaxpr, "conv_general_dilated")
    other = jax.make_jaxpr(jax.jit(lambda k, x: jnp.sum(k) * x))(kernel, images)
    assert not programs.holds(other.jaxpr, "conv_general_dilated")
