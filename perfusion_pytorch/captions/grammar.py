"""A small grammar that writes captions out of lists of words.

Every random number is drawn in a fixed order: another order, or one list changed, gives other captions.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from random import Random

from perfusion_pytorch.captions import words as word_lists

PLURALS = {
    "mouse": "mice", "goose": "geese", "wolf": "wolves", "calf": "calves", "child": "children",
    "leaf": "leaves", "shelf": "shelves", "knife": "knives", "hero": "heroes", "elf": "elves",
    "potato": "potatoes", "tomato": "tomatoes", "fish": "fish", "loaf": "loaves", "scarf": "scarves",
    "foot": "feet", "tooth": "teeth", "ox": "oxen",
}  # fmt: skip
# Beside words in s.
SAME_IN_PLURAL = ("sheep", "deer", "moose", "bison", "salmon", "police", "people", "spacecraft")
KINDS_OF_THINGS = (
    "THINGS", "THINGS", "THINGS", "ANIMALS", "VEHICLES", "FURNITURE", "CLOTHES", "FOODS", "PLANTS",
    "BUILDINGS", "MORE", "MORE",
)  # fmt: skip
QUALITIES_OF = {
    "ANIMALS": ("ADJECTIVES", "ANIMATE_ADJECTIVES", "ANIMATE_ADJECTIVES"),
    "FOODS": ("FOOD_ADJECTIVES",),
    "PLANTS": ("ADJECTIVES",),
    "LANDSCAPES": ("ADJECTIVES",),
}
DETERMINERS = ("the", "the", "my", "your", "this", "one", "another", "his", "her", "our", "their")
ROOMS = (
    "kitchen", "bedroom", "bathroom", "living room", "dining room", "office", "hallway",
    "classroom", "lobby", "attic",
)  # fmt: skip
# Beginnings of words that take "an" before a consonant, and of those that take "a" before a vowel.
LIKE_VOWELS = ("hour", "honest", "x-ray", "f/")
UNLIKE_VOWELS = ("uni", "use", "euro", "one", "ukulele")
# What {adj} and the like in EVERYDAY stand for.
LISTS_IN_EVERYDAY = {
    "adj": "ADJECTIVES", "topic": "TOPICS", "name": "NAMES", "animal": "ANIMALS", "doing": "ACTIONS",
    "sport": "SPORTS", "nation": "NATIONS", "food": "FOODS", "body": "BODY",
}  # fmt: skip


@cache
def word_list(name: str) -> tuple[str, ...]:
    """Return a list of words; entries of several words are divided by bars, or tied by underscores."""
    text: str = getattr(word_lists, name)
    parts = text.replace("\n", " ").split("|") if "|" in text else text.split()
    return tuple(" ".join(part.replace("_", " ").split()) for part in parts)


def plural(noun: str) -> str:
    """Return the plural of a noun, as far as a few rules know it.

    Example:
        >>> [plural(noun) for noun in ("dog", "box", "puppy", "toy", "mouse", "glasses", "policewoman")]
        ['dogs', 'boxes', 'puppies', 'toys', 'mice', 'glasses', 'policewomen']
    """
    *before, last = noun.split(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith("man") and last != "human":
        last = last[:-2] + "en"
    elif last in SAME_IN_PLURAL or _ends_in_single_s(last):
        pass
    elif last.endswith(("ss", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


def _ends_in_single_s(noun: str) -> bool:
    return noun.endswith("s") and not noun.endswith("ss")


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase.

    Example:
        >>> [with_article(phrase) for phrase in ("dog", "old dog", "unicorn", "umbrella", "hour")]
        ['a dog', 'an old dog', 'a unicorn', 'an umbrella', 'an hour']
    """
    is_vowel = phrase[0] in "aeiou" and not phrase.startswith(UNLIKE_VOWELS)
    return f"{'an' if is_vowel or phrase.startswith(LIKE_VOWELS) else 'a'} {phrase}"


class Writer:
    """Writes one caption from random numbers of its own."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        # Each kind of caption, and how often it comes of 105 times.
        self.kinds: dict[Callable[[], str], int] = {
            self.snapshot: 24, self.scene: 14, self.activity: 12, self.creature: 8, self.food: 7,
            self.landscape: 7, self.art: 9, self.everyday: 14, self.written: 3, self.interior: 4,
            self.outfit: 3,
        }  # fmt: skip

    def caption(self) -> str:
        (kind,) = self.rng.choices(list(self.kinds), list(self.kinds.values()))
        caption = kind()
        if self.chance(0.12):
            caption = caption[0].upper() + caption[1:] + self.pick_of((".", ".", "!", "", " ..."))
        return caption

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, *names: str) -> str:
        """Pick a word of one of the lists of these names."""
        return self.rng.choice(word_list(self.rng.choice(names)))

    def pick_of(self, options: Sequence[str]) -> str:
        return self.rng.choice(options)

    def thing(self) -> str:
        return self.pick(*KINDS_OF_THINGS)

    def attributes(self, kind: str = "THINGS") -> list[str]:
        """None to three of quality, colour and material, in this order, for a noun of a kind."""
        qualities = QUALITIES_OF.get(kind, ("ADJECTIVES",))
        parts = [(0.4, self.pick_of(qualities)), (0.1 if kind == "FOODS" else 0.3, "COLOURS")]
        parts += [(0.15, "MATERIALS")] if kind not in QUALITIES_OF else []
        return [self.pick(name) for probability, name in parts if self.chance(probability)]

    def noun_phrase(self, kind: str | None = None) -> str:
        """A noun with attributes and an article or a number."""
        kind = kind or self.pick_of(KINDS_OF_THINGS)
        noun = self.pick(kind)
        attributes = self.attributes(kind)
        if self.chance(0.12):
            return " ".join([self.pick("NUMBERS"), *attributes, plural(noun)])
        phrase = " ".join([*attributes, noun])
        start = self.rng.random()
        if _ends_in_single_s(noun):
            return f"the {phrase}" if start < 0.3 else phrase
        if start < 0.72:
            return with_article(phrase)
        return f"{self.pick_of(DETERMINERS)} {phrase}"

    def person(self) -> str:
        phrase = f"{self.pick('PERSON_ADJECTIVES')} " if self.chance(0.45) else ""
        phrase += self.pick("PEOPLE")
        if self.chance(0.12):
            return f"{self.pick('NUMBERS')} {plural(phrase)}"
        return with_article(phrase) if self.chance(0.85) else f"the {phrase}"

    def setting(self) -> str:
        """A place, a time, both or neither, each with a blank before it."""
        place = f" {self.pick('PLACES')}" if self.chance(0.55) else ""
        time = f" {self.pick('TIMES')}" if self.chance(0.2) else ""
        return place + time

    def qualities(self, probability: float = 0.25) -> str:
        """None to four qualities of a picture, each after a comma."""
        count = self.rng.randint(1, 4) if self.chance(probability) else 0
        return "".join(f", {quality}" for quality in self.rng.sample(word_list("QUALITIES"), count))

    def photo_of(self) -> str:
        kind = self.pick("PHOTOS")
        if self.chance(0.15):
            kind = f"{self.pick('ADJECTIVES')} {kind}"
        named = f"{with_article(kind)} of"
        return self.pick_of((named, named, f"{kind} of", f"the {kind} of"))

    def photo_start(self, probability: float) -> str:
        """The beginning of a caption that says that it is of a photograph, or nothing."""
        return f"{self.photo_of()} " if self.chance(probability) else ""

    def snapshot(self) -> str:
        subject = self.noun_phrase() if self.chance(0.85) else self.thing()
        return f"{self.photo_start(0.6)}{subject}{self.setting()}{self.qualities()}"

    def scene(self) -> str:
        start = self.pick_of(("", "", "", "there is ", "this is ", f"{self.photo_of()} "))
        return f"{start}{self.noun_phrase()} {self.pick('RELATIONS')} {self.noun_phrase()}{self.setting()}"

    def activity(self) -> str:
        start = self.photo_start(0.3)
        second = f" with {self.pick_of((self.person(), self.noun_phrase()))}" if self.chance(0.2) else ""
        doing = f"{self.person()} {self.pick('PERSON_VERBS')}"
        return f"{start}{doing}{second}{self.setting()}{self.qualities(0.15)}"

    def creature(self) -> str:
        start = self.photo_start(0.35)
        doing = f"{self.noun_phrase('ANIMALS')} {self.pick('ANIMAL_VERBS')}"
        return f"{start}{doing}{self.setting()}{self.qualities(0.15)}"

    def food(self) -> str:
        food = self.pick("FOODS")
        other = self.pick("FOODS")
        dish = self.pick("DISHES")
        adjective = self.pick("FOOD_ADJECTIVES")
        return self.pick_of((
            f"{food} {dish} with {other}",
            f"{adjective} {food} on a plate",
            f"{food} and {other}{self.setting()}",
            f"a recipe for {food} {dish}",
            f"{with_article(food)} cut in half",
            f"a bowl of {plural(food)} and {plural(other)}",
            f"a cup of {food} and a slice of {other}",
            f"easy {food} {dish} in 30 minutes",
            f"{adjective} {food} {dish}, served with {other}",
            f"a glass of {other} {self.pick('PLACES')}",
            f"how to cook {food} with {other}",
            f"{food}{self.qualities(0.9)}",
        ))  # fmt: skip

    def landscape(self) -> str:
        land = self.pick("LANDSCAPES")
        building = self.pick("BUILDINGS")
        one = self.pick_of((
            f"{with_article(land)} {self.pick('TIMES')}",
            f"the {land} and the {self.pick('LANDSCAPES')}",
            f"sunset over the {land}",
            f"{with_article(building)} by the {land}",
            with_article(f"{self.pick('ADJECTIVES')} {land}"),
            f"clouds above the {land}",
            f"a path through the {land}",
            f"{plural(self.pick('PLANTS'))} in the {land}",
            f"the old {building} {self.pick('PLACES')}",
            with_article(f"{self.pick('ADJECTIVES')} {building} {self.pick('TIMES')}"),
            f"a view of the {land} from the {building}",
            f"snow on the {land}",
            f"fog over the {land}",
            f"the moon and stars above {with_article(building)}",
        ))  # fmt: skip
        return f"{self.photo_start(0.4)}{one}{self.qualities()}"

    def art(self) -> str:
        style = self.pick("STYLES")
        subject = self.pick_of((self.noun_phrase(), self.person(), f"the {self.pick('LANDSCAPES')}"))
        doing = (f" {self.pick('ANIMAL_VERBS')}", f" {self.pick('PERSON_VERBS')}")
        extra = self.pick_of((*doing, "", "", self.setting()))
        return self.pick_of((
            f"{with_article(style)} of {subject}{extra}",
            f"{style} of {subject}{extra}",
            f"{subject}{extra}, {style}{self.qualities()}",
            with_article(f"{self.pick('ADJECTIVES')} {style} of {subject}"),
            f"{subject} in the style of {with_article(style)}",
        ))  # fmt: skip

    def everyday(self) -> str:
        """A phrase of EVERYDAY, filled in."""
        return re.sub(r"\{(\w+)\}", lambda match: self.filled_in(match[1]), self.pick("EVERYDAY"))

    def filled_in(self, placeholder: str) -> str:
        if placeholder == "a":
            return with_article(self.described_thing() if self.chance(0.3) else self.thing())
        if placeholder == "n":
            return self.thing()
        if placeholder == "ns":
            return plural(self.thing())
        if placeholder == "person":
            return self.person()
        return self.pick(LISTS_IN_EVERYDAY[placeholder])

    def described_thing(self) -> str:
        return f"{self.pick('ADJECTIVES')} {self.thing()}"

    def written(self) -> str:
        phrase = self.pick("PHRASES")
        thing = self.noun_phrase()
        return self.pick_of((
            phrase,
            f'{thing} that says "{phrase}"',
            f"{thing} with the words {phrase}",
            f'a sign that reads "{phrase}"',
            f'"{phrase}" written on {thing}',
            f"{phrase} card with {thing}",
        ))  # fmt: skip

    def interior(self) -> str:
        room = self.pick_of(ROOMS)
        first = " ".join([*self.attributes(), self.pick("FURNITURE")])
        second = " ".join([*self.attributes(), self.pick("FURNITURE")])
        place = with_article(f"{self.pick('ADJECTIVES')} {room}")
        return f"{place} with {with_article(first)} and {with_article(second)}{self.qualities()}"

    def outfit(self) -> str:
        first = " ".join([*self.attributes(), self.pick("CLOTHES")])
        second = " ".join([*self.attributes(), self.pick("CLOTHES")])
        return f"{self.person()} in {first} and {second}{self.setting()}{self.qualities()}"
