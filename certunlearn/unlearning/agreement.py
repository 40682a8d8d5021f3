"""Runs over several processes, each of which calls `unlearn`: what these must have in common."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import processes, random_keys
from certunlearn.unlearning import interrupts
from certunlearn.unlearning.private_history import UnlearningState
from certunlearn.unlearning.run_options import Options


def check_options(params: ArrayTree, more: Options, solves: bool) -> None:
    """Refuses what a run over several processes cannot do.

    Raises:
      ValueError: if it would save to one file, or minimise on the host.
    """
    if not processes.spans_processes(params):
        return
    if isinstance(more.save_to, str | os.PathLike):
        raise ValueError(
            "save_to must be a function where params span processes, such as "
            "orbax_checkpoints.Saver(folder), to which each process writes its pieces; got a file"
        )
    if solves:
        raise ValueError(
            "params must be on the devices of one process for a mechanism that minimises first, "
            "which is done on the host"
        )


def agreed_keys(
    keys: random_keys.Keys,
    source: str,
    params: ArrayTree,
    settings: dict[str, Any],
    resumed: UnlearningState | None,
) -> tuple[random_keys.Keys, str]:
    """The keys of all processes: those that the first one drew, or that all were given.

    Args:
      keys: of this process.
      source: how they were drawn.
      params: the parameters, which say whether there are other processes.
      settings: what decides the course of the run besides, in JSON's types.
      resumed: from what the run goes on; its noise key is in there, and not in `keys`.

    Returns:
      The keys, and their source as it was given.

    Raises:
      ValueError: if processes were given different keys or settings: copies of a parameter would
        get different noise, and no longer be copies.
    """
    if not processes.spans_processes(params):
        return keys, source
    words = [np.asarray(jax.random.key_data(key)) for key in keys]
    if resumed is not None:
        words, settings = words[1:], settings | {"step": resumed.step}
    elif source == random_keys.FROM_SYSTEM:
        raw = processes.from_first(b"".join(each.tobytes() for each in words))
        drawn = np.frombuffer(raw, np.uint32).reshape(3, -1)
        keys = random_keys.Keys(*map(random_keys.as_key, drawn))
        words = []
    content = json.dumps(settings, sort_keys=True).encode()
    what = "key, mechanism, noise_scale, batch_size, microbatch_size, frozen and resume"
    processes.check_agreed(what, content, *(each.tobytes() for each in words))
    return keys, source


@contextlib.contextmanager
def deferred_interrupts(params: ArrayTree) -> Iterator[Callable[[], bool]]:
    """`interrupts.deferred_interrupts`, but not over several processes.

    There a signal ends the process at once, as without it: one that stopped after a step of its own
    choice would leave the others waiting for it.
    """
    if processes.spans_processes(params):
        yield lambda: False
        return
    with interrupts.deferred_interrupts() as interrupted:
        yield interrupted
