"""Several runs of one structure whose noisy steps are taken together, under `jax.vmap`."""

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from certunlearn.unlearning import kept_steps, noisy_step, running
from certunlearn.unlearning.compiled_steps import Carry, NoisySteps, StepStats
from certunlearn.unlearning.data_feeds import Call
from certunlearn.unlearning.noisy_step import Fixed
from certunlearn.unlearning.prepared_run import Prepared
from certunlearn.unlearning.replica_checks import checked
from certunlearn.unlearning.running import Noisy

# For each leaf, 0 where replicas have each their own, None where one serves all.
_Axes = tuple[int | None, ...]
# Of the batches of all replicas that go into one call of several steps. On a CPU, what is stacked
# is to be in its cache when it is read.
_MOST_BYTES = {"cpu": 2**24}
_MOST_BYTES_ELSEWHERE = 2**26


def run_replicas(
    prepared: Sequence[Prepared],
    *,
    interrupted: Callable[[], bool] = lambda: False,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Noisy]:
    """Runs the noisy steps of several runs together: `run_noisy_steps` for each, vmapped.

    Every replica has its own noise, batches and keys of the loss, and may have its own trained
    model, centre, noise scale and numbers of the mechanism: learning rate, clip norm, radius,
    weight decay. What is compiled is kept for later calls. Arrays that are the same JAX array in
    all runs (the data, frozen leaves, the centre) are not copied.

    Args:
      prepared: what `prepare` returned, at least once. All have equal retain data, in one place,
        the same loss, batch size and steps, and mechanisms whose `step_rule`s have one structure
        (of a number for each step in one, and one for all in another, only either); no mechanism
        that solves, no `Stream`, no `evaluate` and no `save_every`. Each can be run once.
      interrupted: asked after every compiled call whether to stop all of them. Its answer must not
        depend on the models.
      advance: told after every compiled call how many steps each replica took.

    Returns:
      For each run its `Noisy`, for `run_finetuning` and `release` with its `Prepared`. Where
      `interrupted` stopped them, each has a state that can be resumed alone, as of a single run.

    Raises:
      TypeError: if `prepared` does not hold `Prepared`s.
      ValueError: if there is none, two have the same noise key, or something differs that must be
        the same; none is used up then. Or as `run_noisy_steps`, about one replica, which a note
        names: no replica is released then.
      RuntimeError: if one was run before.
      FloatingPointError: as `run_noisy_steps`, about one replica, which a note names.
      KeyboardInterrupt: likewise, if there is no noise yet.

    Guarantee:
      None before `release` has certified it. Each certificate is then for that output alone, as if
      its run had been the only one. An exception, whichever, ends all replicas: it carries no
      state, and none of them can be resumed.

      *Several outputs compose.* The noise of replicas is independent, so all outputs together are
      (sum of epsilons, sum of deltas)-indistinguishable. **Choosing an output by looking at the
      outputs counts as releasing all of them**, whatever data the choice looks at, public data too:
      the choice is a function of all. Only a choice that was made before, or at random, leaves the
      claim of the one. Losses and clipped fractions of the steps are private, too.

      Sums of a batch may be taken in another order than alone, so a replica is its single run up to
      the last bits of its gradients. Clip, projection and noise are those of the single run: their
      bounds hold however they are compiled.

    >>> import certunlearn as cu
    >>> import jax.numpy as jnp
    >>> data = jnp.ones((8, 2))
    >>> runs = [
    ...     cu.unlearning.prepare(
    ...         lambda params, batch: jnp.mean((batch - params) ** 2),
    ...         jnp.ones(2),
    ...         data,
    ...         cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=rate, steps=3),
    ...         noise_scale=5.0,
    ...         delta=1e-5,
    ...         batch_size=4,
    ...         accountant="interpolation",
    ...     )
    ...     for rate in (0.1, 0.2)
    ... ]
    >>> noisy = cu.unlearning.run_replicas(runs)
    >>> noisy
    [Noisy(step=3, <private>), Noisy(step=3, <private>)]
    >>> result = cu.unlearning.release(runs[1], noisy[1])  # chosen before, by its number
    >>> bool(cu.verify(result.certificate, result.params))
    True
    """
    runs = checked(prepared)
    step, carry, watches = _taken(runs, interrupted, advance)
    found = []
    for number, (run, watch) in enumerate(zip(runs, watches, strict=True)):
        mine: Carry = jax.tree.map(lambda leaf: leaf[number], carry)  # noqa: B023
        with _named(number):
            found.append(running.ended(run, step, mine, watch.stats, [], None))
    return found


def _taken(
    runs: list[Prepared], interrupted: Callable[[], bool], advance: Callable[[int], object]
) -> tuple[int, Carry, list[running.Watch]]:
    """How many steps there were, what they led to, and what was seen on the way."""
    starts = [run.start.take() for run in runs]
    watches = [running.Watch(run, start[0]) for run, start in zip(runs, starts, strict=True)]
    # Asking for the numbers waits for the device: only where a step may end the run.
    asked = not all(run.mechanism.tolerates_nonfinite for run in runs)
    asked |= any(run.mechanism.watches_magnitudes for run in runs)
    carry, together = _stacked_alone(starts), _Together(runs)
    del starts
    first, stop = runs[0].first, runs[0].stop
    step, seen = first, []
    with contextlib.closing(_calls(runs)) as calls:
        for each in calls:
            carry, stats = together(carry, each)
            seen.append(stats)
            if asked:
                seen[-1] = jax.device_get(stats)
                _check(watches, seen[-1], step)
            step += each[0].count
            advance(each[0].count)
            if step < stop and interrupted():
                running.stop_early(_least_able(runs, step), step)
                break
    if not asked:
        for stats in jax.device_get(seen):
            for number, watch in enumerate(watches):
                watch.stats.append(_of(stats, number))
    return step, carry, watches


def _calls(runs: list[Prepared]) -> Generator[tuple[Call, ...], None, None]:
    """The calls of all runs, in step: each on the first one's data, which is equal to all's."""
    feed = runs[0].examples.feed
    batch = sum(leaf.size * leaf.dtype.itemsize for leaf in _batch_shapes(runs[0]))
    most = _MOST_BYTES.get(jax.default_backend(), _MOST_BYTES_ELSEWHERE)
    longest = max(1, min(runs[0].longest, most // (batch * len(runs) + 1)))
    with contextlib.ExitStack() as opened:
        found = []
        for run in runs:
            steps = run.examples.noisy(run.keys.data, run.first, run.stop, longest)
            # A source is read by this thread alone: it need not stand several at once.
            calls = feed.calls(steps._replace(prefetch=0))
            found.append(opened.enter_context(contextlib.closing(calls)))
        yield from zip(*found, strict=True)


def _batch_shapes(run: Prepared) -> list[jax.ShapeDtypeStruct]:
    shapes = run.examples.feed.batch_shapes(run.examples.batch_size)
    found: list[jax.ShapeDtypeStruct] = jax.tree.leaves(shapes)
    return found


class _Together:
    """The compiled steps of all runs."""

    def __init__(self, runs: list[Prepared]) -> None:
        """Nothing compiled yet."""
        steps: list[NoisySteps] = [run.noisy for run in runs]  # type: ignore[misc]
        self._first = steps[0]
        self._varied = _stacked([one.varied for one in steps])
        self._compiled: Callable[..., tuple[Carry, StepStats]] | None = None

    def __call__(self, carry: Carry, calls: tuple[Call, ...]) -> tuple[Carry, StepStats]:
        """Takes the steps of one call of each."""
        varied, own = self._varied
        given, more = _stacked([(call.data, call.sampling_key) for call in calls])
        if self._compiled is None:
            steps, shapes = self._first, (varied, given, carry)
            self._compiled = kept_steps.compiled(
                "replicas", steps.fixed, steps.looked_at, shapes, _compiled_replicas
            )
        step, count, most = calls[0].step, calls[0].count, calls[0].most
        carry, stats = self._compiled(
            carry, (varied, given), step, count, most=most, axes=own + more
        )
        if count < most:  # of steps that were not taken there are no numbers
            stats = jax.tree.map(lambda numbers: np.asarray(numbers)[:, :count], stats)
        return carry, stats


def _stacked(trees: list[Any]) -> tuple[Any, _Axes]:
    """One tree of all: a leaf that is the same object in all as it is, the others stacked."""
    flat = [jax.tree.leaves(tree) for tree in trees]
    leaves, axes = [], []
    for parts in zip(*flat, strict=True):
        one = all(part is parts[0] for part in parts)
        leaves.append(parts[0] if one else _stack(parts))
        axes.append(None if one else 0)
    return jax.tree.unflatten(jax.tree.structure(trees[0]), leaves), tuple(axes)


@jax.jit
def _stack(parts: tuple[Any, ...]) -> jax.Array:
    """One call, where `jnp.stack` alone is one for each part."""
    return jnp.stack(parts)


def _compiled_replicas(
    this: kept_steps.Compiled[Fixed],
) -> Callable[..., tuple[Carry, StepStats]]:
    """The compiled `run(carry, given, step, count, *, most, axes)`."""

    @functools.partial(jax.jit, static_argnames=("most", "axes"), donate_argnums=0)
    def run(
        carry: Carry, given: Any, step: int, count: int, *, most: int, axes: _Axes
    ) -> tuple[Carry, StepStats]:
        leaves, structure = jax.tree.flatten(given)

        def one(leaves: list[Any], carry: Carry) -> tuple[Carry, StepStats]:
            varied, (data, key) = jax.tree.unflatten(structure, leaves)
            return noisy_step.steps_of_call(
                this.fixed, varied, carry, data, key, step, count, most, ()
            )

        mapped: tuple[Carry, StepStats] = jax.vmap(one, in_axes=(list(axes), 0))(leaves, carry)
        return mapped

    return run


def _stacked_alone(trees: list[Any]) -> Any:
    """One tree in new memory, which the steps may overwrite."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _of(stats: StepStats, number: int) -> StepStats:
    """The numbers of one replica."""
    mine: StepStats = jax.tree.map(lambda leaf: np.asarray(leaf)[number], stats)
    return mine


def _check(watches: list[running.Watch], stats: StepStats, step: int) -> None:
    """Raises what is wrong with the steps of one replica."""
    for number, watch in enumerate(watches):
        problem = watch.problem(_of(stats, number), step)
        if problem is not None:
            with _named(number):
                raise problem


def _least_able(runs: list[Prepared], step: int) -> Prepared:
    """One that could not be certified if it stopped here, if there is one."""
    return next((run for run in runs if not run.mechanism.can_stop(step)), runs[0])


@contextlib.contextmanager
def _named(number: int) -> Generator[None, None, None]:
    """Says of an exception which replica it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised for prepared[{number}]; no replica of this call is released")
        raise
