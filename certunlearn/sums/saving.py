"""Exact sums on disk: private files, written whole or not at all, and checked when read."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from certunlearn._numerics import archives, files
from certunlearn.sums.fixed_point import TARGET_BITS, Settings
from certunlearn.sums.row_index import SALT_BYTES, RowIndex
from certunlearn.sums.statistics import MOST_WEIGHT, Statistics, sums_problem
from certunlearn.sums.wide_integers import WideIntegers

_ENDING = ".private.npz"
_FORMAT = "certunlearn exact sums 1"
_WORDS = {"gram_high": np.int64, "gram_low": np.uint32, "cross_high": np.int64} | {
    "cross_low": np.uint32
}
_INDEX = {"index_high": np.uint64, "index_low": np.uint64, "index_counts": np.int64}


def save(path: str | os.PathLike[str], stats: Statistics) -> None:
    """Writes sums and index, for their owner only.

    The file is as private as the rows: it holds their traces until they are removed and the file is
    written anew. Copies and backups made before keep those traces.

    Args:
      path: ends in `.private.npz`. It holds the old content or the new, whole, at any moment, even
        if the process is killed.
      stats: what to write.

    Raises:
      OSError: if the file cannot be written.
      TypeError: if `path` is no path.
      ValueError: if the name does not say that the file is private.
    """
    name = _text(path)
    if not Path(name).name.endswith(_ENDING):
        raise ValueError(f"path must end in {_ENDING!r}, for it is private; got {name!r}")
    about = {
        "format": _FORMAT,
        "settings": dataclasses.asdict(stats.settings),
        "rows": stats.rows,
        "weight": stats.weight,
    }
    arrays = {"about": np.asarray(json.dumps(about))}
    for which, sums in (("gram", stats.gram), ("cross", stats.cross)):
        arrays |= {f"{which}_high": sums.high, f"{which}_low": sums.low.astype(np.uint32)}
    if stats.class_counts is not None:
        arrays["class_counts"] = stats.class_counts
    index = stats.index
    if index is not None:
        for name, parts in (
            ("index_high", [part.high for part in index.parts]),
            ("index_low", [part.low for part in index.parts]),
            ("index_counts", [part.counts for part in index.parts]),
            ("salt", [np.frombuffer(part.salt, np.uint8) for part in index.parts]),
        ):
            arrays[name] = np.concatenate(parts)
        arrays["index_sizes"] = np.array([len(part.high) for part in index.parts], np.int64)
    files.write_atomically(path, lambda file: archives.write(file, arrays), private=True)


def load(path: str | os.PathLike[str]) -> Statistics:
    """Reads what `save` wrote, and checks that rows could have such sums.

    Raises:
      OSError: if the file cannot be read.
      TypeError: if `path` is no path.
      ValueError: if it is not such a file, or what it says cannot be.
    """
    name = _text(path)
    arrays = archives.read(name)
    try:
        return _statistics(arrays)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        reason = str(error)[:300] if isinstance(error, TypeError | ValueError) else "no such sums"
        raise ValueError(f"{name!r} holds no exact sums: {reason}") from error


def _text(path: object) -> str:
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):  # `open` would take a number for a file that is open already
        raise TypeError(f"path must be a string or a pathlib.Path, got {type(path).__name__}")
    return text


def _statistics(arrays: dict[str, np.ndarray]) -> Statistics:
    about, settings = _about(arrays.pop("about", np.zeros(0)))
    d, columns = settings.num_features, settings.columns
    shapes = {"gram": (d, d), "cross": (d, columns)}
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        name: (dtype, shapes[name.split("_")[0]]) for name, dtype in _WORDS.items()
    }
    if settings.classes is not None:
        expected["class_counts"] = (np.int64, (settings.classes,))
    if "salt" in arrays:
        length = arrays["index_high"].shape if "index_high" in arrays else ()
        expected |= {name: (dtype, length) for name, dtype in _INDEX.items()}
        parts = arrays["index_sizes"].shape if "index_sizes" in arrays else ()
        expected["index_sizes"] = (np.int64, parts)
        expected["salt"] = (np.uint8, (SALT_BYTES * math.prod(parts),))
    if set(arrays) != set(expected):
        raise ValueError(f"it has the arrays {sorted(arrays)}, not {sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{name} is {array.dtype} of shape {array.shape}, not {np.dtype(dtype)} of {shape}"
            )
    stats = Statistics(
        settings=settings,
        rows=about["rows"],
        class_counts=arrays.get("class_counts"),
        weight=about["weight"],
        gram=_wide(arrays, "gram"),
        cross=_wide(arrays, "cross"),
        index=_index(arrays) if "salt" in arrays else None,
    )
    problem = _counts_problem(stats) or sums_problem(stats) or _range_problem(stats)
    if problem is not None:
        raise ValueError(problem)
    return stats


def _about(text: np.ndarray) -> tuple[dict[str, Any], Settings]:
    if text.dtype.kind != "U" or text.ndim != 0:
        raise ValueError("it does not say what it is about")
    about = json.loads(str(text))
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT!r}")
    if set(about) != {"format", "settings", "rows", "weight"}:
        raise ValueError(f"it has the entries {sorted(about)}")
    if type(about["rows"]) is not int or type(about["weight"]) is not int:
        raise ValueError("rows and weight are no whole numbers")
    fields = about["settings"]
    names = {field.name for field in dataclasses.fields(Settings)}
    if not isinstance(fields, dict) or set(fields) != names:
        raise ValueError(f"its settings are not {sorted(names)}")
    return about, Settings(**fields)


def _wide(arrays: dict[str, np.ndarray], name: str) -> WideIntegers:
    return WideIntegers(arrays[f"{name}_high"], arrays[f"{name}_low"].astype(np.int64))


def _index(arrays: dict[str, np.ndarray]) -> RowIndex:
    sizes = arrays["index_sizes"]
    if (
        sizes.ndim != 1
        or not len(sizes)
        or (sizes < 0).any()
        or not (sizes.sum(dtype=np.float64) == len(arrays["index_high"]))
    ):
        raise ValueError("index_sizes do not add up to the length of the index")
    ends = np.cumsum(sizes)[:-1]
    columns = (np.split(arrays[name], ends) for name in _INDEX)
    salts = arrays["salt"].reshape(len(sizes), SALT_BYTES)
    parts = [
        RowIndex(salt.tobytes(), *part)
        for salt, part in zip(salts, zip(*columns, strict=True), strict=True)
    ]
    return dataclasses.replace(parts[0], others=tuple(parts[1:]))


def _counts_problem(stats: Statistics) -> str | None:
    """What is wrong with the counts, which then bound all that is summed over them."""
    if not 0 <= stats.rows <= stats.weight <= MOST_WEIGHT:
        return "rows and weight are not from 0 to 2^44, rows at most the weight"
    counts = stats.class_counts
    weight = stats.rows
    if counts is not None:
        if not all(0 <= count <= stats.rows for count in counts.tolist()):
            return "class_counts are not from 0 to the number of rows"
        if counts.sum() != stats.rows:  # at most 2^12 2^44
            return "class_counts do not add up to the number of rows"
        if stats.settings.class_weights is not None:
            weight = int(counts @ np.asarray(stats.settings.class_weights, np.int64))
    if weight != stats.weight:
        return "the weight is not that of the rows"
    # A float64 sum is exact up to 2^53, and beyond it is not below that.
    if stats.index is not None and stats.rows != sum(
        float(part.counts.sum(dtype=np.float64)) for part in stats.index.parts
    ):
        return "the index does not have as many rows"
    return None


def _range_problem(stats: Statistics) -> str | None:
    """Whether sums are not symmetric, or larger than rows can make them (to float64's accuracy)."""
    gram, settings = stats.gram, stats.settings
    if not all(np.array_equal(word, word.T) for word in (gram.high, gram.low)):
        return "gram is not symmetric"
    norm, room = float(settings.norm_in_units), 1 + 2.0**-50
    if (np.abs(gram.to_float()) > stats.weight * norm**2 * room).any():
        return "gram is too large for so many rows"
    if stats.class_counts is None:
        most = np.asarray(stats.weight * norm * 2.0**TARGET_BITS)
    else:
        most = stats.class_counts * norm * np.asarray(settings.class_weights or 1, np.float64)
    if (np.abs(stats.cross.to_float()) > most * room).any():
        return "cross is too large for so many rows"
    return None
