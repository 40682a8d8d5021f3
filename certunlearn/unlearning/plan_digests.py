"""What decides the course of a run, and its digests."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from chex import ArrayTree

from certunlearn import mechanisms
from certunlearn._numerics import checks, processes
from certunlearn.mechanisms import Mechanism
from certunlearn.unlearning import leaf_split, resuming
from certunlearn.unlearning.prepared_run import Examples


def settings_of(
    mechanism: Mechanism, scale: checks.PerStep, split: leaf_split.Split, examples: Examples
) -> dict[str, Any]:
    """What decides the course of the run besides arrays and functions."""
    return {
        "mechanism": mechanisms.to_record(mechanism),
        "noise_scale": scale,
        "batch_size": examples.batch_size,
        "per_example": examples.per_example,
        # Each microbatch of a batch has a key of its own. Examples' keys do not depend on it.
        "microbatch_size": examples.accumulated,
        "frozen": split.is_frozen,
    }


def planned(
    settings: dict[str, Any], split: leaf_split.Split, examples: Examples, center: ArrayTree | None
) -> Callable[[], dict[str, str]]:
    """Computes the digests when they are asked for, and once."""
    plan = functools.cache(lambda: _plan(settings, split, examples, center))
    if processes.spans_processes(split.leaves):
        plan()  # while all processes are here, and none waits for one that failed
    return plan


def _plan(
    settings: dict[str, Any], split: leaf_split.Split, examples: Examples, center: ArrayTree | None
) -> dict[str, str]:
    """Digests of what decides the course of the run."""
    return resuming.plan(
        settings,
        {
            "params": jax.tree.unflatten(split.treedef, split.leaves),
            "retain_data": examples.feed.digested(),
            "center": center,
        },
    )
