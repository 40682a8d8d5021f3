"""Retraining: trained from a public start on retain data only, and recorded as such."""

import dataclasses

import jax
from chex import ArrayTree

from certunlearn.mechanisms import base, sentences
from certunlearn.mechanisms.without_noise import WithoutNoise

_COMPARED = (
    "The released parameters were trained on retain data only, as they would have been had the "
    "forget set never existed."
)
_START = (
    "Training started from parameters that are public, or a function of the retain data alone, "
    "such as an exact head of it: never from parameters that a deleted example had a part in."
)
_CHOSEN = (
    "Hyperparameters, and when to stop, were not chosen by looking at a model, a run or a score "
    "that a deleted example had a part in."
)
_RANDOM = (
    "All randomness of training, such as the order of examples, dropout and augmentation, is "
    "independent of the forget set and of earlier runs."
)
_STATE = (
    "Nothing else of an earlier training enters: no optimizer state, running statistics, teacher, "
    "mask, pseudo-label, cached feature or split of the data."
)


@dataclasses.dataclass(frozen=True)
class Retraining(WithoutNoise):
    """Training from a public start on retain data only: epsilon = delta = 0, without any noise.

    The record of the honest alternative, of the same kind as that of a noisy run: digest,
    assumptions, and what they rest on. `unlearn(loss_fn, params, retain_data, Retraining(),
    center=start, finetune=(optimizer, steps), batch_size=...)` trains from the centre, of which the
    trained parameters give the structure only. `certify(Retraining(), params=...)` records a loop
    of your own.

    Guarantee:
      What is released has the very distribution that it would have had without the forget set, if
      the assumptions hold: any number of deletions, in any order, chosen by looking at earlier
      releases or not. A model that was trained from an *earlier* start which saw a deleted example,
      and was kept, is not covered: after a deletion everything downstream is redone.

    >>> Retraining().exact, Retraining().steps
    (True, 0)
    """

    uses_center = True

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        return (
            _COMPARED,
            _START,
            _STATE,
            _CHOSEN,
            _RANDOM,
            sentences.PUBLIC,
            sentences.DOWNSTREAM,
        )

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return (
            "Nothing accumulates: each training starts anew, with the same certificate for the "
            "union of all deletions so far, also where requests were chosen by looking at earlier "
            f"releases. What was trained from an earlier start is redone. {sentences.UNION}"
        )

    @property
    def why_exact(self) -> str:
        """Why nothing is left of what was deleted."""
        return "trained from a public start on retain data only"

    def start(self, params: ArrayTree, center: ArrayTree | None, key: jax.Array) -> ArrayTree:
        """The centre itself.

        Raises:
          ValueError: if there is none.
        """
        del params, key
        if center is None:
            raise ValueError(_NO_START)
        return center

    def check_run(self, run: base.PlannedRun) -> None:
        """Also refuses runs without a public start, or without training."""
        super().check_run(run)
        if not run.centered:
            raise ValueError(_NO_START)
        if not run.finetuned:
            raise ValueError(
                "finetune must be given for Retraining, got None: these steps are the training. "
                "For a loop of your own use certunlearn.certify(Retraining(), params=...)"
            )


_NO_START = (
    "center must be the public start for Retraining, got None: the trained parameters never enter. "
    "It may be an initialisation, a public model, or an exact head of the retain data"
)
