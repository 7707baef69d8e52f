"""A small captioned world of 64 × 64 pictures, drawn from a seed.

Eight superclasses have a body plan each. An object's *look* is its palette (body, second part, accent) and a
pattern. Every superclass has 24 *breeds*, words that stand for one look each; the superclass's own word
stands for any look. Two looks of every superclass are held out: no breed has them, and no picture of the
world shows them. They are the new objects to learn.

With eight breeds per superclass, a model learns each of them by heart, and no value output can then make a
look that the model has never seen. Two dozen breeds, and words for colours and patterns, make it learn the
parts.

    >>> picture = sample(7)
    >>> picture.caption
    'on blue we see a pink fish right of a magnolia'
    >>> picture.image.size
    (64, 64)
"""

from dataclasses import astuple, dataclass
from random import Random

from PIL import Image, ImageChops, ImageDraw

SIZE = 64  # pixels, width and height of a picture
SUPERSAMPLING = 4  # pictures are drawn this much larger and averaged down

COLOURS = {
    "red": (214, 38, 42),
    "orange": (246, 138, 28),
    "yellow": (247, 222, 58),
    "green": (46, 156, 66),
    "teal": (38, 178, 178),
    "blue": (44, 78, 214),
    "purple": (128, 52, 176),
    "pink": (247, 150, 196),
    "brown": (122, 78, 42),
    "gray": (136, 136, 136),
    "black": (24, 24, 24),
    "white": (246, 246, 246),
}
BACKGROUNDS = tuple(COLOURS)
# What objects are painted with: no two are near each other.
PAINTS = ("red", "yellow", "green", "blue", "pink", "black", "white")
# Patterns and their adjectives.
PATTERNS = {"plain": "plain", "stripes": "striped", "spots": "spotted", "band": "banded"}
INK = (20, 20, 20)

# Body plans in the unit square, y down, drawn in this order: (shape, part, coordinates).
# The pattern covers the parts called "body".
PLANS = {
    "fish": (
        ("polygon", "second", (0.66, 0.50, 1.00, 0.16, 1.00, 0.84)),
        ("polygon", "second", (0.22, 0.34, 0.36, 0.04, 0.66, 0.30)),
        ("ellipse", "body", (0.00, 0.22, 0.78, 0.78)),
        ("polygon", "accent", (0.36, 0.66, 0.58, 0.66, 0.62, 0.98)),
        ("ellipse", "eye", (0.12, 0.38, 0.22, 0.48)),
    ),
    "house": (
        ("rectangle", "body", (0.10, 0.42, 0.90, 1.00)),
        ("polygon", "second", (0.00, 0.46, 0.50, 0.00, 1.00, 0.46)),
        ("rectangle", "accent", (0.40, 0.66, 0.60, 1.00)),
    ),
    "flower": (
        ("rectangle", "accent", (0.46, 0.55, 0.54, 1.00)),
        ("ellipse", "accent", (0.52, 0.74, 0.84, 0.90)),
        ("ellipse", "body", (0.34, 0.00, 0.66, 0.32)),
        ("ellipse", "body", (0.34, 0.40, 0.66, 0.72)),
        ("ellipse", "body", (0.14, 0.10, 0.46, 0.42)),
        ("ellipse", "body", (0.54, 0.10, 0.86, 0.42)),
        ("ellipse", "body", (0.14, 0.30, 0.46, 0.62)),
        ("ellipse", "body", (0.54, 0.30, 0.86, 0.62)),
        ("ellipse", "second", (0.35, 0.21, 0.65, 0.51)),
    ),
    "mug": (
        ("ring", "second", (0.52, 0.34, 1.00, 0.82)),
        ("rectangle", "body", (0.06, 0.16, 0.72, 0.98)),
        ("ellipse", "second", (0.06, 0.04, 0.72, 0.28)),
        ("ellipse", "accent", (0.16, 0.10, 0.62, 0.23)),
    ),
    "car": (
        ("polygon", "second", (0.16, 0.48, 0.32, 0.14, 0.70, 0.14, 0.86, 0.48)),
        ("rectangle", "body", (0.00, 0.42, 1.00, 0.76)),
        ("ellipse", "accent", (0.10, 0.60, 0.38, 0.88)),
        ("ellipse", "accent", (0.62, 0.60, 0.90, 0.88)),
    ),
    "tree": (
        ("rectangle", "second", (0.40, 0.58, 0.60, 0.92)),
        ("polygon", "accent", (0.22, 0.82, 0.78, 0.82, 0.68, 1.00, 0.32, 1.00)),
        ("ellipse", "body", (0.08, 0.00, 0.92, 0.68)),
    ),
    "butterfly": (
        ("ellipse", "second", (0.10, 0.50, 0.50, 0.96)),
        ("ellipse", "second", (0.50, 0.50, 0.90, 0.96)),
        ("ellipse", "body", (0.00, 0.06, 0.52, 0.60)),
        ("ellipse", "body", (0.48, 0.06, 1.00, 0.60)),
        ("ellipse", "accent", (0.43, 0.10, 0.57, 0.90)),
    ),
    "bear": (
        ("ellipse", "second", (0.16, 0.00, 0.40, 0.24)),
        ("ellipse", "second", (0.60, 0.00, 0.84, 0.24)),
        ("ellipse", "accent", (0.14, 0.80, 0.46, 1.00)),
        ("ellipse", "accent", (0.54, 0.80, 0.86, 1.00)),
        ("ellipse", "body", (0.16, 0.42, 0.84, 0.96)),
        ("ellipse", "body", (0.22, 0.06, 0.78, 0.52)),
        ("ellipse", "second", (0.37, 0.29, 0.63, 0.48)),
        ("ellipse", "eye", (0.34, 0.18, 0.42, 0.26)),
        ("ellipse", "eye", (0.58, 0.18, 0.66, 0.26)),
    ),
}
SUPERCLASSES = tuple(PLANS)

BREEDS_OF = {
    "fish": "salmon trout carp guppy koi perch marlin tetra barbel bass bream cod "
    "dace eel gar grouper haddock herring mullet pike roach tench tuna wrasse",
    "house": "cottage cabin villa chalet bungalow barn manor igloo lodge hut shack mansion "
    "palace castle chapel tower farmhouse townhouse gatehouse hacienda pagoda yurt kiosk pavilion",
    "flower": "rose tulip daisy lily poppy orchid iris peony aster begonia camellia carnation "
    "crocus dahlia freesia gardenia geranium hibiscus jasmine lotus magnolia marigold pansy zinnia",
    "mug": "stein tankard teacup goblet beaker chalice tumbler flagon cup pint jug schooner "
    "ewer pitcher demitasse noggin jar krug canteen carafe pot urn quaich bowl",
    "car": "sedan coupe roadster hatchback limousine taxi jeep buggy wagon convertible minivan pickup "
    "van racer cabriolet crossover dragster landau lorry phaeton runabout saloon spyder truck",
    "tree": "oak pine maple willow birch cedar elm aspen alder ash beech chestnut "
    "cypress fir hazel hickory juniper larch linden poplar rowan spruce sycamore yew",
    "butterfly": "monarch swallowtail admiral skipper birdwing morpho hairstreak brimstone apollo argus "
    "azure buckeye cardinal comma copper emperor fritillary grayling heath peacock ringlet satyr "
    "sulphur tortoiseshell",
    "bear": "grizzly panda kodiak kermode koala sunbear paddington ursa atlas baloo barribal bernie "
    "boxer bruin bungle cinnamon cub glacier misha olaf pooh rupert sloth yogi",
}
BREED_NAMES = {superclass: tuple(names.split()) for superclass, names in BREEDS_OF.items()}
SYNONYMS = {"bear": ("bear", "bear", "bear", "teddy bear")}  # one superclass also has a name of two words

PREFIXES = (
    "", "", "", "a photo of", "a photo of", "a picture of", "a picture of", "an image of", "a drawing of",
    "a painting of", "a sketch of", "a snapshot of", "there is", "here is", "this is", "look at", "we see",
)  # fmt: skip
BACKGROUND_PHRASES = (
    "on a {} background", "on a {} background", "on {}", "in front of a {} wall",
    "against a {} backdrop", "with a {} background", "before a {} curtain",
)  # fmt: skip
BACKGROUND_FIRST = ("on a {} background", "against a {} wall", "on {}")
SIZES = {
    "small": (24, 28, ("small", "tiny", "little")),
    "medium": (32, 38, ()),
    "large": (44, 52, ("large", "big", "huge")),
}
PLACES = {
    "on the left": (0, None),
    "on the right": (1, None),
    "at the top": (None, 0),
    "at the bottom": (None, 1),
    "in the middle": (0.5, 0.5),
}
# phrase: (axis along which the two stand, whether the first has the smaller coordinate).
# Where a phrase leaves that open, they stand from left to right.
RELATIONS = {
    "left of": (0, True), "right of": (0, False), "above": (1, True), "below": (1, False),
    "beside": (0, True), "next to": (0, True), "and": (0, True), "with": (0, True),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """The colours of an object's body, second part and accent, and the pattern on its body."""

    body: str
    second: str
    accent: str
    pattern: str


@dataclass(frozen=True)
class Thing:
    """An object in a scene: centre and edge of its box in pixels; `breed` where its look has a name."""

    superclass: str
    look: Look
    breed: str | None
    size: float
    x: float
    y: float

    @property
    def box(self):
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    """A background (name and exact shade of its colour) and one or two things of different superclasses."""

    background: str
    shade: tuple[int, int, int]
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Picture:
    """A caption and its scene; reading `image` draws the picture."""

    caption: str
    scene: Scene

    @property
    def image(self):
        return draw(self.scene)


def random_look(rng, background=None):
    """Draw a look, all equally likely, whose body and second part differ from the background."""
    while True:
        body, second, accent = rng.sample(PAINTS, 3)
        pattern = rng.choice(tuple(PATTERNS))
        if background not in (body, second):
            return Look(body, second, accent, pattern)


def _differ(look, others, parts=2):
    """Return whether a look differs from each of the others in at least so many parts."""
    return all(
        sum(mine != theirs for mine, theirs in zip(astuple(look), astuple(other), strict=True)) >= parts
        for other in others
    )


def _name_looks():
    """Give each breed its look, and hold out two (body, second) pairs of every superclass.

    All looks of a superclass differ in at least two parts.
    """
    breeds, held_out = {}, {}
    for superclass, names in BREED_NAMES.items():
        rng, looks = Random(f"looks of {superclass}"), []
        while len(looks) < len(names) + 2:
            look, is_new = random_look(rng), len(looks) >= len(names)
            pairs = {(other.body, other.second) for other in looks if is_new}
            if _differ(look, looks) and (look.body, look.second) not in pairs:
                looks.append(look)
        breeds |= {name: (superclass, look) for name, look in zip(names, looks, strict=False)}
        held_out[superclass] = tuple(looks[-2:])
    return breeds, held_out


BREEDS, HELD_OUT = _name_looks()


def is_held_out(superclass, look):
    """Return whether a look is kept out of the pictures: it has body and second colour of a held-out look."""
    return any((look.body, look.second) == (other.body, other.second) for other in HELD_OUT[superclass])


def draw_thing(thing, *, mask=False):
    """Draw a thing alone: RGBA on a transparent ground, or with `mask` its opaque area in mode "L"."""
    edge = SIZE * SUPERSAMPLING
    corner = [v * SUPERSAMPLING for v in thing.box[:2]]
    size = thing.size * SUPERSAMPLING

    def place(coordinates):
        return [corner[i % 2] + v * size for i, v in enumerate(coordinates)]

    layer = Image.new("RGBA", (edge, edge))
    pen = ImageDraw.Draw(layer)
    paint = {part: COLOURS[getattr(thing.look, part)] for part in ("body", "second", "accent")}
    paint["eye"] = COLOURS["white"] if thing.look.body == "black" else INK
    last_body = max(i for i, (_, part, _) in enumerate(PLANS[thing.superclass]) if part == "body")
    body = Image.new("L", (edge, edge))
    for i, (shape, part, coordinates) in enumerate(PLANS[thing.superclass]):
        points = place(coordinates)
        if shape == "ring":
            pen.ellipse(points, outline=paint[part], width=round(size * 0.12))
        else:
            getattr(pen, shape)(points, fill=paint[part])
        if part == "body":
            getattr(ImageDraw.Draw(body), shape)(points, fill=255)
        if i == last_body and thing.look.pattern != "plain":
            layer.paste(paint["accent"], mask=ImageChops.multiply(body, _pattern(thing.look.pattern, body)))
    if mask:
        layer = layer.getchannel("A")
    return layer.reduce(SUPERSAMPLING)


def _pattern(name, body):
    """Draw a pattern over the box of the body's mask, as a mask of the same size."""
    left, top, right, bottom = body.getbbox()
    wide, high = right - left, bottom - top
    picture = Image.new("L", body.size)
    pen = ImageDraw.Draw(picture)
    if name == "stripes":
        for i in range(3):
            start = left + (0.12 + 0.31 * i) * wide
            pen.rectangle((start, top, start + 0.14 * wide, bottom), fill=255)
    elif name == "band":
        pen.rectangle((left, top + 0.58 * high, right, top + 0.80 * high), fill=255)
    elif name == "spots":
        radius = 0.10 * (wide * high) ** 0.5
        for row, y in enumerate((0.20, 0.50, 0.80)):
            for x in (0.14, 0.50, 0.86) if row % 2 else (0.30, 0.70):
                cx, cy = left + x * wide, top + y * high
                pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
    return picture


def draw(scene):
    """Draw a scene: an RGB picture of 64 × 64."""
    image = Image.new("RGB", (SIZE, SIZE), scene.shade)
    for thing in scene.things:
        layer = draw_thing(thing)
        image.paste(layer, mask=layer.getchannel("A"))
    return image


def shade_of(colour, rng):
    """Draw a shade of a named colour: every channel moves by at most 6 of 255."""
    return tuple(min(255, max(0, v + rng.randint(-6, 6))) for v in COLOURS[colour])


def _random_thing(rng, background, taken=()):
    """Draw superclass, look and breed of a thing; three in five things are of a breed.

    Its body and second part never have the background's colour.
    """
    while True:
        superclass = rng.choice([s for s in SUPERCLASSES if s not in taken])
        if rng.random() < 0.6:
            breed = rng.choice(BREED_NAMES[superclass])
            look = BREEDS[breed][1]
        else:
            breed, look = None, random_look(rng)
        if background not in (look.body, look.second) and not is_held_out(superclass, look):
            return superclass, look, breed


def _article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def describe(thing, rng, *, size_words=(), has_pattern=False):
    """Describe a thing: article, perhaps a size, perhaps pattern and colour of a nameless look, and noun."""
    words = []
    if size_words and rng.random() < 0.75:
        words.append(rng.choice(size_words))
    if thing.breed is None and has_pattern and rng.random() < 0.3:
        words.append(PATTERNS[thing.look.pattern])
    if thing.breed is None and rng.random() < 0.5:
        words.append(thing.look.body)
    words.append(thing.breed or rng.choice(SYNONYMS.get(thing.superclass, (thing.superclass,))))
    words = " ".join(words)
    chance = rng.random()
    return f"the {words}" if chance < 0.08 else f"one {words}" if chance < 0.12 else _article(words)


def sample(seed):
    """Draw the world's picture number `seed`, with its caption and its scene."""
    rng = Random(f"picture {seed}")
    background = rng.choice(BACKGROUNDS)
    first = _random_thing(rng, background)
    if rng.random() < 0.6:
        size_name = rng.choice(tuple(SIZES))
        low, high, size_words = SIZES[size_name]
        size = rng.uniform(low, high)
        place = rng.choice(tuple(PLACES)) if size_name != "large" and rng.random() < 0.4 else ""
        spot = PLACES.get(place, (None, None))
        centre = [_near_the_middle(rng, size) if v is None else _along(rng, size, v) for v in spot]
        things = (Thing(*first, size, *centre),)
        subject = describe(things[0], rng, size_words=size_words, has_pattern=True) + (
            f" {place}" if place else ""
        )
    else:
        relation = rng.choice(tuple(RELATIONS))
        axis, first_is_lower = RELATIONS[relation]
        second = _random_thing(rng, background, taken=(first[0],))
        things = []
        for kind, is_lower in ((first, first_is_lower), (second, not first_is_lower)):
            size = rng.uniform(26, 30)
            centre = [rng.uniform(size / 2 + 2, SIZE - size / 2 - 2)] * 2
            centre[1 - axis] = rng.uniform(24, SIZE - 24)
            centre[axis] = (
                rng.uniform(size / 2 + 1, 16.5) if is_lower else rng.uniform(SIZE - 16.5, SIZE - size / 2 - 1)
            )
            things.append(Thing(*kind, size, *centre))
        things = tuple(things)
        subject = f"{describe(things[0], rng)} {relation} {describe(things[1], rng)}"
    scene = Scene(background, shade_of(background, rng), things)
    return Picture(_caption(rng, subject, background), scene)


def _near_the_middle(rng, size):
    """Draw a coordinate for a thing whose place the caption does not name: near the middle, as in photos.

    With things anywhere, the text says so little about any one pixel that a model learns looks many times
    more slowly.
    """
    low, high = size / 2 + 1, SIZE - size / 2 - 1
    return min(high, max(low, SIZE / 2 + rng.uniform(-5, 5)))


def _along(rng, size, where):
    """Draw a coordinate for a thing of this size: anywhere (None), or near the start, middle or end."""
    low, high = size / 2 + 1, SIZE - size / 2 - 1
    if where is None:
        return rng.uniform(low, high)
    third = (high - low) / 4
    start = low + where * (high - low - third)
    return rng.uniform(start, start + third)


def _caption(rng, subject, background):
    chance = rng.random()
    if chance < 0.1:
        return f"{rng.choice(PREFIXES)} {subject}".strip()
    if chance < 0.25:
        start = rng.choice(BACKGROUND_FIRST).format(background)
        verb = rng.choice(("", "there is", "we see", "stands"))
        return f"{start} {verb} {subject}".replace("  ", " ")
    return f"{rng.choice(PREFIXES)} {subject} {rng.choice(BACKGROUND_PHRASES).format(background)}".strip()


def sample_new_object(superclass, index, seed):
    """Draw a picture of a held-out look alone on a plain background, with the object's mask ("L").

    Args:
        superclass: one of `SUPERCLASSES`.
        index: which of the superclass's held-out looks, 0 or 1.
        seed: number of the picture.

    Returns:
        The picture and its mask, both 64 × 64.
    """
    look = HELD_OUT[superclass][index]
    rng = Random(f"new {superclass} {index} {seed}")
    background = rng.choice([c for c in BACKGROUNDS if c not in astuple(look)])
    size = rng.uniform(34, 46)
    thing = Thing(superclass, look, None, size, _near_the_middle(rng, size), _near_the_middle(rng, size))
    return draw(Scene(background, shade_of(background, rng), (thing,))), draw_thing(thing, mask=True)
