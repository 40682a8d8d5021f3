"""Saving the state of a run on the way, so that a process that is killed loses little."""

import os

import numpy as np

from certunlearn.unlearning.prepared_run import Prepared
from certunlearn.unlearning.private_history import UnlearningState, load_state, write_state
from certunlearn.unlearning.run_options import Options


def check(options: Options) -> None:
    """Refuses to overwrite the state of another run, or a later one of this run.

    Raises:
      ValueError: if the file is there, and is not the state that the run goes on from, or an
        earlier one.
    """
    path, resumed = options.save_to, options.resume
    if not isinstance(path, str | os.PathLike) or not os.path.lexists(path):
        return
    found = None if resumed is None else _state_at(path)
    same_run = (
        found is not None
        and resumed is not None
        and np.array_equal(found.data_key, resumed.data_key)
        and found.plan == resumed.plan
        and found.step <= resumed.step
    )
    if not same_run:
        raise ValueError(
            f"save_to={os.fspath(path)!r} is there already, and may be the state of a run that was "
            "killed, or a later one of this run: go on with it, "
            "Options(resume=load_state(save_to)), or delete it"
        )


def _state_at(path: str | os.PathLike[str]) -> UnlearningState | None:
    """The state in a file; None if it is something else."""
    try:
        return load_state(path)
    except (OSError, ValueError):
        return None


def due(prepared: Prepared, step: int) -> bool:
    """Whether the state after so many noisy steps is to be saved."""
    every = prepared.options.save_every
    return every is not None and (step % every == 0 or step == prepared.stop)


def save(options: Options, state: UnlearningState | None) -> None:
    """Saves a state; None, of a step that failed, leaves what was saved before."""
    if state is None or options.save_to is None:
        return
    if isinstance(options.save_to, str | os.PathLike):
        write_state(options.save_to, state)
    else:
        options.save_to(state)
