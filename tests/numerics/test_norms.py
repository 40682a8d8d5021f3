"""The strict ball: bound, tightness and every odd input."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from certunlearn._numerics import folded_sums, norms

SIZES = (1, 7, 128, 129, 1000, 5003)
clip = jax.jit(norms.clip_tree)
# What clipping may cost: the norm is aimed at, not only bounded.
LOSS = 3e-5


def exact_norm(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return math.sqrt(math.fsum(np.square(np.concatenate(leaves)).tolist())) if leaves else 0.0


def spread(rng, size, exponents):
    return (rng.normal(size=size) * 10.0 ** rng.uniform(*exponents, size=size)).astype(np.float32)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=2),
    exponent=st.floats(-30, 30),
    width=st.floats(0, 3),
    radius_exponent=st.floats(-30, 30),
)
@pytest.mark.slow
def test_norm_is_at_most_the_bound_for_all_magnitudes(
    seed, sizes, exponent, width, radius_exponent
):
    rng = np.random.default_rng(seed)
    tree = [spread(rng, n, (exponent - width, exponent)) for n in sizes]
    max_norm = min(max(10.0**radius_exponent, 1e-30), 1e30)
    out = clip(tree, max_norm)
    before, after = exact_norm(tree), exact_norm(out.tree)
    assert after <= max_norm
    assert not out.nonfinite
    if before <= max_norm * (1 - LOSS):
        assert not out.clipped
        for a, b in zip(tree, out.tree, strict=True):
            np.testing.assert_array_equal(a, b)
    else:
        assert after >= max_norm * (1 - LOSS)


def test_optax_overshoots_where_this_does_not():
    rng = np.random.default_rng(0)
    reference = optax.clip_by_global_norm(1.0)
    theirs, ours = [], []
    for _ in range(100):
        tree = [jnp.asarray(rng.normal(size=1000).astype(np.float32))]
        theirs.append(exact_norm(reference.update(tree, reference.init(tree))[0]))
        ours.append(exact_norm(clip(tree, 1.0).tree))
    assert max(theirs) > 1.0
    assert max(ours) <= 1.0
    np.testing.assert_allclose(ours, theirs, rtol=LOSS)


def test_the_radius_itself_is_rounded_safely():
    for max_norm in (0.1, 1 / 3, 0.7, 1 + 2**-24, 3e-30, 7e29):
        tree = jnp.asarray([max_norm * 10 if max_norm < 1e29 else 1e30], jnp.float32)
        assert exact_norm(clip(tree, max_norm).tree) <= max_norm
        # A vector whose float32 norm rounds to the radius from above.
        edge = jnp.asarray([np.nextafter(np.float32(max_norm), np.float32(np.inf))])
        assert exact_norm(clip(edge, max_norm).tree) <= max_norm


@pytest.mark.slow
@pytest.mark.parametrize("value", [1.0, 0.3, 1e-25, 1e25])
def test_ten_million_equal_elements(value):
    tree = jnp.full(10**7, value, jnp.float32)
    after = exact_norm(clip(tree, value).tree)
    assert value * (1 - LOSS) <= after <= value


@pytest.mark.slow
def test_long_sums_keep_within_their_promised_error():
    rng = np.random.default_rng(1)
    for size in (1, 2, 127, 128, 129, 1024, 1031, 99991):
        terms = np.abs(spread(rng, size, (-6, 0)))
        total, depth = folded_sums.folded_sum(jnp.asarray(terms))
        exact = math.fsum(terms.astype(np.float64).tolist())
        assert abs(float(total) / exact - 1) <= 1.01 * depth * 2.0**-24
        assert depth <= 127 + 4 * math.ceil(math.log(max(size, 8), 8))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 64, 4999])
def test_one_nonfinite_element_zeroes_the_whole_tree(bad, place):
    leaf = np.ones(5000, np.float32)
    leaf[place] = bad
    out = clip({"a": leaf, "b": jnp.ones(3)}, 1.0)
    assert out.nonfinite
    assert not out.clipped
    assert exact_norm(out.tree) == 0.0


def test_largest_and_smallest_float32_numbers():
    huge = jnp.full(300, np.finfo(np.float32).max)
    for max_norm in (1e-30, 1.0, 1e30):
        after = exact_norm(clip(huge, max_norm).tree)
        assert max_norm * (1 - LOSS) <= after <= max_norm
    smallest = jnp.full(300, np.finfo(np.float32).tiny) * 0.25
    out = clip(smallest, 1e-30)
    assert not out.clipped
    assert exact_norm(clip(jnp.zeros(5), 1e-30).tree) == 0.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_narrow_leaves_are_normed_and_returned_in_float32(dtype):
    leaf = jnp.full(3000, 3, dtype)
    out = clip(leaf, 1.0)
    assert out.tree.dtype == jnp.float32
    assert 1 - LOSS <= exact_norm(out.tree) <= 1.0


def test_float64_leaves_beside_float32_ones():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        for max_norm in (0.1, 1e-30, 1e30):
            wide = {"a": jnp.asarray(rng.normal(size=4001) * max_norm)}
            mixed = wide | {"b": jnp.asarray(rng.normal(size=401) * max_norm, jnp.float32)}
            for tree in (wide, mixed):
                out = norms.clip_tree(tree, max_norm).tree
                assert out["a"].dtype == jnp.float64
                long = [np.asarray(leaf, np.longdouble) for leaf in jax.tree.leaves(out)]
                after = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in long))
                assert max_norm * (1 - LOSS) <= after <= max_norm
            assert mixed["b"].dtype == out["b"].dtype


def test_empty_trees_and_empty_leaves():
    assert norms.clip_tree({}, 1.0).tree == {}
    out = norms.clip_tree([jnp.zeros((0, 3)), jnp.full(4, 9.0)], 1.0)
    assert out.tree[0].shape == (0, 3)
    assert exact_norm(out.tree) <= 1.0


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, 1e-37])
def test_a_traced_radius_out_of_range_means_no_update(bound):
    assert exact_norm(clip(jnp.ones(5), bound).tree) == 0.0
    assert exact_norm(clip(jnp.full(5, 1e35), np.inf).tree) <= 1e30


def test_clip_under_vmap_equals_one_by_one():
    rows = jnp.asarray(np.random.default_rng(3).normal(size=(6, 300)).astype(np.float32))
    rows = rows.at[2, 5].set(jnp.nan)
    together = jax.vmap(lambda r: norms.clip_tree(r, 1.0))(rows)
    for i, row in enumerate(rows):
        alone = norms.clip_tree(row, 1.0)
        np.testing.assert_allclose(together.tree[i], alone.tree, rtol=1e-6)
        assert bool(together.nonfinite[i]) == (i == 2)
        assert exact_norm(together.tree[i]) <= 1.0


def test_the_norm_bound_is_above_and_close():
    tree = [jnp.asarray(np.random.default_rng(4).normal(size=9999).astype(np.float32))]
    exact = exact_norm(tree)
    assert exact <= float(norms.norm_bound(tree)) <= exact * (1 + LOSS)
    assert np.isnan(norms.norm_bound([jnp.array([jnp.inf])]))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan, 1e-31, 1e31])
def test_bad_radius_is_an_error(bad):
    with pytest.raises(ValueError, match="max_norm"):
        norms.clip_tree(jnp.ones(2), bad)


def test_wrong_types_are_errors():
    with pytest.raises(TypeError, match="max_norm"):
        norms.clip_tree(jnp.ones(2), "1")
    with pytest.raises(TypeError, match="complex"):
        norms.clip_tree(jnp.ones(2, jnp.complex64), 1.0)
