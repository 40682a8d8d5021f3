"""Exact heads: linear models that are a function of integer sums over the retained rows."""

import dataclasses
from collections.abc import Sequence

from certunlearn._numerics import checks
from certunlearn.mechanisms import base, sentences
from certunlearn.mechanisms.without_noise import WithoutNoise

KINDS = ("ridge", "lda")
# Of the fixed-point numbers that features are rounded to.
LEAST_BITS, MOST_BITS = 2, 20
_MOST_WEIGHT = 255

_SAME = (
    "The released head is the same function of the same integers as one that is computed anew from "
    "the retained rows alone: the sums hold every retained row, and no other."
)
_INDEXED = (
    "The sums kept an index of their rows, which refuses to remove a row that is not there; it was "
    "never edited by other means."
)
_AT_WORD = (
    "Every row that was removed from the sums had been added to them, with the same features, "
    "target and public map: without an index that is the issuer's word."
)
_PRIVATE = (
    "The sums, their index, logs and backups are private: they hold a deleted row's traces until "
    "it is removed from each of them."
)
_FIXED = (
    "The kind of head, its l2 and all recorded constants (number of classes, bounds, bits, class "
    "weights) are public: they were chosen without looking at data that may be deleted."
)
_POST = "What follows the head uses the released head and retain data only."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactHead(WithoutNoise):
    """A head that is a function of exact integer sums: epsilon = delta = 0, bit for bit.

    `certunlearn.exact` computes sums and heads, and its `certify` issues the certificate, which
    holds the digest of the sums.

    Args:
      kind: `"ridge"` or `"lda"`.
      l2: weight of the L2 term, or what a linear discriminant adds to the covariance; positive.
      num_features: d.
      feature_norm: largest norm of a row, to which longer ones were scaled down.
      bits: of the fixed-point numbers that features were rounded to, 2 to 20.
      outputs: targets of a regression in each row; None: one number, or labels.
      classes: number of classes; None for a regression.
      target_norm: largest magnitude of a regression's targets.
      class_weights: public whole numbers, one for each class; None for all the same.
      indexed: whether the sums kept an index of their rows, so that none could be removed that was
        not there.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if one is out of range, or outputs or class weights do not fit.

    Guarantee:
      The head is the same function of the same integers as retraining's, if the assumptions hold:
      for any number of deletions, in any order, chosen by looking at earlier releases or not. What
      was trained from an *earlier* head and kept is not covered: after a deletion everything
      downstream is redone.

    >>> ExactHead(kind="ridge", l2=1e-3, num_features=64, feature_norm=1.0, bits=20).exact
    True
    """

    kind: str
    l2: float
    num_features: int
    feature_norm: float
    bits: int
    outputs: int | None = None
    classes: int | None = None
    target_norm: float = 1024.0
    class_weights: Sequence[int] | None = None
    indexed: bool = True

    of_sums = True

    def __post_init__(self) -> None:
        """Checks every argument; class weights become a tuple."""
        checks.choice("kind", self.kind, KINDS)
        base.set_fields(
            self,
            l2=checks.positive("l2", self.l2),
            num_features=checks.positive_int("num_features", self.num_features),
            feature_norm=checks.positive("feature_norm", self.feature_norm),
            target_norm=checks.positive("target_norm", self.target_norm),
            bits=checks.positive_int("bits", self.bits),
            indexed=checks.flag("indexed", self.indexed),
        )
        if not LEAST_BITS <= self.bits <= MOST_BITS:
            raise ValueError(f"bits must be from {LEAST_BITS} to {MOST_BITS}, got {self.bits}")
        for name in ("outputs", "classes"):
            value = base.field_values(self)[name]
            if value is not None:
                base.set_fields(self, **{name: checks.positive_int(name, value)})
        if self.classes is None and self.kind == "lda":
            raise ValueError("classes must be given for kind='lda', got None")
        if self.classes is not None and (self.classes < 2 or self.outputs is not None):
            raise ValueError(
                "classes must be at least 2, without outputs, which are a regression's, got "
                f"classes={self.classes} and outputs={self.outputs}"
            )
        base.set_fields(self, class_weights=_weights(self.class_weights, self.classes))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        return (
            _SAME,
            f"Every row was clipped to norm {self.feature_norm!r} and rounded to {self.bits} bits "
            "by the recorded public constants, by a rule that looks at that row alone.",
            sentences.PUBLIC_MAP,
            _FIXED,
            _INDEXED if self.indexed else _AT_WORD,
            _PRIVATE,
            _POST,
            sentences.DOWNSTREAM,
        )

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return (
            "Nothing accumulates: after any number of requests, in any order, chosen by looking at "
            "earlier releases or not, the head is that of the rows that remain, with the same "
            "certificate for the union of all deletions so far. What was trained from an earlier "
            f"head is redone. {sentences.UNION}"
        )

    @property
    def why_exact(self) -> str:
        """Why nothing is left of what was deleted."""
        return "the same function of the same integers as retraining gives"

    def check_run(self, run: base.PlannedRun) -> None:
        """Refuses every run of the loop: a head is computed from sums."""
        del run
        raise ValueError(
            "mechanism must be one that unlearn runs, got ExactHead: a head is computed from sums, "
            "by certunlearn.exact.ridge or lda, and certified by certunlearn.exact.certify"
        )


def _weights(weights: Sequence[int] | None, classes: int | None) -> tuple[int, ...] | None:
    if weights is None:
        return None
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(
            f"class_weights must be a list of whole numbers, got {checks.shown(weights)}"
        )
    found = tuple(checks.positive_int("class_weights", each) for each in weights)
    if classes is None or len(found) != classes:
        raise ValueError(
            f"class_weights must have one number for each of {classes} classes, got {len(found)}"
        )
    if max(found) > _MOST_WEIGHT:
        raise ValueError(f"class_weights must be at most {_MOST_WEIGHT}, got {max(found)}")
    return found
