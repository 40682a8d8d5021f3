"""A progress bar, where one is wanted and tqdm is installed."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def advancing(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """Gives a bar's `advance(steps)`, or a stand-in without tqdm or where none is wanted."""
    if not shown or importlib.util.find_spec("tqdm") is None:
        yield lambda count: None
        return
    from tqdm import tqdm

    bar = tqdm(total=total, desc="unlearning", unit="step")

    def advance(count: int) -> None:
        with contextlib.suppress(Exception):  # a closed terminal must not cost the run
            bar.update(count)

    try:
        yield advance
    finally:
        with contextlib.suppress(Exception):
            bar.close()
