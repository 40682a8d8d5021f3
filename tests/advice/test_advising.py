"""The advice is true: theorems by independent formulas, properties, and calls that run."""

import functools
import html.parser
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from advice_helpers import mu_of
from hypothesis import given, settings
from hypothesis import strategies as st

import certunlearn as cu
from certunlearn.advice import clipping_search
from certunlearn.mechanisms import sentences

RESTART = "Restart from your public centre: unlearning saves you nothing here."
SHAPES = {
    "Conv_0": {"kernel": (3, 3, 3, 16), "bias": (16,)},
    "Conv_1": {"kernel": (3, 3, 16, 32), "bias": (32,)},
    "Dense_0": {"kernel": (512, 10), "bias": (10,)},
}
is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731


def weights(seed, scale=0.05):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: draw.normal(scale=scale, size=shape).astype(np.float32),
        SHAPES,
        is_leaf=is_shape,
    )


CENTER = weights(0)
TRAINED = jax.tree.map(lambda a, b: a + b, CENTER, weights(1))


def tv(mu):
    return 2 * scipy.stats.norm.cdf(mu / 2) - 1


def of_method(advice, method):
    (option,) = (option for option in advice.options if option.method == method)
    return option


def test_a_network_and_five_hundred_images_get_the_true_answer():
    advice = cu.advise(params=TRAINED, center=CENTER, rows=50_000, deletions=500)
    assert advice.verdict == RESTART
    assert [o.method for o in advice.options] == [
        "Retraining",
        "OutputPerturbation",
        "GradientClipping",
    ]
    best = advice.options[0]
    assert (best.epsilon, best.delta) == (0, 0)
    assert "public centre" in best.title
    assert any("public_features" in question for question in advice.questions)
    text = str(advice)
    assert text.startswith(RESTART)
    assert "theorem" in text
    assert "benchmarks/coupling-mnist/results.json" in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_numbers_are_those_of_independent_formulas(epsilon):
    advice = cu.advise(params=TRAINED, center=CENTER, epsilon=epsilon)
    mu, size = mu_of(epsilon, 1e-5), 432 + 16 + 4608 + 32 + 5120 + 10
    flat = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(float)
        for tree in (TRAINED, CENTER)
    ]
    distance = np.linalg.norm(flat[0] - flat[1])
    scales = {
        name: np.sqrt(np.mean(layer["kernel"].astype(float) ** 2)) for name, layer in CENTER.items()
    }
    total = 0.1 * min(scales.values())

    one = of_method(advice, "OutputPerturbation")
    assert one.survival.tv_limit == pytest.approx(tv(mu), rel=1e-6)
    assert one.survival.tv_limit_to_center == pytest.approx(tv(mu / 2), rel=1e-6)
    kept = one.survival.kept_radius
    assert 0.99 < kept / (mu * total / 2) <= 1 + 1e-6  # three digits, rounded down
    assert one.survival.share_of_distance == pytest.approx(kept / distance, rel=1e-5)
    assert one.noise.total <= total
    assert one.noise.total == pytest.approx(2 * kept / mu, rel=1e-6)
    assert one.noise.norm == pytest.approx(one.noise.total * math.sqrt(size), rel=1e-6)
    assert one.noise.norm_over_kept == pytest.approx(2 * math.sqrt(size) / mu, rel=1e-6)
    assert cu.epsilon(one.mechanism, noise_scale=one.noise_scale, delta=1e-5) == pytest.approx(
        epsilon, rel=1e-6
    )

    steps = of_method(advice, "GradientClipping")  # its gradients move as far as the start may keep
    assert steps.survival.tv_limit == pytest.approx(tv(mu), rel=1e-6)
    assert steps.survival.tv_limit_to_center == pytest.approx(tv(3 * mu / 4), rel=1e-6)
    assert 0.99 < steps.survival.kept_radius / (mu * total / 4) <= 1 + 1e-6
    assert steps.noise.total <= total
    shown = float(re.search(r"more than (\S+)%", advice.why[0])[1])
    assert 100 * tv(3 * mu / 4) <= shown < 100 * tv(3 * mu / 4) + 0.1

    found = {layer.name: layer for layer in one.noise.layers}
    assert len(found) == 6
    assert sum(layer.size for layer in found.values()) == size
    for name, scale in scales.items():
        layer = found[f"{name}/kernel"]
        assert layer.fresh_scale == pytest.approx(scale, rel=1e-6)
        assert layer.noise_over_fresh == pytest.approx(one.noise.total / scale, rel=1e-6)
        assert found[f"{name}/bias"].noise_over_fresh is None


def test_without_a_center_fresh_weights_are_known_by_their_shapes():
    layers = of_method(cu.advise(params=TRAINED), "OutputPerturbation").noise.layers
    found = {layer.name: layer.fresh_scale for layer in layers if layer.fresh_scale is not None}
    fans = {"Conv_0/kernel": 27, "Conv_1/kernel": 144, "Dense_0/kernel": 512}
    assert found == pytest.approx({name: fan**-0.5 for name, fan in fans.items()})


def test_proposals_do_not_depend_on_the_trained_model():
    """Hyperparameters are fixed without looking at it: a certificate assumes so."""
    far = jax.tree.map(lambda leaf: leaf + 3, TRAINED)
    for given_center in (CENTER, None):
        near, other = (cu.advise(params=params, center=given_center) for params in (TRAINED, far))
        for method in ("OutputPerturbation", "GradientClipping"):
            a, b = of_method(near, method), of_method(other, method)
            assert (a.mechanism, a.noise_scale, a.call) == (b.mechanism, b.noise_scale, b.call)
    assert any("choose no hyperparameter by it" in note for note in cu.advise(distance=1.0).notes)


SAID = {
    "parameters": st.integers(1, 10**9),
    "distance": st.floats(1e-9, 1e4),
    "fresh_scale": st.floats(1e-3, 1),
    "rows": st.integers(1_000, 10**8),
    "deletions": st.integers(1, 999),
    "requests": st.integers(1, 10**6),
    "adaptive": st.booleans(),
    "trained": st.booleans(),
    "public_features": st.sampled_from([None, False]),
    "convex": st.sampled_from([None, False]),
    "epsilon": st.floats(0.05, 60),
    "delta": st.floats(1e-9, 0.1),
}
quick = settings(max_examples=15, deadline=None)


@quick
@given(st.fixed_dictionaries(SAID))
def test_with_a_center_and_no_convex_loss_it_says_restart(said):
    advice = cu.advise(**said)
    assert advice.options[0].method == "Retraining"
    assert advice.verdict.startswith("Restart from your public centre")
    limits = [o.survival.tv_limit_to_center for o in advice.options if o.survival]
    assert ("saves you nothing here" in advice.verdict) == (max(limits) <= 0.1)
    for option in advice.options:
        covered = sentences.REQUESTS not in option.assumes or not said["adaptive"]
        assert covered == ("It does not hold for requests" not in option.guarantee)
        if option.survival is not None:
            limit = math.tanh(said["epsilon"] / 2) + 2 * said["delta"] / (
                1 + math.exp(said["epsilon"])
            )
            assert option.survival.tv_limit <= limit * (1 + 1e-6)
            assert option.survival.tv_limit_to_center <= option.survival.tv_limit
            assert 0 <= option.survival.share_of_distance <= 1
            # The start, one Gaussian or none: what is kept never outgrows theory.
            most = mu_of(said["epsilon"], said["delta"]) / 2 if said["epsilon"] < 30 else math.inf
            assert option.survival.kept_radius <= most * option.noise.total * (1 + 1e-6)


@quick
@given(st.fixed_dictionaries(SAID), st.floats(1.001, 4))
def test_more_epsilon_never_leaves_less_of_the_old_model(said, factor):
    less, more = cu.advise(**said), cu.advise(**{**said, "epsilon": said["epsilon"] * factor})
    for method in ("OutputPerturbation", "GradientClipping"):
        a, b = of_method(less, method), of_method(more, method)
        assert a.survival.tv_limit <= b.survival.tv_limit * (1 + 1e-9)
        assert a.survival.tv_limit_to_center <= b.survival.tv_limit_to_center * (1 + 1e-9)
        assert a.survival.kept_radius <= b.survival.kept_radius * (1 + 1e-9)
        assert a.survival.share_of_distance <= b.survival.share_of_distance * (1 + 1e-9)
        assert a.noise.norm_over_kept >= b.noise.norm_over_kept * (1 - 0.011)  # three digits


def test_adaptive_requests_put_what_does_not_cover_them_last():
    case = {"public_features": True, "rows": 22_000, "features": 513, "classes": 5}
    methods = [o.method for o in cu.advise(**case, deletions=10, adaptive=True).options]
    assert methods[-1] == "GradientClipping"
    assert methods[-2] == "PerturbedMinimizer"
    assert [o.method for o in cu.advise(**case, deletions=10).options][-1] == "PerturbedMinimizer"

    ahead = cu.advise(trained=False, adaptive=True)
    assert ahead.options[0].method == "Retraining"
    assert "does not hold" in of_method(ahead, "DPSGD").guarantee
    convex = cu.advise(trained=False, adaptive=True, convex=True)
    assert [o.method for o in convex.options] == ["Retraining", "PerturbedMinimizer", "DPSGD"]


def test_convex_losses_get_the_minimiser_and_what_contracting_costs():
    advice = cu.advise(convex=True)
    assert [o.method for o in advice.options] == ["Retraining", "PerturbedMinimizer"]
    ruled = dict(advice.ruled_out)
    assert "168,661 times" in ruled["DescentToDelete, ProjectedNoisySGD"]
    noise = 1 / mu_of(1.0, 1e-5)
    assert f"{noise:.3g} * gradient_norm / strong_convexity" in str(advice)
    assert any("public_features" in question for question in advice.questions)


def test_training_that_is_ahead_may_add_noise():
    advice = cu.advise(trained=False, deletions=5, requests=4)
    assert "deletions=20" in of_method(advice, "DPSGD").call
    assert "any 20 rows" in of_method(advice, "DPSGD").guarantee
    assert "DPSGD" not in [o.method for o in cu.advise().options]


def test_seconds_follow_from_what_was_said():
    advice = cu.advise(public_start=True, epochs=20, epoch_seconds=30, requests=3)
    assert advice.options[0].seconds == 600
    assert "1800 s in all" in advice.options[0].cost_words
    assert "30 s at most" in of_method(advice, "GradientClipping").cost_words
    assert cu.advise(epochs=20).options[0].seconds is None


def test_a_large_delta_is_noticed():
    assert any("1 over the number of rows" in n for n in cu.advise(rows=50_000, delta=1e-4).notes)
    assert not any("1 over the number" in n for n in cu.advise(rows=50_000).notes)


def test_two_ways_of_saying_the_same_agree():
    advice = cu.advise(params=TRAINED, center=CENTER)
    kernels = [layer["kernel"].astype(float) for layer in CENTER.values()]
    said = cu.advise(
        parameters=10_218,
        distance=float(np.sqrt(sum(
            np.sum((a.astype(float) - b.astype(float)) ** 2)
            for a, b in zip(jax.tree.leaves(TRAINED), jax.tree.leaves(CENTER), strict=True)
        ))),
        fresh_scale=min(float(np.sqrt(np.mean(kernel**2))) for kernel in kernels),
    )  # fmt: skip
    for method in ("OutputPerturbation", "GradientClipping"):
        a, b = of_method(advice, method), of_method(said, method)
        assert a.mechanism == b.mechanism
        assert a.survival == b.survival


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"center": CENTER}, ValueError, "params=None"),
        ({"params": TRAINED, "parameters": 5}, ValueError, "leave them out"),
        ({"params": TRAINED, "center": CENTER, "distance": 1.0}, ValueError, "leave them out"),
        ({"params": TRAINED, "center": {"w": np.ones(3)}}, ValueError, "structure"),
        ({"distance": -1.0}, ValueError, "distance must be positive"),
        ({"distance": 1.0, "public_start": False}, ValueError, "public_start must not be False"),
        ({"params": TRAINED, "center": TRAINED}, ValueError, "center must be public"),
        ({"distance": 0.0}, ValueError, "distance must be positive"),
        ({"rows": 10, "deletions": 10}, ValueError, "fewer than rows, got 10 of 10"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive"),
        ({"delta": 1.0}, ValueError, "delta must be strictly"),
        ({"cost": "money"}, ValueError, "cost must be one of 'operations', 'seconds'"),
        ({"convex": "yes"}, TypeError, "convex must be True or False"),
        ({"deletions": 1.5}, TypeError, "deletions must be a whole number"),
        ({"epoch_seconds": 0}, ValueError, "epoch_seconds must be positive"),
    ],
)
def test_what_is_wrong_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        cu.advise(**wrong)


class Balanced(html.parser.HTMLParser):
    """Raises where tags do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_notebooks_show_all_of_it_as_sound_html():
    advice = cu.advise(params=TRAINED, center=CENTER)
    page = Balanced()
    page.feed(advice._repr_html_())
    assert page.open == []
    shown = "".join(page.text)
    for part in (advice.verdict, *advice.why, *advice.notes, *advice.questions):
        assert part in shown
    for option in advice.options:
        assert option.call in shown
        assert option.guarantee in shown
    odd = cu.advise(params={"<b>": np.ones((3, 3))})
    assert "<b>:" not in odd._repr_html_()
    assert "&lt;b&gt;" in odd._repr_html_()


def test_asking_flips_no_switch_and_changes_nothing():
    before = jax.tree.map(np.copy, TRAINED)
    first = cu.advise(params=TRAINED, center=CENTER)
    assert str(first) == str(cu.advise(params=TRAINED, center=CENTER))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, TRAINED))
    assert not jax.config.jax_enable_x64


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Retraining", "OutputPerturbation", "GradientClipping"])
def test_calls_run_as_they_are_printed(method):
    x = jax.random.normal(jax.random.key(0), (60, 4))
    center = {"w": jnp.full((4, 2), 0.1)}
    names = {
        "cu": cu,
        "loss_fn": lambda p, batch: jnp.mean((batch["x"] @ p["w"]) ** 2),
        "params": {"w": jnp.ones((4, 2))},
        "center": center,
        "retain": {"x": x},
        "optimizer": optax.sgd(0.1),
        "steps": 3,
        "batch_size": 20,
    }
    option = of_method(cu.advise(params=names["params"], center=center), method)
    lines = option.call.split("cu.unlearn(")
    exec(f"{lines[0]}result = cu.unlearn({lines[1]}", names)
    result = names["result"]
    assert cu.verify(result.certificate, result.params)
    assert result.certificate.epsilon == pytest.approx(option.epsilon, rel=1e-3)


def test_exact_calls_run_as_they_are_printed():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(40, 3))
    labels = (features[:, 0] > 0).astype(int)
    heads = []
    for option in cu.advise(public_features=True).options[:2]:
        assert option.method == "exact"
        names = {
            "cu": cu,
            "stats": cu.exact.collect(features, labels, feature_norm=4.0),
            "forget_features": features[:5],
            "forget_labels": labels[:5],
        }
        exec(option.call, names)
        heads.append(names["head"])
    never = cu.exact.collect(features[5:], labels[5:], feature_norm=4.0)
    assert np.array_equal(heads[0], cu.exact.ridge(never, l2=1e-3))
    assert np.array_equal(heads[0], heads[1])


@pytest.mark.slow
def test_any_form_of_a_model_is_taken():
    from flax import linen, nnx

    net = linen.Dense(3)
    variables = net.init(jax.random.key(0), jnp.ones((1, 5)))
    assert of_method(cu.advise(params=variables), "OutputPerturbation").noise.layers[1].size == 15
    drawn = linen.Dense(10).init(jax.random.key(0), jnp.ones((1, 512)))["params"]["kernel"]
    layers = of_method(cu.advise(params={"w": drawn}), "OutputPerturbation").noise.layers
    assert float(jnp.std(drawn)) == pytest.approx(layers[0].fresh_scale, rel=0.05)
    module = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    sizes = [
        la.size for la in of_method(cu.advise(params=module), "OutputPerturbation").noise.layers
    ]
    assert sorted(sizes) == [3, 15]


@pytest.mark.slow
def test_with_a_search_gradient_clipping_keeps_more(monkeypatch):
    short = functools.partial(cu.advice.suggest_clipping, steps=(1, 2), decays=(0.0,))
    monkeypatch.setattr(clipping_search, "suggest_clipping", short)
    quick_one = of_method(cu.advise(fresh_scale=0.1, epsilon=4.0), "GradientClipping")
    searched = of_method(cu.advise(fresh_scale=0.1, epsilon=4.0, search=True), "GradientClipping")
    assert searched.survival.kept_radius > 1.05 * quick_one.survival.kept_radius
    assert searched.mechanism.steps > 1
    assert searched.survival.tv_limit_to_center <= searched.survival.tv_limit
