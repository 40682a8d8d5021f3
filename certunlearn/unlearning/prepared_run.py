"""A run that is ready to start, as `prepare` makes it."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from chex import ArrayTree
from jax.sharding import Mesh

from certunlearn._numerics import batches, checks
from certunlearn._numerics.batches import PoissonSampling
from certunlearn._numerics.random_keys import Keys
from certunlearn.mechanisms import Mechanism
from certunlearn.unlearning import data_feeds, placement, spread_feeds
from certunlearn.unlearning.compiled_steps import Carry, StepStats
from certunlearn.unlearning.data_feeds import Feed, RetainData, Steps
from certunlearn.unlearning.leaf_split import Split
from certunlearn.unlearning.model_forms import ModelForm
from certunlearn.unlearning.run_options import Options
from certunlearn.unlearning.solving import Solved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The retain data, and how steps take it. All but the numbers is private.

    Attributes:
      feed: the data, whatever its kind.
      size: number of examples.
      batch_size: examples in a batch.
      per_example: whether each example's gradient is clipped.
      microbatch_size: examples handled at a time, or None for all.
      sampling: how each step draws a sample of its own, as with `DPSGD`; None for batches.
      prefetch: batches that are made ahead, where they are not in memory.
      mesh: over which parameters or batches are spread; None on one device.
    """

    feed: Feed = dataclasses.field(repr=False)
    size: int = dataclasses.field(repr=False)
    batch_size: int
    per_example: bool
    microbatch_size: int | None
    sampling: PoissonSampling | None
    prefetch: int
    mesh: Mesh | None

    @classmethod
    def make(
        cls,
        retain_data: RetainData,
        batch_size: int | None,
        mechanism: Mechanism,
        more: Options,
        params: ArrayTree = (),
    ) -> "Examples":
        """Looks at the data, whatever its kind, and at the sizes.

        Raises:
          TypeError: if the data is of no known kind, or a batch size is needed.
          ValueError: if a size is out of range, or the mechanism cannot take such data.
        """
        name, feed = type(mechanism).__name__, data_feeds.feed_of(retain_data)
        if batch_size is None:
            batch_size = feed.batch_size if mechanism.solve_to is None else feed.size
        if batch_size is None:
            raise TypeError(f"batch_size must be given for {name}, got None")
        batch_size = batches.check_batch_size(batch_size, feed.size)
        if mechanism.solve_to is None and feed.batch_size not in (None, batch_size):
            raise ValueError(
                f"batch_size must be the stream's, {feed.batch_size}, got {batch_size}"
            )
        sampling = mechanism.poisson_sampling()
        if feed.streamed and sampling is not None:
            raise ValueError(
                f"retain_data must be arrays or a source of examples by index for {name}, got a "
                "stream: each step takes every example with a chance of its own"
            )
        microbatch_size = more.microbatch_size
        if sampling is None and batch_size % (microbatch_size or 1):
            raise ValueError(
                f"microbatch_size must divide batch_size={batch_size}, got {microbatch_size}"
            )
        mesh = placement.mesh_of(more.batch_sharding, params, feed.sample)
        if mechanism.solve_to is None:
            places = batch_size
            if sampling is not None:
                places = sampling.places(feed.size, microbatch_size)
            feed = spread_feeds.spread(feed, more.batch_sharding, mesh, places)
        return cls(
            feed=feed,
            size=feed.size,
            batch_size=batch_size,
            per_example=more.per_example,
            microbatch_size=microbatch_size,
            sampling=sampling,
            prefetch=more.prefetch,
            mesh=mesh,
        )

    @property
    def accumulated(self) -> int | None:
        """Examples handled at a time where the gradient is that of a whole batch; None for all."""
        one_by_one = self.per_example or self.sampling is not None
        return None if one_by_one else self.microbatch_size

    @property
    def at_once(self) -> int:
        """Examples in what the noisy steps' loss is called on."""
        if self.per_example or self.sampling is not None:
            return 1
        return self.microbatch_size or self.batch_size

    @property
    def retain_size(self) -> int | None:
        """The number of examples where it may be published: not where steps draw samples."""
        return None if self.sampling is not None else self.size

    def noisy(
        self,
        key: jax.Array,
        first: int,
        stop: int,
        longest: int = 1,
        pauses: tuple[int, ...] = (),
    ) -> Steps:
        """The noisy steps from one to another, at most `longest` in a call."""
        return Steps(
            key=key,
            batch_size=self.batch_size,
            first=first,
            stop=stop,
            pauses=pauses,
            longest=longest,
            sampling=self.sampling,
            microbatch_size=self.microbatch_size,
            prefetch=self.prefetch,
        )

    def noiseless(self, key: jax.Array, steps: int, offset: int) -> Steps:
        """The steps of fine-tuning, after `offset` noisy ones."""
        return Steps(
            key=key,
            batch_size=self.batch_size,
            first=0,
            stop=steps,
            offset=offset,
            prefetch=self.prefetch,
        )


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
        carry = self.look()
        self._carry = None
        return carry

    def look(self) -> Carry:
        """What `take` would return.

        Raises:
          RuntimeError: after `take`.
        """
        if self._carry is None:
            raise RuntimeError(
                "prepared was run already, and its noise is used up: prepare another run, or go "
                "on with the state of that one, Options(resume=...)"
            )
        return self._carry


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
      longest: most of them in one call.
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
    longest: int
    tuning: Tuning | None
    plan: Callable[[], dict[str, str]]
    trained_digest: str
    start_digest: str

    def __repr__(self) -> str:
        """What is planned, and nothing that is secret."""
        name = type(self.mechanism).__name__
        return f"Prepared({name}, steps {self.first} to {self.stop}, <private>)"
