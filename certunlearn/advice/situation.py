"""What a user has said of their model and request, checked once."""

import dataclasses

from chex import ArrayTree

from certunlearn._numerics import checks, model_trees, trees
from certunlearn.advice import fresh_weights, measurements
from certunlearn.advice.fresh_weights import Layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Situation:
    """The arguments of `advise`, checked, and what follows from them at once.

    Attributes:
      parameters: how many numbers the model has, or None.
      distance: of the trained parameters from the public centre, or None. Private.
      has_center: whether there is a public start.
      layers: the leaves of the parameters, empty if they were not given.
      fresh_scale: standard deviation of the smallest layer's fresh weights, or None.
    """

    parameters: int | None
    distance: float | None
    has_center: bool
    layers: tuple[Layer, ...]
    fresh_scale: float | None
    convex: bool | None
    public_features: bool | None
    public_rows: bool
    rows: int | None
    features: int | None
    classes: int | None
    deletions: int
    requests: int
    adaptive: bool
    trained: bool
    epsilon: float
    delta: float
    noise_share: float
    epochs: float | None
    epoch_seconds: float | None
    unit: str
    search: bool
    progress: bool

    @property
    def total_noise(self) -> float | None:
        """The most noise, in parameter units, that the smallest layer is taken to bear."""
        return None if self.fresh_scale is None else self.noise_share * self.fresh_scale

    @property
    def retraining_seconds(self) -> float | None:
        """How long training takes as it was done, which the cheapest retraining undercuts."""
        if self.epochs is None or self.epoch_seconds is None:
            return None
        return self.epochs * self.epoch_seconds


def checked(
    *,
    params: ArrayTree | None,
    center: ArrayTree | None,
    parameters: int | None,
    distance: float | None,
    public_start: bool | None,
    fresh_scale: float | None,
    **others: object,
) -> Situation:
    """The situation; arguments and errors as for `advise`."""
    if center is not None and params is None:
        raise ValueError("center must come with params, the trained parameters, got params=None")
    layers: tuple[Layer, ...] = ()
    if params is not None:
        if parameters is not None or (center is not None and distance is not None):
            raise ValueError(
                "parameters and distance are worked out from params and center: leave them out"
            )
        params = model_trees.parameters(params)
        if center is not None:
            center = model_trees.parameters(center)
            trees.check_same_structure(params, center)
            trees.check_finite("params", params)
            trees.check_finite("center", center)
            distance = fresh_weights.distance_between(params, center)
            if distance == 0:
                raise ValueError(
                    "center must be public, such as the parameters that training started from; "
                    "got the trained parameters"
                )
        layers = fresh_weights.layers_of(params, center)
        parameters = sum(layer.size for layer in layers)
    fresh = fresh_weights.least_scale(layers) if fresh_scale is None else fresh_scale
    has_center = center is not None or distance is not None
    if public_start is not None:
        if has_center and not checks.flag("public_start", public_start):
            raise ValueError("public_start must not be False where center or distance is given")
        has_center = checks.flag("public_start", public_start)
    if distance is not None:
        distance = checks.positive("distance", distance)
    return Situation(
        parameters=_count("parameters", parameters),
        distance=distance,
        has_center=has_center,
        layers=layers,
        fresh_scale=None if fresh is None else checks.positive("fresh_scale", fresh),
        **_others(**others),  # type: ignore[arg-type]
    )


def _others(
    *, rows: int | None, deletions: int, requests: int, unit: str, **rest: object
) -> dict[str, object]:
    """What needs no parameters, checked."""
    found: dict[str, object] = {
        "rows": _count("rows", rows),
        "deletions": checks.positive_int("deletions", deletions),
        "requests": checks.positive_int("requests", requests),
        "unit": checks.choice("cost", unit, measurements.UNITS),
        "delta": checks.open_unit("delta", rest.pop("delta")),
    }
    if rows is not None and deletions >= rows:
        raise ValueError(f"deletions must be fewer than rows, got {deletions} of {rows}")
    for name in ("features", "classes"):
        found[name] = _count(name, rest.pop(name))
    for name in ("epsilon", "noise_share"):
        found[name] = checks.positive(name, rest.pop(name))
    for name in ("epochs", "epoch_seconds"):
        value = rest.pop(name)
        found[name] = None if value is None else checks.positive(name, value)
    for name in ("convex", "public_features"):
        value = rest.pop(name)
        found[name] = None if value is None else checks.flag(name, value)
    for name in ("public_rows", "adaptive", "trained", "search", "progress"):
        found[name] = checks.flag(name, rest.pop(name))
    assert not rest, rest
    return found


def _count(name: str, value: object) -> int | None:
    return None if value is None else checks.positive_int(name, value)
