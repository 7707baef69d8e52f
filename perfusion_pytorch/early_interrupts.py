"""Ctrl-C while large packages are still being imported: one line instead of a traceback through them."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # the exit code that shells expect


def is_the_command() -> bool:
    """Return whether this process is `perfusion` or `python -m perfusion_pytorch`, not a user's program."""
    program = Path(sys.argv[0] if sys.argv else "").name
    if program in ("-m", "__main__.py"):  # of runpy, before and after it found the module
        return "perfusion_pytorch" in sys.orig_argv
    return program.removesuffix(".exe") == "perfusion"


@contextmanager
def ends_at_ctrl_c() -> Iterator[None]:
    """End the process at Ctrl-C in the block, at once and with one line, if it is the command.

    Nothing is lost during imports. An exception there would go through the packages that are half imported,
    and some turn it into other errors.
    """
    if not is_the_command() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(*_: Any) -> None:
    os.write(2, b"perfusion: Interrupted.\n")
    os._exit(INTERRUPTED)
