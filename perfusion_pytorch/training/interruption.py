"""How a training run is stopped: Ctrl-C and SIGTERM are noted, and obeyed between two steps."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

# A launcher passes on the Ctrl-C that the terminal has sent to all processes: that is not a second one.
SECOND_AFTER = 1.0  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as from a scheduler of jobs; in all else it is Ctrl-C.

    Attributes:
        exit_code: what a process that ends by it returns.
    """

    exit_code = 128 + 15


@dataclass
class Interruption:
    """Whether the run has been asked to stop.

    Attributes:
        is_wanted: whether it has.
        error: what is raised then: KeyboardInterrupt after Ctrl-C, `Terminated` after SIGTERM.
    """

    is_wanted: bool = False
    error: type[KeyboardInterrupt] = KeyboardInterrupt


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated("Stopped before or after the steps; checkpoints that were written are good.")


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Within the block, let SIGTERM raise `Terminated`, so that what was begun is undone.

    Where the caller has a handler of its own, or ignores SIGTERM, it stays.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    with _handled([signal.SIGTERM], _terminate):
        yield


@contextmanager
def noted_interruption(bar: "tqdm") -> Iterator[Interruption]:
    """Within the block, note the first Ctrl-C or SIGTERM instead of raising an exception.

    A second Ctrl-C, a second later or more, raises KeyboardInterrupt at once.

    Args:
        bar: a progress bar, which shows that the first was noted.

    Yields:
        Whether the run has been asked to stop.
    """
    interruption = Interruption()
    noted_at = 0.0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal noted_at
        now = time.monotonic()
        if not interruption.is_wanted:
            noted_at = now
            interruption.is_wanted = True
            interruption.error = Terminated if signum == signal.SIGTERM else KeyboardInterrupt
            bar.set_description("stopping after this step (again: at once)")
        elif signum == signal.SIGINT and now - noted_at >= SECOND_AFTER:
            raise KeyboardInterrupt("Stopped amid a step; earlier checkpoints are good.")

    signums = [signal.SIGINT]
    if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, _terminate):
        signums.append(signal.SIGTERM)
    with _handled(signums, note):
        yield interruption


@contextmanager
def _handled(
    signums: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle signals within the block, in the main thread: others may set no handlers."""
    before = {signum: signal.getsignal(signum) for signum in signums}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    # One that Python did not install could not be put back.
    before = {signum: old for signum, old in before.items() if old is not None}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
