"""What the clip is compiled to: measured numbers are scaled numbers, few passes, no gathers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bound_helpers import MODES, exact_norm

from certunlearn import transforms
from certunlearn._numerics import folded_sums, norms, programs, small_leaves


def cancelling(rows=6, width=300):
    """Numbers of which a b - c is another with a fused multiply-add than without."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(rows, width)).astype(np.float32) for _ in range(2))
    return a, b, a * b


@pytest.mark.parametrize("mode", ["jit", "jit of vmap", "jit of scan"])
def test_what_is_measured_is_what_is_scaled(mode):
    def residue(a, b, c):
        out = norms.clip_tree({"w": a * b - c, "v": jnp.sin(a) * b - c}, 1e-9)
        return out.tree["w"], 3.0 + out.tree["w"], out.tree["v"]

    for w, _, v in zip(*map(np.asarray, MODES[mode](residue)(*cancelling())), strict=True):
        assert math.hypot(exact_norm(w), exact_norm(v)) <= 1e-9


@pytest.mark.parametrize("clip", [norms.clip_tree, norms.sum_of_clipped])
def test_only_the_loop_reads_the_numbers(clip):
    # Where anything else reads them, a compiler may work them out twice, and scale other numbers.
    leaf = jnp.ones((3, 300))
    jaxpr = jax.make_jaxpr(lambda leaf: clip({"w": leaf}, 1.0).tree)(leaf).jaxpr
    while any(inner := [e for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")]) and not any(
        e.primitive.name == "while" for e in jaxpr.eqns
    ):
        jaxpr = inner[0].params["jaxpr"].jaxpr
    readers = [
        e for e in jaxpr.eqns if jaxpr.invars[0] in [v for v in e.invars if v in jaxpr.invars]
    ]
    assert [e.primitive.name for e in readers] == ["while"]
    out = [v for v in readers[0].outvars if v.aval.shape == leaf.shape]
    assert len(out) == 1  # which is scaled
    assert any(out[0] is v for e in jaxpr.eqns for v in e.invars)


def test_summed_examples_are_each_inside():
    # One example at a time is not zero, so its share of the sum can be read.
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(7, 300)).astype(np.float32) * 10.0 ** rng.integers(-6, 30, (7, 1))
    rows = rows.astype(np.float32)
    rows[3, 5], rows[5, 7] = np.nan, np.inf
    out = jax.jit(norms.sum_of_clipped)({"a": rows, "b": rows[:, :40]}, 0.3)
    assert out.nonfinite.tolist() == [i in (3, 5) for i in range(7)]
    alone = [norms.clip_tree({"a": row, "b": row[:40]}, 0.3) for row in rows]
    assert out.clipped.tolist() == [bool(one.clipped) for one in alone]
    for name in "ab":
        total = sum(np.asarray(one.tree[name], np.float64) for one in alone)
        np.testing.assert_allclose(out.tree[name], total, rtol=1e-5, atol=1e-6)
    for i in range(7):
        single = norms.sum_of_clipped({"a": rows[i : i + 1], "b": rows[i : i + 1, :40]}, 0.3)
        assert math.hypot(*map(exact_norm, single.tree.values())) <= 0.3


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "shape",
    [(4097,)] + [pytest.param(s, marks=SLOW) for s in ((5000, 3), (3, 7, 11, 13), (2, 2, 1021))],
)
def test_a_folded_sum_keeps_its_word(shape):
    # A plain sum would stay at one: each further term is below half a spacing.
    terms = np.full(shape, 2.0**-25, np.float32)
    terms.flat[0] = 1
    exact = math.fsum(terms.ravel().tolist())
    total, depth = folded_sums.folded_sum(jnp.asarray(terms))
    assert depth <= 158 + 7 * max(0, math.ceil(math.log(terms.size / 4096, 8)))
    assert abs(float(total) / exact - 1) <= depth * 2.0**-24
    rows, _ = folded_sums.folded_sum(jnp.stack([terms, terms]), rows=1)
    np.testing.assert_allclose(rows, [exact, exact], rtol=depth * 2.0**-24)


def reductions(text):
    return sum(" reduce(" in line for line in text.splitlines())


def test_a_sum_of_sums_is_not_merged():
    terms = jnp.ones((64, 64))
    compiled = lambda f: jax.jit(f).lower(terms).compile().as_text()  # noqa: E731
    assert reductions(compiled(lambda x: folded_sums.folded_sum(x)[0])) == 2


def clipped_lines(count, shape):
    tree = [jnp.ones(shape)] * count
    return len(jax.jit(norms.clip_tree).lower(tree, 1.0).as_text().splitlines())


@pytest.mark.parametrize(("shape", "most"), [((64, 64), 70), ((300, 300), 130)])
def test_the_program_grows_little_with_each_leaf(shape, most):
    few, many = clipped_lines(10, shape), clipped_lines(30, shape)
    assert many - few <= 20 * most


def kernels(count, shape):
    tree = [jnp.ones(shape(i)) for i in range(count)]
    return jax.jit(norms.clip_tree).lower(tree, 1.0).compile().as_text().count(" fusion(")


def test_a_small_leaf_of_its_own_shape_costs_one_kernel():
    assert kernels(20, lambda i: (10 + i, 30)) - kernels(16, lambda i: (10 + i, 30)) <= 4
    large = lambda i: (300, 300 + i)  # noqa: E731  # not copied: these cost more
    assert kernels(4, large) - kernels(2, large) > 6


def many_leaves(scale):
    """Small leaves of many shapes, some alike, an empty one, and a large one."""
    rng = np.random.default_rng(0)
    shapes = [(3 + i, 2) for i in range(20)] + [(5,)] * 5 + [(0, 3), (), (70_000,)]
    return [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes]


FAST = ("jit", "jit of vmap", "jit of scan")


@pytest.mark.parametrize(
    "mode", [mode if mode in FAST else pytest.param(mode, marks=SLOW) for mode in MODES]
)
def test_small_leaves_end_to_end_are_clipped_as_one_tree(mode):
    trees = [many_leaves(scale) for scale in (1e-6, 1.0, 1e25)]
    trees.append([leaf.at[:1].set(jnp.nan) if leaf.ndim else leaf for leaf in trees[1]])
    clip = MODES[mode](lambda *leaves: tuple(norms.clip_tree(leaves, 0.5).tree))
    found = clip(*map(jnp.stack, zip(*trees, strict=True)))
    for row, tree in enumerate(trees[:3]):
        whole = math.hypot(*map(exact_norm, tree))
        for leaf, clipped in zip(tree, found, strict=True):
            if whole < 0.4:
                np.testing.assert_array_equal(clipped[row], leaf)
            expected = np.asarray(leaf, np.float64) * min(1.0, 0.5 / whole)
            np.testing.assert_allclose(clipped[row], expected, rtol=3e-5, atol=1e-30)
        assert math.hypot(*(exact_norm(leaf[row]) for leaf in found)) <= 0.5
    assert not any(np.any(leaf[3]) for leaf in found)


def test_leaves_of_other_dtypes_are_not_joined():
    tree = [leaf.astype(jnp.float16) if i % 2 else leaf for i, leaf in enumerate(many_leaves(1.0))]
    groups = small_leaves.groups([jnp.asarray(leaf) for leaf in tree])
    assert sorted(place for places in groups for place in places) == list(range(len(tree)))
    assert all(len({tree[place].dtype for place in places}) == 1 for places in groups)
    assert math.hypot(*map(exact_norm, norms.clip_tree(tree, 0.5).tree)) <= 0.5


def test_the_clip_holds_no_copy_of_the_gradient():
    size = 2**20

    def step(params, gradient):
        update = norms.clip_tree(jnp.sin(gradient) * params, 1.0).tree
        return params - 0.1 * update

    analysis = jax.jit(step).lower(jnp.ones(size), jnp.ones(size)).compile().memory_analysis()
    # The gradient itself, and an eighth of it.
    assert analysis.temp_size_in_bytes <= 4 * size * 1.2


def convolutions(jaxpr, looped=False):
    """For each convolution in a program, whether it is in a loop."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append(looped)
        inside = looped or equation.primitive.name in ("while", "scan")
        for inner in programs.inner(equation.params):
            found += convolutions(inner, inside)
    return found


def test_no_convolution_is_in_a_loop():
    kernel, images = jnp.ones((3, 3, 1, 4)), jnp.ones((16, 8, 8, 1))
    layout = ("NHWC", "HWIO", "NHWC")

    def loss(kernel, batch):
        out = jax.lax.conv_general_dilated(batch, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return jnp.mean(out**2)

    def steps(kernel, batch):
        clip = optax.chain(transforms.clip_by_global_norm(1.0), optax.sgd(0.1))
        updates, _ = clip.update(jax.grad(loss)(kernel, batch), clip.init(kernel))
        parts = [
            transforms.clipped_value_and_grad(loss, 1.0, per_example, microbatch_size=8)
            for per_example in (True, False)
        ]
        return updates, [part(kernel, batch)[1] for part in parts]

    jaxpr = jax.make_jaxpr(steps)(kernel, images).jaxpr
    assert len(convolutions(jaxpr)) >= 6
    assert not any(convolutions(jaxpr))


@pytest.mark.parametrize("center", [None, pytest.param(1.0, marks=SLOW)])
def test_parameters_are_clipped_inside_any_trace(center):
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3)}
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    if center is not None:
        center = jax.tree.map(lambda leaf: jnp.full_like(leaf, center), params)

    def clip(params, radius=2.0):
        return transforms.clip_params(params, radius, center)

    alone = [clip(jax.tree.map(lambda leaf, i=i: leaf[i], rows)) for i in range(2)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    both = (
        jax.jit(jax.vmap(clip))(rows, jnp.full(2, 2.0)),
        jax.lax.scan(lambda x, p: (x, clip(p)), 0, rows)[1],
    )
    for out in both:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), out, expected)
    # What is concrete is still checked.
    bad = params | {"b": jnp.array([1.0, np.nan, 1.0])}
    with pytest.raises(ValueError, match="params must be finite"):
        jax.jit(lambda radius: clip(bad, radius))(1.0)
    with pytest.raises(ValueError, match="radius"):
        jax.jit(lambda params: clip(params, -1.0))(params)
