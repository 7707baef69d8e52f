"""Functions that read a flag's value from its text; argparse reports what they refuse."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from perfusion_pytorch.training.options import NOT_NEGATIVE, POSITIVE, Range

Value = TypeVar("Value")


def number(text: str) -> float:
    """Read a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def whole(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    value = whole(text)
    if value < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def count_or_none(text: str) -> int | None:
    """Read a whole number of at least 0, where 0 means None."""
    return None if whole(text) == 0 else count(text)


def in_range(read: Callable[[str], Value], allowed: Range) -> Callable[[str], Value]:
    """Return a function that reads a value and refuses one that is out of its range.

    Example:
        >>> in_range(number, POSITIVE)("0.5")
        0.5
    """

    def read_in_range(text: str) -> Value:
        value = read(text)
        if not allowed.fits(value):
            raise ArgumentTypeError(f"must be {allowed.needed.removesuffix(', or None')}, got {text!r}")
        return value

    return read_in_range


positive = in_range(number, POSITIVE)
not_negative = in_range(number, NOT_NEGATIVE)


def gate_value(text: str) -> tuple[str | None, float]:
    """Read "0.5" or "<token>=0.5" as (token or None, number).

    Example:
        >>> gate_value("0.5"), gate_value("<teddy-1>=0.6")
        ((None, 0.5), ('<teddy-1>', 0.6))
    """
    name, equals, value = text.rpartition("=")
    return (name if equals else None), number(value)


def temperature_value(text: str) -> tuple[str | None, float]:
    """Read what `gate_value` reads, of which the number is above 0.

    Example:
        >>> temperature_value("<teddy-1>=0.1")
        ('<teddy-1>', 0.1)
    """
    name, value = gate_value(text)
    if value <= 0:
        raise ArgumentTypeError(f"must be above 0, got {text!r}")
    return name, value


def not_empty(text: str) -> str:
    """Read a text of more than spaces."""
    if not text.strip():
        raise ArgumentTypeError(f"must not be empty, got {text!r}")
    return text


def words(text: str) -> str:
    """Read a prompt: text, and not bytes of another encoding than the terminal's."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"must be text in UTF-8, got {text!a}") from None
    return text


def seed(text: str) -> int:
    """Read a seed: a whole number that torch takes, and which leaves room to count on from it."""
    value = whole(text)
    if not 0 <= value < 2**62:
        raise ArgumentTypeError(f"must be a whole number from 0 to 2**62 - 1, got {text!r}")
    return value


def png(text: str) -> Path:
    """Read the name of a PNG file."""
    if Path(text).suffix.lower() != ".png":
        raise ArgumentTypeError(f"must end in .png, got {text!r}")
    return Path(text)
