"""Argument checks: what passes, and that every refusal names the argument in a line."""

import decimal
import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import certunlearn as cu
from certunlearn import mechanisms
from certunlearn._numerics import checks

HUGE = 10**5000  # Python refuses even to print it
NO_NUMBERS = [
    None,
    True,
    np.True_,
    np.array(True),
    jnp.array(True),
    "1",
    b"1",
    1j,
    np.complex64(1),
    np.ma.masked,
    np.ma.array(1.0),
    np.array(None, object),
    [1.0],
    np.zeros(100_000),
    object(),
    float,
    {},
    np.datetime64("2020"),
    np.timedelta64(1),
]


def refused(function, *arguments, **options):
    """The error's text, of TypeError or ValueError; in one short line."""
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*arguments, **options)
    assert type(caught.value) in (TypeError, ValueError)
    text = str(caught.value)
    assert text.startswith("some_name")
    assert len(text) < 250
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "value",
    [
        2,
        2.0,
        np.float32(2),
        np.int8(2),
        np.array(2.0),
        jnp.array(2),
        jnp.bfloat16(2),
        fractions.Fraction(2),
        decimal.Decimal(2),
    ],
)
def test_numbers_of_any_library_are_numbers(value):
    assert checks.real("x", value) == 2.0
    assert type(checks.positive("x", value)) is float
    assert checks.per_step("x", value, 3) == 2.0
    assert checks.per_step("x", [value, 1, value], 3) == (2.0, 1.0, 2.0)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda v: type(v).__name__)
def test_other_values_are_no_numbers(value):
    assert "one real number" in refused(checks.real, "some_name", value)
    assert "whole number" in refused(checks.positive_int, "some_name", value)
    assert "some_name" in refused(checks.open_unit, "some_name", value)
    if not callable(value):
        refused(checks.per_step, "some_name", value, 3)
    if np.ndim(value) == 0:
        refused(checks.per_step, "some_name", [1.0, value, 1.0], 3)


@pytest.mark.parametrize("value", [2, np.int8(2), np.uint64(2), np.array(2), jnp.array(2)])
def test_whole_numbers_of_any_library_are_whole(value):
    assert checks.positive_int("n", value) == 2
    assert type(checks.steps("n", value)) is int
    assert checks.optional_count("n", value) == 2
    for other in (2.0, np.float32(2), fractions.Fraction(2)):
        assert "a whole number, got" in refused(checks.positive_int, "some_name", other)


def test_numbers_beyond_what_computers_count_with_are_refused():
    assert "must fit a float64" in refused(checks.real, "some_name", 10**400)
    for value in (HUGE, -HUGE):
        assert "of 16610 bits" in refused(checks.real, "some_name", value)
        assert "of 16610 bits" in refused(checks.positive_int, "some_name", value)
        assert "of 16610 bits" in refused(checks.optional_count, "some_name", value)
        assert "of 16610 bits" in refused(checks.per_step, "some_name", [1.0, value], 2)
    assert checks.positive_int("n", 2**63 - 1) == 2**63 - 1
    assert "at most 9223372036854775807" in refused(checks.positive_int, "some_name", 2**63)


def test_steps_fit_the_counters_of_devices():
    assert checks.steps("steps", 2**31 - 2) == 2**31 - 2
    assert "must be at most 2147483646" in refused(checks.steps, "some_name", 2**31 - 1)
    with pytest.raises(ValueError, match="steps must be at most 2147483646, got 3000000000"):
        cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=3 * 10**9)


def test_flags_are_bools_of_python_and_numpy():
    assert checks.flag("f", np.True_) is True
    assert checks.flag("f", False) is False
    for value in (1, 0, "yes", None, np.array(True), [True]):
        assert "True or False" in refused(checks.flag, "some_name", value)
    ball = {"init_radius": 1.0, "clip_norm": 1.0, "learning_rate": 0.1, "steps": 2}
    assert cu.GradientClipping(**ball, memoryless=np.False_).memoryless is False


def test_choices_are_text():
    assert checks.choice("c", "b", ("a", "b")) == "b"
    for value in ("c", None, ["a"], np.array(["a", "b"]), {"a"}, 3):
        assert "must be one of 'a', 'b'" in refused(checks.choice, "some_name", value, ("a", "b"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1.0, None, 1.0], "got None at step 1"),
        ([1.0, 1.0, "1"], "got '1' at step 2"),
        ((True, 1.0, 1.0), "got True at step 0"),
        ([1.0, 1j, 1.0], "got 1j at step 1"),
        ([1.0, [1.0], 1.0], r"got \[1.0\] at step 1"),
        ([[1.0], [1.0, 2.0], 1.0], "at step 0"),
        ([1.0, 2.0], "for each of the 3 steps, got 2 numbers"),
        ([1.0] * 100_000, "for each of the 3 steps, got 100000 numbers"),
        (np.ones((3, 3)), r"array of shape \(3, 3\)"),
        (np.ones(100_000), r"array of shape \(100000,\)"),
        (np.ma.array([1.0, 2.0, 3.0]), "masked array"),
        (np.array([1.0, None, 2.0], object), "array of object"),
        (np.array(["1", "2", "3"]), "array of <U1"),
        (np.array([True] * 3), "array of bool"),
        (np.array([1j] * 3), "array of complex128"),
        ({1, 2, 3}, "numbers or a schedule, got {1, 2, 3}"),
        ({0: 1.0}, "numbers or a schedule"),
        (iter([1.0, 2.0, 3.0]), "numbers or a schedule"),
        ([1.0, math.nan, 1.0], "positive and finite, got nan at step 1"),
        (lambda t: None, "a schedule, must return numbers, got None"),
        (lambda t: "1", "a schedule, must return numbers, got '1'"),
        (lambda t: True, "a schedule, must return numbers, got True"),
        (lambda t: 1j, "a schedule, must return numbers, got 1j"),
        (lambda t: [1.0, 2.0], "must return one number for each step"),
        (lambda t: np.ones((5, 5)), "must return one number for each step"),
    ],
)
def test_odd_numbers_for_steps_are_named(value, words):
    with pytest.raises((TypeError, ValueError), match=words):
        checks.per_step("some_name", value, 3)
    refused(checks.per_step, "some_name", value, 3)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        1j,
        [[1.0], [1.0, 2.0]],
        [1.0, None],
        ["1", "2"],
        np.ma.array([1.0, 2.0]),
        np.array([1.0, None], object),
        np.array([1j]),
        iter([1.0]),
        scipy.sparse.eye(3),
        {"a": 1.0},
        jax.random.key(0),
    ],
    ids=lambda v: type(v).__name__,
)
def test_arrays_of_anything_else_are_refused(value):
    assert "an array of real numbers" in refused(checks.numbers, "some_name", value)
    loss = cu.convex.logistic_regression(feature_norm=1.0, l2=0.1)
    good = np.zeros((2, 3)), np.zeros(2)
    for data in ((value, good[1]), (good[0], value), value, (*good, value)):
        with pytest.raises((TypeError, ValueError), match=r"(features|targets|data) must be"):
            cu.convex.gradient_norm(loss, loss.init(3), data)
    with pytest.raises(TypeError, match="features must be an array of real numbers"):
        cu.convex.clip_features(value, 1.0)
    with pytest.raises(TypeError, match="params must be an array of real numbers"):
        cu.convex.gradient_norm(loss, value, good)


def test_arrays_of_numbers_are_passed_on():
    for value in ([1.0, 2.0], np.ones(2), jnp.ones(2), np.array([True]), jnp.ones(2, jnp.bfloat16)):
        np.testing.assert_array_equal(checks.numbers("x", value), value)
    traced = jax.jit(lambda x: cu.convex.clip_features(checks.numbers("x", x), 1.0))
    assert traced(jnp.ones((2, 3))).shape == (2, 3)


def test_messages_show_no_key_state_or_array():
    key = jax.random.key(271828)
    tx = cu.noisy_sgd(cu.OutputPerturbation(init_radius=1.0), 1.0, key=key)
    for value in (key, jax.random.key_data(key), tx.init(jnp.full(2, 0.5)), [key], {"k": key}):
        for check in (checks.real, checks.steps, checks.flag):
            text = refused(check, "some_name", value)
            assert "271828" not in text
            assert "0.5" not in text
        refused(checks.choice, "some_name", value, ("a",))
    with pytest.raises(TypeError) as caught:
        mechanisms.check(tx.init(jnp.ones(2)))
    assert "271828" not in str(caught.value)


def test_long_values_are_cut_in_messages():
    class Loud:
        def __repr__(self):
            return "x" * 10**6

    class Broken:
        def __repr__(self):
            raise RuntimeError

    for value in (Loud(), Broken(), "y" * 10**6, [["z"] * 1000] * 1000, {"k": [HUGE]}, [HUGE]):
        assert len(checks.shown(value)) <= 80
        assert len(refused(checks.real, "some_name", value)) < 130


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {"name": ["GradientClipping"]},
        {"name": None},
        {"name": "x" * 10**6},
        {"name": "OutputPerturbation", "init_radius": HUGE, "reference": "retrained"},
        {"name": "OutputPerturbation", "init_radius": 1.0, "reference": {}},
        {"name": "OutputPerturbation", "init_radius": 1.0, "reference": "retrained", "\x1b[2J": 1},
        {"name": "OutputPerturbation", 3: 4},
    ],
)
def test_records_of_anything_are_refused_in_a_printable_line(record):
    with pytest.raises((TypeError, ValueError)) as caught:
        mechanisms.from_record(record)
    text = str(caught.value)
    assert len(text) < 300
    assert text.isprintable()
    with pytest.raises(TypeError) as caught:
        mechanisms.check([0] * 10**6)
    assert len(str(caught.value)) < 300
