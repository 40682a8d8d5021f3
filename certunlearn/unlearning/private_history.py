"""The operator's private record of a run. Nothing in this file may leave with a released model."""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import archives, files, processes, recognition


class UnlearningState(NamedTuple):
    """Private: all that it takes to resume a run, as secret as the trained model.

    It holds the noise key and a hidden iterate; whoever has both has the noise, and the noise is
    the guarantee.

    Attributes:
      step: noisy steps already run.
      leaves: parameters and optimizer state in tree order: NumPy arrays, or JAX arrays that are
        spread over devices.
      data_key: uint32 `[2]`, key of the batch order.
      finetune_key: uint32 `[2]`, key of the fine-tuning batches.
      key_source: how the keys were drawn.
      plan: digests of what the run depends on (data, trained parameters, centre, settings), under
        the names of `unlearn`'s arguments.
      noise_stream: the number of the stream that the noise is drawn from; 1 is that of versions
        which did not say.
    """

    step: int
    leaves: tuple[np.ndarray | jax.Array, ...]
    data_key: np.ndarray
    finetune_key: np.ndarray
    key_source: str
    plan: dict[str, str]
    noise_stream: int = 1

    def __repr__(self) -> str:
        """How far the run is, and nothing that is secret."""
        return f"UnlearningState(step={self.step}, <private>)"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class PrivateHistory:
    """Private: what the operator may look at and must not publish.

    Every number here is computed from the hidden run. The certificate covers the released
    parameters alone; publishing any of this voids it.

    Attributes:
      losses: float32 `[steps run now]`, batch loss before each noisy step; empty where the
        objective was minimised instead.
      clip_fractions: float32, likewise: fraction of the gradients that were clipped: 0 or 1 where
        batch gradients are clipped, in between where each example's is.
      nonfinite: number of gradients (of batches or of examples) that were not finite and were
        replaced by zero.
      finetune_losses: float32, batch loss before each fine-tuning step.
      evaluations: (step, value) for each call of `evaluate`.
      trained_digest: SHA-256 of the trained model's parameters.
      start_digest: SHA-256 of their projection onto the ball.
      state: what it takes to resume, if the run was stopped before its last step, fine-tuning
        included; else None.
      before_noise: where noise comes after the last step only: the parameters without it, from
        which the next request is served (`mechanism.next`); else None. As secret as the trained
        model, and not saved. Float64 where the objective was minimised.
      gradient_norm: where the objective was minimised: the verified bound that was reached; else
        None.
      passes: over the retain data that this took, if the package's solver did it; else None.
    """

    losses: np.ndarray
    clip_fractions: np.ndarray
    nonfinite: int
    finetune_losses: np.ndarray
    evaluations: list[tuple[int, Any]]
    trained_digest: str
    start_digest: str
    state: UnlearningState | None
    before_noise: ArrayTree | None = None
    gradient_norm: float | None = None
    passes: int | None = None

    def __repr__(self) -> str:
        """How many steps there were, and nothing that is secret."""
        tuned = len(self.finetune_losses)
        return f"PrivateHistory(<private: {len(self.losses)} noisy steps, {tuned} without noise>)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record as JSON, without `state`; the name must end in `.private.json`.

        Numbers that are not finite become null, keys become strings, and of an evaluation that
        is none of JSON's types its `repr` is written.

        Raises:
          ValueError: if the name does not say that the file is private.
        """
        check_private(path, ".private.json")
        record = {
            "warning": "Private record of the operator: publishing it voids the certificate.",
            "losses": self.losses,
            "clip_fractions": self.clip_fractions,
            "nonfinite": self.nonfinite,
            "finetune_losses": self.finetune_losses,
            "evaluations": self.evaluations,
            "trained_digest": self.trained_digest,
            "start_digest": self.start_digest,
            "gradient_norm": self.gradient_norm,
            "passes": self.passes,
        }
        text = json.dumps(_plain(record), indent=2, allow_nan=False) + "\n"
        files.write_atomically(path, lambda file: file.write(text.encode()), private=True)


def save_state(path: str | os.PathLike[str], state: UnlearningState) -> None:
    """Writes a stopped run's state, to be resumed with `Options(resume=load_state(path))`.

    The file is readable by its owner only. It holds the noise key and a hidden iterate, and says
    so with a warning: delete it once the run is finished.

    Raises:
      ValueError: if the name does not end in `.private.npz`, or arrays span processes.
    """
    write_state(path, state)
    warnings.warn(
        f"{os.fspath(path)} holds the noise key and a hidden iterate: keep it as secret as the "
        "trained model, never beside the released one, and delete it when the run is finished",
        stacklevel=2,
    )


def write_state(path: str | os.PathLike[str], state: UnlearningState) -> None:
    """`save_state` without its warning."""
    check_private(path, ".private.npz")
    if processes.spans_processes(state.leaves):
        raise ValueError(
            "state must be whole in this process to go into one file, got arrays that span "
            "processes: let each write its pieces, with orbax_checkpoints.Saver(folder)"
        )
    # NumPy's files know bfloat16 and its like by their size only: their bits go there, and names.
    leaves = list(map(np.asarray, state.leaves))
    arrays = {f"leaf{i:06d}": _bits(leaf) for i, leaf in enumerate(leaves)}
    about = {"step": state.step, "key_source": state.key_source, "plan": state.plan}
    about["noise_stream"] = state.noise_stream
    text = json.dumps(about | {"dtypes": [leaf.dtype.name for leaf in leaves]})
    arrays |= {"data_key": state.data_key, "finetune_key": state.finetune_key}
    arrays["about"] = np.asarray(text)
    files.write_atomically(path, lambda file: archives.write(file, arrays), private=True)


def load_state(path: str | os.PathLike[str]) -> UnlearningState:
    """Reads what `save_state` wrote.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not a saved state.
    """
    arrays = archives.read(path)
    try:
        about = json.loads(str(arrays.pop("about")))
        data_key, finetune_key = arrays.pop("data_key"), arrays.pop("finetune_key")
        return UnlearningState(
            step=int(about["step"]),
            leaves=tuple(
                arrays[name].view(dtype)
                for name, dtype in zip(sorted(arrays), map(jnp.dtype, about["dtypes"]), strict=True)
            ),
            data_key=data_key,
            finetune_key=finetune_key,
            key_source=str(about["key_source"]),
            plan={str(name): str(digest) for name, digest in about["plan"].items()},
            noise_stream=int(about.get("noise_stream", 1)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a saved unlearning state") from error


def _bits(leaf: np.ndarray) -> np.ndarray:
    # NumPy's format knows its own types only; of the others some call themselves kind "f".
    foreign = leaf.dtype.kind == "V" or (leaf.dtype.kind == "f" and leaf.dtype.itemsize == 1)
    return leaf.view(f"u{leaf.dtype.itemsize}") if foreign else leaf


def check_private(path: str | os.PathLike[str], ending: str) -> None:
    """Raises ValueError if a name does not say that what it is of is private."""
    if not Path(path).name.endswith(ending):
        raise ValueError(f"path must end in {ending!r}, for it is private; got {os.fspath(path)!r}")


def _plain(value: Any) -> Any:
    """The same in JSON's types."""
    if isinstance(value, Mapping):
        pairs = [(_name(key), _plain(item)) for key, item in value.items()]
        # Keys such as 1 and "1" would be the same in JSON.
        return dict(pairs) if len(dict(pairs)) == len(pairs) else pairs
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if recognition.has_numpy_dtype(value):  # not a PRNG key, of which no number may be written
        plain = np.asarray(value).tolist()
        return _plain(plain) if isinstance(plain, bool | int | float | str | list) else repr(value)
    return "a PRNG key" if isinstance(value, jax.Array) else repr(value)


def _name(key: Any) -> str:
    return str(key.item() if isinstance(key, np.generic) else key)
