"""What flags of `perfusion` take, as functions from their text; a wrong one is told by argparse."""

import math
from argparse import ArgumentTypeError
from pathlib import Path


def number(text: str) -> float:
    """Read a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def positive(text: str) -> float:
    """Read a number above 0."""
    value = number(text)
    if value <= 0:
        raise ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def not_negative(text: str) -> float:
    """Read a number of at least 0."""
    value = number(text)
    if value < 0:
        raise ArgumentTypeError(f"must be at least 0, got {text!r}")
    return value


def fraction(text: str) -> float:
    """Read a number from 0 to below 1."""
    value = number(text)
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"must be at least 0 and below 1, got {text!r}")
    return value


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    value = count_or_none(text)
    if value is None:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def count_or_none(text: str) -> int | None:
    """Read a whole number of at least 0; 0 is None."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ArgumentTypeError(f"must be a whole number, got {text!r}")
    return value or None


def whole(text: str) -> int:
    """Read a whole number of at least 0."""
    return count_or_none(text) or 0


def gate_value(text: str) -> tuple[str | None, float]:
    """Read "0.5" or "<token>=0.5" as (token or None, number).

    Example:
        >>> gate_value("0.5"), gate_value("<teddy-1>=0.6")
        ((None, 0.5), ('<teddy-1>', 0.6))
    """
    name, equals, value = text.rpartition("=")
    return (name if equals else None), number(value)


def png(text: str) -> Path:
    """Read the name of a PNG file."""
    if Path(text).suffix.lower() != ".png":
        raise ArgumentTypeError(f"must end in .png, got {text!r}")
    return Path(text)
