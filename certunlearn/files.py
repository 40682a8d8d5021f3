"""Parameters on disk and their digest; every file appears whole or not at all."""

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any], *, private: bool = False
) -> None:
    """Writes a file so that `path` holds either the whole new content or what it held before.

    Args:
      path: where the file goes; its folder must exist.
      write: receives the open binary file and fills it.
      private: whether only the owner may read the file; otherwise it gets the usual permissions.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if not private:
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)  # reading it means setting it
    os.umask(mask)
    return mask


def leaf_name(path: Any) -> str:
    """A leaf's path in a pytree as text: "dense/kernel"; "value" for a tree that is one leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "value"


def named_leaves(params: Any) -> dict[str, np.ndarray]:
    """A pytree's arrays under their paths ("dense/kernel"), on the host, sorted by path.

    A nested tree and the flat dict that this function makes of it have the same named leaves.

    Raises:
      ValueError: if two leaves have the same path, as `{"a/b": x, "a": {"b": y}}` would.
    """
    named: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        if name in named:
            raise ValueError(f"params has two leaves named {name!r}; rename one of them")
        named[name] = np.asarray(leaf)
    return dict(sorted(named.items()))


def params_digest(params: Any) -> str:
    """SHA-256 (hexadecimal) of all parameters: paths, dtypes, shapes and values.

    >>> import jax.numpy as jnp
    >>> nested, flat = {"a": {"b": jnp.ones(2)}}, {"a/b": jnp.ones(2)}
    >>> params_digest(nested) == params_digest(flat)
    True
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(params).items():
        header = f"{len(name.encode())}:{name}:{leaf.dtype.name}:{leaf.shape};"
        digest.update(header.encode())
        little_endian = leaf.astype(leaf.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(little_endian).tobytes())
    return digest.hexdigest()


def save_params(path: str | os.PathLike[str], params: Any) -> None:
    """Writes parameters as a NumPy `.npz` archive, one array under each leaf's path.

    Raises:
      ValueError: if `path` does not end in `.npz`, or a leaf's dtype is not one of NumPy's own
        (bfloat16, say: cast it to float32 first).
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {os.fspath(path)!r}")
    named = named_leaves(params)
    for name, leaf in named.items():
        if leaf.dtype.kind not in "biufc":
            raise ValueError(f"params[{name!r}] has dtype {leaf.dtype}; cast it to float32 first")
    write_atomically(path, lambda file: write_npz(file, named))


def write_npz(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as `np.savez` would, under any names ("file", too, which that one reserves)."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)


def load_params(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads what `save_params` wrote, as a flat dict from leaf path to array.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not such an archive.
    """
    with open(path, "rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            return {name: archive[name] for name in archive.files}
        except Exception as error:  # zipfile, NumPy and struct errors alike
            raise ValueError(f"{os.fspath(path)!r} is not a readable .npz of parameters") from error
