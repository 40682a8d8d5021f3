"""Rows in fixed point: the rule by an independent derivation, in every dtype and company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums_helpers import features, fixed_row

from certunlearn.sums import Settings
from certunlearn.sums.fixed_point import _ceil_sqrt

NUMBERS = st.one_of(
    st.floats(width=64), st.floats(-4, 4), st.sampled_from([0.0, -0.0, 1.0, 1.5, 5e-324, 1.7e308])
)


def rule(d, norm=1.0, bits=20, **rest):
    return Settings(num_features=d, feature_norm=norm, bits=bits, **rest)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(NUMBERS, min_size=1, max_size=5),
    st.one_of(st.floats(1e-30, 1e30), st.sampled_from([1.0, 2.0**-20, 0.75, 3.0])),
    st.integers(2, 20),
)
def test_rows_follow_the_rule(row, norm, bits):
    found = rule(len(row), norm, bits).feature_rows(np.array([row]))
    assert found[0].tolist() == fixed_row(row, norm, bits)


@pytest.mark.parametrize("norm", [1.0, 0.7])
def test_rows_whose_largest_entry_is_the_norm_times_a_power_of_two(norm):
    x = features(40, 3) / 3
    x[:, 1] = norm * 2.0 ** (np.arange(40) % 5)
    found = rule(3, norm, 6).feature_rows(x).tolist()
    assert found == [fixed_row(row, norm, 6) for row in x.tolist()]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=4), st.floats(0.25, 3), st.integers(4, 20))
def test_rounding_and_clipping_are_close(row, norm, bits):
    public = rule(len(row), norm, bits)
    stored = public.feature_rows(np.array([row]))[0] * public.feature_unit
    length = np.linalg.norm(row)
    wanted = np.array(row) * (1 if length <= norm else norm / length)
    assert np.abs(stored - wanted).max() <= (2 + len(row)) * public.feature_unit


def test_long_rows_keep_their_direction_and_get_the_norm():
    x = features(50, 8) * 10.0 ** np.arange(-3, 47)[:, None]
    public = rule(8, 2.0)
    q = public.feature_rows(x).astype(np.float64)
    lengths = np.linalg.norm(q, axis=1)
    assert (lengths <= public.norm_in_units).all()
    assert (lengths[10:] > public.norm_in_units - 8).all()
    cosines = (q * x / np.linalg.norm(x, axis=1)[:, None]).sum(1) / lengths
    assert (cosines[10:] > 1 - 1e-9).all()


def test_a_row_does_not_see_the_others():
    x = features(1300, 7)
    x[5], x[600, 2], x[601, 3], x[900] = 1e300, np.nan, -np.inf, 5.0
    public = rule(7, 3.0)
    alone = np.vstack([public.feature_rows(row[None]) for row in x])
    np.testing.assert_array_equal(public.feature_rows(x), alone)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_array_equal(public.feature_rows(x[order]), alone[order])
    assert not alone[600].any()
    assert not alone[601].any()


def test_all_dtypes_and_layouts_of_the_same_numbers_are_the_same():
    x = np.round(features(40, 6) * 8).clip(-100, 100)
    public = rule(6, 30.0, 12)
    expected = public.feature_rows(x)
    for dtype in (np.float32, np.float16, np.int8, np.int64, jnp.bfloat16):
        np.testing.assert_array_equal(public.feature_rows(x.astype(dtype)), expected)
    wide = np.zeros((80, 12))
    wide[::2, 1::2] = x
    for same in (wide[::2, 1::2], np.asfortranarray(x), x.T.copy().T, x.tolist(), x.astype(">f8")):
        np.testing.assert_array_equal(public.feature_rows(same), expected)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32):
        np.testing.assert_array_equal(public.feature_rows(jnp.asarray(x, dtype)), expected)
    np.testing.assert_array_equal(rule(2).feature_rows(np.array([[True, False]])), [[2**19, 0]])


def test_features_are_not_changed():
    x = features() * 100
    before = x.copy()
    rule(5).feature_rows(x)
    np.testing.assert_array_equal(x, before)


def test_the_largest_dimension_at_the_largest_numbers_is_exact():
    d = 2**14
    x = np.full((2, d), 1e300)
    x[1] = 1.0  # each at most the norm, together 128 times it
    q = rule(d).feature_rows(x)
    assert (q == 2**19 // 2**7).all()
    with pytest.raises(ValueError, match="num_features must be from 1 to 16384"):
        rule(d + 1)


def test_roots_are_rounded_up():
    roots = np.concatenate([np.arange(2, 200), 2**26 - np.arange(200), [94906265]])
    roots = roots[roots <= 2**26].astype(np.int64)
    squares = np.concatenate([roots**2, roots**2 - 1, roots**2 - 2 * roots + 2])
    np.testing.assert_array_equal(_ceil_sqrt(squares), np.tile(roots, 3))
    np.testing.assert_array_equal(_ceil_sqrt(np.array([1, 2])), [1, 2])


@pytest.mark.parametrize("norm", [1.0, 1.0 + 2**-52, 1 - 2**-53, 0.5, 3.0, 1e-30, 1e30])
def test_units_are_powers_of_two_that_hold_the_norm(norm):
    public = rule(1, norm, 8, target_norm=norm)
    for unit, exponent, most in (
        (public.feature_unit, public.feature_exponent, 2**7),
        (public.target_unit, public.target_exponent, 2**31),
    ):
        assert unit == 2.0**exponent
        assert most / 2 < norm / unit <= most


# ------------------------------------------------------------------------------ targets


def test_targets_are_rounded_to_their_unit():
    public = rule(1, target_norm=3.0)
    y = np.array([3.0, -3.0, 0.1, 1e-12, -0.0])
    found = public.target_rows(y)
    assert found.dtype == np.int64
    assert found.shape == (5, 1)
    np.testing.assert_array_equal(found[:, 0], np.rint(y / public.target_unit))
    assert np.abs(rule(1, target_norm=4.0).target_rows(np.array([4.0]))).max() == 2**31
    two = rule(1, target_norm=3.0, outputs=2).target_rows(np.stack([y, -y], 1))
    np.testing.assert_array_equal(two, np.stack([found[:, 0], -found[:, 0]], 1))


@pytest.mark.parametrize("bad", [3.0000001, -4.0, np.nan, np.inf])
def test_targets_that_are_too_large_are_named(bad):
    y = np.zeros(10)
    y[7] = bad
    with pytest.raises(ValueError, match=r"magnitude at most target_norm, 3, got .* at row 7"):
        rule(1, target_norm=3.0).target_rows(y)
    with pytest.raises(ValueError, match="at row 107"):
        rule(1, target_norm=3.0).target_rows(y, first_row=100)
    with pytest.raises(ValueError, match="at row 3"):
        rule(1, target_norm=3.0, outputs=2).target_rows(y.reshape(5, 2))


@pytest.mark.parametrize("bad", [-1, 3, 1.5, np.nan, np.inf, -np.inf, 2**63, -(2**63)])
def test_labels_that_are_no_classes_are_named(bad):
    public = rule(1, classes=3)
    with pytest.raises(ValueError, match=r"labels, whole numbers from 0 to 2, got .* at row 2"):
        public.target_rows(np.array([0, 1, bad]))
    for dtype in (np.float32, np.uint8, np.int64, bool):
        assert public.target_rows(np.array([0, 1], dtype)).tolist() == [0, 1]


def test_shapes_and_kinds_are_checked():
    public = rule(3, classes=2)
    with pytest.raises(ValueError, match=r"features must be of shape \[n, 3\], got \(2, 4\)"):
        public.feature_rows(np.ones((2, 4)))
    for wrong in (np.ones((2, 3), complex), [["a"] * 3], np.ma.ones((2, 3)), object()):
        with pytest.raises(TypeError, match="features must be an array of real numbers"):
            public.feature_rows(wrong)
    with pytest.raises(ValueError, match=r"targets must be of shape \[n\]"):
        public.target_rows(np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"targets must be of shape \[n, 2\]"):
        rule(3, outputs=2).target_rows(np.ones(2))
    with pytest.raises(TypeError, match="JAX is tracing"):
        jax.jit(public.feature_rows)(jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"bits": 21}, ValueError, "bits must be from 2 to 20, got 21"),
        ({"bits": 1}, ValueError, "bits"),
        ({"bits": 8.0}, TypeError, "bits"),
        ({"num_features": 0}, ValueError, "num_features"),
        ({"feature_norm": 0.0}, ValueError, "feature_norm"),
        ({"feature_norm": np.nan}, ValueError, "feature_norm"),
        ({"feature_norm": 1e31}, ValueError, "feature_norm"),
        ({"target_norm": -1.0}, ValueError, "target_norm"),
        ({"classes": 1}, ValueError, "classes must be from 2 to 4096, got 1"),
        ({"classes": 5000}, ValueError, "classes"),
        ({"outputs": 5000}, ValueError, "outputs"),
        ({"outputs": 2, "classes": 2}, ValueError, "give one of them"),
        ({"class_weights": (1, 2)}, ValueError, "no labels"),
        ({"class_weights": (1, 2, 3), "classes": 2}, ValueError, "2 are needed, got 3"),
        ({"class_weights": (1, 256), "classes": 2}, ValueError, r"class_weights\[1\]"),
        ({"class_weights": (0, 2), "classes": 2}, ValueError, r"class_weights\[0\]"),
        ({"class_weights": (1, 0.5), "classes": 2}, TypeError, r"class_weights\[1\]"),
        ({"class_weights": 3, "classes": 2}, TypeError, "one a class"),
    ],
)
def test_settings_are_checked(change, kind, message):
    with pytest.raises(kind, match=message):
        Settings(**{"num_features": 4} | change)


def test_settings_are_plain_numbers_and_compare():
    odd = Settings(
        num_features=np.int64(3), classes=np.int32(2), class_weights=np.array([1, 2]), bits=8
    )
    assert odd == Settings(num_features=3, classes=2, class_weights=[1, 2], bits=8)
    assert type(odd.num_features) is int
    assert type(odd.class_weights[0]) is int
    assert hash(odd) == hash(Settings(num_features=3, classes=2, class_weights=(1, 2), bits=8))
