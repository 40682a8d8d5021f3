"""What a run may be asked for besides its mechanism, guarantee and data."""

import dataclasses
import os
from collections.abc import Callable
from types import EllipsisType
from typing import Any

import jax
import optax
from chex import ArrayTree

from certunlearn._numerics import checks, loss_functions
from certunlearn.mechanisms import Mechanism, base
from certunlearn.unlearning import inputs, private_history
from certunlearn.unlearning.private_history import UnlearningState

# `loss_fn(params, batch)` or `loss_fn(params, batch, key)`, the mean loss of a batch, or one for
# each example, or (loss, aux). What `params` and `batch` are made of is the caller's choice.
LossFn = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Finetune:
    """Steps without noise on retain data, after the noisy ones. They cost no privacy.

    Args:
      optimizer: any Optax optimizer. It gets the parameters' own tree, `optax.MaskedNode()` where a
        leaf is frozen, and `value`, `grad` and `value_fn` if it asks for them.
      steps: how many, at least 1.
      loss_fn: the loss of these steps; None takes that of the noisy ones, which a mechanism with
        memory forbids, for its loss may depend on the trained model.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if there is no step.

    Guarantee:
      These steps are post-processing if they see the released parameters and the retain data only:
      neither the optimizer nor the loss may hold anything made from the trained model. See
      `unlearn`.

    >>> Finetune(optax.adam(1e-3), 100).steps
    100
    """

    optimizer: optax.GradientTransformation
    steps: int
    loss_fn: LossFn | None = None

    def __post_init__(self) -> None:
        """Checks every argument."""
        inputs.transform("finetune optimizer", self.optimizer)
        object.__setattr__(self, "steps", checks.positive_int("finetune steps", self.steps))
        inputs.function("finetune loss_fn", self.loss_fn, loss_functions.SIGNATURE, True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """What else a run may be asked for; what a mechanism does not use it refuses.

    Args:
      per_example: clip each example's gradient and average, instead of the batch gradient.
      microbatch_size: examples handled at a time, which bounds the memory; must divide
        `batch_size`. A batch's gradient is the mean of those of its microbatches, clipped once, as
        if it were computed at once: also in fine-tuning, unless `per_example` or the mechanism
        clips examples in the noisy steps. With `DPSGD` any number: the room for a step's sample is
        rounded up to it. More than 16 parts run in a loop, where convolutions are slow on a CPU.
      before_clip: Optax transform ahead of the clip, such as `optax.scale_by_adam()`; needs a
        mechanism with `memoryless=False`. Its state starts fresh and is discarded. It gets what
        fine-tuning optimizers get.
      frozen: pytree of bools structured like `params`, True where a leaf stays as it is; one bool
        may stand for all leaves below it. Of an NNX module it is structured like `nnx.state(model,
        nnx.Param)`, or an NNX filter that is true of what stays, such as
        `nnx.Not(nnx.LoRAParam)`; in the place of numbers the filter gets shapes. Frozen leaves are
        outside the guarantee and must not depend on the forget set.
      forget_size: number of forget examples, for the record.
      recompute_state: `recompute_state(params, retain_data)` makes the model state other than
        parameters anew from the released parameters; see `recompute_statistics`. It gets what
        `loss_fn` gets: of an NNX module a new one, which it may change in place or return.
        `retain_data` is JAX arrays where it was given as arrays; a source or a `Stream` comes as it
        is.
      stop_after: run only so many of the noisy steps, certify those and return a resumable state.
        Fine-tuning is then left out. If the run is resumed, this stop's parameters must never
        leave: only one output of a run may.
      resume: `history.state` of a run of the same plan that was stopped early, or `state` of the
        exception that ended it. Data, centre and trained parameters must be the same, and are
        compared; losses and `before_clip` must be too, and cannot be.
      evaluate: `evaluate(params) -> value`, called outside the compiled steps with what `loss_fn`
        gets, at step 0, every `evaluate_every` steps and at the end of each phase. Private.
      evaluate_every: how often, in steps.
      save_every: save the state of the run after every so many noisy steps, and after the last.
        Needs
      save_to: where: the name of a file, which must end in `.private.npz` and is replaced whole, or
        a function `save_to(state)`, such as `orbax_checkpoints.Saver(folder)`. A process that is
        killed loses the steps since: `resume=load_state(save_to)` takes them again. See the
        guarantee.
      prefetch: of sources and streams: how many batches a thread makes ahead. 0 makes each when it
        is needed, in the thread of the caller. Batches are the same.
      batch_sharding: on several devices: how batches lie there, a `NamedSharding` whose first axis
        is that of the examples. None is as `retain_data` lies, or a copy of each batch on every
        device if that is on one. See the page on devices.
      solver: for `PerturbedMinimizer`: `solver(loss, params, data, tolerance) -> params`, any way
        to a gradient norm of `tolerance`, which is verified afterwards. It gets float64 parameters,
        within `jax.enable_x64(True)`, and of a source or a `Stream` a function that starts a pass
        over batches. None is `solvers.minimize`.
      gradient_allowance: for `PerturbedMinimizer` with the loss of a linearised network:
        `allowance` of `solvers.minimize`, what rounding may hide of its gradient. The certificate
        rests on it.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if a number is out of range.

    Guarantee:
      None by itself. A resumed run takes the steps after the last save again, with the same keys
      and batches, so with the same noise on the same gradients: it computes the same numbers a
      second time, of which nothing had left. No noise is added to anything else. For that, data and
      settings must be the same; they are compared by their digests (of a source, by its length and
      some examples; of a stream, by its sizes and first batch).

    >>> Options(per_example=True, microbatch_size=16).evaluate_every
    10
    """

    per_example: bool = False
    microbatch_size: int | None = None
    before_clip: optax.GradientTransformation | None = None
    frozen: ArrayTree | Callable[..., object] | EllipsisType | None = None
    forget_size: int | None = None
    recompute_state: Callable[[Any, Any], Any] | None = None
    stop_after: int | None = None
    resume: UnlearningState | None = None
    evaluate: Callable[[Any], Any] | None = None
    evaluate_every: int = 10
    save_every: int | None = None
    save_to: str | os.PathLike[str] | Callable[[UnlearningState], object] | None = None
    prefetch: int = 2
    batch_sharding: jax.sharding.NamedSharding | None = None
    solver: Callable[[Any, Any, Any, float], Any] | None = None
    gradient_allowance: float | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without the mechanism, the parameters and the data."""
        inputs.function(
            "recompute_state", self.recompute_state, "f(params, retain_data) -> state", True
        )
        inputs.function("evaluate", self.evaluate, "f(params) -> value", True)
        inputs.function("solver", self.solver, "f(loss, params, data, tolerance) -> params", True)
        if self.before_clip is not None:
            inputs.transform("before_clip", self.before_clip)
        if not isinstance(self.batch_sharding, jax.sharding.NamedSharding | None):
            raise TypeError(
                "batch_sharding must be a jax.sharding.NamedSharding, such as NamedSharding(mesh, "
                f'PartitionSpec("data")), or None; got {inputs.kind(self.batch_sharding)}'
            )
        if self.resume is not None and not isinstance(self.resume, UnlearningState):
            raise TypeError(
                "resume must be the state of a stopped run, history.state or load_state(path); got "
                f"{inputs.kind(self.resume)}"
            )
        checked = {
            "per_example": inputs.flag("per_example", self.per_example),
            "evaluate_every": checks.positive_int("evaluate_every", self.evaluate_every),
            "forget_size": checks.optional_count("forget_size", self.forget_size),
            "prefetch": checks.optional_count("prefetch", self.prefetch) or 0,
        }
        if (self.save_every is None) != (self.save_to is None):
            raise ValueError(
                f"save_every and save_to must be given together, got save_every={self.save_every!r}"
            )
        if self.saves_to_file:
            assert isinstance(self.save_to, str | os.PathLike)
            private_history.check_private(self.save_to, ".private.npz")
        else:
            inputs.function("save_to", self.save_to, "a path, or f(state)", True)
        for name, value in (
            ("save_every", self.save_every),
            ("microbatch_size", self.microbatch_size),
            ("stop_after", self.stop_after),
        ):
            if value is not None:
                checked[name] = checks.positive_int(name, value)
        if self.gradient_allowance is not None:
            allowance = checks.positive("gradient_allowance", self.gradient_allowance)
            object.__setattr__(self, "gradient_allowance", allowance)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def saves_to_file(self) -> bool:
        """Whether states are saved to one file."""
        return isinstance(self.save_to, str | os.PathLike)

    @property
    def pauses(self) -> tuple[int, ...]:
        """No compiled call may go beyond a multiple of any of these."""
        asked = (self.save_every, None if self.evaluate is None else self.evaluate_every)
        return tuple(every for every in asked if every is not None)


DEFAULTS = Options()


def as_options(value: object) -> Options:
    """Returns `value`, or raises TypeError if it is no `Options`."""
    if not isinstance(value, Options):
        raise TypeError(f"options must be certunlearn.Options(...), got {inputs.kind(value)}")
    return value


def as_finetune(value: object) -> Finetune | None:
    """`unlearn(finetune=...)` as a `Finetune`, or None if it is None.

    Raises:
      TypeError: if it is neither of these, nor a tuple (optimizer, steps).
      ValueError: if there is no step.
    """
    if value is None or isinstance(value, Finetune):
        return value
    if not (isinstance(value, tuple) and len(value) == 2):
        found = f"{len(value)} values" if isinstance(value, tuple) else inputs.kind(value)
        raise TypeError(
            f"finetune must be Finetune(...), (Optax optimizer, steps) or None, got {found}"
        )
    inputs.transform("the first of finetune", value[0])
    return Finetune(*value)


def finetuning_loss(mechanism: Mechanism, tuning: Finetune, noisy_loss_fn: LossFn) -> LossFn:
    """The loss of the steps after the noisy ones, which must not hold the trained model.

    Raises:
      ValueError: if it is that of the noisy steps, and that may hold the trained model.
    """
    if tuning.loss_fn is not None:
        return tuning.loss_fn
    if not base.is_memoryless(mechanism):
        raise ValueError(
            "finetune needs a loss_fn of its own, Finetune(optimizer, steps, loss_fn), with a "
            "mechanism of memoryless=False, whose loss_fn may depend on the trained model: give "
            "the loss of the steps without noise, which must not hold anything made from the "
            "trained model"
        )
    return noisy_loss_fn
