"""Colours: the named ones, distances as the eye sees them, and shades between the names."""

import colorsys
from functools import lru_cache

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
NAMED_WITHIN = 24.0  # a shade further than this from every named colour has no name


@lru_cache(maxsize=100_000)
def lab(colour):
    """Return CIE L*a*b* (white point D65) of an sRGB colour, three integers in [0, 255]."""
    red, green, blue = ((v / 255 / 12.92) if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour)
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.0891
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def colour_distance(one, other):
    """Return the distance of two colours in L*a*b*: 2 can just be told apart, black and white are 100 apart."""
    return sum((a - b) ** 2 for a, b in zip(lab(one), lab(other), strict=True)) ** 0.5


@lru_cache(maxsize=100_000)
def name_of(colour):
    """Return the name of a shade, or None where it lies between the named colours."""
    name = min(COLOURS, key=lambda n: colour_distance(COLOURS[n], colour))
    return name if colour_distance(COLOURS[name], colour) < NAMED_WITHIN else None


def any_colour(rng):
    """Draw a colour for an object: all hues alike, strong or pale, and one in seven a gray."""
    if rng.random() < 1 / 7:
        return (round(255 * rng.uniform(0.08, 0.97)),) * 3
    hue, saturation, value = rng.random(), rng.uniform(0.35, 1.0), rng.uniform(0.4, 1.0)
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, saturation, value))


def shade_of(colour, rng, by=6):
    """Draw a shade of a colour: every channel moves by at most `by` of 255."""
    return tuple(min(255, max(0, v + rng.randint(-by, by))) for v in colour)
