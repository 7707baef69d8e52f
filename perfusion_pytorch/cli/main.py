"""The `perfusion` command: exit codes, errors in one line, warnings."""

import os
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TextIO

from perfusion_pytorch.cli.parser import given_twice, read_arguments
from perfusion_pytorch.early_interrupts import INTERRUPTED
from perfusion_pytorch.user_warnings import warn_user

FAILED = 1
# Remedies of the library in Python, and what they are on the command line.
IN_FLAGS = {
    "`cached_covariance(pipe, captions)`": "`--captions FILE`",
    "`InputCovariance(C, ridge=1e-6)`": "`--ridge 1e-6`",
    "`set_concepts`": "`--concept`",
}
# Errors whose message says all; others are shown with their type.
EXPLAINED = (ValueError, OSError, ImportError, RuntimeError)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit code: 0; 1 after an error; 2 after a wrong use; 130 after Ctrl-C; 143 after
        SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # not every console or file can hold a β
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = read_arguments(argv)
    except SystemExit as finished:  # --help, --version, or a wrong use
        return int(finished.code or 0)
    with warnings.catch_warnings():
        if not args.verbose:
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", UserWarning)  # ours; other packages warn of deprecations
            warnings.showwarning = _shows_warnings(args.parser)
        for line in given_twice(argv, args.parser):
            warn_user(line)
        return _run(args)


def _run(args: Namespace) -> int:
    try:
        args.run(args, _say)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as interrupt:
        _complain(str(interrupt) or "Interrupted.")
        return getattr(interrupt, "exit_code", INTERRUPTED)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        name = "" if isinstance(error, EXPLAINED) else f"{type(error).__name__}: "
        text = _with_flags(" ".join(str(error).split()), args.parser)
        _complain(f"error: {name}{text}" + ("" if args.verbose else " (--verbose shows where)"))
        return FAILED


def _with_flags(text: str, parser: ArgumentParser) -> str:
    """Return a message of the library with flags in the place of its arguments' names and remedies."""
    for remedy, flags in IN_FLAGS.items():
        text = text.replace(remedy, flags)
    for action in parser._actions:
        if action.option_strings:
            text = text.replace(f"`{action.dest}`", action.option_strings[-1])
            text = text.replace(f"`{action.dest}=", f"`{action.option_strings[-1]} ")
    return text


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _complain(text: str) -> None:
    sys.stderr.write(f"perfusion: {text}\n")


def _shows_warnings(parser: ArgumentParser) -> Callable[..., None]:
    """Return what shows a warning as one line."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _complain(f"warning: {_with_flags(' '.join(str(message).split()), parser)}")

    return show
