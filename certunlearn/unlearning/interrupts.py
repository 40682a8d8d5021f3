"""Stops and failures that lose no work: Ctrl-C between steps, exceptions that carry the state."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from certunlearn.unlearning.private_history import UnlearningState


class UnlearningFailed(RuntimeError):
    """An exception in `unlearn` after noise was added; `__cause__` is what was raised.

    Attributes:
      state: **private**, what a run with `Options(resume=error.state)` goes on from.
    """

    state: UnlearningState | None = None


class UnlearningInterrupted(KeyboardInterrupt):
    """A second Ctrl-C in `unlearn` after noise was added, or one where nothing can be released.

    Attributes:
      state: **private**, what a run with `Options(resume=error.state)` goes on from.
    """

    state: UnlearningState | None = None


@contextmanager
def carrying(state: Callable[[], UnlearningState | None]) -> Iterator[None]:
    """Gives whatever is raised within this context the state from which the run can go on.

    Args:
      state: makes it, or returns None where there is nothing to go on from; then, and for an exit
        of the interpreter, the exception is raised as it is. So is one that has a state already.

    Raises:
      UnlearningFailed: in place of an exception.
      UnlearningInterrupted: in place of a KeyboardInterrupt.
    """
    try:
        yield
    except (UnlearningFailed, UnlearningInterrupted):
        raise
    except (Exception, KeyboardInterrupt) as error:
        kept = state()
        if kept is None:
            raise
        pressed = isinstance(error, KeyboardInterrupt)
        what = f"interrupted {error}".strip() if pressed else f"{type(error).__name__}: {error};"
        raised = (UnlearningInterrupted if pressed else UnlearningFailed)(
            f"{what} at step {kept.step}. Nothing was released and nothing is lost: the state of "
            "this exception goes on from there, Options(resume=error.state)"
        )
        raised.state = kept
        raise raised from error


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Within this context the first Ctrl-C or SIGTERM is only noted; a second one interrupts.

    A signal that is ignored stays ignored, and one with a handler of the program's own stays with
    that handler.

    Yields:
      A function that says whether there was one.
    """
    noted = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals reach the main thread only
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mine = {number: handler for number, handler in before.items() if handler in usual}
    try:
        for number in mine:
            signal.signal(number, note)
        yield lambda: noted
    finally:
        for number, handler in mine.items():
            signal.signal(number, handler)
