"""`Separations`, a mechanism of plain numbers: its checks, its records, its run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bound_helpers import MODES, exact_norm

import certunlearn as cu
from certunlearn import transforms
from certunlearn.mechanisms import from_record, to_record
from certunlearn.mechanisms.records import separations_from_record, separations_to_record

PLAIN = {"initial_distance": 1.0, "contraction": [0.9, 0.8], "shift": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"initial_distance": -1.0}, "initial_distance must be at least 0"),
        ({"initial_distance": math.inf}, "initial_distance must be at least 0 and finite"),
        ({"contraction": [0.9, -0.1]}, "contraction must be at least 0"),
        ({"contraction": [0.9]}, "shift must be one number or have one for each of the 1"),
        ({"shift": [0.1, math.nan]}, "shift must be at least 0 and finite"),
        ({"shift": [0.1, 0.2, 0.3]}, "shift must be one number or have one for each of the 2"),
        ({"noisy": [True]}, "noisy must have a bool for each of the 2 steps"),
        ({"noisy": [False, False]}, "noisy must be True at one step or more"),
        ({"contraction": 1.0, "shift": 0.1}, "steps must be given"),
        ({"steps": 3}, "one for each of the 3 steps"),
        ({"diameter": 0.0}, "diameter must be positive"),
        ({"init_noise_scale": -1.0}, "init_noise_scale must be at least 0"),
        ({"reference": "nobody"}, "reference must be one of"),
        ({"assumptions": ["caf\u00e9"]}, "printable ASCII"),
        ({"assumptions": [""]}, "1 to 2000 characters"),
    ],
)
def test_what_is_out_of_range_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        cu.Separations(**PLAIN | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"initial_distance": "1"}, "initial_distance must be one real number"),
        ({"contraction": [0.9, None]}, "contraction must be a number, numbers or a schedule"),
        ({"noisy": [1, 0]}, "noisy must be True or False"),
        ({"assumptions": "one sentence"}, "assumptions must be a list of sentences"),
        ({"assumptions": [1]}, "assumptions must be sentences"),
        ({"memoryless": 1}, "memoryless must be True or False"),
    ],
)
def test_what_is_of_the_wrong_kind_is_refused(change, words):
    with pytest.raises(TypeError, match=words):
        cu.Separations(**PLAIN | change)


def test_arrays_lists_and_tuples_are_the_same():
    as_arrays = {name: np.array(value) for name, value in PLAIN.items() if name != "shift"}
    assert cu.Separations(**PLAIN | as_arrays) == cu.Separations(**PLAIN)
    assert hash(cu.Separations(**PLAIN)) == hash(cu.Separations(**PLAIN | {"noisy": [True, True]}))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"noisy": [False, True], "assumptions": ["One.", "Two."], "memoryless": False},
        {"diameter": 3.0, "init_noise_scale": 0.5, "reference": "center"},
        {"contraction": 1.0, "shift": 0.0, "steps": 7},
    ],
)
def test_a_record_is_the_whole_of_it(change):
    stated = cu.Separations(**PLAIN | change)
    assert from_record(to_record(stated)) == stated
    record = separations_to_record(stated)
    assert separations_from_record(record) == stated
    for name in record:
        with pytest.raises(ValueError, match=rf"missing or unknown fields.*{name}"):
            separations_from_record({k: v for k, v in record.items() if k != name})
    with pytest.raises(ValueError, match=r"missing or unknown fields.*transform"):
        separations_from_record(record | {"transform": None})


def test_the_first_steps_of_it():
    stated = cu.Separations(**PLAIN | {"noisy": [True, False]})
    assert stated.first(1) == cu.Separations(
        initial_distance=1.0, contraction=[0.9], shift=[0.1], noisy=[True]
    )
    with pytest.raises(ValueError, match="steps must be at most 2"):
        stated.first(3)
    assert not stated.can_stop(0)
    assert stated.can_stop(1)
    assert not cu.Separations(**PLAIN | {"noisy": [False, True]}).can_stop(1)


MECHANISMS = {
    "gradient clipping": cu.GradientClipping(
        init_radius=1.0, clip_norm=0.5, learning_rate=[0.1, 0.0, 0.3], weight_decay=0.5, steps=3
    ),
    "with memory": cu.GradientClipping(
        init_radius=1.0, clip_norm=0.5, learning_rate=0.1, steps=3, memoryless=False
    ),
    "model clipping": cu.ModelClipping(
        init_radius=1.0, model_radius=0.5, learning_rate=0.1, steps=3, init_noise_scale=0.3
    ),
    "projected": cu.ProjectedNoisySGD(
        initial_distance=5.0,
        learning_rate=0.1,
        strong_convexity=1.0,
        smoothness=2.0,
        steps=3,
        radius=1.0,
    ),
    "one noise": cu.OutputPerturbation(init_radius=1.0, reference="center"),
    "minimizer": cu.PerturbedMinimizer(gradient_norm=1e-3, strong_convexity=0.1),
    "descent": cu.DescentToDelete(
        initial_distance=5.0, learning_rate=0.1, strong_convexity=1.0, smoothness=2.0, steps=3
    ),
}


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("accountant", ["interpolation", "product"])
def test_accountants_read_nothing_of_a_mechanism_but_these_numbers(name, accountant):
    mechanism = MECHANISMS[name]
    if cu.supported_accountants(mechanism)[accountant] is not None:
        with pytest.raises(ValueError, match=accountant):
            cu.epsilon(mechanism.separations(), noise_scale=1.0, delta=1e-5, accountant=accountant)
        return
    found = [
        cu.epsilon(m, noise_scale=1.0, delta=1e-5, accountant=accountant)
        for m in (mechanism, mechanism.separations())
    ]
    assert found[0] == found[1] > 0


def test_a_class_that_contradicts_itself_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Wrong(cu.Mechanism):
        steps: int = 3

        def separations(self):
            return cu.Separations(**PLAIN)

        def update(self, center):
            return optax.identity()

    with pytest.raises(ValueError, match=r"separations\(\) must have steps=3"):
        cu.epsilon(Wrong(), noise_scale=1.0, delta=1e-5)
    with pytest.raises(ValueError, match=r"separations\(\) must have steps=3"):
        cu.noisy_sgd(Wrong(), 1.0, key=jax.random.key(0))
    with pytest.raises(TypeError, match="abstract"):
        cu.Mechanism()
    with pytest.raises(TypeError, match=r"mechanism must be a certunlearn\.Mechanism"):
        cu.noise_scale("GradientClipping", epsilon=1.0, delta=1e-5)


def test_a_class_without_a_field_for_its_steps_cuts_itself():
    @dataclasses.dataclass(frozen=True)
    class Twice(cu.Mechanism):
        half: int = 2

        @property
        def steps(self):
            return 2 * self.half

        def separations(self):
            return cu.Separations(
                initial_distance=1.0, contraction=1.0, shift=0.1, steps=self.steps
            )

        def update(self, center):
            return optax.identity()

    assert Twice().first(4) == Twice()
    with pytest.raises(TypeError, match=r"Twice must define first\(steps\)"):
        Twice().first(3)
    assert cu.epsilon(Twice(), noise_scale=2.0, delta=1e-5, accountant="interpolation") > 0


def two_runs(stated, starts, gradients, center):
    """The distances after each step of two runs with the same noise and other gradients."""
    key = cu.split_key(jax.random.key(3)).noise
    tx = cu.noisy_sgd(stated, 0.5, key=key, center=center)
    runs = [stated.start(start, center, key) for start in starts]
    states = [tx.init(run) for run in runs]
    step = jax.jit(tx.update)
    distances = [float(jnp.linalg.norm(runs[0] - runs[1]))]
    for pair in gradients:
        moved = [step(g, s, p) for g, s, p in zip(pair, states, runs, strict=True)]
        runs = [optax.apply_updates(p, u) for p, (u, _) in zip(runs, moved, strict=True)]
        states = [state for _, state in moved]
        distances.append(float(jnp.linalg.norm(runs[0] - runs[1])))
    return distances


@pytest.mark.parametrize(
    ("reference", "centered"),
    [
        ("retrained", True),
        ("center", False),
        pytest.param("retrained", False, marks=pytest.mark.slow),
        pytest.param("center", True, marks=pytest.mark.slow),
    ],
)
def test_the_simplest_method_has_these_separations(reference, centered):
    """Opposite starts and opposite large gradients reach them, and go no farther."""
    center = jnp.array([2.0, -1.0, 0.5]) if centered else None
    middle = 0.0 if center is None else center
    direction = jnp.array([0.6, 0.8, 0.0])
    stated = cu.Separations(
        initial_distance=2.0,
        contraction=[1.0, 0.5, 0.0, 0.9, 1.0],
        shift=[0.2, 0.0, 0.4, 0.1, 0.3],
        noisy=[True, False, True, True, True],
        reference=reference,
    )
    far = [middle + 50 * direction, middle - 50 * direction]
    if reference == "center":
        far[1] = middle * jnp.ones(3)
    gradients = [(-9 * direction, 9 * direction)] * 5
    distances = two_runs(stated, far, gradients, center)
    claimed = [stated.initial_distance]
    for step in range(stated.steps):
        claimed.append(stated.separation(step, claimed[-1]))
    np.testing.assert_allclose(distances, claimed, rtol=1e-5)
    assert distances[0] <= stated.initial_distance * (1 + 1e-6)
    random = jax.random.normal(jax.random.key(5), (5, 2, 3)) * 10
    nearer = two_runs(stated, far, random, center)
    assert all(a <= b * (1 + 1e-5) for a, b in zip(nearer, claimed, strict=True))
    assert nearer[-1] < 0.9 * claimed[-1]


@pytest.mark.parametrize("mode", ["eager", "jit", "jit of vmap", "scan", "map"])
def test_no_update_of_the_simplest_method_is_longer_than_half_its_shift(mode):
    shifts = [0.3, 0.0, 4e-30, 7.0]
    tx = cu.Separations(initial_distance=1.0, contraction=1.0, shift=shifts).update(None)

    def four_steps(gradient):
        state, found = tx.init(gradient), []
        for _ in shifts:
            update, state = tx.update(gradient, state, jnp.zeros_like(gradient))
            found.append(update)
        return jnp.stack(found)

    rows = np.random.default_rng(0).normal(size=(8, 301)).astype(np.float32)
    rows *= np.array([[1e-40], [1e-20], [1e-3], [1.0], [1e19], [1e37], [1.0], [1.0]], np.float32)
    rows[6, 5], rows[7, 9] = np.nan, np.inf
    norms = [[exact_norm(u) for u in updates] for updates in MODES[mode](four_steps)(rows)]
    assert np.all(np.array(norms) <= np.array(shifts, np.longdouble) / 2)
    assert np.min(norms[3][0]) > 0.1499  # aimed at, not only bounded
    assert not np.any(norms[6:])


def test_a_diameter_is_kept_by_a_projection_after_the_noise():
    center = jnp.array([2.0, -1.0])
    steps = {"initial_distance": 1.0, "contraction": [1.0] * 3, "shift": [0.1] * 3}
    ball = cu.Separations(**steps, diameter=0.5)
    key = jax.random.key(4)
    for stated, radius in ((ball, 0.25), (cu.Separations(**steps), np.inf)):
        tx = cu.noisy_sgd(stated, 5.0, key=key, center=center)
        params = stated.start(center, center, key)
        state, farthest = tx.init(params), 0.0
        for _ in range(3):
            updates, state = tx.update(jnp.ones(2), state, params)
            params = optax.apply_updates(params, updates)
            farthest = max(farthest, float(jnp.linalg.norm(params - center)))
        assert farthest <= radius * (1 + 1e-6)
    assert farthest > 1  # without the diameter nothing is projected


def test_what_a_claim_counts_is_among_its_assumptions():
    plain = cu.Separations(**PLAIN)
    richer = {"noisy": [False, True], "diameter": 0.5, "init_noise_scale": 0.3}
    for name, value in richer.items():
        more = set(cu.Separations(**PLAIN, **{name: value}).rests_on()) - set(plain.rests_on())
        assert len(more) == 1, name
    assert "0.5" in " ".join(cu.Separations(**PLAIN, diameter=0.5).rests_on())
    assert "0.3" in " ".join(cu.Separations(**PLAIN, init_noise_scale=0.3).rests_on())


def test_starts_that_are_not_apart_are_the_centre():
    stated = cu.Separations(initial_distance=0.0, contraction=[1.0], shift=[0.1])
    center = jnp.array([1.0, 2.0])
    key = jax.random.key(0)
    assert stated.start(jnp.array([5.0, 5.0]), center, key).tolist() == [1.0, 2.0]
    assert stated.start(jnp.array([5.0, 5.0]), None, key).tolist() == [0.0, 0.0]


def test_noise_on_the_start_is_of_a_stream_of_its_own():
    stated = cu.Separations(**PLAIN | {"init_noise_scale": 0.7})
    key = jax.random.key(0)
    started = stated.start(jnp.zeros(20_000), None, key)
    assert float(jnp.std(started)) == pytest.approx(0.7, rel=0.03)
    tx = transforms.add_gaussian_noise(0.7, key)
    first, _ = tx.update(jnp.zeros(20_000), tx.init(started))
    assert abs(float(jnp.corrcoef(started, first)[0, 1])) < 0.03


def test_another_update_is_the_callers_word():
    stated = cu.Separations(**PLAIN, transform=optax.scale(-0.25))
    params = {"w": jnp.array([30.0, 40.0])}
    assert stated.start(params, None, jax.random.key(0)) is params
    assert not stated.tolerates_nonfinite
    assert not stated.uses_center
    key = jax.random.key(1)
    tx = cu.noisy_sgd(stated, 0.5, key=key)
    updates, _ = tx.update({"w": jnp.array([4.0, 8.0])}, tx.init(params), params)
    noise = transforms.add_gaussian_noise(0.5, key)
    known, _ = noise.update({"w": jnp.zeros(2)}, noise.init(params), params)
    np.testing.assert_allclose(updates["w"] - known["w"], [-1.0, -2.0], rtol=1e-6)


def test_what_cannot_be_run_says_what_would():
    params = jnp.zeros(2)
    for change, words in (
        ({"contraction": 1.5}, "contraction must be at most 1 to be run"),
        ({"shift": 1e-31}, "shift must be 0 or at least 2e-30"),
    ):
        stated = cu.Separations(
            initial_distance=1.0, **{"contraction": 1.0, "shift": 0.1} | change, steps=2
        )
        with pytest.raises(ValueError, match=words):
            cu.noisy_sgd(stated, 1.0, key=jax.random.key(0)).init(params)
