"""Mechanisms of a user's own, and plain separations, through the loop's noisy steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_helpers import BATCH, DATA, PARAMS, SIZE, loss_fn, same
from transform_helpers import exact_norm

import certunlearn as cu
from certunlearn.unlearning import compiled_steps

KEY, SCALE = jax.random.key(7), 0.05
KEYS = cu.split_key(KEY)
CENTER = {"w": jnp.array([2.0, 0.0, -1.0]), "b": jnp.array(1.0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PulledSigns(cu.Mechanism):
    """Each step goes a part of the way to the centre, and by `step` along each gradient's sign."""

    steps: int
    radius: float
    pull: float
    step: float
    size: int

    uses_center = True

    def separations(self):
        return cu.Separations(
            initial_distance=2 * self.radius,
            contraction=1 - self.pull,
            shift=2 * self.step * self.size**0.5,
            steps=self.steps,
            assumptions=[f"The parameters are {self.size} numbers."],
        )

    def start(self, params, center, key):
        return cu.clip_params(params, self.radius, center)

    def update(self, center):
        return optax.chain(
            optax.scale_by_sign(),
            optax.scale(self.step),
            cu.transforms.decay_toward(self.pull, center),
            optax.scale(-1.0),
        )


class Tolerant(PulledSigns):
    """A step without a gradient goes to the centre only, which the separations allow."""

    tolerates_nonfinite = True


class WithoutCenter(PulledSigns):
    uses_center = False


OWN = {"steps": 5, "radius": 1.0, "pull": 0.25, "step": 0.1, "size": 4}
SIGNS = PulledSigns(**OWN)


def prepare(mechanism=SIGNS, data=DATA, params=PARAMS, center=CENTER, key=KEY, **rarer):
    return cu.unlearning.prepare(
        loss_fn,
        params,
        data,
        mechanism,
        noise_scale=SCALE,
        delta=1e-5,
        batch_size=BATCH,
        key=key,
        center=center,
        accountant="interpolation",
        options=cu.Options(**rarer),
        progress=False,
    )


def path(mechanism=SIGNS, **changes):
    """The parameters before the first step and after each, and the numbers of the steps."""
    watched = {"evaluate": lambda params: params, "evaluate_every": 1}
    noisy = cu.unlearning.run_noisy_steps(prepare(mechanism, **(watched | changes)))
    assert [step for step, _ in noisy.evaluations] == list(range(mechanism.steps + 1))
    return [params for _, params in noisy.evaluations], noisy


def noises(steps, key=KEYS.noise, scale=SCALE):
    """What `add_gaussian_noise` draws with the run's key."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = cu.transforms.add_gaussian_noise(scale, key)
    drawn, state = [], tx.init(zeros)
    for _ in range(steps):
        noise, state = tx.update(zeros, state)
        drawn.append(noise)
    return drawn


def gradients(params):
    """Of the loss at parameters on the run's batches, one tree a step."""
    order = cu.batch_indices(KEYS.data, SIZE, BATCH, len(params))
    batches = [jax.tree.map(lambda x, i=indices: x[i], DATA) for indices in order]
    return [jax.grad(loss_fn)(x, batch) for x, batch in zip(params, batches, strict=True)]


def stepped(params, grads, noise):
    """One step of `PulledSigns`, written by hand in float64."""

    def leaf(x, g, n, c):
        x, g, n, c = (np.asarray(each, np.float64) for each in (x, g, n, c))
        return x - OWN["step"] * np.sign(g) - OWN["pull"] * (x - c) + n

    return jax.tree.map(leaf, params, grads, noise, CENTER)


def close(left, right):
    return exact_norm(jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), left, right)) < 1e-6


@pytest.fixture(scope="module")
def walked():
    return path()


# ------------------------------------------------------------------------------ a class of its own


def test_noisy_steps_are_the_start_the_update_and_the_noise(walked):
    found, noisy = walked
    assert close(found[0], cu.clip_params(PARAMS, OWN["radius"], CENTER))
    assert not close(found[0], PARAMS)
    drawn = noises(SIGNS.steps)
    for t, grads in enumerate(gradients(found[:-1])):
        assert close(found[t + 1], stepped(found[t], grads, drawn[t]))
        others = [noise for step, noise in enumerate(drawn) if step != t]
        for wrong in (jax.tree.map(jnp.zeros_like, PARAMS), *others):
            assert not close(found[t + 1], stepped(found[t], grads, wrong))
    assert noisy.step == SIGNS.steps
    assert same(noisy.carry[0], found[-1])


def test_the_step_count_is_what_the_state_has_counted(walked):
    _, noisy = walked
    assert cu.mechanisms.evidence(noisy.carry[1]) == (SIGNS.steps, 0)


POISONED = DATA | {"x": np.where(np.arange(SIZE)[:, None] == 5, np.nan, DATA["x"])}


def test_a_gradient_that_is_not_finite_is_refused_or_left_out_as_the_class_says():
    order = np.concatenate(list(cu.batch_indices(KEYS.data, SIZE, BATCH, SIZE // BATCH)))
    bad = int(np.flatnonzero(order == 5)[0]) // BATCH
    with pytest.raises(FloatingPointError, match=f"at step {bad}, batch {bad} of epoch 0.*Pulled"):
        path(data=POISONED)
    found, noisy = path(Tolerant(**OWN), data=POISONED)
    assert noisy.stats[bad].nonfinite.sum() == 1
    none = jax.tree.map(jnp.zeros_like, PARAMS)
    assert close(found[bad + 1], stepped(found[bad], none, noises(bad + 1)[bad]))
    assert np.all(np.isfinite(found[-1]["w"]))


def fails_at(step):
    seen = iter(range(100))

    def evaluate(params):
        if next(seen) == step:
            raise RuntimeError("disk full")

    return evaluate


def test_a_run_goes_on_where_it_stopped(walked):
    with pytest.raises(cu.unlearning.UnlearningFailed, match="disk full; at step 2") as caught:
        cu.unlearning.run_noisy_steps(prepare(evaluate=fails_at(2), evaluate_every=1))
    state = caught.value.state
    resumed = cu.unlearning.run_noisy_steps(prepare(key=None, resume=state))
    assert same(resumed.carry[0], walked[1].carry[0])
    assert resumed.step == SIGNS.steps
    assert sum(len(stats.loss) for stats in resumed.stats) == SIGNS.steps - 2
    for other in (PulledSigns(**OWN | {"pull": 0.5}), Tolerant(**OWN)):
        with pytest.raises(ValueError, match="another plan: mechanism"):
            prepare(other, key=None, resume=state)


def test_a_centre_is_refused_where_it_would_not_be_used():
    with pytest.raises(ValueError, match="center must be None"):
        prepare(WithoutCenter(**OWN))
    assert prepare(WithoutCenter(**OWN), center=None).stop == SIGNS.steps


def test_what_a_mechanism_has_no_use_for_is_refused():
    with pytest.raises(ValueError, match="per_example=True needs a clip norm"):
        prepare(per_example=True)
    with pytest.raises(ValueError, match="before_clip must be None for PulledSigns"):
        prepare(before_clip=optax.scale_by_adam())


def test_no_class_and_no_undecorated_subclass_is_a_mechanism():
    class Bare(cu.Mechanism):
        steps = 3

        def separations(self):
            return SIGNS.separations()

        def update(self, center):
            return optax.identity()

    for wrong, words in ((PulledSigns, "must be a certunlearn.Mechanism"), (Bare(), "dataclass")):
        with pytest.raises(TypeError, match=words):
            prepare(wrong)


# ------------------------------------------------------------------------------ plain separations

FAR = 3.0
SEPARATIONS = {
    "numbers": {"contraction": 0.8, "shift": 0.4, "steps": 5},
    "schedules": {"contraction": [1.0, 0.5, 0.0, 0.9, 0.7], "shift": [0.0, 0.3, 0.1, 0.0, 0.5]},
    "no shift": {"contraction": 0.9, "shift": 0.0, "steps": 5},
    "no contraction": {"contraction": 1.0, "shift": 0.2, "steps": 5},
    "the last noisy": {
        "contraction": [0.9, 0.9, 1.0, 0.5, 0.9],
        "shift": 0.1,
        "noisy": [False] * 4 + [True],
    },
    "some noisy": {
        "contraction": 0.6,
        "shift": [0.1, 0.0, 0.2, 0.0, 0.1],
        "noisy": [True, False, True, False, True],
    },
    "from the centre": {"contraction": 0.8, "shift": 0.4, "steps": 5, "reference": "center"},
}
# Gradients in all directions and of all sizes, so that clips and starts point away from each other.
ELSEWHERE = DATA | {"y": -30 * DATA["y"]}


@pytest.fixture(scope="module", params=SEPARATIONS)
def pair(request):
    """A mechanism and its runs from two models on other data: apart as far as they may be."""
    mechanism = cu.Separations(initial_distance=FAR, **SEPARATIONS[request.param])
    there = jax.tree.map(lambda c: c + 50.0, CENTER)
    back = jax.tree.map(lambda c: c - 50.0, CENTER)
    if mechanism.reference == "center":
        back = CENTER
    here, _ = path(mechanism, params=there)
    other, _ = path(mechanism, data=ELSEWHERE, params=back)
    return mechanism, here, other


def gap(left, right):
    return exact_norm(jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), left, right))


def test_two_runs_never_are_further_apart_than_stated(pair):
    """Both have the same noise, so that their distance after a step is that before its noise."""
    mechanism, here, there = pair
    # Each of the four numbers is rounded, in both runs, by half a spacing at most for each of some
    # operations.
    rounding = 8 * np.spacing(np.float32(4.0))
    assert FAR * 0.999 < gap(here[0], there[0]) <= FAR + rounding
    for t in range(mechanism.steps):
        bound = mechanism.separation(t, gap(here[t], there[t]))
        assert gap(here[t + 1], there[t + 1]) <= bound + rounding


def test_contractions_are_exact_where_there_is_no_shift(pair):
    mechanism, here, there = pair
    for t in range(mechanism.steps):
        contraction = np.broadcast_to(mechanism.contraction, 5)[t]
        shift = np.broadcast_to(mechanism.shift, 5)[t]
        distance, after = gap(here[t], there[t]), gap(here[t + 1], there[t + 1])
        assert abs(after - contraction * distance) <= shift + 1e-5
        if shift == 0:
            assert after == pytest.approx(contraction * distance, abs=1e-5)


def test_each_clip_takes_half_the_shift(pair):
    mechanism, here, _ = pair
    drawn = noises(mechanism.steps)
    for t in range(mechanism.steps):
        contraction = np.broadcast_to(mechanism.contraction, 5)[t]
        shift = np.broadcast_to(mechanism.shift, 5)[t]
        noisy = float(mechanism.noisy_steps[t])
        moved = jax.tree.map(
            lambda x, y, n, c, k=contraction, on=noisy: (
                np.float64(y) - c - k * (np.float64(x) - c) - on * np.float64(n)
            ),
            here[t],
            here[t + 1],
            drawn[t],
            CENTER,
        )
        assert exact_norm(moved) == pytest.approx(shift / 2, abs=1e-6)


@pytest.mark.slow
def test_starts_that_are_not_apart_are_the_centre():
    found, _ = path(cu.Separations(initial_distance=0.0, contraction=0.9, shift=0.1, steps=2))
    assert same(found[0], CENTER)


def test_a_gradient_that_is_not_finite_moves_nothing():
    mechanism = cu.Separations(initial_distance=FAR, contraction=1.0, shift=0.2, steps=3)
    found, noisy = path(mechanism, data=POISONED)
    bad = next(t for t, stats in enumerate(noisy.stats) if stats.nonfinite.sum())
    moved = jax.tree.map(jnp.subtract, found[bad + 1], found[bad])
    assert close(moved, noises(3)[bad])


def test_the_update_of_ones_own_runs_in_place_of_the_simplest():
    mechanism = cu.Separations(
        initial_distance=100.0,
        contraction=1.0,
        shift=0.4,
        steps=3,
        assumptions=["Each update moves the parameters by 0.2 at most."],
        transform=optax.chain(optax.normalize_by_update_norm(), optax.scale(-0.2)),
    )
    found, _ = path(mechanism, center=None)
    assert same(found[0], PARAMS)
    drawn = noises(3)
    for t, grads in enumerate(gradients(found[:-1])):
        norm = exact_norm(grads)
        expected = jax.tree.map(
            lambda x, g, n, of=norm: np.float64(x) - 0.2 * np.float64(g) / of + np.float64(n),
            found[t],
            grads,
            drawn[t],
        )
        assert close(found[t + 1], expected)
    with pytest.raises(ValueError, match="center must be None"):
        prepare(mechanism)
    with pytest.raises(FloatingPointError, match="not finite at step"):
        path(mechanism, center=None, data=POISONED)


def test_separations_that_do_not_contract_need_an_update_of_their_own():
    with pytest.raises(ValueError, match=r"contraction must be at most 1 to be run, got 1\.1"):
        prepare(cu.Separations(initial_distance=FAR, contraction=1.1, shift=0.1, steps=2))


def test_plain_separations_resume_and_stop_where_there_was_noise(monkeypatch):
    monkeypatch.setattr(compiled_steps, "longest_call", lambda params, convolutions: 1)
    mechanism = cu.Separations(initial_distance=FAR, **SEPARATIONS["some noisy"])
    whole = cu.unlearning.run_noisy_steps(prepare(mechanism))
    stopped = {"evaluate": fails_at(3), "evaluate_every": 1}
    with pytest.raises(cu.unlearning.UnlearningFailed) as caught:
        cu.unlearning.run_noisy_steps(prepare(mechanism, **stopped))
    resumed = cu.unlearning.run_noisy_steps(prepare(mechanism, key=None, resume=caught.value.state))
    assert same(resumed.carry[0], whole.carry[0])
    late = cu.Separations(initial_distance=FAR, **SEPARATIONS["the last noisy"])
    with pytest.raises(KeyboardInterrupt, match="before any noise"):
        cu.unlearning.run_noisy_steps(prepare(late), interrupted=lambda: True)
    with pytest.warns(UserWarning, match="stopped after 1 of 5"):
        early = cu.unlearning.run_noisy_steps(prepare(mechanism), interrupted=lambda: True)
    assert early.step == 1
