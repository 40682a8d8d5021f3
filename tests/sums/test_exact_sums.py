"""Exact sums are those of Python's integers, by every route, at every edge."""

import dataclasses
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums_helpers import features, labels, python_sums, same_sums

from certunlearn import sums
from certunlearn.sums import WideIntegers, block_products, device_products, statistics

KINDS = {
    "labels": (labels(), {}),
    "weights": (labels(), {"class_weights": (3, 255, 1)}),
    "regression": (features(60, 1, 2)[:, 0], {}),
    "outputs": (features(60, 4, 3) * 300, {"target_norm": 2000.0}),
}


def collected(kind, rows=slice(None), **options):
    targets, settings_ = KINDS[kind]
    return sums.collect(features()[rows], targets[rows], feature_norm=2.0, **settings_, **options)


def check_by_python(stats, x, y):
    whole = stats.settings.target_rows(y)
    gram, cross = python_sums(stats.settings, stats.settings.feature_rows(x), whole)
    assert (stats.gram.to_objects() == gram).all()
    assert (stats.cross.to_objects() == cross).all()
    assert stats.rows == len(x)
    if stats.settings.classes is None:
        assert stats.class_counts is None
        assert stats.weight == len(x)
    else:
        counts = np.bincount(whole, minlength=stats.settings.classes)
        assert stats.class_counts.tolist() == counts.tolist()
        assert stats.weight == counts @ (stats.settings.class_weights or np.ones_like(counts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_device", [False, True])
def test_sums_are_those_of_pythons_integers(kind, on_device):
    check_by_python(collected(kind, on_device=on_device), features(), KINDS[kind][0])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(-3, 3), min_size=2, max_size=2), st.floats(-9, 9)), max_size=8
    ),
    st.integers(2, 20),
    st.randoms(use_true_random=False),
)
def test_any_order_of_adding_and_removing_gives_the_same_sums(rows, bits, random):
    start = sums.empty(2, bits=bits, target_norm=10.0)
    x, y = np.array([row for row, _ in rows]).reshape(-1, 2), np.array([t for _, t in rows])
    whole = sums.add(start, x, y)
    check_by_python(whole, x, y)
    kept = [i for i in range(len(rows)) if random.random() < 0.5]
    gone = [i for i in range(len(rows)) if i not in kept]
    random.shuffle(gone)
    left = sums.remove(whole, x[gone], y[gone])
    one_by_one = whole
    for i in gone:
        one_by_one = sums.remove(one_by_one, x[[i]], y[[i]])
    never = sums.add(start, x[kept[::-1]], y[kept[::-1]])
    assert sums.digest(left) == sums.digest(never) == sums.digest(one_by_one)
    assert same_sums(left, never)
    assert same_sums(left, one_by_one)
    assert sums.remove(left, x[kept], y[kept]).gram.is_zero()


@pytest.mark.parametrize("kind", KINDS)
def test_every_route_gives_the_same_bits(kind):
    x, (y, chosen) = features(), KINDS[kind]
    whole = collected(kind)
    start = dataclasses.replace(sums.remove(whole, x, y), index=None)
    assert same_sums(start, statistics.no_rows(whole.settings, None))
    order = np.random.default_rng(4).permutation(60)
    cuts = np.split(order, [1, 30, 31, 31])
    stream = [(x[part], y[part]) for part in cuts]
    routes = [
        collected(kind, order),
        collected(kind, index=False),
        sums.collect(iter(stream), feature_norm=2.0, **chosen, classes=whole.settings.classes),
        sums.add(start, stream),
        sums.add(start, iter(stream), on_device=True),
        sums.merge(sums.add(start, *stream[0]), sums.add(start, stream[1:])),
        sums.remove(sums.add(whole, x[5:9], y[5:9]), x[5:9], y[5:9]),
        sums.sums_of(whole.settings, x, y),
        sums.sums_of(whole.settings, stream),
        sums.collect(jnp.asarray(x), y, feature_norm=2.0, **chosen)
        if x.dtype == np.float32
        else sums.collect(x.tolist(), y.tolist(), feature_norm=2.0, **chosen),
    ]
    for route in routes:
        assert same_sums(route, whole)
        assert sums.digest(route) == sums.digest(whole)


@pytest.mark.parametrize("on_device", [False, True])
def test_blocks_of_rows_do_not_matter(monkeypatch, on_device):
    wanted = collected("weights")
    for size, pending in ((1, 2**23), (7, 300), (60, 2**23)):
        monkeypatch.setattr(statistics, "BLOCK_ROWS", size)
        monkeypatch.setattr(statistics, "_MOST_PENDING_WEIGHT", pending)
        assert same_sums(collected("weights", on_device=on_device), wanted)
        assert same_sums(sums.remove(sums.add(wanted, features(), labels()), features(), labels()),
                         wanted)  # fmt: skip


@pytest.mark.parametrize("multiply", [block_products.products, device_products.products])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_full_block_of_the_largest_numbers_is_exact(multiply, sign):
    n = block_products.BLOCK_ROWS
    public = sums.Settings(num_features=2, target_norm=1.0)
    rows = np.full((n, 2), 2**19, np.int32) * np.array([1, sign], np.int32)
    rows[-1] = 2**19 - 1, sign
    y = np.full((n, 1), sign * 2**31)
    y[-1] -= sign
    gram, cross = multiply(public, rows, y)
    expected = python_sums(public, rows, y)
    assert (gram.astype(object) == expected[0]).all()
    found = sum(part.astype(object) * 2**shift for shift, part in cross.items())
    assert (found == expected[1]).all()
    weighted = sums.Settings(num_features=2, classes=2, class_weights=(255, 254))
    given = np.arange(n) % 2
    gram, cross = multiply(weighted, rows, given)
    expected = python_sums(weighted, rows, given)
    assert (gram.astype(object) == expected[0]).all()
    assert (cross[0].astype(object) == expected[1]).all()


@pytest.mark.parametrize("bits", [2, 3, 7, 8, 14, 15, 20])
def test_devices_multiply_all_digits(bits):
    public = sums.Settings(num_features=64, bits=bits, target_norm=1.0)
    draw = np.random.default_rng(bits)
    most = 2 ** (bits - 1)
    rows = draw.integers(-most, most + 1, (50, 64)).astype(np.int32)
    rows[0], rows[1] = -most, most
    y = draw.integers(-(2**31), 2**31 + 1, (50, 1))
    y[:4, 0] = -(2**31), 2**31, 2**31 - 1, 0
    for one, other in zip(
        block_products.products(public, rows, y),
        device_products.products(public, rows, y),
        strict=True,
    ):
        if isinstance(one, dict):
            one, other = (
                sum(part.astype(object) << shift for shift, part in parts.items())
                for parts in (one, other)
            )
        assert (one == other).all()


# ------------------------------------------------------------------------------ large weights


def scaled(stats, factor):
    """The sums of that many copies of each row, without an index."""
    return dataclasses.replace(
        stats,
        rows=stats.rows * factor,
        weight=stats.weight * factor,
        class_counts=None if stats.class_counts is None else stats.class_counts * factor,
        gram=WideIntegers.from_objects(stats.gram.to_objects() * factor),
        cross=WideIntegers.from_objects(stats.cross.to_objects() * factor),
        index=None,
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_stay_exact_up_to_the_largest_weight(sign):
    x, y = np.array([[1.0, 0.0]]), np.array([sign * 1024.0])  # the largest whole numbers
    one = sums.collect(x, y, index=False)
    assert abs(one.cross.to_objects()[0, 0]) == 2**50
    half = scaled(one, 2**43)
    full = sums.merge(half, half)
    assert full.weight == 2**44
    assert full.gram.to_objects()[0, 0] == 2**82
    assert full.cross.to_objects()[0, 0] == sign * 2**94
    assert same_sums(sums.remove(full, x, y), scaled(one, 2**44 - 1))
    assert same_sums(sums.add(sums.remove(full, x, y), x, y), full)
    for beyond in (lambda: sums.add(full, x, y), lambda: sums.merge(full, one)):
        with pytest.raises(ValueError, match=r"total weight .* at most 2\^44"):
            beyond()


def test_more_blocks_than_int64_holds_are_exact():
    x, y = np.ones((140_000, 1)), np.ones(140_000, int)  # 255 * 140,000 * 2^38 > 2^63
    stats = sums.collect(x, y, class_weights=(1, 255), index=False)
    assert stats.gram.to_objects().tolist() == [[140_000 * 255 * 2**38]]
    assert stats.cross.to_objects().tolist() == [[0, 140_000 * 255 * 2**19]]
    assert sums.remove(stats, x, y).gram.is_zero()


def test_the_weight_counts_class_weights():
    one = sums.collect([[1.0], [1.0]], [0, 1], class_weights=(255, 1), index=False)
    assert one.weight == 256
    full = scaled(one, 2**36)
    with pytest.raises(ValueError, match=r"at most 2\^44"):
        sums.add(full, [[1.0]], [1])


# ------------------------------------------------------------------------------ what is asked


def test_whole_numbers_are_labels_and_floats_are_not():
    x = features(6)
    assert sums.collect(x, [0, 1, 2, 0, 1, 2]).settings.classes == 3
    assert sums.collect(x, np.zeros(6, np.uint8)).settings.classes == 2
    assert sums.collect(x, np.ones(6, bool)).settings.classes == 2
    assert sums.collect(x, np.ones(6)).settings.classes is None
    assert sums.collect(x, jnp.ones(6, jnp.bfloat16)).settings.classes is None
    assert sums.collect(x, np.ones(6), classes=4).settings.classes == 4
    assert sums.collect(x, np.ones(6, int), class_weights=[1, 2, 3]).settings.classes == 3
    assert sums.collect(x, np.ones((6, 2), int)).settings.outputs == 2
    with pytest.raises(ValueError, match=r"from 0 to 1, got 2\.0 at row 5"):
        sums.collect([(x[:3], [0, 1, 1]), (x[3:], [0, 1, 2])])


def test_inputs_that_are_wrong_are_refused_and_change_nothing():
    stats = collected("labels")
    before = sums.digest(stats)
    x = features(4)
    cases = [
        (lambda: sums.add(stats, x, [0, 1, 2]), ValueError, "as many rows, got 4 and 3"),
        (lambda: sums.add(stats, x[:, :4], [0, 1, 2, 0]), ValueError, r"\[n, 5\]"),
        (lambda: sums.add(stats, x, [0, 1, 2, 3]), ValueError, r"got 3\.0 at row 3"),
        (lambda: sums.add(stats, [(x, [0] * 4), (x, [0, 9, 0, 0])]), ValueError, "at row 5"),
        (lambda: sums.add(stats, x), ValueError, "targets must be given"),
        (lambda: sums.add(stats, 3.0), ValueError, "targets must be given"),
        (lambda: sums.add(stats, [x]), TypeError, "no pair"),
        (lambda: sums.add(stats, x, 3), ValueError, "one number"),
        (lambda: sums.add(stats, x[0], [1] * 5), ValueError, "features must be of shape"),
        (lambda: sums.collect([]), ValueError, "at least one batch"),
        (lambda: sums.collect(x[0], [1] * 5), ValueError, r"features must be of shape \[n, d\]"),
        (lambda: sums.collect(x[:0], np.zeros(0, int)), ValueError, "classes must be given"),
        (lambda: sums.collect(x, [0] * 4, index="no"), TypeError, "index must be True or False"),
        (lambda: sums.collect(x, [0] * 4, on_device=1), TypeError, "on_device"),
        (lambda: sums.collect(x, [0] * 4, batch_size=0), ValueError, "batch_size"),
        (lambda: sums.collect(x, [0] * 4, apply_fn=3), TypeError, "apply_fn"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    assert sums.digest(stats) == before
    assert same_sums(stats, collected("labels"))


def test_a_stream_that_fails_changes_nothing():
    stats = collected("regression")
    before = sums.digest(stats)

    def stream():
        yield features(3), np.ones(3)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        sums.add(stats, stream())
    assert sums.digest(stats) == before


def test_no_rows_are_no_change():
    for kind in KINDS:
        stats, y = collected(kind), KINDS[kind][0]
        for none in (
            sums.add(stats, features()[:0], y[:0]),
            sums.remove(stats, features()[:0], y[:0]),
            sums.remove(stats, []),
        ):
            assert same_sums(none, stats)
    assert sums.collect(features()[:0], np.zeros(0)).rows == 0


def test_the_digest_sees_every_part():
    stats = collected("labels")
    found = {sums.digest(stats)}
    one = np.zeros((5, 5), np.int64)
    one[1, 2] = 1
    changes = [
        {"rows": 61},
        {"weight": 61},
        {"class_counts": stats.class_counts[::-1]},
        {"gram": stats.gram.plus(one)},
        {"gram": stats.gram.plus(one, 60)},
        {"cross": stats.cross.plus(one[:, :3])},
        {"settings": dataclasses.replace(stats.settings, feature_norm=2.0000000000000004)},
        {"settings": dataclasses.replace(stats.settings, target_norm=1.0)},
    ]
    found |= {sums.digest(dataclasses.replace(stats, **change)) for change in changes}
    assert len(found) == len(changes) + 1
    assert sums.digest(stats) == sums.digest(collected("labels"))  # another salt


def test_digests_of_files_stay_what_they_are():
    # Certificates hold it: another digest for the same sums would make them fail.
    stats = sums.collect([[0.5, -0.25], [3.0, 4.0]], [1.0, -2.0], bits=8)
    assert sums.digest(stats) == DIGEST


DIGEST = "50c9402cf24c90f87b73ec386898029ea6b87397a35561d8cc92cd1fb19f04aa"


def test_sums_cannot_be_changed():
    stats = collected("labels")
    for array in (stats.class_counts, stats.gram.low, stats.cross.high):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.rows = 1


def test_nothing_private_is_shown():
    stats = collected("labels")
    for part in (stats, stats.index, stats.gram, (stats,)):
        text = repr(part)
        assert not any(
            char.isdigit() for char in text.replace("5 features", "").replace("5 x 5", "")
        )


@pytest.mark.slow
def test_long_chains_of_requests_end_where_retraining_does():
    x, y = features(3000, 20, 5), labels(3000, 7, 6)
    draw = np.random.default_rng(7)
    stats, held = sums.collect(x[:1000], y[:1000], feature_norm=4.0, classes=7), set(range(1000))
    for step in range(200):
        if step % 2:
            change = draw.choice(sorted(held), 9, replace=False)
            stats, held = sums.remove(stats, x[change], y[change]), held - set(change.tolist())
        else:
            outside = sorted(set(range(3000)) - held)
            change = draw.choice(outside, 11, replace=False)
            stats, held = sums.add(stats, x[change], y[change]), held | set(change.tolist())
        if step % 20 == 19:
            rows = draw.permutation(sorted(held))
            fresh = sums.collect(x[rows], y[rows], feature_norm=4.0, classes=7)
            assert sums.digest(fresh) == sums.digest(stats)
            assert same_sums(fresh, stats)


THREADS = """
import sys
import numpy as np
from certunlearn import sums

draw = np.random.default_rng(0)
x, y = draw.normal(size=(9001, 257)), draw.integers(0, 5, 9001)
whole = sums.collect(x, y, feature_norm=17.0)
less = sums.remove(whole, x[::7], y[::7])
real = sums.collect(x.astype(np.float32), x[:, :3], feature_norm=17.0)
print(*map(sums.digest, (whole, less, real)))
"""


@pytest.mark.slow
def test_the_number_of_threads_does_not_matter():
    found = []
    for threads in ("1", "2", "3"):
        names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, threads)
        command = [sys.executable, "-c", THREADS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].split())) == 3


@pytest.mark.slow
def test_a_wide_row_and_many_outputs():
    d, outputs = 1025, 1000
    x, y = features(40, d), features(40, outputs)
    for on_device in (False, True):
        stats = sums.collect(x, y, feature_norm=40.0, on_device=on_device)
        some = np.random.default_rng(0).integers(0, outputs, 20)
        q, t = stats.settings.feature_rows(x).astype(object), stats.settings.target_rows(y)
        assert (stats.cross.to_objects()[:, some] == q.T @ t[:, some].astype(object)).all()
        assert (stats.gram.to_objects()[some] == q[:, some].T @ q).all()
