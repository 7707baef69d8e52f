"""How a training run is stopped: Ctrl-C is noted, and obeyed between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed."""

    is_wanted: bool = False


@contextmanager
def noted_interruption(bar: "tqdm") -> Iterator[Interruption]:
    """Within the block, note the first Ctrl-C instead of raising KeyboardInterrupt.

    The second Ctrl-C raises it at once.

    Args:
        bar: a progress bar, which shows that the first was noted.

    Yields:
        Whether Ctrl-C was pressed.
    """
    interruption = Interruption()

    def note(signum: int, frame: FrameType | None) -> None:
        if interruption.is_wanted:
            raise KeyboardInterrupt
        interruption.is_wanted = True
        bar.set_description("stopping after this step (again: at once)")

    before = signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers, and one that Python did not install cannot be put back.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield interruption
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
