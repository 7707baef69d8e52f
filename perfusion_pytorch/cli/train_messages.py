"""What `perfusion train` shows of the library's log and errors."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def log_shown() -> Iterator[None]:
    """Show what the library logs, such as what a run will do, on stderr."""
    logger, handler = logging.getLogger("perfusion_pytorch"), logging.StreamHandler(sys.stderr)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextmanager
def in_flags() -> Iterator[None]:
    """Let messages speak of flags that are about the pipeline, or about a run that was stopped."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)(str(stop).replace("`resume_from_checkpoint`", "--resume_from_checkpoint")) from stop
    except ValueError as error:
        if "`pipe`" not in str(error):
            raise
        model = "the model of --pretrained_model_name_or_path"
        raise ValueError(str(error).replace("`pipe`", model)) from error
