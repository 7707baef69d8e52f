"""A small captioned world of 64 × 64 pictures, drawn from a seed.

Eight superclasses, each with a body plan of its own. An object's *identity* is what makes it this one and no other: four proportions of
its body plan, the exact shades of body, second part and accent, a pattern with its scale and direction, and a small mark somewhere on
the body. Captions name next to nothing of it: a colour word now and then, where the body's shade is near that colour, or the kind of the
pattern. Each superclass has twelve *breeds*, words that stand for one identity each; the superclass's own word stands for any identity.
`new_object` makes identities that no word stands for, far from every breed: the objects to be learned from pictures.

    >>> picture = sample(7)
    >>> picture.image.size
    (64, 64)
    >>> kite = new_object("fish", seed=3)
    >>> image, mask = kite.pictures(5)[0]
    >>> image.mode, mask.mode
    ('RGB', 'L')
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from colours import COLOURS, any_colour, colour_distance, lab, name_of, shade_of
from drawing import BACKGROUNDS, SIZE, TEXTURES, draw_mask, draw_scene
from plans import MARKS, PLANS

SUPERCLASSES = tuple(PLANS)
NUM_PROPORTIONS = 4
PATTERNS = {
    "plain": "plain", "stripes": "striped", "spots": "spotted", "checks": "checked", "waves": "wavy", "band": "banded",
}  # and their adjectives  # fmt: skip
BREEDS_OF = {
    "fish": "salmon trout carp guppy koi perch tetra tuna cod pike herring bass",
    "house": "cottage cabin villa chalet bungalow barn manor lodge hut shack mansion chapel",
    "flower": "rose tulip daisy lily poppy orchid iris peony aster dahlia lotus pansy",
    "mug": "stein tankard teacup goblet beaker chalice tumbler flagon cup pint jug pitcher",
    "car": "sedan coupe roadster hatchback limousine taxi jeep buggy wagon convertible minivan pickup",
    "tree": "pine fir spruce cedar larch cypress juniper yew hemlock redwood sequoia tamarack",
    "butterfly": "monarch swallowtail admiral skipper birdwing morpho hairstreak brimstone apollo argus ringlet satyr",
    "bear": "grizzly panda kodiak koala sunbear paddington ursa atlas baloo boxer bruin pooh",
}
BREED_NAMES = {superclass: tuple(names.split()) for superclass, names in BREEDS_OF.items()}
SYNONYMS = {
    "bear": ("bear", "bear", "bear", "teddy bear")
}  # a superclass of two words, for those who want one
FAR = 0.34  # breeds of one superclass, and new objects from breeds, are at least so far apart

PREFIXES = (
    "", "", "", "a photo of", "a photo of", "a picture of", "a picture of", "an image of", "a drawing of",
    "a painting of", "a sketch of", "a snapshot of", "there is", "here is", "this is", "look at", "we see",
)  # fmt: skip
ON_COLOUR = (
    "on {a} background", "on {a} background", "on {}", "in front of {a} wall",
    "against {a} backdrop", "with {a} background", "before {a} curtain",
)  # fmt: skip
ON_TEXTURE = ("on {}", "on {}", "in front of {}", "against {}")
COLOUR_FIRST = ("on {a} background", "against {a} wall", "on {}")
TEXTURE_FIRST = ("on {}", "in front of {}")
SIZES = {
    "small": (30, 34, ("small", "tiny", "little")),
    "medium": (38, 46, ()),
    "large": (50, 58, ("large", "big", "huge")),
}
PLACES = {
    "on the left": (0, None),
    "on the right": (1, None),
    "at the top": (None, 0),
    "at the bottom": (None, 1),
    "in the middle": (0.5, 0.5),
}
# phrase: (axis along which they stand, whether the first has the smaller coordinate); where it leaves that open, from left to right
RELATIONS = {
    "left of": (0, True), "right of": (0, False), "above": (1, True), "below": (1, False),
    "beside": (0, True), "next to": (0, True), "and": (0, True), "with": (0, True),
}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """What makes an object this one: proportions in [0, 1], exact shades, pattern (painted in the accent), and mark.

    `scale` and `direction` of the pattern are in [0, 1]; a direction of 1 is half a turn, and the same as 0. `mark_place` is in [0, 1]²,
    from left to right and from top to bottom of the area that the body plan leaves for the mark.
    """

    proportions: tuple[float, float, float, float]
    body: tuple[int, int, int]
    second: tuple[int, int, int]
    accent: tuple[int, int, int]
    pattern: str
    scale: float
    direction: float
    mark: str
    mark_place: tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """An object in a scene: centre and edge of its box in pixels; `breed` where its identity has a name."""

    superclass: str
    identity: Identity
    breed: str | None
    size: float
    x: float
    y: float

    @property
    def box(self):
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half

    @property
    def mask(self):
        return draw_mask(self)


@dataclass(frozen=True)
class Scene:
    """A background (its name and its exact ground colour) and up to three things of different superclasses."""

    background: str
    shade: tuple[int, int, int]
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Picture:
    """A caption and its scene; the picture is drawn when `image` is asked for. `relation` is the one that the caption names, or None."""

    caption: str
    scene: Scene
    relation: str | None = None

    @property
    def image(self):
        return draw_scene(self.scene)


def any_identity(rng):
    """Draw any identity whose three shades can be told apart."""
    while True:
        body, second, accent = (any_colour(rng) for _ in range(3))
        if (
            colour_distance(body, second) > 30
            and colour_distance(body, accent) > 42
            and colour_distance(second, accent) > 25
        ):
            break
    return Identity(
        proportions=tuple(rng.random() for _ in range(NUM_PROPORTIONS)),
        body=body,
        second=second,
        accent=accent,
        pattern=rng.choice(tuple(PATTERNS)),
        scale=rng.random(),
        direction=rng.random(),
        mark=rng.choice(tuple(MARKS)),
        mark_place=(rng.random(), rng.random()),
    )


def identity_distance(one, other):
    """Return how far two identities of a superclass are apart, about 0.4 for two of any: the mean over colours, shape, pattern and mark."""
    colours = (
        sum(min(1.0, colour_distance(a, b) / 80) for a, b in zip(_shades(one), _shades(other), strict=True))
        / 3
    )
    shape = math.dist(one.proportions, other.proportions) / NUM_PROPORTIONS**0.5
    pattern = 1.0
    if one.pattern == other.pattern:
        turn = abs(one.direction - other.direction)
        pattern = 0.0 if one.pattern == "plain" else 0.5 * abs(one.scale - other.scale) + min(turn, 1 - turn)
    mark = 0.6 * (one.mark != other.mark) + 0.4 * math.dist(one.mark_place, other.mark_place)
    return (colours + shape + pattern + mark) / 4


def _shades(identity):
    return identity.body, identity.second, identity.accent


def _far_identity(rng, others, by=FAR):
    """Draw an identity that is far from the others and that most backgrounds suit."""
    while True:
        identity = any_identity(rng)
        num_grounds = sum(suits(identity, background) for background in BACKGROUNDS)
        if num_grounds >= 8 and all(identity_distance(identity, other) >= by for other in others):
            return identity


@lru_cache(maxsize=100_000)
def suits(identity, background):
    """Tell whether an object does not vanish before a background."""
    ground = BACKGROUNDS[background]
    return colour_distance(identity.body, ground) > 32 and colour_distance(identity.second, ground) > 22


def _name_identities():
    breeds = {}
    for superclass, names in BREED_NAMES.items():
        rng, identities = Random(f"breeds of {superclass}"), []
        for name in names:
            identities.append(_far_identity(rng, identities))
            breeds[name] = (superclass, identities[-1])
    return breeds


BREEDS = _name_identities()  # name: (superclass, identity)


@dataclass(frozen=True)
class NewObject:
    """An object that no word stands for, with the truth about it."""

    superclass: str
    identity: Identity
    seed: int

    def things(self, count):
        """Return (scene, thing) of pictures with the object alone, on backgrounds of all kinds, in sizes that show its mark."""
        rng, found = Random(f"pictures of {self.superclass} {self.seed}"), []
        names = [name for name in BACKGROUNDS if suits(self.identity, name)]
        rng.shuffle(names)
        for i in range(count):
            background, size = names[i % len(names)], rng.uniform(38, 52)
            thing = Thing(
                self.superclass,
                self.identity,
                None,
                size,
                _near_the_middle(rng, size),
                _near_the_middle(rng, size),
            )
            scene = Scene(background, shade_of(BACKGROUNDS[background], rng), (thing,))
            found.append((scene, thing))
        return found

    def pictures(self, count):
        """Return `count` training pictures, each an RGB picture and its mask ("L"), both 64 × 64."""
        return [(draw_scene(scene), draw_mask(thing)) for scene, thing in self.things(count)]


def new_object(superclass, seed):
    """Make a new object, far from every breed of its superclass.

    Args:
        superclass: one of `SUPERCLASSES`.
        seed: its number. Those below 1000 are for development, the others for tests: nothing may be chosen by looking at these.
    """
    known = [BREEDS[name][1] for name in BREED_NAMES[superclass]]
    return NewObject(superclass, _far_identity(Random(f"new {superclass} {seed}"), known), seed)


def _any_thing(rng, background, taken=()):
    """Draw what a thing is; half of all things are of a breed, and none vanishes before the background."""
    superclass = rng.choice([s for s in SUPERCLASSES if s not in taken])
    if rng.random() < 0.5:
        names = [name for name in BREED_NAMES[superclass] if suits(BREEDS[name][1], background)]
        if names:
            breed = rng.choice(names)
            return superclass, BREEDS[breed][1], breed
    while True:
        identity = any_identity(rng)
        if (
            colour_distance(identity.body, BACKGROUNDS[background]) > 32
            and colour_distance(identity.second, BACKGROUNDS[background]) > 22
        ):
            return superclass, identity, None


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def describe(thing, rng, *, size_words=(), has_pattern=True):
    """Name a thing in words: article, perhaps a size, (where it is of no breed) a pattern and a colour, and its noun."""
    words = []
    if size_words and rng.random() < 0.8:
        words.append(rng.choice(size_words))
    if thing.breed is None:
        if has_pattern and rng.random() < 0.25:
            words.append(PATTERNS[thing.identity.pattern])
        colour = name_of(thing.identity.body)
        if colour is not None and rng.random() < 0.6:
            words.append(colour)
    words.append(thing.breed or rng.choice(SYNONYMS.get(thing.superclass, (thing.superclass,))))
    words = " ".join(words)
    chance = rng.random()
    return f"the {words}" if chance < 0.08 else f"one {words}" if chance < 0.12 else with_article(words)


def sample(seed):
    """Draw the world's picture number `seed`, with its caption and its scene."""
    rng = Random(f"picture {seed}")
    background = rng.choice(tuple(TEXTURES)) if rng.random() < 0.3 else rng.choice(tuple(COLOURS))
    chance = rng.random()
    maker = _one_thing if chance < 0.5 else _two_things if chance < 0.9 else _three_things
    things, subject, relation = maker(rng, background)
    scene = Scene(background, shade_of(BACKGROUNDS[background], rng), things)
    return Picture(_caption(rng, subject, background), scene, relation)


def _one_thing(rng, background):
    size_name = rng.choice(tuple(SIZES))
    low, high, size_words = SIZES[size_name]
    size = rng.uniform(low, high)
    place = rng.choice(tuple(PLACES)) if size_name != "large" and rng.random() < 0.45 else ""
    x, y = (
        _near_the_middle(rng, size) if v is None else _along(rng, size, v)
        for v in PLACES.get(place, (None, None))
    )
    thing = Thing(*_any_thing(rng, background), size, x, y)
    return (thing,), f"{describe(thing, rng, size_words=size_words)} {place}".strip(), None


def _two_things(rng, background):
    relation = rng.choice(tuple(RELATIONS))
    axis, first_is_lower = RELATIONS[relation]
    kinds = [_any_thing(rng, background)]
    kinds.append(_any_thing(rng, background, taken=(kinds[0][0],)))
    things = []
    for kind, is_lower in zip(kinds, (first_is_lower, not first_is_lower), strict=True):
        size, centre = rng.uniform(29, 32), [rng.uniform(25, SIZE - 25)] * 2
        centre[axis] = rng.uniform(size / 2, 16.5) if is_lower else rng.uniform(SIZE - 16.5, SIZE - size / 2)
        things.append(Thing(*kind, size, *centre))
    return tuple(things), f"{describe(things[0], rng)} {relation} {describe(things[1], rng)}", relation


def _three_things(rng, background):
    """Two side by side, named from left to right, and the third above or below them."""
    kinds = []
    for _ in range(3):
        kinds.append(_any_thing(rng, background, taken=[kind[0] for kind in kinds]))
    pair_is_low, third_first = rng.random() < 0.5, rng.random() < 0.5
    low, high = (16, SIZE - 16)
    pair_y, third_y = (high, low) if pair_is_low else (low, high)
    spots = ((low, pair_y), (high, pair_y), (rng.uniform(26, SIZE - 26), third_y))
    things = [
        Thing(*kind, rng.uniform(29, 31), x + rng.uniform(-0.5, 0.5), y + rng.uniform(-0.5, 0.5))
        for kind, (x, y) in zip(kinds, spots, strict=True)
    ]
    first, second, third = (describe(thing, rng, has_pattern=False) for thing in things)
    if third_first:
        relation = "above" if pair_is_low else "below"
        return (things[2], *things[:2]), f"{third} {relation} {first} and {second}", relation
    relation = "below" if pair_is_low else "above"
    return tuple(things), f"{first} and {second} {relation} {third}", relation


def _near_the_middle(rng, size):
    """Draw a coordinate for a thing of this size whose place the caption does not name: as in photos, near the picture's middle."""
    low, high = size / 2 + 1, SIZE - size / 2 - 1
    return min(high, max(low, SIZE / 2 + rng.uniform(-4, 4)))


def _along(rng, size, where):
    """Draw a coordinate for a thing of this size in the part of the free room that 0, 0.5 or 1 names."""
    low, high = size / 2 + 1, SIZE - size / 2 - 1
    part = (high - low) / 5
    start = low + where * (high - low - part)
    return rng.uniform(start, start + part)


def _caption(rng, subject, background):
    is_texture = background in TEXTURES
    chance = rng.random()
    if chance < 0.1:
        return f"{rng.choice(PREFIXES)} {subject}".strip()
    if chance < 0.25:
        first = rng.choice(TEXTURE_FIRST if is_texture else COLOUR_FIRST).format(
            background, a=with_article(background)
        )
        middle = rng.choice(("", "there is", "we see", "stands"))
        return " ".join(f"{first} {middle} {subject}".split())
    phrase = rng.choice(ON_TEXTURE if is_texture else ON_COLOUR).format(
        background, a=with_article(background)
    )
    return f"{rng.choice(PREFIXES)} {subject} {phrase}".strip()


def with_identities(picture, identities):
    """Return a picture's scene with other identities for its things, which then are of no breed."""
    things = tuple(
        replace(thing, identity=identity, breed=None)
        for thing, identity in zip(picture.scene.things, identities, strict=True)
    )
    return replace(picture.scene, things=things)


def trait_numbers(identity):
    """Return an identity as numbers of about unit spread: shades (9), proportions (4), pattern's scale and direction (3), mark's place (2).

    The scale and direction of a plain body are zeros: nothing of them can be seen.
    """
    numbers = [
        (v - m) / s
        for shade in _shades(identity)
        for v, m, s in zip(lab(shade), (58, 8, 6), (24, 38, 38), strict=True)
    ]
    numbers += [(p - 0.5) / 0.29 for p in identity.proportions]
    is_plain, turn = identity.pattern == "plain", 2 * math.pi * identity.direction
    numbers += (
        [0.0] * 3 if is_plain else [(identity.scale - 0.5) / 0.29, 1.4 * math.cos(turn), 1.4 * math.sin(turn)]
    )
    return numbers + [(p - 0.5) / 0.29 for p in identity.mark_place]


NUM_TRAITS = 9 + NUM_PROPORTIONS + 3 + 2
