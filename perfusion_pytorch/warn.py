"""Warnings that point at the user's own line, however deep in the package they arise."""

import contextlib
import os
import sys
import warnings

# Packages that may stand between a user's line and ours, such as a pipeline that calls us back.
_BETWEEN = ("accelerate", "beartype", "diffusers", "torch", "transformers")


def warn_user(message: str) -> None:
    """Emit a UserWarning whose file and line are those of the user's code that led here.

    Args:
        message: the warning's text.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn_user("Something is unusual.")
        >>> print(caught[0].message)
        Something is unusual.
    """
    files = [sys.modules[name].__file__ for name in ("perfusion_pytorch", *_BETWEEN) if name in sys.modules]
    folders = [os.path.dirname(file) + os.sep for file in files if file is not None]
    skipped = (*folders, contextlib.__file__, "<@beartype")  # beartype's wrappers are in no file
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)
