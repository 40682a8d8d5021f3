"""Retain data that is fetched or streamed: the same batches, the same run, the same promise."""

import dataclasses
import threading
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_system import SYSTEMS
from feed_helpers import KEYS, TUNED, Source, TorchStyle, keyed, stream
from loop_helpers import BATCH, DATA, PARAMS, SIZE, run, same

import certunlearn as cu
from certunlearn.unlearning import (
    Stream,
    UnlearningFailed,
    compiled_steps,
    data_feeds,
    prepared_run,
)


def on_disk(folder):
    """A source on a file that is mapped into memory."""
    path = folder / "x.npy"
    np.save(path, np.column_stack([DATA["x"], DATA["y"]]))
    mapped = np.load(path, mmap_mode="r")
    return Source({"x": mapped[:, :3], "y": mapped[:, 3]})


@pytest.fixture(scope="module")
def of_arrays():
    return run(**TUNED)


@pytest.mark.parametrize("kind", ["own", "torch", "memmap"])
def test_a_source_gives_what_arrays_give_bit_for_bit(kind, of_arrays, tmp_path):
    source = {"own": Source, "torch": TorchStyle, "memmap": lambda: on_disk(tmp_path)}[kind]()
    fetched = run(data=source, **TUNED)
    assert same(fetched.params, of_arrays.params)
    assert same(fetched.history.losses, of_arrays.history.losses)
    assert same(fetched.history.finetune_losses, of_arrays.history.finetune_losses)
    assert fetched.certificate.assumptions == of_arrays.certificate.assumptions
    assert fetched.certificate.retain_size == SIZE
    assert not [t for t in threading.enumerate() if t.name == "certunlearn-prefetch"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grain", "datasets"])
def test_so_do_sources_of_other_libraries(kind, of_arrays):
    rows = [{"x": DATA["x"][i], "y": DATA["y"][i]} for i in range(SIZE)]
    if kind == "grain":
        grain = pytest.importorskip("grain")
        source = grain.MapDataset.source(rows).map(dict)
    else:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {"x": datasets.Sequence(datasets.Value("float32")), "y": datasets.Value("float32")}
        )
        plain = datasets.Dataset.from_list([jax.tree.map(np.asarray, r) for r in rows], features)
        source = plain.with_format("numpy")
        with pytest.raises(TypeError, match="with_format"):
            run(data=plain)
    assert same(run(data=source, **TUNED).params, of_arrays.params)


OTHER_WAYS = {
    "example by example": {"per_example": True},
    "microbatches": {"per_example": True, "microbatch_size": 2},
    "one batch an epoch": {"batch_size": SIZE},
    "batches that do not divide the data": {"batch_size": 7},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_WAYS)
def test_options_mean_the_same_for_a_source(name, monkeypatch):
    # One step a call for arrays, too: loops over steps are other programs, and may round otherwise.
    monkeypatch.setattr(compiled_steps, "longest_call", lambda *about: 1)
    changes = OTHER_WAYS[name]
    found = run(data=Source(), **changes).params
    assert same(found, run(**changes).params)
    assert not same(found, run(**changes, key=8).params)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, BATCH, SIZE])
def test_batches_of_a_source_are_those_of_arrays(batch_size, prefetch):
    steps = data_feeds.Steps(
        key=KEYS.data, batch_size=batch_size, first=2, stop=7, pauses=(3,), prefetch=prefetch
    )
    feeds = map(data_feeds.feed_of, (DATA, Source()))
    for expected, found in zip(*(feed.calls(steps) for feed in feeds), strict=True):
        assert same(expected.data, found.data)
        assert (found.step, found.count) == (expected.step, expected.count)


@pytest.mark.parametrize("microbatch", [None, pytest.param(5, marks=pytest.mark.slow)])
def test_poisson_samples_of_a_source_are_those_of_arrays(microbatch):
    sampling = SYSTEMS["dp"].poisson_sampling()
    steps = data_feeds.Steps(
        key=KEYS.data,
        batch_size=12,
        first=1,
        stop=4,
        sampling=sampling,
        microbatch_size=microbatch,
    )
    source = Source()
    feed = data_feeds.feed_of(source)
    for call in feed.calls(steps):
        key = jax.random.fold_in(KEYS.data, call.step)
        arrays = jax.tree.map(jnp.asarray, DATA)
        expected = sampling.sample(arrays, key, microbatch)
        found = sampling.sample(call.data, key, microbatch)
        assert same(found, expected)
        assert jax.tree.map(jnp.shape, call.data) == jax.tree.map(jnp.shape, feed.trial(steps).data)
        last = source.read[-len(set(np.asarray(sampling.draw(SIZE, key, microbatch)[0]))) :]
        assert len(set(last)) == len(last)  # empty places cost nothing


@pytest.mark.slow
def test_dp_sgd_on_a_source_is_dp_sgd_on_arrays():
    mechanism = dataclasses.replace(SYSTEMS["dp"], steps=3, batch_size=BATCH)
    options = {"mechanism": mechanism, "delta": 1e-5, "accountant": None}
    assert same(run(data=Source(), **options).params, run(**options).params)


def test_samples_are_not_drawn_of_a_stream():
    with pytest.raises(ValueError, match="source of examples by index for DPSGD, got a stream"):
        prepared_run.Examples.make(stream(keyed()), None, SYSTEMS["dp"], cu.Options())


def test_a_run_on_a_source_is_resumed_at_its_batch(of_arrays):
    state = run(data=Source(), stop_after=4, **TUNED).history.state
    source = Source()
    assert same(run(data=source, resume=state, **TUNED, prefetch=0).params, of_arrays.params)
    order = np.concatenate(
        [
            np.asarray(jax.random.permutation(jax.random.fold_in(KEYS.data, epoch), SIZE))
            for epoch in (0, 1)
        ]
    )
    digested = [0, *range(SIZE)]  # the first for its shapes, and all of so few for the digest
    assert source.read[: len(digested) + 2 * BATCH] == [*digested, *order[4 * BATCH : 6 * BATCH]]


@pytest.mark.parametrize("what", ["an example", "the length", "a dtype"])
def test_a_state_is_of_its_source(what):
    state = run(data=Source(), stop_after=4).history.state
    other = Source({"x": DATA["x"], "y": DATA["y"] + (np.arange(SIZE) == 5)})
    if what == "the length":
        other = Source(size=SIZE - 1)
    if what == "a dtype":
        other = Source(jax.tree.map(lambda x: x.astype(np.float64), DATA))
    with pytest.raises(ValueError, match="another plan: retain_data must be as"):
        run(data=other, resume=state)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda i: {"x": np.ones(3 + (i == 20))}, ValueError, "the shapes of the first"),
        (lambda i: {"x": np.ones(3)} if i != 20 else None, ValueError, r"data\[20\] must be str"),
        (lambda i: {"x": np.ones(3, np.float32 if i != 20 else complex)}, ValueError, "dtypes of"),
        (lambda i: {"x": 1 / (i - 20) * np.ones(3)}, ZeroDivisionError, "division by zero"),
    ],
    ids=["another shape", "a hole", "another dtype", "an error of its own"],
)
def test_an_example_that_is_not_like_the_first_loses_no_work(make, error, words):
    class Made(Source):
        def __getitem__(self, index):  # after the first look at all of so few
            self.read.append(index)
            return make(index if len(self.read) > SIZE + 1 else 0)

    order = np.asarray(jax.random.permutation(jax.random.fold_in(KEYS.data, 0), SIZE))
    step = int(np.flatnonzero(order == 20)[0]) // BATCH
    assert step > 0
    with pytest.raises(UnlearningFailed, match=words) as caught:
        run(params=PARAMS["w"], data=Made(), loss=lambda w, b: jnp.mean((b["x"] @ w) ** 2))
    assert isinstance(caught.value.__cause__, error)
    assert caught.value.state.step == step


# ------------------------------------------------------------------------------ what else reads it


def average(state, batch):
    return 0.5 * state + 0.5 * batch["x"].mean(0)


def test_statistics_are_recomputed_from_any_data():
    start = jnp.zeros(3)
    options = {"batch_size": BATCH, "passes": 2}
    expected = cu.unlearning.recompute_statistics(average, start, DATA, **options)
    in_order = [jax.tree.map(lambda x, i=i: x[i : i + BATCH], DATA) for i in range(0, SIZE, BATCH)]
    for data in (Source(), stream(in_order)):
        found = cu.unlearning.recompute_statistics(average, start, data, **options)
        assert same(found, expected)
    with pytest.raises(ValueError, match="a pass of its own"):
        cu.unlearning.recompute_statistics(average, start, stream(iter(in_order)), **options)


def test_recompute_state_gets_the_source_itself():
    source, got = Source(), []
    run(data=source, recompute_state=lambda params, data: got.append(data))
    assert got == [source]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["source", "stream"])
def test_an_objective_is_minimised_on_data_that_is_fetched(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3)) / 4
    y = (x @ np.array([1.0, -2.0, 0.5]) > 0).astype(np.int32)
    loss = cu.convex.logistic_regression(4.0, 0.1)
    mechanism = cu.PerturbedMinimizer(gradient_norm=1e-6, strong_convexity=0.1)
    options = {"loss": loss, "params": loss.init(3), "noise_scale": 1e-3, "batch_size": None}
    data = Source((x, y), 60)
    if kind == "stream":
        data = Stream([(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)], size=60, batch_size=20)
    fetched = run(mechanism, data=data, **options)
    expected = run(mechanism, data=(x, y), **options)
    np.testing.assert_allclose(fetched.params, expected.params, atol=2e-4)
    assert cu.verify(fetched.certificate, fetched.params)
    if kind == "stream":
        with pytest.raises(ValueError, match="batch_size must be the stream's, 20, got 60"):
            run(mechanism, data=data, **options, **TUNED)
        tuned = run(mechanism, data=data, **options | {"batch_size": 20}, **TUNED)
        assert tuned.certificate.finetune_steps == 4
        short = dataclasses.replace(data, loader=data.loader[:2])
        with pytest.raises(ValueError, match="ended before batch 2 of epoch 0"):
            run(mechanism, data=short, **options)
        uneven = dataclasses.replace(data, size=70)
        with pytest.raises(ValueError, match="batch_size=20 does not divide size=70"):
            run(mechanism, data=uneven, **options)


# ------------------------------------------------------------------------------ memory


class Large:
    """400,000 examples of 256 KiB, each made when it is asked for: 100 GiB."""

    def __len__(self):
        return 400_000

    def __getitem__(self, index):
        return np.full(2**16, (index % 97) / 97, np.float32)


def peak_of(what):
    """Bytes of Python's and NumPy's memory, JAX's arrays on a CPU among it where it shares it."""
    tracemalloc.start()
    try:
        what()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Of each batch the rows and the array that they are put together in, and 28 bytes an example.
FEW_BATCHES = 28 * 100_000 + 2 * 4 * 2**18 * 4


def test_data_larger_than_memory_takes_the_memory_of_a_few_batches():
    steps = data_feeds.Steps(key=KEYS.data, batch_size=4, first=0, stop=40, prefetch=2)

    def read():
        for call in data_feeds.feed_of(Large()).calls(steps):
            assert call.data.shape == (4, 2**16)

    assert peak_of(read) < FEW_BATCHES


@pytest.mark.slow
def test_so_does_a_whole_run():
    mechanism = cu.GradientClipping(init_radius=1.0, clip_norm=0.5, learning_rate=0.1, steps=40)

    def whole():
        run(
            mechanism,
            data=Large(),
            params=jnp.ones(()),
            loss=lambda w, batch: jnp.mean((batch - w) ** 2),
            batch_size=4,
            finetune=(optax.sgd(0.1), 4),
        )

    whole()  # compiled before it is measured
    assert peak_of(whole) < FEW_BATCHES


def test_an_order_is_the_same_whatever_the_data_holds():
    steps = data_feeds.Steps(key=KEYS.data, batch_size=BATCH, first=0, stop=6)
    read = []
    for data in (DATA, jax.tree.map(lambda x: x * 0 + 1, DATA)):
        source = Source(data)
        for _ in data_feeds.feed_of(source).calls(steps):
            pass
        read.append(source.read)
    assert read[0] == read[1]
