"""Only rows that are there are removed, and only as often: a multiset, checked against Python's."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums_helpers import features, labels, same_sums

from certunlearn import sums
from certunlearn.sums import row_index
from certunlearn.sums.row_index import RowIndex

SALT = bytes(range(32))
DIGESTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12)


def pairs(digests):
    return np.array(digests, np.uint64).reshape(-1, 2)


def counted(index):
    keys = zip(index.high.tolist(), index.low.tolist(), strict=True)
    return dict(zip(keys, index.counts.tolist(), strict=True))


@settings(max_examples=80, deadline=None)
@given(DIGESTS, DIGESTS, DIGESTS)
def test_it_is_a_multiset_also_where_halves_of_digests_are_equal(first, second, gone):
    index = RowIndex.empty(SALT).with_rows(pairs(first))
    both = index.merged(RowIndex.empty(SALT).with_rows(pairs(second)))
    expected = collections.Counter(first) + collections.Counter(second)
    assert counted(both) == expected
    assert counted(index.with_rows(pairs(second))) == expected
    assert both.rows == len(first) + len(second)
    left, missing = expected.copy(), None
    for position, digest in enumerate(gone):
        left[digest] -= 1
        if left[digest] < 0:
            missing = position
            break
    if missing is None:
        assert counted(both.without(pairs(gone))) == +left
    else:
        held = expected[gone[missing]]
        shown = f"row {missing} cannot be removed: there is " + (
            f"only {held} of it" if held else "no such row"
        )
        with pytest.raises(ValueError, match=shown):
            both.without(pairs(gone))
    assert counted(both) == expected


def test_digests_are_keyed_hashes_of_features_and_target():
    index = RowIndex.empty(SALT)
    rows, targets = np.array([[1, 2], [1, 2], [1, 3]], np.int32), np.array([5, 6, 5])
    found = index.digests(rows, targets)
    assert found.shape == (3, 2)
    assert len({tuple(row) for row in found.tolist()}) == 3
    np.testing.assert_array_equal(found[1:2], index.digests(rows[1:2], targets[1:2]))
    np.testing.assert_array_equal(found, index.digests(np.asfortranarray(rows), targets[:, None]))
    other = RowIndex.empty(bytes(32)).digests(rows, targets)
    assert not (found == other).any()
    assert index.digests(rows[:0], targets[:0]).shape == (0, 2)
    assert row_index.new_salt() != row_index.new_salt()


def test_rows_that_are_not_there_are_named_and_nothing_changes():
    x, y = features(), labels()
    stats = sums.collect(x, y, feature_norm=2.0)
    before = sums.digest(stats)
    other = x.copy()
    other[7, 2] += 1e-3
    wrong = (y + (np.arange(60) == 4)) % 3
    cases = [
        (lambda: sums.remove(stats, other, y), "row 7 cannot be removed: there is no such row"),
        (lambda: sums.remove(stats, x, wrong), "row 4 .* no such row"),
        (lambda: sums.remove(stats, x[[1, 2, 1]], y[[1, 2, 1]]), "row 2 .* only 1 of it"),
        (lambda: sums.remove(stats, [(x, y), (x[:2], y[:2])]), "row 60 .* only 1 of it"),
        (lambda: sums.remove(sums.remove(stats, x[:3], y[:3]), x[2:5], y[2:5]), "row 0 .* no such"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert sums.digest(stats) == before
    assert same_sums(sums.add(sums.remove(stats, x, y), x, y), stats)


def test_rows_of_equal_whole_numbers_are_the_same_row():
    # They are the same terms of the sums, so that either may be removed for the other.
    stats = sums.collect([[0.5], [0.5 + 2**-30]], [0, 1], bits=8)
    assert sums.remove(stats, [[0.5], [0.5]], [1, 0]).gram.is_zero()


def test_copies_are_counted():
    x, y = features(1), [1]
    stats = sums.empty(5, classes=2)
    for _ in range(3):
        stats = sums.add(stats, x, y)
    assert stats.index.counts.tolist() == [3]
    assert sums.remove(stats, np.repeat(x, 2, 0), [1, 1]).index.counts.tolist() == [1]
    with pytest.raises(ValueError, match=r"row 3 .* only 3"):
        sums.remove(stats, np.repeat(x, 4, 0), [1] * 4)


def test_without_an_index_removal_is_at_the_callers_word_up_to_what_shows():
    x, y = features(6), np.array([0, 0, 1, 1, 2, 2])
    stats = sums.collect(x, y, index=False)
    assert stats.index is None
    before = sums.digest(stats)
    few = sums.collect([[0.25, 0.5]], [1.0], index=False)
    cases = [
        (lambda: sums.remove(stats, np.repeat(x, 2, 0), np.repeat(y, 2)), "fewer than no rows"),
        (lambda: sums.remove(stats, x[:3], [0, 0, 0]), "fewer than no rows"),  # of one class
        (lambda: sums.remove(few, [[0.5, 0.25]], [1.0]), "squares would be negative"),
        (lambda: sums.remove(few, [[0.25, 0.25]], [1.0]), "would be too large"),
        (lambda: sums.remove(few, [[0.25, 0.5]], [2.0]), "sums that are not zero"),
        (lambda: sums.remove(few, [[0.25, -0.5]], [1.0]), "sums that are not zero"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=rf"{message}.*nothing was changed"):
            call()
    assert sums.digest(stats) == before
    # What does not show is removed: the sums are then those of no rows that ever were.
    assert sums.remove(sums.collect(np.eye(2) / 2, [0, 1], index=False), [[0.1, 0]], [0]).rows == 1


@pytest.mark.parametrize(
    "change",
    [
        {"salt": b"short"},
        {"counts": np.array([1, 0])},
        {"counts": np.array([1, 1, 1])},
        {"low": np.array([3, 3], np.uint64)},
        {"high": np.array([2, 1], np.uint64)},
        {"high": np.array([1, 1])},
    ],
)
def test_what_is_no_index_is_refused(change):
    one = np.array([1, 1], np.uint64)
    right = RowIndex(SALT, one, np.array([2, 3], np.uint64), np.array([1, 1]))
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(right, **change)


def test_indexes_cannot_be_changed_and_show_nothing():
    index = RowIndex.empty(SALT).with_rows(pairs([(123456, 654321)]))
    for array in (index.high, index.low, index.counts):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert repr(index) == "RowIndex(<private>)"
