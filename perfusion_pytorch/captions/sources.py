"""Captions that an input covariance is estimated from: the built-in ones, written by a small grammar, and those of a text file."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random

from beartype import beartype

from perfusion_pytorch.captions import words as word_lists

NUM_CAPTIONS = 100_000  # the paper's number
CHECKED = 1000  # captions whose words are looked at
LETTERS_A_PIECE = 3  # a tokenizer that cuts a word into pieces shorter than this on average does not know it
PLURALS = {
    "mouse": "mice", "goose": "geese", "wolf": "wolves", "calf": "calves", "child": "children", "leaf": "leaves", "shelf": "shelves",
    "knife": "knives",
    "hero": "heroes",
    "elf": "elves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "fish": "fish", "loaf": "loaves", "scarf": "scarves", "foot": "feet", "tooth": "teeth", "ox": "oxen",
}  # fmt: skip
SAME_IN_PLURAL = (
    "sheep",
    "deer",
    "moose",
    "bison",
    "salmon",
    "police",
    "people",
    "spacecraft",
)  # beside words in s
KINDS_OF_THINGS = (
    "THINGS", "THINGS", "THINGS", "ANIMALS", "VEHICLES", "FURNITURE", "CLOTHES", "FOODS", "PLANTS", "BUILDINGS", "MORE", "MORE",
)  # fmt: skip
QUALITIES_OF = {
    "ANIMALS": ("ADJECTIVES", "ANIMATE_ADJECTIVES", "ANIMATE_ADJECTIVES"),
    "FOODS": ("FOOD_ADJECTIVES",),
    "PLANTS": ("ADJECTIVES",),
    "LANDSCAPES": ("ADJECTIVES",),
}
LIKE_VOWELS, UNLIKE_VOWELS = (
    ("hour", "honest", "x-ray", "f/"),
    ("uni", "use", "euro", "one", "ukulele"),
)  # of a and an


@dataclass(frozen=True)
class BuiltInCaptions:
    """Everyday captions: subjects, attributes, settings, styles, photographs, phrases. Caption i is a function of the seed and i.

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
        return (_Writer(Random(f"{self.seed} {i}")).caption() for i in range(self.count))


@dataclass(frozen=True)
class CaptionFile:
    """The captions of a text file, one a line, read anew each time; empty lines do not count.

    Raises:
        ValueError: on reading, where the file is no UTF-8 text or holds no caption.
        OSError: on reading, where there is no such file.
    """

    path: str | os.PathLike

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        is_empty = True
        try:
            with open(self.path, encoding="utf-8") as file:
                for line in file:
                    if caption := line.strip():
                        is_empty = False
                        yield caption
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{Path(self.path)} must be a text file in UTF-8, one caption a line, got other bytes ({error})."
            ) from error
        if is_empty:
            raise ValueError(f"{Path(self.path)} must hold captions, one a line, but it is empty.")


@beartype
def share_of_unknown_words(tokenizer, captions: Iterable[str]) -> float:
    """Return the part, from 0 to 1, of the longer words of captions that a tokenizer does not know, each as often as it is there.

    Byte-pair encoding can write every word, if need be letter by letter. A word counts as unknown where its pieces have fewer than three
    letters on average, or hold the tokenizer's own token for the unknown. Words of up to three letters, which are everywhere, do not count.
    """
    words = Counter(word for caption in captions for word in re.findall(r"[^\W\d_]{4,}", caption.lower()))
    return sum(count for word, count in words.items() if not _is_known(tokenizer, word)) / max(
        1, words.total()
    )


@beartype
def check_words_are_known(tokenizer, captions: Iterable[str]) -> None:
    """Raise a ValueError where a tokenizer does not know most words of the first thousand captions: their encodings would mean nothing."""
    unknown = share_of_unknown_words(tokenizer, islice(captions, CHECKED))
    if unknown > 0.5:
        whose = "The built-in captions" if isinstance(captions, BuiltInCaptions) else "The captions"
        raise ValueError(
            f"{whose} must be in words that the text encoder's tokenizer knows, but it cuts {unknown:.0%} of the longer ones into single "
            "letters or hardly more. Give captions such as the model was trained on: a text file, one a line, by `--captions FILE`."
        )


def _is_known(tokenizer, word):
    ids = tokenizer(word, add_special_tokens=False).input_ids
    pieces = len([piece for piece in tokenizer.convert_ids_to_tokens(ids) if piece.strip("▁Ġ")])
    return tokenizer.unk_token_id not in ids and pieces <= max(1, -(-len(word) // LETTERS_A_PIECE))


@cache
def _words(name: str) -> tuple[str, ...]:
    """Return a list of words; those of several parts are divided by bars, or tied by underscores."""
    text = getattr(word_lists, name)
    parts = text.replace("\n", " ").split("|") if "|" in text else text.split()
    return tuple(" ".join(part.replace("_", " ").split()) for part in parts)


def plural(noun: str) -> str:
    """Return the plural of a noun, as well as a few rules know it.

    Example:
        >>> [plural(noun) for noun in ("dog", "box", "puppy", "toy", "mouse", "glasses", "policewoman")]
        ['dogs', 'boxes', 'puppies', 'toys', 'mice', 'glasses', 'policewomen']
    """
    *before, last = noun.split(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith("man") and last != "human":
        last = last[:-2] + "en"
    elif last in SAME_IN_PLURAL or (last.endswith("s") and not last.endswith("ss")):
        pass
    elif last.endswith(("ss", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase.

    Example:
        >>> [with_article(phrase) for phrase in ("dog", "old dog", "unicorn", "umbrella", "hour")]
        ['a dog', 'an old dog', 'a unicorn', 'an umbrella', 'an hour']
    """
    like_vowel = phrase.startswith(LIKE_VOWELS) or (
        phrase[0] in "aeiou" and not phrase.startswith(UNLIKE_VOWELS)
    )
    return f"{'an' if like_vowel else 'a'} {phrase}"


class _Writer:
    """Writes one caption from random numbers of its own."""

    def __init__(self, rng):
        self.rng = rng
        self.kinds = (
            (self.snapshot, 24), (self.scene, 14), (self.activity, 12), (self.creature, 8), (self.food, 7), (self.landscape, 7),
            (self.art, 9), (self.everyday, 14), (self.written, 3), (self.interior, 4), (self.outfit, 3),
        )  # fmt: skip

    def caption(self):
        kinds, weights = zip(*self.kinds, strict=True)
        (kind,) = self.rng.choices(kinds, weights)
        caption = kind()
        if self.chance(0.12):
            caption = caption[0].upper() + caption[1:] + self.pick_of((".", ".", "!", "", " ..."))
        return caption

    def chance(self, probability):
        return self.rng.random() < probability

    def pick(self, *names):
        return self.rng.choice(_words(self.rng.choice(names)))

    def pick_of(self, options):
        return self.rng.choice(options)

    def thing(self):
        return self.pick(*KINDS_OF_THINGS)

    def attributes(self, kind="THINGS"):
        """None to three of quality, colour and material, in this order, for a noun of a kind."""
        qualities = QUALITIES_OF.get(kind, ("ADJECTIVES",))
        parts = [(0.4, self.pick_of(qualities)), (0.1 if kind == "FOODS" else 0.3, "COLOURS")]
        parts += [(0.15, "MATERIALS")] if kind not in QUALITIES_OF else []
        return [self.pick(name) for probability, name in parts if self.chance(probability)]

    def noun_phrase(self, kind=None):
        """A noun with attributes and an article or a number."""
        kind = kind or self.pick_of(KINDS_OF_THINGS)
        noun, attributes = self.pick(kind), self.attributes(kind)
        if self.chance(0.12):
            return " ".join([self.pick("NUMBERS"), *attributes, plural(noun)])
        phrase = " ".join([*attributes, noun])
        start = self.rng.random()
        if noun.endswith("s") and not noun.endswith("ss"):
            return f"the {phrase}" if start < 0.3 else phrase
        if start < 0.72:
            return with_article(phrase)
        return (
            self.pick_of(("the", "the", "my", "your", "this", "one", "another", "his", "her", "our", "their"))
            + " "
            + phrase
        )

    def person(self):
        phrase = (
            f"{self.pick('PERSON_ADJECTIVES')} {self.pick('PEOPLE')}"
            if self.chance(0.45)
            else self.pick("PEOPLE")
        )
        if self.chance(0.12):
            return f"{self.pick('NUMBERS')} {plural(phrase)}"
        return with_article(phrase) if self.chance(0.85) else f"the {phrase}"

    def setting(self):
        """A place, a time, both or neither, each with a blank before it."""
        return (f" {self.pick('PLACES')}" if self.chance(0.55) else "") + (
            f" {self.pick('TIMES')}" if self.chance(0.2) else ""
        )

    def qualities(self, probability=0.25):
        count = self.rng.randint(1, 4) if self.chance(probability) else 0
        return "".join(f", {quality}" for quality in self.rng.sample(_words("QUALITIES"), count))

    def photo_of(self):
        kind = self.pick("PHOTOS")
        if self.chance(0.15):
            kind = f"{self.pick('ADJECTIVES')} {kind}"
        return self.pick_of(
            (f"{with_article(kind)} of", f"{with_article(kind)} of", f"{kind} of", f"the {kind} of")
        )

    def snapshot(self):
        subject = self.noun_phrase() if self.chance(0.85) else self.thing()
        start = f"{self.photo_of()} " if self.chance(0.6) else ""
        return f"{start}{subject}{self.setting()}{self.qualities()}"

    def scene(self):
        start = self.pick_of(("", "", "", "there is ", "this is ", f"{self.photo_of()} "))
        return f"{start}{self.noun_phrase()} {self.pick('RELATIONS')} {self.noun_phrase()}{self.setting()}"

    def activity(self):
        start = f"{self.photo_of()} " if self.chance(0.3) else ""
        second = f" with {self.pick_of((self.person(), self.noun_phrase()))}" if self.chance(0.2) else ""
        return f"{start}{self.person()} {self.pick('PERSON_VERBS')}{second}{self.setting()}{self.qualities(0.15)}"

    def creature(self):
        start = f"{self.photo_of()} " if self.chance(0.35) else ""
        return f"{start}{self.noun_phrase('ANIMALS')} {self.pick('ANIMAL_VERBS')}{self.setting()}{self.qualities(0.15)}"

    def food(self):
        food, other, dish = self.pick("FOODS"), self.pick("FOODS"), self.pick("DISHES")
        adjective = self.pick("FOOD_ADJECTIVES")
        return self.pick_of((
            f"{food} {dish} with {other}", f"{adjective} {food} on a plate", f"{food} and {other}{self.setting()}",
            f"a recipe for {food} {dish}", f"{with_article(food)} cut in half", f"a bowl of {plural(food)} and {plural(other)}",
            f"a cup of {food} and a slice of {other}", f"easy {food} {dish} in 30 minutes",
            f"{adjective} {food} {dish}, served with {other}",
            f"a glass of {other} {self.pick('PLACES')}", f"how to cook {food} with {other}", f"{food}{self.qualities(0.9)}",
        ))  # fmt: skip

    def landscape(self):
        land, building = self.pick("LANDSCAPES"), self.pick("BUILDINGS")
        one = self.pick_of((
            f"{with_article(land)} {self.pick('TIMES')}", f"the {land} and the {self.pick('LANDSCAPES')}", f"sunset over the {land}",
            f"{with_article(building)} by the {land}", f"{with_article(self.pick('ADJECTIVES') + ' ' + land)}", f"clouds above the {land}",
            f"a path through the {land}", f"{plural(self.pick('PLANTS'))} in the {land}", f"the old {building} {self.pick('PLACES')}",
            f"{with_article(self.pick('ADJECTIVES') + ' ' + building)} {self.pick('TIMES')}", f"a view of the {land} from the {building}",
            f"snow on the {land}", f"fog over the {land}", f"the moon and stars above {with_article(building)}",
        ))  # fmt: skip
        return (
            f"{self.photo_of()} {one}{self.qualities()}" if self.chance(0.4) else f"{one}{self.qualities()}"
        )

    def art(self):
        style, subject = (
            self.pick("STYLES"),
            self.pick_of((self.noun_phrase(), self.person(), f"the {self.pick('LANDSCAPES')}")),
        )
        extra = self.pick_of(
            (f" {self.pick('ANIMAL_VERBS')}", f" {self.pick('PERSON_VERBS')}", "", "", self.setting())
        )
        return self.pick_of((
            f"{with_article(style)} of {subject}{extra}", f"{style} of {subject}{extra}", f"{subject}{extra}, {style}{self.qualities()}",
            f"{with_article(self.pick('ADJECTIVES') + ' ' + style)} of {subject}", f"{subject} in the style of {with_article(style)}",
        ))  # fmt: skip

    def everyday(self):
        words = {
            "a": lambda: with_article(
                f"{self.pick('ADJECTIVES')} {self.thing()}" if self.chance(0.3) else self.thing()
            ),
            "n": self.thing,
            "ns": lambda: plural(self.thing()),
            "person": self.person,
        }
        lists = {
            "adj": "ADJECTIVES", "topic": "TOPICS", "name": "NAMES", "animal": "ANIMALS", "doing": "ACTIONS", "sport": "SPORTS",
            "nation": "NATIONS", "food": "FOODS", "body": "BODY",
        }  # fmt: skip
        return re.sub(
            r"\{(\w+)\}",
            lambda match: words[match[1]]() if match[1] in words else self.pick(lists[match[1]]),
            self.pick("EVERYDAY"),
        )

    def written(self):
        phrase, thing = self.pick("PHRASES"), self.noun_phrase()
        return self.pick_of((
            phrase, f'{thing} that says "{phrase}"', f"{thing} with the words {phrase}", f'a sign that reads "{phrase}"',
            f'"{phrase}" written on {thing}', f"{phrase} card with {thing}",
        ))  # fmt: skip

    def interior(self):
        room = self.pick_of(
            (
                "kitchen",
                "bedroom",
                "bathroom",
                "living room",
                "dining room",
                "office",
                "hallway",
                "classroom",
                "lobby",
                "attic",
            )
        )
        first, second = (f"{' '.join([*self.attributes(), self.pick('FURNITURE')])}" for _ in range(2))
        return f"{with_article(self.pick('ADJECTIVES') + ' ' + room)} with {with_article(first)} and {with_article(second)}{self.qualities()}"

    def outfit(self):
        first, second = (" ".join([*self.attributes(), self.pick("CLOTHES")]) for _ in range(2))
        return f"{self.person()} in {first} and {second}{self.setting()}{self.qualities()}"
