"""Batches that are made ahead are the same, no more than asked for, and end with the run."""

import threading

import jax
import jax.numpy as jnp
import pytest

from certunlearn.unlearning import prefetching


def threads():
    return [each for each in threading.enumerate() if each.name == "certunlearn-prefetch"]


def counted(made, stop=100):
    for number in range(stop):
        made.append(number)
        yield number


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
def test_items_come_in_order_and_are_made_at_most_so_far_ahead(depth):
    made = []
    ahead = prefetching.ahead(counted(made), depth)
    for number in range(30):
        assert next(ahead) == number
        assert len(made) <= number + 1 + depth
    ahead.close()
    assert not threads()
    assert len(made) <= 30 + depth


def test_an_error_is_raised_at_its_place():
    def broken():
        yield 1
        yield 2
        raise OSError("the network is gone")

    ahead = prefetching.ahead(broken(), 5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(OSError, match="the network is gone") as caught:
        next(ahead)
    assert any("broken" in str(entry) for entry in caught.traceback)
    assert not threads()


def test_whoever_stops_early_ends_the_thread_and_closes_what_it_read():
    closed = []

    def source():
        try:
            yield from range(100)
        finally:
            closed.append(threading.current_thread().name)

    ahead = prefetching.ahead(source(), 2)
    next(ahead)
    ahead.close()
    assert closed == ["certunlearn-prefetch"]
    assert not threads()


def test_one_that_was_never_asked_has_no_thread():
    made = []
    prefetching.ahead(counted(made), 2).close()
    assert made == []


@pytest.mark.parametrize("wide", [False, True])
def test_the_thread_has_the_callers_settings(wide):
    def dtypes():
        yield jnp.zeros(2, float).dtype, jax.config.jax_default_device

    device = jax.devices()[0]
    with jax.enable_x64(wide), jax.default_device(device):
        expected = next(dtypes())
        assert next(prefetching.ahead(dtypes(), 1)) == expected
    assert expected[0] == (jnp.float64 if wide else jnp.float32)
