"""Checkers of the user's own: functions that give pictures numbers."""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from PIL.Image import Image

# A checker's values of these names take the place of DINO and CLIP in the recommendation.
IDENTITY, PROMPT = "identity", "prompt"


@dataclass(frozen=True)
class CheckedConcept:
    """What a checker is told about the pictures that it gets.

    Attributes:
        name: of the file, "base model", or "training pictures".
        superclass: what the thing is, as the prompts that a checker gets call it.
        words: what stood for the thing in the prompts that the pictures were made of.
        strength: β, or a LoRA's scale; None where there is none.
    """

    name: str
    superclass: str
    words: str
    strength: float | None = None


Checker = Callable[[Sequence[Any], Sequence[str], CheckedConcept], Mapping[str, Sequence[float]]]


def checked(
    checker: Checker, pictures: Sequence["Image"], texts: Sequence[str], concept: CheckedConcept
) -> dict[str, list[float]]:
    """Return what a checker says of pictures, after a look at its form.

    Raises:
        ValueError: it is not a mapping of names to a finite number for each picture.
    """
    result = checker(list(pictures), list(texts), concept)
    name = getattr(checker, "__name__", type(checker).__name__)
    if not isinstance(result, Mapping) or not result:
        raise ValueError(
            f"The checker {name} must return a mapping of names to a number for each picture, got "
            f"{type(result).__name__}."
        )
    values = {str(key): _numbers(row) for key, row in result.items()}
    for key, row in values.items():
        if len(row) != len(pictures) or not all(map(math.isfinite, row)):
            raise ValueError(
                f"The checker {name} must return a finite number for each of {len(pictures)} pictures, got "
                f"{result[key]!r} as {key!r}."
            )
    return values


def _numbers(row: Iterable[Any]) -> list[float]:
    """Return numbers as floats; what is none as NaN, and what is no row as an empty one."""
    try:
        return [float(value) for value in row]
    except (TypeError, ValueError):
        return []


def checker_named(name: str) -> Checker:
    """Return the checker that "module:function" or "file.py:function" names. Its code is run.

    The folder of a file is added to Python's path, so that it can import what is beside it.

    Raises:
        ValueError: there is no such module or function.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function.isidentifier():
        raise ValueError(f"`checkers` must be named as module:function or file.py:function, got {name!r}.")
    try:
        module = _module_of(place)
    except ImportError as error:
        raise ValueError(
            f"`checkers` must name a module or a file that can be imported, got {place!r}: {error}. "
            "Name its file, or run the command where it can be imported."
        ) from error
    checker = getattr(module, function, None)
    if not callable(checker):
        found = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise ValueError(f"`checkers` must name a function of {place}, got {function!r}. It has {found}.")
    return cast(Checker, checker)


def _module_of(place: str) -> ModuleType:
    path = Path(place)
    if path.suffix != ".py":
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(place)
    if not path.is_file():
        raise ImportError("there is no such file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
