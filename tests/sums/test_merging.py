"""Sums of shards are the sums of all rows, and the index knows the rows of each shard."""

import pytest
from sums_helpers import features, labels, same_sums

from certunlearn import sums


def test_shards_of_one_beginning_merge():
    x, y = features(4), labels(4)
    start = sums.empty(5, classes=3)
    a, b = sums.add(start, x[:2], y[:2]), sums.add(start, x[2:], y[2:])
    assert same_sums(sums.merge(a, b), sums.collect(x, y, classes=3))
    sums.remove(sums.merge(a, b), x, y)  # the index knows the rows of both
    other = sums.empty(5, classes=3, bits=19)
    with pytest.raises(ValueError, match=r"equal settings .*cu\.exact\.empty"):
        sums.merge(a, other)
    bare = sums.empty(5, classes=3, index=False)
    for pair in ((a, bare), (bare, a)):
        with pytest.raises(ValueError, match="both have an index"):
            sums.merge(*pair)


def test_collections_that_began_apart_merge(tmp_path):
    x, y = features(6), labels(6)
    shards = [sums.collect(x[i : i + 2], y[i : i + 2], classes=3) for i in (0, 2, 4)]
    again = sums.collect(x[:1], y[:1], classes=3)  # row 0 is in two of them
    whole = sums.merge(sums.merge(shards[0], sums.merge(shards[1], shards[2])), again)
    sums.save(tmp_path / "sums.private.npz", whole)
    for stats in (whole, sums.load(tmp_path / "sums.private.npz")):
        assert stats.index.rows == stats.rows == 7
        left = sums.remove(stats, x[[0, 5, 0, 3]], y[[0, 5, 0, 3]])
        assert same_sums(left, sums.collect(x[[1, 2, 4]], y[[1, 2, 4]], classes=3))
        with pytest.raises(ValueError, match=r"row 2 cannot .* only 2 of it"):
            sums.remove(stats, x[[0, 0, 0]], y[[0, 0, 0]])
        with pytest.raises(ValueError, match=r"row 1 cannot .* no such row"):
            sums.remove(left, x[[4, 5]], y[[4, 5]])
        back = sums.merge(left, sums.collect(x[[0]], y[[0]], classes=3))
        assert sums.remove(back, x[[0]], y[[0]]).rows == 3
