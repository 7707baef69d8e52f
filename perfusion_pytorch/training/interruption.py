"""The folder of a training run, and how a run is stopped."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from beartype import beartype

from perfusion_pytorch.files import write_atomically


@beartype
def check_output_dir(output_dir: str | os.PathLike, needed: int) -> Path:
    """Make the folder, and see that files can be written there, before hours of training are.

    Args:
        output_dir: the folder.
        needed: bytes that will be.

    Raises:
        OSError: it cannot be written to, or its disk has no room.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".probe-{os.getpid()}"  # other processes of the run look too
        write_atomically(probe, bytes(2**16))
        probe.unlink()
        free = shutil.disk_usage(output_dir).free
    except OSError as error:
        raise OSError(
            f"`output_dir` must be a folder that can be written to, but {output_dir} cannot: {error}"
        ) from error
    if free < needed:
        raise OSError(
            f"`output_dir` must be on a disk with at least {needed:,} bytes free, got {free:,} at {output_dir}. Make room first."
        )
    return output_dir


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed."""

    is_wanted: bool = False


@contextmanager
def noted_interruption(bar) -> Iterator[Interruption]:
    """Within the block, note the first Ctrl-C instead of raising KeyboardInterrupt wherever the program is; the second raises at once.

    Args:
        bar: a progress bar, which tells that the first was heard.
    """
    interruption = Interruption()

    def note(signum, frame):
        if interruption.is_wanted:
            raise KeyboardInterrupt
        interruption.is_wanted = True
        bar.set_description("stopping after this step (again: at once)")

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:  # not ours to set
        yield interruption
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
