"""The accountant `"exact"`: 0 of everything for mechanisms without noise, and for no other."""

import dataclasses

import numpy as np
import optax
import pytest

import certunlearn as cu
from certunlearn import mechanisms, planning

HEAD = mechanisms.ExactHead(kind="lda", l2=0.1, num_features=3, feature_norm=1, bits=20, classes=2)
EXACT = [cu.Retraining(), HEAD]
exact = pytest.mark.parametrize("m", EXACT, ids=lambda m: type(m).__name__)
NOISY = [
    cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=2),
    cu.OutputPerturbation(init_radius=1.0),
    cu.PerturbedMinimizer(gradient_norm=1e-3, strong_convexity=0.1),
    cu.DPSGD(
        clip_norm=1.0, learning_rate=0.1, steps=2, sampling_rate=0.5, batch_size=5, deletions=3
    ),
    cu.Separations(initial_distance=0.0, contraction=[1.0], shift=[0.0]),
]


@exact
def test_everything_is_zero(m):
    for given in ({}, {"noise_scale": 0.0, "delta": 0.0}, {"noise_scale": 3.0, "delta": 1e-5}):
        assert cu.epsilon(m, **given) == 0
        assert cu.epsilon(m, **given, accountant="exact") == 0
        assert cu.epsilon_curve(m, **given).tolist() == [0.0]
    assert cu.delta(m, epsilon=0.0) == cu.delta(m, noise_scale=0.0, epsilon=1.0) == 0
    assert cu.noise_scale(m, epsilon=1.0, delta=1e-5) == cu.noise_scale(m, epsilon=0.0) == 0
    assert cu.noise_scale(m, epsilon=1.0, accountant="exact") == 0
    assert cu.accounting.total_variation(m) == 0
    assert cu.accounting.mu(m, noise_scale=0.0) == 0
    assert cu.accounting.least_epsilon(m) == (0.0, "exact")
    assert cu.accounting.affordable_lower_bound(m, noise_scale=0.0, delta=1e-5) is None


@exact
def test_no_accountant_of_noise_takes_them(m):
    assert cu.accounting.supported_names(m) == ("exact",)
    for name, reason in cu.supported_accountants(m).items():
        if name == "exact":
            continue
        assert "exact without any; use 'exact'" in reason
        with pytest.raises(ValueError, match="use 'exact'"):
            cu.epsilon(m, accountant=name)
        assert cu.accounting.unaffordable_reason(name, m, 0.0) is None


@pytest.mark.parametrize("m", NOISY, ids=lambda m: type(m).__name__)
def test_it_takes_no_mechanism_that_needs_noise(m):
    assert "exact" not in cu.accounting.supported_names(m)
    with pytest.raises(ValueError, match="for mechanisms that need no noise"):
        cu.epsilon(m, noise_scale=1.0, delta=1e-5, accountant="exact")
    with pytest.raises(TypeError, match="noise_scale must be given"):
        cu.epsilon(m, delta=1e-5)
    with pytest.raises(TypeError, match="delta must be one real number"):
        cu.epsilon(m, noise_scale=1.0)
    with pytest.raises(ValueError, match="noise_scale"):
        cu.epsilon(m, noise_scale=0.0, delta=1e-5)
    with pytest.raises(ValueError, match="delta"):
        cu.epsilon(m, noise_scale=1.0, delta=0.0)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        cu.noise_scale(m, epsilon=0.0, delta=1e-5)


@exact
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"noise_scale": -1.0}, "noise_scale must be at least 0"),
        ({"noise_scale": np.nan}, "noise_scale must be at least 0"),
        ({"delta": 1.0}, "delta must be strictly between"),
        ({"delta": -1e-9}, "delta must be strictly between"),
    ],
)
def test_what_is_given_is_still_checked(m, given, words):
    with pytest.raises(ValueError, match=words):
        cu.epsilon(m, **given)


@exact
def test_what_exact_mechanisms_answer(m):
    assert mechanisms.check(m) is m
    assert m.exact
    assert m.steps == 0
    assert m.separations() is None
    assert m.published_noise() is None
    assert m.first(0) is m
    for steps in (1, -1, True, None):
        with pytest.raises(ValueError, match="steps must be 0"):
            m.first(steps)
    assert m.can_stop(0)
    assert len(set(m.rests_on())) == len(m.rests_on()) >= 6
    assert all(each.isascii() and each.isprintable() for each in m.rests_on())
    assert mechanisms.sentences.DOWNSTREAM in m.rests_on()
    assert mechanisms.sentences.REQUESTS not in m.rests_on()
    for words in ("Nothing accumulates", "union", "looking at earlier", "is redone", "itself tell"):
        assert words in m.sequence
    record = mechanisms.to_record(m)
    assert mechanisms.from_record(record) == m
    with pytest.raises(ValueError, match="missing or unknown fields"):
        mechanisms.from_record(record | {"surplus": 1})


@exact
def test_a_plan_says_that_there_is_no_noise(m):
    plan = planning.plan_for(m, epsilon=1.0, delta=1e-5)
    assert [(each.accountant, each.noise_scale) for each in plan.accountants] == [("exact", 0.0)]
    table = planning.to_table(plan)
    assert f"no noise: {m.why_exact}" in table
    assert planning.to_record(plan)["initial_distance"] is None


@dataclasses.dataclass(frozen=True)
class Claims(cu.Mechanism):
    """A class of a user's own that says it is exact."""

    steps: int = 0
    exact: bool = True
    apart: float | None = None

    def separations(self):
        if self.apart is None:
            return None
        return cu.Separations(initial_distance=self.apart, contraction=[1.0], shift=[0.0])

    def update(self, center):
        return optax.set_to_zero()


def test_a_class_of_ones_own_may_say_so_but_nobody_certifies_it():
    assert cu.epsilon(Claims()) == 0
    with pytest.raises(ValueError, match="must state separations to be certified"):
        cu.certify(Claims(), params={"w": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="must have steps = 0 and no separations to be exact"):
        cu.epsilon(Claims(apart=1.0))
    with pytest.raises(ValueError, match="must have steps = 0"):
        cu.epsilon(Claims(steps=3))
