"""Image data from a folder of parquet files, or from the public hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Arrays = TypeVar("Arrays")


def load(
    name: str,
    hub_name: str,
    arrays: Callable[[dict[str, np.ndarray]], Arrays],
    data_dir: Path | str | None,
    progress: bool,
) -> tuple[Arrays, Arrays]:
    """The training and the test examples of a data set.

    Args:
      name: the folder's name in `data_dir`.
      hub_name: the data set's name on the public hub.
      arrays: makes examples of columns.
      data_dir: the folder that holds `name`, or is it; None for the public hub.
      progress: whether to draw progress bars.

    Raises:
      OSError: if the data cannot be found or read.
    """
    source = hub_name if data_dir is None else str(_folder(Path(data_dir), name))
    import datasets

    if not progress:
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(source)
        columns: list[Any] = [loaded[part].with_format("numpy")[:] for part in ("train", "test")]
        return arrays(columns[0]), arrays(columns[1])
    except Exception as error:  # network, disk, parquet and image errors of several libraries
        remedy = f"; give --data-dir, a folder that holds {name}/" if data_dir is None else ""
        raise OSError(f"cannot load {name} from {source!r} ({error}){remedy}") from error


def _folder(data_dir: Path, name: str) -> Path:
    for folder in (data_dir / name, data_dir):
        if folder.is_dir() and any(folder.glob("*.parquet")):
            return folder
    raise OSError(
        f"no {name} in {str(data_dir)!r}: neither it nor its {name}/ holds .parquet files"
    )
