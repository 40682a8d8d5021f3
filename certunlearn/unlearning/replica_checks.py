"""What runs must have in common to be taken together, and what they must not."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from certunlearn import transforms
from certunlearn.unlearning import inputs, resuming
from certunlearn.unlearning.compiled_steps import NoisySteps
from certunlearn.unlearning.prepared_run import Prepared
from certunlearn.unlearning.snapshots import snapshot


def checked(prepared: Sequence[Prepared]) -> list[Prepared]:
    """The runs as a list, if they can be taken together; none is used up.

    Raises:
      TypeError: if there are other things among them.
      ValueError: if there is none, one cannot be run with others, two would have the same noise, or
        they differ in what must be the same.
      RuntimeError: if one was run before.
    """
    if not isinstance(prepared, Sequence) or isinstance(prepared, str):
        raise TypeError(f"prepared must be a list of Prepared, got {inputs.kind(prepared)}")
    runs = list(prepared)
    if not runs:
        raise ValueError("prepared must hold at least one run, got none")
    for number, run in enumerate(runs):
        if not isinstance(run, Prepared):
            raise TypeError(
                f"prepared[{number}] must be what unlearning.prepare returns, got "
                f"{inputs.kind(run)}"
            )
        _check_one(number, run)
        if any(run is other for other in runs[:number]):
            raise ValueError(
                f"prepared[{number}] must be a run of its own, got one that is in the list "
                "already, whose noise would be used twice: call prepare for each"
            )
        run.start.look()  # raises if it is used up
    _check_noise(runs)
    for number, run in enumerate(runs[1:], 1):
        _check_same(number, run, runs[0])
    return runs


def _check_one(number: int, run: Prepared) -> None:
    """Refuses a run that cannot be one of several."""
    name, feed = type(run.mechanism).__name__, run.examples.feed
    problem = None
    if run.mechanism.exact or run.mechanism.solve_to is not None:
        problem = f"a mechanism that takes noisy steps on batches, got {name}"
    elif feed.streamed:
        problem = "retain data in arrays or a source of examples by index, got a stream"
    elif run.examples.mesh is not None:
        problem = "parameters and data on one device, got arrays that are spread over several"
    elif run.options.evaluate is not None:
        problem = "Options(evaluate=None), got a function: look at what run_replicas returns"
    elif run.options.save_every is not None:
        problem = f"Options(save_every=None), got {run.options.save_every}"
    if problem is not None:
        raise ValueError(f"prepared[{number}] must have {problem}; or use run_noisy_steps")


def _check_noise(runs: list[Prepared]) -> None:
    """Refuses two runs with one noise key: the difference of their outputs would have no noise."""
    seen: dict[bytes, int] = {}
    for number, run in enumerate(runs):
        for key in {key.tobytes() for key in _noise_keys(run)}:
            if key in seen:
                raise ValueError(
                    f"prepared[{number}] must have a noise key of its own, got that of "
                    f"prepared[{seen[key]}]: with the same noise twice, the difference of two "
                    "outputs has none. Give prepare another key for each, as of "
                    "jax.random.split(key, number), or key=None"
                )
            seen[key] = number


def _noise_keys(run: Prepared) -> list[np.ndarray]:
    """The words of the keys in the optimizer's state."""
    is_noise = lambda node: isinstance(node, transforms.AddGaussianNoiseState)  # noqa: E731
    nodes = jax.tree.leaves(run.start.look()[1], is_leaf=is_noise)
    return [np.asarray(node.key_data) for node in nodes if is_noise(node)]


def _check_same(number: int, run: Prepared, first: Prepared) -> None:
    """Raises ValueError if what must be the same in all runs is not."""
    mine, theirs = _numbers(run), _numbers(first)
    for name, value in mine.items():
        if value != theirs[name]:
            raise ValueError(
                f"prepared[{number}] must have the {name} of prepared[0], {theirs[name]}, got "
                f"{value}: runs that are taken together take the same steps"
            )
    different = _parts_that_differ(run, first) or _shapes_that_differ(run, first)
    if different is not None:
        raise ValueError(
            f"prepared[{number}] must have the structure of prepared[0], for one compiled step "
            f"serves all: {different}"
        )
    if not _same_data(run, first):
        raise ValueError(
            f"prepared[{number}] must have the retain_data of prepared[0], got others: a call "
            "takes all runs on the same data"
        )


def _numbers(run: Prepared) -> dict[str, Any]:
    fixed = _steps(run).fixed
    return {
        "steps before the first": run.first,
        "step to stop after": run.stop,
        "batch_size": run.examples.batch_size,
        "per_example": fixed.per_example,
        "microbatch_size": fixed.microbatch_size,
        "Poisson sampling": fixed.sampling,
    }


def _parts_that_differ(run: Prepared, first: Prepared) -> str | None:
    """Says what else the steps are traced from that is not the same, or None."""
    mine, theirs = _steps(run), _steps(first)
    if mine.fixed.loss != theirs.fixed.loss and not _alike(mine.looked_at[0], theirs.looked_at[0]):
        return "loss_fn, and which parameters are frozen, must be the same"
    centers = [list(map(id, jax.tree.leaves(s.fixed.own_center))) for s in (mine, theirs)]
    if not _alike(mine.fixed.own, theirs.fixed.own) or centers[0] != centers[1]:
        names = (type(each.mechanism).__name__ for each in (run, first))
        return (
            f"a mechanism without step_rule must be the same one, with one centre, for its numbers "
            f"are constants of the step: got {' and '.join(names)}"
        )
    if not _alike(mine.fixed.before_clip, theirs.fixed.before_clip):
        return "before_clip must be the same object, or one made in the same way"
    if mine.fixed.watches != theirs.fixed.watches:
        return "mechanisms must all hold the parameters' magnitudes against rounding, or none"
    return None


def _shapes_that_differ(run: Prepared, first: Prepared) -> str | None:
    """Says which array or number of a step has another shape, or None."""
    mine, theirs = (_shapes(each) for each in (run, first))
    for place in sorted(mine.keys() | theirs.keys()):
        if mine.get(place) != theirs.get(place):
            mine_there, theirs_there = (each.get(place, "none") for each in (mine, theirs))
            return f"{place} has {mine_there} where prepared[0] has {theirs_there}"
    structures: list[Any] = [
        jax.tree.structure((_steps(each).varied, each.start.look())) for each in (run, first)
    ]
    if structures[0] != structures[1]:
        names = (type(each.mechanism).__name__ for each in (run, first))
        return (
            f"the steps of mechanisms differ, or what holds the parameters: {' and '.join(names)}"
        )
    return None


def _shapes(run: Prepared) -> dict[str, str]:
    """Shapes and dtypes of all that a step depends on, by what it is."""
    varied, (params, state) = _steps(run).varied, run.start.look()
    parts = {
        "params": params,
        "optimizer state": state,
        "model": varied.arrays,
        "clip_norm of examples": varied.limits,
        "mechanism": varied.update.rule,
        "noise_scale": varied.update.noise,
        "center": varied.update.center,
    }
    found = {}
    for name, tree in parts.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[name + jax.tree_util.keystr(path)] = f"{leaf.dtype}{list(leaf.shape)}"
    return found


def _same_data(run: Prepared, first: Prepared) -> bool:
    mine, theirs = (jax.tree.leaves(each.examples.feed.given) for each in (run, first))
    if len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True)):
        return True
    arrays = all(isinstance(leaf, jax.Array) for leaf in mine + theirs)
    given = (run.examples.feed.given, first.examples.feed.given)
    return arrays and resuming.digest(given[0]) == resuming.digest(given[1])


def _alike(one: Any, other: Any) -> bool:
    """Whether two things do the same: one object, or as far as can be looked into."""
    if one is other:
        return True
    found = snapshot(one)
    return found is not None and found == snapshot(other)


def _steps(run: Prepared) -> NoisySteps:
    assert isinstance(run.noisy, NoisySteps)
    return run.noisy
