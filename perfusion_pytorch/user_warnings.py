"""Warnings that point at the user's line, however deep in this package the problem is found."""

import sys
import warnings
from types import FrameType

INNER_PACKAGES = (
    "perfusion_pytorch",
    "accelerate",
    "beartype",
    "contextlib",
    "diffusers",
    "torch",
    "transformers",
)
BEARTYPE_FILE = "<@beartype("  # the file name of the wrappers that beartype makes


def warn_user(message: str) -> None:
    """Issue a UserWarning at the innermost line outside this package and those that call it.

    A fixed `stacklevel` cannot do this, because the same check is reached through different numbers of calls.
    If there is no such line, the warning points at the outermost one.

    Args:
        message: what is wrong, and what to do about it.
    """
    frame, stacklevel = sys._getframe(1), 2
    while _is_inner(frame) and frame.f_back is not None:
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, stacklevel=stacklevel)


def _is_inner(frame: FrameType) -> bool:
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in INNER_PACKAGES or frame.f_code.co_filename.startswith(BEARTYPE_FILE)
