"""Draw scenes of the world with Pillow: backgrounds, objects with their patterns and marks, masks."""

import math

import numpy as np
from colours import COLOURS, lab
from PIL import Image, ImageDraw
from plans import MARKS, PLANS

SIZE = 64  # pixels, width and height of a picture
SUPERSAMPLING = 4  # pictures are drawn this much larger and averaged down
EDGE = SIZE * SUPERSAMPLING
INK, LIGHT = (20, 20, 24), (244, 244, 240)
MARK_SIZE = 0.205  # of the object's box


def _polygon(pen, points, fill, outline=None, width=0):
    pen.polygon([tuple(point) for point in points.tolist()], fill=fill)
    if outline is not None:
        closed = [tuple(point) for point in points.tolist()]
        pen.line([*closed, closed[0], closed[1]], fill=outline, width=width, joint="curve")


def _pattern(identity, width, height, size):
    """Return the pattern over a box as a bool array (height, width), in pixels of the large picture.

    Period and thickness are parts of the object's `size`; the origin is the middle of the box.
    """
    turn = math.pi * identity.direction
    x = (np.arange(width, dtype=np.float32) - width / 2) / size
    y = (np.arange(height, dtype=np.float32) - height / 2)[:, None] / size
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    period = 0.19 + 0.17 * identity.scale
    if identity.pattern == "stripes":
        return (along / period) % 1.0 < 0.45
    if identity.pattern == "checks":
        return ((along / period) % 1.0 < 0.5) ^ ((across / period) % 1.0 < 0.5)
    if identity.pattern == "spots":
        row = np.floor(across / period)
        u, v = (along / period + 0.5 * (row % 2)) % 1.0 - 0.5, across / period - row - 0.5
        return u * u + v * v < 0.33**2
    if identity.pattern == "waves":
        return (
            (along + 0.25 * period * np.sin(across * (2 * math.pi / (1.6 * period)))) / period
        ) % 1.0 < 0.45
    if identity.pattern == "band":
        return np.abs(along) < 0.07 + 0.10 * identity.scale
    raise ValueError(f"`pattern` must be one of the world's, got {identity.pattern!r}.")


def mark_colour(identity):
    """Return the colour of an object's mark: light on a dark body and dark on a light one."""
    return INK if lab(identity.body)[0] > 58 else LIGHT


def _mark(pen, identity, area, place, size, corner):
    x, y, half_width, half_height = area
    u, v = identity.mark_place
    if place == "ring":  # around the middle
        angle = 2 * math.pi * u
        centre = np.array((x + half_width * math.sin(angle), y - half_height * math.cos(angle)))
    elif place == "sides":  # left or right of the middle
        centre = np.array((x + (half_width if u > 0.5 else -half_width), y + half_height * (2 * v - 1)))
    else:
        centre = np.array((x + half_width * (2 * u - 1), y + half_height * (2 * v - 1)))
    centre, radius = corner + centre * size, MARK_SIZE / 2 * size
    box = [*(centre - 1.35 * radius), *(centre + 1.35 * radius)]
    pen.ellipse(box, fill=identity.body)  # a plain ground, so that no pattern hides the mark
    for points in MARKS[identity.mark]:
        _polygon(pen, points * radius + centre, mark_colour(identity))


MARK_PLACES = {"flower": "ring", "butterfly": "sides"}


def draw_thing(canvas, superclass, identity, size, x, y):
    """Draw an object onto a large picture, in place.

    Args:
        canvas: RGB picture of `EDGE`², or an "L" one, which gets the object's area in white.
        superclass: its name.
        identity: what it looks like.
        size, x, y: edge and centre of the object's box in pixels of the small picture.
    """
    pen, is_mask = ImageDraw.Draw(canvas), canvas.mode == "L"
    size = size * SUPERSAMPLING
    corner = np.array((x, y)) * SUPERSAMPLING - size / 2
    shapes, area = PLANS[superclass](*identity.proportions)
    paint = {
        "body": identity.body,
        "second": identity.second,
        "accent": identity.accent,
        "ink": INK,
        "light": LIGHT,
    }
    width = max(2, round(0.022 * size))
    for part, points in shapes:
        points = corner + points * size
        if is_mask:
            _polygon(pen, points, 255, 255, width)
            continue
        outline = tuple(int(v * 0.45) for v in paint[part])
        if part == "body" and identity.pattern != "plain":
            _polygon(pen, points, identity.body)
            _paste_pattern(canvas, identity, points, size)
            pen.line(
                [tuple(p) for p in (*points.tolist(), *points[:2].tolist())],
                fill=outline,
                width=width,
                joint="curve",
            )
        else:
            _polygon(pen, points, paint[part], outline if part != "ink" else None, width)
    if not is_mask:
        _mark(pen, identity, area, MARK_PLACES.get(superclass), size, corner)


def _paste_pattern(canvas, identity, points, size):
    left, top = (int(v) for v in np.floor(points.min(axis=0)))
    right, bottom = (int(v) + 1 for v in np.ceil(points.max(axis=0)))
    shape = Image.new("L", (right - left, bottom - top))
    _polygon(ImageDraw.Draw(shape), points - (left, top), 255)
    pattern = _pattern(identity, right - left, bottom - top, size)
    canvas.paste(identity.accent, (left, top), Image.fromarray(np.asarray(shape) * pattern))


def _grass(pen, shade):
    dark, light = (tuple(min(255, int(v * f)) for v in shade) for f in (0.72, 1.22))
    for row in range(-1, 8):
        for column in range(-1, 9):
            x, y = column * 32 + (row % 2) * 16, row * 36
            pen.polygon(
                [(x, y + 26), (x + 6, y), (x + 12, y + 26)], fill=dark if (row + column) % 2 else light
            )


def _sand(pen, shade):
    dark = tuple(int(v * 0.78) for v in shade)
    for row in range(-1, 9):
        for column in range(-1, 9):
            x, y = column * 32 + (row % 2) * 16, row * 32
            pen.ellipse([x, y, x + 11, y + 11], fill=dark)


def _bricks(pen, shade):
    mortar = tuple(min(255, int(v * 0.4 + 130)) for v in shade)
    for row in range(8):
        pen.rectangle([0, row * 32, EDGE, row * 32 + 5], fill=mortar)
        for x in range(-(row % 2) * 32, EDGE, 64):
            pen.rectangle([x, row * 32, x + 5, row * 32 + 32], fill=mortar)


def _water(pen, shade):
    light = tuple(min(255, int(v * 0.5 + 120)) for v in shade)
    xs = np.arange(-8, EDGE + 9, 8)
    for row in range(8):
        ys = 16 + 32 * row + 7 * np.sin((xs + 32 * (row % 2)) * (2 * math.pi / 64))
        pen.line([tuple(p) for p in np.stack([xs, ys], axis=1).tolist()], fill=light, width=7)


def _tiles(pen, shade):
    dark = tuple(int(v * 0.80) for v in shade)
    for row in range(8):
        for column in range(row % 2, 8, 2):
            pen.rectangle([column * 32, row * 32, column * 32 + 31, row * 32 + 31], fill=dark)


# Textured backgrounds: ground colour, the colour that objects must differ from, and what is drawn on the ground.
TEXTURES = {
    "grass": ((92, 168, 70), _grass),
    "sand": ((226, 200, 140), _sand),
    "bricks": ((172, 82, 62), _bricks),
    "water": ((70, 140, 206), _water),
    "tiles": ((214, 214, 222), _tiles),
}
BACKGROUNDS = {**COLOURS, **{name: colour for name, (colour, _) in TEXTURES.items()}}


def draw_background(name, shade):
    """Return the large picture of a background; `shade` is its ground colour."""
    canvas = Image.new("RGB", (EDGE, EDGE), shade)
    if name in TEXTURES:
        TEXTURES[name][1](ImageDraw.Draw(canvas), shade)
    return canvas


def draw_scene(scene):
    """Draw a scene: an RGB picture of 64 × 64."""
    canvas = draw_background(scene.background, scene.shade)
    for thing in scene.things:
        draw_thing(canvas, thing.superclass, thing.identity, thing.size, thing.x, thing.y)
    return canvas.reduce(SUPERSAMPLING)


def draw_mask(thing):
    """Draw the area that a thing covers as an "L" picture of 64 × 64."""
    canvas = Image.new("L", (EDGE, EDGE))
    draw_thing(canvas, thing.superclass, thing.identity, thing.size, thing.x, thing.y)
    return canvas.reduce(SUPERSAMPLING)
