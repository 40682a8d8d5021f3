"""Retain data that comes in batches: the same run, and a promise that says whose order it was."""

import dataclasses

import numpy as np
import pytest
from every_system import SYSTEMS
from feed_helpers import KEYS, TUNED, keyed, stream
from loop_helpers import BATCH, DATA, PARAMS, SIZE, run, same

import certunlearn as cu
from certunlearn.certificates import record
from certunlearn.mechanisms import sentences
from certunlearn.unlearning import Stream, UnlearningFailed


@pytest.fixture(scope="module")
def of_arrays():
    return run(**TUNED)


class TensorFlowStyle:
    """Has the iterator that `tf.data.Dataset` has, and yields what is no array otherwise."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter([object()])

    def as_numpy_iterator(self):
        return iter(self.batches)


@pytest.mark.parametrize("kind", ["function", "iterator", "list", "tf.data"])
def test_the_same_batches_in_a_stream_give_the_same_parameters(kind, of_arrays):
    expected = of_arrays
    if kind in ("list", "tf.data"):  # of which every epoch has the same order
        batches = list(keyed()(0))
        expected = run(data=stream(lambda epoch: batches), **TUNED)
        loader = batches if kind == "list" else TensorFlowStyle(batches)
    elif kind == "function":
        # Fine-tuning would start with epoch 0 again, where arrays have other keys.
        assert same(run(data=stream(keyed()), batch_size=None).params, run().params)
        return
    else:
        tuning = list(keyed(KEYS.finetune)(0)) + list(keyed(KEYS.finetune)(1))
        loader = iter([*keyed()(0), *keyed()(1), *tuning[:4]])
    streamed = run(data=stream(loader), **TUNED)
    assert same(streamed.params, expected.params)
    assert same(streamed.history.finetune_losses, expected.history.finetune_losses)


def test_a_certificate_says_that_the_batches_order_is_the_issuers_word(of_arrays):
    certificate = run(data=stream(keyed())).certificate
    assert certificate.assumptions[:-1] == of_arrays.certificate.assumptions
    assert certificate.assumptions[-1] == sentences.STREAMED
    assert cu.verify(certificate)
    assert "keys and sizes alone" in cu.verify(certificate).summary
    twice = [*certificate.assumptions, sentences.STREAMED]
    for altered in (
        {"assumptions": twice},
        {"assumptions": [sentences.STREAMED, *certificate.assumptions[:-1]]},
        # What older formats list is what their mechanisms rest on, and nothing else.
        {"schema": "certunlearn.certificate/3"},
    ):
        forged = record.as_record(dataclasses.replace(certificate, **altered))
        forged["record_digest"] = record.record_digest(forged)
        assert "assumptions" in cu.verify(cu.Certificate(**forged)).problems[0]


def test_of_samples_no_certificate_says_so():
    mechanism = SYSTEMS["dp"]
    with pytest.raises(ValueError, match="streamed must be False for DPSGD"):
        cu.certify(
            mechanism, noise_scale=1.0, delta=1e-5, params=PARAMS, steps_run=1, streamed=True
        )


@pytest.mark.parametrize("once", [False, True], ids=["every epoch", "once"])
def test_a_stream_that_ends_early_loses_no_work(once):
    whole = run(data=stream(keyed()))

    def short(epoch):
        for position, batch in enumerate(keyed()(epoch)):
            if (epoch, position) == (1, 1):
                return
            yield batch

    loader = iter([*short(0), *short(1)]) if once else short
    with pytest.raises(UnlearningFailed, match=r"ended before batch [14] of") as caught:
        run(data=stream(loader))
    assert caught.value.state.step == 4
    mended = iter([*keyed()(0), *keyed()(1)]) if once else keyed()
    assert same(run(data=stream(mended), resume=caught.value.state).params, whole.params)


def test_batches_before_the_state_are_left_out_and_epochs_before_it_not_read():
    state = run(data=stream(keyed()), stop_after=4).history.state
    started = []

    def loader(epoch):
        started.append(epoch)
        return keyed()(epoch)

    assert same(run(data=stream(loader), resume=state).params, run(data=stream(keyed())).params)
    assert started == [0, 1]  # the first for its shapes
    with pytest.raises(ValueError, match="another plan: retain_data must be as"):
        run(data=stream(keyed(KEYS.finetune)), resume=state)


@pytest.mark.parametrize("change", [lambda b: {"x": b["x"]}, lambda b: b | {"y": b["y"] > 0}])
def test_a_batch_that_is_not_like_the_first_is_refused(change):
    def loader(epoch):
        for position, batch in enumerate(keyed()(epoch)):
            yield batch if (epoch, position) != (1, 0) else change(batch)

    with pytest.raises(UnlearningFailed, match=r"batch 0 of epoch 1 .* be like the first"):
        run(data=stream(loader))


def test_a_remainder_at_the_end_of_a_pass_is_not_read():
    def loader(epoch):
        yield from keyed()(epoch)
        raise AssertionError("it was read")

    assert same(run(data=stream(loader)).params, run(data=stream(keyed())).params)
    uneven = stream(lambda epoch: list(keyed()(epoch)), size=SIZE + BATCH - 1)
    assert run(data=uneven).certificate.retain_size == SIZE + BATCH - 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"size": 0}, ValueError, "size must be"),
        ({"batch_size": 25}, ValueError, "batch_size must be at most"),
        ({"loader": DATA}, TypeError, "loader must be an iterable"),
        ({"loader": np.ones(3)}, TypeError, "loader must be an iterable"),
        ({"loader": 3}, TypeError, "loader must be an iterable .* got 3"),
    ],
)
def test_a_stream_says_what_is_wrong_with_it(change, error, words):
    with pytest.raises(error, match=words):
        Stream(**({"loader": [], "size": SIZE, "batch_size": BATCH} | change))


@pytest.mark.slow
def test_a_stream_of_grain_runs_and_resumes():
    grain = pytest.importorskip("grain")
    rows = [{"x": DATA["x"][i], "y": DATA["y"][i]} for i in range(SIZE)]
    batched = grain.MapDataset.source(rows).shuffle(seed=3).batch(BATCH, drop_remainder=True)
    data = stream(batched.to_iter_dataset())
    whole = run(data=data, batch_size=None)
    state = run(data=data, stop_after=4).history.state
    assert same(run(data=data, resume=state).params, whole.params)
