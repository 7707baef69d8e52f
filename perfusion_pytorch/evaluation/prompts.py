"""The prompts of an evaluation: built-in ones for objects and for living things, or those of a file."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OBJECT_PROMPTS = (
    "a photo of a {} on a beach",
    "a photo of a {} in the snow",
    "a photo of a {} in a forest",
    "a photo of a {} on a wooden floor",
    "a photo of a {} on top of a stone wall",
    "a photo of a {} in front of the Eiffel tower",
    "a photo of a {} with a city in the background",
    "a photo of a {} beside a bowl of fruit",
    "a photo of a {} next to a dog",
    "a photo of a {} floating on a lake",
    "a photo of a {} at night under a street lamp",
    "a photo of a small {} in a hand",
    "a red {}",
    "a {} made of glass",
    "an oil painting of a {}",
    "a pencil drawing of a {}",
)
LIVING_PROMPTS = (
    "a photo of a {} on a beach",
    "a photo of a {} in the snow",
    "a photo of a {} in a kitchen",
    "a photo of a {} in front of a castle",
    "a photo of a {} running through a meadow",
    "a photo of a {} swimming in a lake",
    "a photo of a {} sleeping on a sofa",
    "a photo of a {} riding a bicycle",
    "a photo of a {} reading a book",
    "a photo of a {} beside a red car",
    "a photo of a {} with a hat",
    "a photo of a {} with a blue scarf",
    "a photo of a {} in a space suit",
    "a {} as a knight in armour",
    "an oil painting of a {}",
    "a pencil drawing of a {}",
)
UNRELATED_PROMPTS = (
    "a photo of a mountain lake",
    "a bowl of soup on a table",
    "a street with old houses",
    "a man playing the guitar",
    "a vase with yellow flowers",
    "an airplane above the clouds",
    "a portrait of an old woman",
    "an oil painting of a ship at sea",
)
BUILT_IN = {"objects": OBJECT_PROMPTS, "living": LIVING_PROMPTS}


@dataclass(frozen=True)
class Prompts:
    """What pictures are made of.

    Attributes:
        templates: prompts with one {} each, for the thing that is evaluated.
        unrelated: prompts that have nothing to do with it.
    """

    templates: tuple[str, ...]
    unrelated: tuple[str, ...]


def prompts_for(prompts: str | os.PathLike | Sequence[str], superclass: str) -> Prompts:
    """Return the prompts of an evaluation.

    Args:
        prompts: "objects" or "living" for the built-in ones, a text file of one prompt a line, or texts. A
            text with {} is a prompt of the thing, any other is an unrelated prompt; where there are none of
            these, the built-in ones are taken. In a file, empty lines and those that begin with # are left
            out.
        superclass: what the thing is. Built-in unrelated prompts that name it are left out.

    Raises:
        ValueError: no text has a {}, one has several, or one is there twice.
        OSError: the file cannot be read.
    """
    name = "`prompts`"
    if isinstance(prompts, str) and prompts in BUILT_IN:
        texts: Sequence[str] = BUILT_IN[prompts]
    elif isinstance(prompts, (str, os.PathLike)):
        name, texts = str(prompts), _lines_of(Path(prompts))
    else:
        texts = list(prompts)
    wrong = [text for text in texts if text.count("{}") > 1 or texts.count(text) > 1]
    if wrong:
        raise ValueError(f"{name} must hold each prompt once, with one {{}} at most, got {wrong[0]!r}.")
    templates = tuple(text for text in texts if "{}" in text)
    if not templates:
        raise ValueError(
            f"{name} must hold prompts with a {{}} in the place of the thing, such as 'a photo of a {{}}', "
            f"but none of its {len(texts)} has one."
        )
    unrelated = tuple(text for text in texts if "{}" not in text)
    return Prompts(templates, unrelated or _without(UNRELATED_PROMPTS, superclass))


def _lines_of(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"`prompts` must be {' or '.join(map(repr, BUILT_IN))}, or a text file of prompts, got "
            f"{str(path)!r}, and there is no such file."
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, but it cannot be read: {error}.") from error
    return [line for line in lines if line and not line.startswith("#")]


def _without(texts: Sequence[str], superclass: str) -> tuple[str, ...]:
    """Return the texts that name none of the superclass's words."""
    words = set(re.findall(r"\w+", superclass.lower()))
    return tuple(text for text in texts if not words & set(re.findall(r"\w+", text.lower())))
