"""States of runs as Orbax checkpoints: of arrays that are spread over devices, written meanwhile.

Needs `orbax-checkpoint`. The state in one file, `save_state`, needs nothing.
"""

import json
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from certunlearn._numerics import checks
from certunlearn.unlearning import private_history
from certunlearn.unlearning.private_history import UnlearningState

__all__ = ["Saver", "restore_state"]


class Saver:
    """Saves states as Orbax checkpoints, in a folder for its owner only: `Options(save_to=...)`.

    Every process of the run makes one, of the same folder, and calls it. Arrays are saved from
    where they are, each process its part, and the files are written while the run goes on. A
    checkpoint is there whole or not at all.

    Args:
      folder: its name must end in `.private`; it is made if it is not there.
      keep: how many of the last states to keep.

    Raises:
      ModuleNotFoundError: if Orbax is not installed.
      ValueError: if the name does not say that the folder is private, or others may read it.

    Guarantee:
      None: a state is as secret as the trained model. See `Options` for what a resumed run
      computes. Delete the folder once the run is finished.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 1) -> None:
        """Opens or makes the folder."""
        orbax = _orbax()
        self._folder = _private_folder(folder, make=True)
        options = orbax.CheckpointManagerOptions(
            max_to_keep=checks.positive_int("keep", keep), enable_async_checkpointing=True
        )
        self._manager = orbax.CheckpointManager(self._folder, options=options)
        # Of the run that the folder is of.
        self._of_run: tuple[list[int], dict[str, str]] | None = None

    def __call__(self, state: UnlearningState) -> None:
        """Starts to save a state; waits for the one before.

        Raises:
          ValueError: if the folder holds a state of another run, or one as late as this.
        """
        orbax = _orbax()
        self.wait()
        latest, key = self._manager.latest_step(), np.asarray(state.data_key).tolist()
        of_run = key, dict(state.plan)
        if latest is not None:
            if self._of_run is None:
                about = _about(orbax, self._manager, latest)
                self._of_run = about["data_key"], about["plan"]
            if self._of_run != of_run or latest >= state.step:
                raise ValueError(
                    f"folder {str(self._folder)!r} holds step {latest} of a run already, and this "
                    f"is step {state.step}: go on with that one, "
                    "Options(resume=restore_state(folder)), or take another folder"
                )
        about = state._asdict() | {
            "data_key": key,
            "finetune_key": np.asarray(state.finetune_key).tolist(),
            "leaves": [[jnp.dtype(leaf.dtype).name, list(leaf.shape)] for leaf in state.leaves],
        }
        # Orbax holds no arrays without numbers, and no tree without arrays: a run has parameters.
        arrays = {_name(i): leaf for i, leaf in enumerate(state.leaves) if leaf.size}
        self._manager.save(
            state.step,
            args=orbax.args.Composite(
                leaves=orbax.args.StandardSave(arrays),
                about=orbax.args.JsonSave({"text": json.dumps(about)}),
            ),
        )
        self._of_run = of_run

    def wait(self) -> None:
        """Returns when the last state is on disk.

        Raises:
          Exception: whatever went wrong with it.
        """
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()

    def __enter__(self) -> "Saver":
        """Itself, to be closed at the end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()


def restore_state(
    folder: str | os.PathLike[str], *, step: int | None = None, spread: bool = False
) -> UnlearningState:
    """Reads a state that a `Saver` has saved, for `Options(resume=...)`.

    Args:
      folder: where it was saved.
      step: which one; None for the last.
      spread: False reads NumPy arrays, which a resumed run spreads as its parameters are, on any
        devices. True reads every array onto the devices that it was saved from, each process its
        part, so that none holds all; it needs the same devices.

    Raises:
      ModuleNotFoundError: if Orbax is not installed.
      FileNotFoundError: if there is no such folder or state.
      ValueError: if it is none that a `Saver` has saved.
    """
    orbax = _orbax()
    with orbax.CheckpointManager(_private_folder(folder, make=False)) as manager:
        step = manager.latest_step() if step is None else checks.positive_int("step", step)
        if step is None or step not in manager.all_steps():
            raise FileNotFoundError(f"folder {os.fspath(folder)!r} holds no state of step {step}")
        try:
            about = _about(orbax, manager, step)
            kinds = [(jnp.dtype(dtype), tuple(shape)) for dtype, shape in about["leaves"]]
            like = {
                _name(i): np.empty(shape, dtype)
                for i, (dtype, shape) in enumerate(kinds)
                if 0 not in shape
            }
            wanted = orbax.args.StandardRestore(None if spread else like)
            found = manager.restore(step, args=orbax.args.Composite(leaves=wanted))["leaves"]
            leaves = tuple(
                _checked(found.get(_name(i), np.zeros(shape, dtype)), dtype, shape)
                for i, (dtype, shape) in enumerate(kinds)
            )
            keys = {
                name: np.asarray(about[name], np.uint32) for name in ("data_key", "finetune_key")
            }
            return UnlearningState(**about | keys | {"leaves": leaves})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            name = os.fspath(folder)
            raise ValueError(f"{name!r} is not a saved unlearning state: {error}") from error


def _orbax() -> Any:
    try:
        import orbax.checkpoint as orbax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'these checkpoints need orbax-checkpoint: pip install "certunlearn[orbax]"',
            name="orbax",
        ) from error
    return orbax


def _private_folder(folder: str | os.PathLike[str], *, make: bool) -> Path:
    """The folder's whole path, which Orbax wants."""
    private_history.check_private(folder, ".private")
    path = Path(folder).absolute()
    if make and not path.exists():
        path.mkdir(mode=0o700, exist_ok=True)  # another process may have made it meanwhile
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(folder)!r}")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ValueError(
            f"folder {os.fspath(folder)!r} must be for its owner only (chmod 700): what is in it "
            "is as secret as the trained model"
        )
    return path


def _about(orbax: Any, manager: Any, step: int) -> dict[str, Any]:
    """What is in a checkpoint besides arrays."""
    wanted = orbax.args.Composite(about=orbax.args.JsonRestore())
    found: dict[str, Any] = json.loads(manager.restore(step, args=wanted)["about"]["text"])
    return found


def _name(index: int) -> str:
    return f"leaf{index:06d}"


def _checked(
    leaf: np.ndarray | jax.Array, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray | jax.Array:
    if leaf.dtype != dtype or leaf.shape != shape:
        raise ValueError(
            f"an array is {leaf.dtype}{leaf.shape}, and was {dtype}{shape}: is JAX's 64-bit mode "
            "as it was (jax_enable_x64)?"
        )
    return leaf
