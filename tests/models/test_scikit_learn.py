"""Estimators of scikit-learn as losses: the same minimisers, and what is refused."""

import sys

import numpy as np
import pytest
from sklearn.linear_model import (
    ElasticNet,
    LogisticRegression,
    LogisticRegressionCV,
    Ridge,
    RidgeClassifier,
)

from certunlearn import convex, solvers

COUNT, NORM = 60, 1.0
PLAIN = {"fit_intercept": False}
EXACT = {**PLAIN, "tol": 1e-10, "max_iter": 10_000}


def draw(classes):
    rng = np.random.default_rng(0)
    x = np.asarray(convex.clip_features(rng.normal(size=(COUNT, 4)), NORM), np.float64)
    numbers = np.argmax(x[:, :classes] + 0.3 * rng.normal(size=(COUNT, classes)), axis=1)
    return x, np.array(["cat", "dog", "emu"])[numbers]


def regression(outputs):
    x, _ = draw(2)
    y = np.clip(x @ np.ones((4, outputs)) / 4, -0.5, 0.5)
    return x, y if outputs > 1 else y[:, 0]


CASES = {
    "two classes": (LogisticRegression(C=0.7, **EXACT), draw(2)),
    "three classes": (LogisticRegression(C=3.0, **EXACT), draw(3)),
    "class weights": (
        LogisticRegression(C=2.0, class_weight={"dog": 3.0, "cat": 0.5}, **EXACT),
        draw(3),
    ),
    "ridge": (Ridge(alpha=2.0, **PLAIN), regression(1)),
    "ridge of two outputs": (Ridge(alpha=0.3, **PLAIN), regression(2)),
    "signs": (RidgeClassifier(alpha=0.5, **PLAIN), draw(2)),
    "signs of three": (RidgeClassifier(alpha=0.5, class_weight={"emu": 2.0}, **PLAIN), draw(3)),
}


def as_data(model, x, y):
    return x, y if isinstance(model, Ridge) else np.searchsorted(model.classes_, y)


def imported(model, size=COUNT):
    targets = {"target_norm": 1.0} if isinstance(model, Ridge) else {}
    return convex.from_sklearn(model, feature_norm=NORM, size=size, **targets)


@pytest.mark.parametrize("name", CASES)
def test_the_minimiser_is_that_of_scikit_learn(name):
    model, (x, y) = CASES[name]
    model.fit(x, y)
    loss, params = imported(model)
    out = solvers.minimize(loss, loss.init(4), as_data(model, x, y), tolerance=1e-11)
    np.testing.assert_allclose(out.params, params, atol=1e-6)
    # With another number of rows, the objective is another.
    other, _ = imported(model, size=2 * COUNT)
    assert other.l2 == pytest.approx(loss.l2 / 2)
    moved = solvers.minimize(other, loss.init(4), as_data(model, x, y), tolerance=1e-9)
    assert np.linalg.norm(moved.params - params) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_parameters_go_back_into_an_estimator_of_their_own(name):
    model, (x, y) = CASES[name]
    model.fit(x, y)
    _, params = imported(model)
    before = model.coef_.copy()
    same = convex.to_sklearn(params, model)
    np.testing.assert_array_equal(same.predict(x), model.predict(x))
    assert "n_iter_" not in vars(same)  # it depends on the deleted rows
    turned = convex.to_sklearn(-params, model)
    if isinstance(model, Ridge):
        np.testing.assert_allclose(turned.predict(x), -model.predict(x), atol=1e-12)
    else:
        np.testing.assert_allclose(turned.decision_function(x), -model.decision_function(x))
        np.testing.assert_array_equal(turned.classes_, model.classes_)
    np.testing.assert_array_equal(model.coef_, before)
    with pytest.raises(ValueError, match="params must be of shape"):
        convex.to_sklearn(params[:-1], model)


def test_after_a_deletion_the_size_is_that_of_the_retain_data():
    x, y = draw(2)
    model = LogisticRegression(C=1.0, **EXACT).fit(x, y)
    kept = slice(10, None)
    loss, params = imported(model, size=COUNT - 10)
    out = solvers.minimize(loss, params, as_data(model, x[kept], y[kept]), tolerance=1e-10)
    again = LogisticRegression(C=1.0, **EXACT).fit(x[kept], y[kept])
    np.testing.assert_allclose(out.params, again.coef_[0], atol=1e-6)
    assert loss.strong_convexity > imported(model)[0].strong_convexity


def test_the_regularised_intercept_of_liblinear_is_a_feature():
    x, y = draw(2)
    y = np.where(x[:, 0] > -0.4, "dog", "cat")
    model = LogisticRegression(solver="liblinear", intercept_scaling=2.0, tol=1e-12).fit(x, y)
    assert abs(model.intercept_[0]) > 0.1
    loss, params = imported(model)
    wide = convex.append_intercept(x, value=2.0)
    assert loss.feature_norm == pytest.approx(np.sqrt(NORM**2 + 4))
    out = solvers.minimize(loss, loss.init(5), as_data(model, wide, y), tolerance=1e-11)
    np.testing.assert_allclose(out.params, params, atol=1e-6)
    same = convex.to_sklearn(params, model)
    np.testing.assert_allclose(same.decision_function(x), model.decision_function(x))
    np.testing.assert_allclose(same.intercept_, model.intercept_)


# Since scikit-learn 1.8 the ratio alone chooses the penalty.
ELASTIC = {} if LogisticRegression().penalty == "deprecated" else {"penalty": "elasticnet"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LogisticRegression(), "fit_intercept=False.*not strongly convex.*liblinear"),
        (Ridge(), "fit_intercept=False.*append_intercept"),
        (LogisticRegression(class_weight="balanced", **PLAIN), "balanced weights"),
        (LogisticRegression(C=np.inf, **PLAIN), "C must be positive and finite"),
        (LogisticRegression(l1_ratio=0.5, solver="saga", **ELASTIC, **EXACT), "L2 penalty alone"),
        (Ridge(positive=True, **PLAIN), "positive=False"),
        (Ridge(alpha=0.0, **PLAIN), "alpha must be positive"),
    ],
)
def test_objectives_without_constants_are_refused(model, message):
    x, y = regression(1) if isinstance(model, Ridge) else draw(2)
    model.fit(x, y)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        imported(model)


def test_other_estimators_are_refused():
    x, y = draw(2)
    for model in (ElasticNet(), LogisticRegressionCV(), "a model", LogisticRegression):
        with pytest.raises(TypeError, match="estimator must be one of LogisticRegression, Ridge"):
            convex.from_sklearn(model, feature_norm=1.0, size=3)
    with pytest.raises(TypeError, match="must be fitted"):
        imported(LogisticRegression(**PLAIN))
    model = LogisticRegression(**PLAIN).fit(x, y)
    with pytest.raises(ValueError, match="target_norm must be None for LogisticRegression"):
        convex.from_sklearn(model, feature_norm=1.0, size=3, target_norm=1.0)
    ridge = Ridge(**PLAIN).fit(*regression(1))
    with pytest.raises(ValueError, match="target_norm must be given for Ridge"):
        convex.from_sklearn(ridge, feature_norm=1.0, size=3)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    model = Ridge(**PLAIN).fit(*regression(1))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for module in [name for name in sys.modules if name.startswith("sklearn.")]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install certunlearn\[sklearn\]"):
        convex.from_sklearn(model, feature_norm=1.0, size=3, target_norm=1.0)
    with pytest.raises(ImportError, match=r"pip install certunlearn\[sklearn\]"):
        convex.to_sklearn(np.ones(4), model)
