"""Captions that an input covariance is estimated from: the built-in ones, and those of a text file."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.captions.grammar import Writer
from perfusion_pytorch.protocols import Tokenizer

NUM_CAPTIONS = 100_000  # the paper's number
CHECKED = 1000  # captions whose words are checked
LETTERS_A_PIECE = 3  # a tokenizer that cuts a word into shorter pieces than this on average does not know it


@dataclass(frozen=True)
class BuiltInCaptions:
    """Everyday captions: subjects, attributes, settings, styles, photographs, phrases.

    Caption i depends on the seed and i alone.

    Example:
        >>> captions = BuiltInCaptions(3)
        >>> len(captions), list(captions) == list(captions)
        (3, True)
    """

    count: int = NUM_CAPTIONS
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        return (Writer(Random(f"{self.seed} {i}")).caption() for i in range(self.count))


@dataclass(frozen=True)
class CaptionFile:
    """The captions of a text file, one a line, read anew each time; empty lines do not count.

    Raises:
        ValueError: on reading, if the file is a folder, is not UTF-8 text or holds no caption.
        FileNotFoundError: on reading, if the file does not exist.
        OSError: on reading, if it cannot be read.
    """

    path: str | os.PathLike[str]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        is_empty = True
        path = Path(self.path)
        if path.is_dir():
            raise ValueError(f"{path} must be a text file of captions, one a line, but it is a folder.")
        if not path.exists():
            raise FileNotFoundError(f"There is no caption file {path}. Give a text file, one caption a line.")
        try:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    if caption := line.strip():
                        is_empty = False
                        yield caption
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} must be a text file in UTF-8, one caption a line, got other bytes ({error})."
            ) from error
        if is_empty:
            raise ValueError(f"{path} must hold captions, one a line, but it is empty.")


@beartype
def share_of_unknown_words(tokenizer: Tokenizer, captions: Iterable[str]) -> float:
    """Return the share, from 0 to 1, of the longer words of captions that a tokenizer does not know.

    Each word counts as often as it occurs. Byte-pair encoding can write every word, letter by letter if it
    must: a word counts as unknown if its pieces have fewer than three letters on average, or include the
    tokenizer's token for the unknown. Words of up to three letters, which are everywhere, do not count.
    """
    words = Counter(word for caption in captions for word in re.findall(r"[^\W\d_]{4,}", caption.lower()))
    unknown = sum(count for word, count in words.items() if not _is_known(tokenizer, word))
    return unknown / max(1, words.total())


@beartype
def check_words_are_known(tokenizer: Tokenizer, captions: Iterable[str]) -> None:
    """Check that a tokenizer knows most words of the first thousand captions.

    Raises:
        ValueError: it does not, so that their encodings would mean nothing.
    """
    unknown = share_of_unknown_words(tokenizer, islice(captions, CHECKED))
    if unknown > 0.5:
        whose = "The built-in captions" if isinstance(captions, BuiltInCaptions) else "The captions"
        raise ValueError(
            f"{whose} must be in words that the text encoder's tokenizer knows, but it cuts {unknown:.0%} of "
            "the longer ones into single letters or hardly more. Give captions such as the model was trained "
            "on, from a text file with one a line, by `cached_covariance(pipe, captions)`."
        )


def _is_known(tokenizer: Tokenizer, word: str) -> bool:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    pieces = [piece for piece in tokenizer.convert_ids_to_tokens(ids) if piece.strip("▁Ġ")]
    most = max(1, -(-len(word) // LETTERS_A_PIECE))
    return tokenizer.unk_token_id not in ids and len(pieces) <= most
