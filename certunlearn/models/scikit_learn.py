"""scikit-learn's linear models as convex losses, and parameters back as fitted estimators.

scikit-learn is needed for this alone: `pip install certunlearn[sklearn]`.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from certunlearn._numerics import checks
from certunlearn.models.classification import logistic_regression, ridge_classification
from certunlearn.models.loss import ConvexLoss
from certunlearn.models.regression import ridge_regression

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

_KINDS = ("LogisticRegression", "Ridge", "RidgeClassifier")


def from_sklearn(
    estimator: "BaseEstimator", *, feature_norm: float, size: int, target_norm: float | None = None
) -> tuple[ConvexLoss, np.ndarray]:
    """The objective that a scikit-learn estimator minimises, as a loss, and its parameters.

    scikit-learn sums over the rows, and this package takes the mean over n rows. Divided by C n, or
    by 2 n, its objectives are the same:

    | estimator | its objective | here, with l2 |
    |---|---|---|
    | `LogisticRegression` | C sum of losses + 1/2 ||w||^2 | `logistic_regression`, l2 = 1 / (C n) |
    | `Ridge` | ||y - X w||^2 + alpha ||w||^2 | `ridge_regression`, l2 = alpha / n |
    | `RidgeClassifier` | the same, targets +1 and -1 | `ridge_classification`, l2 = alpha / n |

    So l2 depends on the number of rows. After a deletion, the objective with the same C or alpha
    has the number of *retain* rows: call this again with it. That l2 is larger, so 1 / (C n) of the
    training is a strong convexity that all later objectives have; a mechanism whose strong
    convexity is fixed in advance takes that one.

    Args:
      estimator: a `LogisticRegression`, `Ridge` or `RidgeClassifier`, fitted without weights of
        examples (or pass them as the batch's weights to a loss of your own).
      feature_norm: a bound on the L2 norm of the features that the estimator gets: fit it on
        `clip_features(features, feature_norm)`.
      size: n, the number of rows that the objective is over: for unlearning, of the retain data.
      target_norm: of `Ridge`, as for `ridge_regression`; of the others None.

    Returns:
      The loss, and the fitted parameters, float64 `[d]` or `[d, outputs]`. Batches are
      `(features, labels)`, with labels as indices into `estimator.classes_`, as
      `np.searchsorted(estimator.classes_, y)` gives them; `(features, targets)` for `Ridge`.

    Raises:
      ImportError: if scikit-learn is not installed.
      TypeError: if the estimator is another, or not fitted.
      ValueError: if its objective is not strongly convex, or rests on numbers that are not public:
        an intercept that is not regularised, another penalty, balanced class weights.
        *Intercepts:* scikit-learn's are not regularised, so nothing bounds how far one deletion
        moves them. Fit with `fit_intercept=False` on `append_intercept(features)`. The exception is
        `LogisticRegression(solver="liblinear")` of two classes, which regularises its intercept:
        the loss is then one of `append_intercept(features, value=intercept_scaling)`, with the
        intercept as last parameter.

    >>> from sklearn.linear_model import Ridge
    >>> x, y = np.eye(2), np.array([1.0, -1.0])
    >>> model = Ridge(alpha=1.0, fit_intercept=False).fit(x, y)
    >>> loss, params = from_sklearn(model, feature_norm=1.0, size=2, target_norm=1.0)
    >>> loss.l2, params
    (0.5, array([ 0.5, -0.5]))
    """
    kind = _kind(estimator)
    count = checks.positive_int("size", size)
    bound = checks.positive("feature_norm", feature_norm)
    settings = estimator.get_params()
    value = _intercept_value(kind, estimator, settings)
    weights = _class_weights(estimator, settings)
    if (target_norm is None) == (kind == "Ridge"):
        wanted = "given" if kind == "Ridge" else "None"
        raise ValueError(
            f"target_norm must be {wanted} for {kind}, got {checks.shown(target_norm)}"
        )
    matrix = np.asarray(estimator.coef_, np.float64)
    if kind == "LogisticRegression":
        _check_penalty(settings)
        l2 = 1 / (checks.positive("C", settings["C"]) * count)
        classes = len(estimator.classes_)
        if classes > 2 and (settings["solver"] == "liblinear" or _is_one_against_rest(settings)):
            raise ValueError(
                "estimator must minimise one softmax loss of its classes, got one that fits a "
                "model for each class: use solver='lbfgs'"
            )
        if value is not None:
            bound = math.hypot(bound, value)
            matrix = np.column_stack([matrix, np.asarray(estimator.intercept_) / value])
        loss = logistic_regression(bound, l2, classes, class_weights=weights)
    elif kind == "Ridge":
        l2 = _alpha(settings) / count
        outputs = None if matrix.ndim == 1 else len(matrix)
        assert target_norm is not None
        loss = ridge_regression(bound, target_norm, l2, outputs=outputs)
    else:
        l2 = _alpha(settings) / count
        loss = ridge_classification(bound, l2, len(estimator.classes_), class_weights=weights)
    return loss, matrix.ravel() if loss.outputs is None else matrix.T.copy()


def to_sklearn(params: ArrayLike, estimator: "BaseEstimator") -> "BaseEstimator":
    """A new estimator with these parameters, which predicts as the fitted `estimator` would.

    Args:
      params: `[d]` or `[d, outputs]`, such as what `unlearn` returned, of the loss that
        `from_sklearn` made of the estimator.
      estimator: the fitted estimator. It stays as it is. Of what its fit has left, only the classes
        and the number of features are taken: the number of its iterations, say, depends on the
        deleted rows.

    Returns:
      An estimator of the same class and settings.

    Raises:
      ImportError, TypeError: as for `from_sklearn`.
      ValueError: if the parameters' shape is not that of the estimator.
    """
    kind = _kind(estimator)
    from sklearn.base import clone

    value = _intercept_value(kind, estimator, estimator.get_params())
    matrix = np.asarray(checks.numbers("params", params), np.float64)
    shape = np.shape(estimator.coef_)
    outputs = 1 if len(shape) == 1 else shape[0]
    width = shape[-1] + (value is not None)
    wanted = (width,) if outputs == 1 else (width, outputs)
    if matrix.shape not in {wanted, (width, outputs)}:
        raise ValueError(f"params must be of shape {wanted}, got {matrix.shape}")
    rows = matrix.reshape(width, outputs).T
    fitted = clone(estimator)
    fitted.n_features_in_ = shape[-1]
    fitted.coef_ = rows[:, : shape[-1]].reshape(shape)
    if kind == "Ridge":
        fitted.intercept_ = 0.0
        return fitted
    fitted.intercept_ = np.zeros(outputs) if value is None else rows[:, -1] * value
    if kind == "RidgeClassifier":
        from sklearn.preprocessing import LabelBinarizer

        binarizer = LabelBinarizer(pos_label=1, neg_label=-1).fit(estimator.classes_)
        fitted._label_binarizer = binarizer  # older versions read the classes from it
    if "classes_" not in dir(fitted):
        fitted.classes_ = np.array(estimator.classes_)
    return fitted


def _kind(estimator: "BaseEstimator") -> str:
    """The estimator's class, or an error if it is none of those known, or not fitted."""
    try:
        from sklearn import exceptions, linear_model
        from sklearn.utils.validation import check_is_fitted
    except ImportError as error:
        raise ImportError(
            "scikit-learn is needed for this, and is not installed: pip install "
            "certunlearn[sklearn]"
        ) from error
    known = [vars(linear_model)[name] for name in _KINDS]
    # Of subclasses, such as those with cross-validation, the objective may be another.
    if type(estimator) not in known:
        raise TypeError(
            f"estimator must be one of {', '.join(_KINDS)}, got {checks.shown(estimator)}"
        )
    try:
        check_is_fitted(estimator, "coef_")
    except exceptions.NotFittedError as error:
        raise TypeError("estimator must be fitted, got one that is not") from error
    return type(estimator).__name__


def _intercept_value(
    kind: str, estimator: "BaseEstimator", settings: dict[str, Any]
) -> float | None:
    """The constant feature that stands for the intercept; None without intercept."""
    if not settings["fit_intercept"]:
        return None
    if kind == "LogisticRegression" and settings["solver"] == "liblinear":
        return checks.positive("intercept_scaling", settings["intercept_scaling"])
    raise ValueError(
        "estimator must have fit_intercept=False, got True: scikit-learn does not regularise the "
        "intercept, so the objective is not strongly convex along it and nothing bounds how far a "
        "deletion moves it. Fit without it on append_intercept(features), which regularises it"
        + (", or with solver='liblinear' of two classes" if kind == "LogisticRegression" else "")
    )


def _class_weights(estimator: "BaseEstimator", settings: dict[str, Any]) -> list[float] | None:
    given = settings.get("class_weight")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(
            f"class_weight must be None or a dict of public numbers, got {checks.shown(given)}: "
            "balanced weights are computed from the data, and each depends on all rows"
        )
    return [float(given.get(label, 1.0)) for label in estimator.classes_.tolist()]


def _check_penalty(settings: dict[str, Any]) -> None:
    penalty, ratio = settings["penalty"], settings.get("l1_ratio")
    newer = penalty == "deprecated"  # the ratio alone decides
    if not (penalty == "l2" or (newer and ratio in (None, 0))):
        raise ValueError(
            "estimator must have the L2 penalty alone, got "
            + (f"l1_ratio={ratio!r}" if newer else f"penalty={penalty!r}")
            + ": the loss must be smooth and strongly convex"
        )


def _is_one_against_rest(settings: dict[str, Any]) -> bool:
    return settings.get("multi_class") == "ovr"  # of older versions


def _alpha(settings: dict[str, Any]) -> float:
    if settings["positive"]:
        raise ValueError(
            "estimator must have positive=False, got True: the loss is minimised over all params"
        )
    return checks.positive("alpha", settings["alpha"])
