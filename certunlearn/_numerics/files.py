"""Parameters on disk and their digest; files that are written whole or not at all."""

import contextlib
import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import archives, checks, model_trees, processes

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed
    fcntl = None  # type: ignore[assignment]


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[IO[bytes]], object], *, private: bool = False
) -> None:
    """Writes a file so that `path` holds either the whole new content or what it held before.

    The content goes to a hidden file in the same folder first. What a killed process left of such
    files is removed when the same path is written again.

    Args:
      path: where the file goes; its folder must exist. A symbolic link is followed and stays.
      write: receives the open binary file and fills it.
      private: whether only the owner may read the file; otherwise it gets the usual permissions.
        The hidden file has the same two endings (`.private.npz`), so that what keeps private files
        out of an archive or a repository keeps it out too. A symbolic link is refused: private
        content must not end up under another name.

    Raises:
      TypeError: if `path` is not a path.
      ValueError: if it holds a null character.
      OSError: naming `path`, if it cannot be written: no such folder, a directory or device of that
        name, a name that is too long, a link where none may be, no permission, a full disk.
    """
    name = _text(path)
    place = _place(name, private)
    try:
        _write(place, write, private)
    except OSError as error:
        # The error names the hidden file, or no file: name `path` instead.
        if error.errno and (
            error.filename is None or Path(os.fsdecode(error.filename)).name.startswith(".")
        ):
            reason = f"the file cannot be written ({os.strerror(error.errno)})"
            raise OSError(error.errno, reason, name) from error
        raise


def _write(place: Path, write: Callable[[IO[bytes]], object], private: bool) -> None:
    # Names have at most 255 bytes, a character at most 4.
    beginning = f".{place.name[:40]}.tmp-"
    ending = "".join(place.suffixes[-2:])[-20:] if private else ".tmp"
    _remove_stale(place.parent, beginning, ending)
    handle, temporary = _new(place.parent, beginning, ending)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if not private:
                os.chmod(temporary, 0o666 & ~_umask())
            if fcntl is not None:  # while it is locked: others take an unlocked one for stale
                os.replace(temporary, place)
        if fcntl is None:
            os.replace(temporary, place)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _text(path: object) -> str:
    """The path as text, or TypeError."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(f"path must be a string or a pathlib.Path, got {type(path).__name__}")
    return text


def _place(name: str, private: bool) -> Path:
    """Where a file of this name is to be written, or an error that says why it cannot be."""
    if "\0" in name:
        raise ValueError(f"path must not hold a null character, got {name!r}")
    if os.path.islink(name) and private:
        raise OSError(errno.EPERM, "a private file is not written through a symbolic link", name)
    place = Path(os.path.realpath(name) if os.path.islink(name) else name)
    try:
        mode = os.stat(place).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:  # the name is too long, or links form a circle
        raise OSError(error.errno, os.strerror(error.errno or 0), name) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a directory is there, not a file", name)
    if mode and not stat.S_ISREG(mode):  # replacing /dev/null would harm the whole system
        raise OSError(errno.EINVAL, "a device or pipe is there, not a file", name)
    if not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {str(place.parent)!r} for", name)
    return place


def _remove_stale(folder: Path, beginning: str, ending: str) -> None:
    """Removes the hidden files of processes that were killed; those of living ones are locked."""
    form = re.compile(re.escape(beginning) + r"[a-z0-9_]{8}" + re.escape(ending))
    with contextlib.suppress(OSError):  # a folder that cannot be listed may be written to
        for name in filter(form.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError), _locked(folder / name):
                os.unlink(folder / name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file's lock, or raises OSError if another process or thread does."""
    if fcntl is None:
        yield
        return
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _new(folder: Path, beginning: str, ending: str) -> tuple[int, str]:
    """A new hidden file for its owner only, open and locked as long as it is open."""
    while True:
        handle, name = tempfile.mkstemp(dir=folder, prefix=beginning, suffix=ending)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        # Another process may have removed it as stale before it was locked.
        if os.path.exists(name):
            return handle, name
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)  # reading it means setting it
    os.umask(mask)
    return mask


def leaf_name(path: tuple) -> str:
    """A leaf's path in a pytree as text: "dense/kernel"; "value" for a tree that is one leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "value"


def named_leaves(params: ArrayTree) -> dict[str, np.ndarray]:
    """A pytree's arrays under their paths ("dense/kernel"), on the host, sorted by path.

    A nested tree and the flat dict that this function makes of it have the same named leaves. None
    is no leaf, as everywhere in JAX: a layer without a bias may have it there.

    Raises:
      TypeError: if a leaf is no array of numbers or bools: text, objects, masked arrays, typed PRNG
        keys, long doubles, or what JAX is tracing.
      ValueError: if there are no leaves, two leaves have the same path, as `{"a/b": x, "a": {"b":
        y}}` would, or a path cannot be written to a file.
    """
    return {name: _on_host(name, leaf) for name, leaf in _by_name(params).items()}


def placed_leaves(params: ArrayTree) -> dict[str, Any]:
    """`named_leaves`, but arrays that are spread over devices stay there."""
    return {
        name: leaf if processes.is_spread(leaf) else _on_host(name, leaf)
        for name, leaf in _by_name(params).items()
    }


def _by_name(params: ArrayTree) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        if name in named:
            raise ValueError(f"params has two leaves named {name!r}; rename one of them")
        if _is_no_name(name):
            raise ValueError(
                f"params has a leaf named {name!r:.80}, which no file can hold; rename it"
            )
        named[name] = leaf
    if not named:
        raise ValueError("params must have at least one array, got none")
    return dict(sorted(named.items()))


def _is_no_name(name: str) -> bool:
    # What is not Unicode does not survive being encoded; zip archives have 16 bits for lengths.
    encoded = name.encode(errors="replace")
    return "\0" in name or encoded.decode() != name or len(encoded) > 65_000


def _on_host(name: str, leaf: object) -> np.ndarray:
    """The leaf as an array of NumPy's, in its own dtype."""
    right = f"params[{name!r}] must be an array of numbers"
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{right}, got a masked array, whose mask would be lost")
    try:
        array = processes.on_host(leaf)
    except Exception as error:  # PRNG keys, tracers, deleted arrays, lists of different lengths
        raise TypeError(f"{right}, got {type(leaf).__name__} ({type(error).__name__})") from error
    _stored_dtype(right, array.dtype)
    return array


def _stored_dtype(right: str, dtype: np.dtype) -> np.dtype:
    """The dtype that holds the same numbers exactly and that every NumPy reads."""
    if dtype.kind in "biu" or (dtype.kind in "fc" and dtype.char in "fdFD"):
        return dtype.newbyteorder("=")
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        return np.dtype(np.float32)
    if dtype.kind == "V" and jnp.issubdtype(dtype, jnp.integer):  # of 4 bits or fewer
        return np.dtype(np.int8 if jnp.iinfo(dtype).min < 0 else np.uint8)
    raise TypeError(f"{right}, got dtype {dtype}")


def _stored(params: ArrayTree) -> Iterator[tuple[str, np.ndarray]]:
    """`named_leaves` in dtypes of NumPy's own: narrower floats as float32, which is exact.

    One by one, so that no more than one leaf needs to be on the host.
    """
    for name, leaf in _by_name(model_trees.parameters(params)).items():
        host = _on_host(name, leaf)
        yield name, host.astype(_stored_dtype(name, host.dtype), copy=False)


def params_digest(params: ArrayTree) -> str:
    """SHA-256 (hexadecimal) of all parameters: paths, dtypes, shapes and values.

    Of a module or a `TrainState` these are the parameters, and nothing else of it.

    Floats narrower than float32 (bfloat16, float16, float8) count as the float32 numbers that they
    are, and integers below 8 bits as int8 or uint8, so a tree of them and what `save_params` writes
    of it have the same digest. How leaves are spread over devices does not count. One leaf after
    another is copied to the host; if they span processes, all of these must call this.

    Raises:
      TypeError: if a leaf is no array of numbers.
      ValueError: if two leaves have the same path, or one that no file can hold.

    >>> import jax.numpy as jnp
    >>> nested, flat = {"a": {"b": jnp.ones(2)}}, {"a/b": jnp.ones(2, jnp.bfloat16)}
    >>> params_digest(nested) == params_digest(flat)
    True
    """
    digest = hashlib.sha256()
    for name, leaf in _stored(params):
        header = f"{len(name.encode())}:{name}:{leaf.dtype.name}:{leaf.shape};"
        digest.update(header.encode())
        little_endian = leaf.astype(leaf.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(little_endian).data)
    return digest.hexdigest()


def save_params(path: str | os.PathLike[str], params: ArrayTree) -> None:
    """Writes parameters as a NumPy `.npz` archive, one array under each leaf's path.

    Floats narrower than float32 (bfloat16, float16, float8) are written as float32, and integers
    below 8 bits as int8 or uint8, for plain NumPy does not read most of them: the same numbers with
    the same digest. If the parameters span processes, all of these must call this, and the first
    one writes.

    Args:
      path: ends in `.npz`; replaced whole or not at all. See `write_atomically`.
      params: a pytree of arrays, or a module or `TrainState`, of which the parameters are written.

    Raises:
      OSError: if the file cannot be written, naming `path`.
      TypeError: if a leaf is no array of numbers, or `path` no path.
      ValueError: if `path` does not end in `.npz`, there are no leaves, or paths of leaves collide:
        also "a" and "a.npy", of which `numpy.load` finds only one.
    """
    if Path(_text(path)).suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {os.fspath(path)!r}")
    named = dict(_stored(params))
    archives.check_names(named)
    if jax.process_index() > 0 and processes.spans_processes(model_trees.parameters(params)):
        return
    write_atomically(path, lambda file: archives.write(file, named))


def load_params(
    path: str | os.PathLike[str], *, max_bytes: int | None = None
) -> dict[str, np.ndarray]:
    """Reads what `save_params` wrote, as a flat dict from leaf path to array.

    Safe for files of unknown origin: nothing in them is run, and they unpack to no more memory than
    they take on disk, or 256 MiB, whichever is more.

    Args:
      path: the `.npz`, as `save_params` or `numpy.savez` writes it.
      max_bytes: largest size to be read, on disk and unpacked; None for no further limit.

    Raises:
      TypeError: if `path` is not a path, or `max_bytes` not a whole number.
      OSError: if the file cannot be read.
      ValueError: if it is not such an archive, or larger.
    """
    if max_bytes is not None:
        max_bytes = checks.positive_int("max_bytes", max_bytes)
    arrays = archives.read(_text(path), max_bytes=max_bytes)
    try:
        return named_leaves(arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no archive of parameters: {error}") from error
