"""A run that is ready to start, as `prepare` makes it."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from chex import ArrayTree

from certunlearn._numerics import checks
from certunlearn._numerics.random_keys import Keys
from certunlearn.mechanisms import Mechanism
from certunlearn.unlearning.compiled_steps import Carry, StepStats
from certunlearn.unlearning.leaf_split import Split
from certunlearn.unlearning.model_forms import ModelForm
from certunlearn.unlearning.run_options import Options
from certunlearn.unlearning.solving import Solved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The retain data, and how steps take it. All but the numbers is private.

    Attributes:
      data: pytree of JAX arrays with a common leading axis.
      size: number of examples.
      batch_size: examples in a batch.
      per_example: whether each example's gradient is clipped.
      microbatch_size: examples handled at a time, or None for all.
      sampled: whether each step draws a sample of its own, as `DPSGD` does.
    """

    data: ArrayTree = dataclasses.field(repr=False)
    size: int = dataclasses.field(repr=False)
    batch_size: int
    per_example: bool
    microbatch_size: int | None
    sampled: bool

    @property
    def retain_size(self) -> int | None:
        """The number of examples where it may be published: not where steps draw samples."""
        return None if self.sampled else self.size


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Fine-tuning that is ready to start: its optimizer, steps and compiled step."""

    optimizer: optax.GradientTransformation
    steps: int
    compiled: Callable[..., tuple[ArrayTree, optax.OptState, jax.Array]]


class Start:
    """Parameters and optimizer state to start from, which one run uses up.

    The steps overwrite the arrays, and their keys must not be used for a second run.
    """

    def __init__(self, carry: Carry) -> None:
        """Not used yet."""
        self._carry: Carry | None = carry

    def take(self) -> Carry:
        """What the run starts from.

        Raises:
          RuntimeError: the second time.
        """
        carry, self._carry = self._carry, None
        if carry is None:
            raise RuntimeError(
                "prepared was run already, and its noise is used up: prepare another run, or go "
                "on with the state of that one, Options(resume=...)"
            )
        return carry


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Prepared:
    """A run that is ready to start. Private: it holds the keys and the trained model.

    Attributes:
      mechanism: what the noisy steps do.
      noise_scale: standard deviation of the noise in parameter units: one number, or one for each
        step.
      delta: of the certificate.
      epsilon: what the noise was calibrated to, or None.
      accountant: which is asked, or None for the best.
      options: what else was asked for.
      form: the model as it was given, taken apart.
      split: its parameters, and which of them are frozen.
      examples: the retain data.
      first: noisy steps that were run before.
      stop: noisy steps after which to stop.
      keys: of noise, batches and fine-tuning batches.
      key_source: how they were drawn.
      start: parameters and optimizer state to start from, for one run.
      solve: minimises the objective from the start and verifies that it has; None if the mechanism
        solves nothing.
      noisy: the compiled noisy steps; None if the mechanism has none.
      tuning: the fine-tuning, or None.
      plan: computes the digests of what the run depends on.
      trained_digest: SHA-256 of the trained parameters.
      start_digest: SHA-256 of the parameters before the first step.
    """

    mechanism: Mechanism
    noise_scale: checks.PerStep
    delta: float
    epsilon: float | None
    accountant: str | None
    options: Options
    form: ModelForm
    split: Split
    examples: Examples
    first: int
    stop: int
    keys: Keys
    key_source: str
    start: Start
    solve: Callable[[ArrayTree], Solved] | None
    noisy: Callable[..., tuple[Carry, StepStats]] | None
    tuning: Tuning | None
    plan: Callable[[], dict[str, str]]
    trained_digest: str
    start_digest: str

    def __repr__(self) -> str:
        """What is planned, and nothing that is secret."""
        name = type(self.mechanism).__name__
        return f"Prepared({name}, steps {self.first} to {self.stop}, <private>)"
