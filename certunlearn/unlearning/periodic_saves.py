"""Saving the state of a run on the way, so that a process that is killed loses little."""

import os

from certunlearn.unlearning.prepared_run import Prepared
from certunlearn.unlearning.private_history import UnlearningState, write_state
from certunlearn.unlearning.run_options import Options


def check(options: Options) -> None:
    """Refuses to overwrite the state of another run.

    Raises:
      ValueError: if the file is there and the run does not go on from a state.
    """
    path = options.save_to
    if isinstance(path, str | os.PathLike) and options.resume is None and os.path.lexists(path):
        raise ValueError(
            f"save_to={os.fspath(path)!r} is there already, and may be the state of a run that was "
            "killed: go on with it, Options(resume=load_state(save_to)), or delete it"
        )


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
