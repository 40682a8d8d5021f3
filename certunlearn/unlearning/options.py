"""What a run may be asked for besides its mechanism, guarantee and data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from chex import ArrayTree

from certunlearn.unlearning.history import UnlearningState


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Steps without noise on retain data, after the noisy ones. They cost no privacy.

    Args:
      optimizer: any Optax optimizer. It gets the parameters' own tree, `optax.MaskedNode()` where a
        leaf is frozen, and `value`, `grad` and `value_fn` if it asks for them.
      steps: how many.
      loss_fn: the loss of these steps; None takes that of the noisy ones, which a mechanism with
        memory forbids, for its loss may depend on the trained model. This one must not hold
        anything made from the trained model: see the Guarantee of `unlearn`.
    """

    optimizer: optax.GradientTransformation
    steps: int
    loss_fn: Callable[[Any, Any], jax.Array] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What else a run may be asked for; what a mechanism does not use it refuses.

    Args:
      per_example: clip each example's gradient and average, instead of the batch gradient.
      microbatch_size: with `per_example`, examples handled at a time; must divide `batch_size`.
        With `DPSGD` any number: the room for a step's sample is rounded up to it.
      before_clip: Optax transform ahead of the clip, such as `optax.scale_by_adam()`; needs a
        mechanism with `memoryless=False`. Its state starts fresh and is discarded. It gets what
        fine-tuning optimizers get.
      frozen: pytree of bools structured like `params`, True where a leaf stays as it is. Frozen
        leaves are outside the guarantee and must not depend on the forget set.
      forget_size: number of forget examples, for the record.
      recompute_state: `recompute_state(params, retain_data)` makes the model state other than
        parameters anew from the released parameters; see `recompute_statistics`.
      stop_after: run only so many of the noisy steps, certify those and return a resumable state.
        Fine-tuning is then left out. If the run is resumed, this stop's parameters must never
        leave: only one output of a run may.
      resume: `history.state` of a run of the same plan that was stopped early, or `state` of the
        exception that ended it. Data, centre and trained parameters must be the same, and are
        compared; losses and `before_clip` must be too, and cannot be.
      evaluate: `evaluate(params) -> value`, called outside the compiled steps with the parameters
        at step 0, every `evaluate_every` steps and at the end of each phase. Private.
      evaluate_every: how often.
    """

    per_example: bool = False
    microbatch_size: int | None = None
    before_clip: optax.GradientTransformation | None = None
    frozen: ArrayTree | None = None
    forget_size: int | None = None
    recompute_state: Callable[[Any, Any], Any] | None = None
    stop_after: int | None = None
    resume: UnlearningState | None = None
    evaluate: Callable[[Any], Any] | None = None
    evaluate_every: int = 10
