"""NumPy's `.npz` archives, read safely: a file may come from anyone.

NumPy's own reader trusts the sizes that a file states, keeps the last of two arrays of one name,
and reports errors as many kinds of exceptions.
"""

import math
import os
import warnings
import zipfile
from collections.abc import Collection
from typing import IO

import numpy as np

# An archive may unpack to so many bytes, or to its size on disk, whichever is more.
MOST_UNPACKED_BYTES = 2**28
_ENDING = ".npy"
_CHUNK_BYTES = 2**20
# Other methods decompress without a bound on how much comes out at a time.
_COMPRESSION_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def write(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as `np.savez` would, under any names: even "file", which it reserves."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}{_ENDING}", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)


def check_names(names: Collection[str]) -> None:
    """Raises ValueError if NumPy's reader would confuse two names: it takes "a.npy" for "a"."""
    for name in names:
        if name + _ENDING in names:
            raise ValueError(
                f"two arrays are named {name!r:.80} and {name + _ENDING!r:.80}, which numpy.load "
                "does not tell apart; rename one of them"
            )


def read(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of an archive.

    Args:
      path: the file.
      max_bytes: largest size to be read, on disk and unpacked; None for no further limit.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not such an archive, names an array twice, holds objects, or is
        too large.
    """
    with open(path, "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if max_bytes is not None and size > max_bytes:
                raise ValueError(f"it has {size} bytes, more than the {max_bytes} that it may have")
            with warnings.catch_warnings(), zipfile.ZipFile(file) as archive:
                warnings.simplefilter("ignore")  # about headers that are unusual but readable
                return _read(archive, size, max_bytes)
        except Exception as error:  # from zipfile, zlib, struct, NumPy or Python's parser
            reason = str(error)[:300] if type(error) is ValueError else type(error).__name__
            name = os.fspath(path)
            raise ValueError(f"{name!r} is not a readable .npz of arrays: {reason}") from error


def _read(archive: zipfile.ZipFile, size: int, max_bytes: int | None) -> dict[str, np.ndarray]:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError("it holds two arrays of the same name")
    check_names(frozenset(names))
    # As the entries declare: no entry yields more than it declares.
    unpacked = sum(entry.file_size for entry in entries)
    limit = max(size, MOST_UNPACKED_BYTES)
    if max_bytes is not None:
        limit = min(limit, max_bytes)
    if unpacked > limit:
        raise ValueError(f"it unpacks to {unpacked} bytes, more than the {limit} that it may have")
    arrays = {}
    for entry in entries:
        if not entry.filename.endswith(_ENDING):
            raise ValueError(f"it holds {entry.filename!r:.80}, which is no array")
        if entry.compress_type not in _COMPRESSION_METHODS:
            raise ValueError("it is compressed by another method than deflation")
        with archive.open(entry) as file:
            arrays[entry.filename.removesuffix(_ENDING)] = _array(file, entry.file_size)
    return arrays


def _array(file: IO[bytes], size: int) -> np.ndarray:
    """The array in an entry of that many bytes."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"it holds an array in version {version} of the format")
    shape, fortran, dtype = readers[version](file)
    length = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError("it holds objects, not numbers")
    if min(shape, default=0) < 0 or length > size:
        raise ValueError("it holds an array that is not of the size it says")
    # An array on `bytes` would not be writable.
    raw = np.empty(length, np.uint8)
    done = 0
    while done < length:
        chunk = file.read(min(_CHUNK_BYTES, length - done))
        if not chunk:
            raise ValueError("it ends within an array")
        raw[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)
    if file.read(1):  # this read also compares the checksum at the end
        raise ValueError("it holds more than the array in an entry")
    array = raw.view(dtype) if length else np.empty(math.prod(shape), dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
