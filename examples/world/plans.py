"""Body plans: which polygons an object of each superclass is made of, for given proportions.

A plan is a function of four proportions, each in [0, 1], that returns

    shapes     (part, polygon) in the order of drawing; a polygon is an array (points, 2) in the unit square, y down
    mark_area  (x, y, half width, half height): where the centre of the mark may be

Parts: "body", "second" and "accent" have the object's own colours, "ink" is nearly black and "light" nearly white.
"""

import math

import numpy as np

_CIRCLE = np.stack(
    [np.cos(np.linspace(0, 2 * np.pi, 33)[:-1]), np.sin(np.linspace(0, 2 * np.pi, 33)[:-1])], axis=1
)


def mix(low, high, part):
    """Return the number that lies at `part` in [0, 1] of the way from low to high."""
    return low + (high - low) * part


def ellipse(x, y, half_width, half_height, degrees=0.0):
    """Return an ellipse as a polygon (32, 2)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (_CIRCLE * (half_width, half_height)) @ np.array(((cos, sin), (-sin, cos))) + (x, y)


def polygon(*coordinates):
    """Return x0, y0, x1, y1, … as a polygon (points, 2)."""
    return np.array(coordinates, dtype=float).reshape(-1, 2)


def box(left, top, right, bottom):
    """Return a rectangle as a polygon (4, 2)."""
    return polygon(left, top, right, top, right, bottom, left, bottom)


def round_box(left, top, right, bottom, radius):
    """Return a rectangle with round corners as a polygon."""
    corners = ((right - radius, bottom - radius), (left + radius, bottom - radius),
               (left + radius, top + radius), (right - radius, top + radius))  # fmt: skip
    arcs = [
        _CIRCLE[8 * i : 8 * i + 9] if i < 3 else np.concatenate([_CIRCLE[24:], _CIRCLE[:1]]) for i in range(4)
    ]
    return np.concatenate([arc * radius + corner for arc, corner in zip(arcs, corners, strict=True)])


def fish(height, tail, fin, length):
    """Swims to the left. Proportions: height of the body, of the tail, of the fin on its back, and length of the body."""
    half, end = mix(0.17, 0.33, height), mix(0.62, 0.82, length)
    spread, back, middle = mix(0.13, 0.36, tail), mix(0.06, 0.26, fin), 0.56
    x = end / 2
    shapes = [
        ("second", polygon(end - 0.09, middle, 0.99, middle - spread, 0.90, middle, 0.99, middle + spread)),
        (
            "second",
            polygon(0.22 * end, middle - 0.7 * half, 0.42 * end, middle - half - back,
                    0.74 * end, middle - half - 0.7 * back, 0.92 * end, middle - 0.4 * half),
        ),
        ("body", ellipse(x + 0.01, middle, x, half)),
        (
            "accent",
            polygon(0.42 * end, middle + 0.55 * half, 0.68 * end, middle + 0.6 * half, 0.70 * end, middle + half + 0.13),
        ),
        ("light", ellipse(0.20 * end, middle - 0.25 * half, 0.065, 0.065)),
        ("ink", ellipse(0.19 * end, middle - 0.25 * half, 0.035, 0.035)),
    ]  # fmt: skip
    return shapes, (0.58 * end, middle - 0.12 * half, 0.16 * end, 0.30 * half)


def house(width, roof, door, window):
    """Seen from the front. Proportions: width of the walls, height of the roof, place of the door, width of the window."""
    half, eaves = mix(0.27, 0.45, width), mix(0.28, 0.50, roof)
    at = 0.5 + mix(-0.55, 0.55, door) * half
    pane_at, pane = (0.5 - 0.50 * half if door > 0.5 else 0.5 + 0.50 * half), mix(0.05, 0.10, window)
    shapes = [
        ("accent", box(0.5 + 0.45 * half, 0.06, 0.5 + 0.45 * half + 0.13, eaves)),
        ("body", box(0.5 - half, eaves - 0.02, 0.5 + half, 0.98)),
        ("second", polygon(0.5 - half - 0.06, eaves + 0.03, 0.5, 0.02, 0.5 + half + 0.06, eaves + 0.03)),
        ("accent", box(at - 0.085, 0.70, at + 0.085, 0.98)),
        ("light", box(pane_at - pane, 0.73, pane_at + pane, 0.87)),
    ]
    return shapes, (0.5, mix(0.535, 0.605, roof), half - 0.13, 0.01)


def flower(petals, depth, centre, head):
    """Has a scalloped head on a stem. Proportions: number of petals, depth between them, size of the centre, of the head."""
    number, cut, radius = round(mix(4, 9, petals)), mix(0.14, 0.36, depth), mix(0.31, 0.385, head)
    angles = np.linspace(0, 2 * np.pi, 12 * number + 1)[:-1]
    edge = radius * (1 - cut + cut * np.abs(np.cos(number * angles / 2)) ** 0.6)
    y = 0.02 + radius
    shapes = [
        ("accent", box(0.465, y, 0.535, 0.99)),
        ("accent", ellipse(0.68, 0.86, 0.17, 0.065, -25)),
        ("body", np.stack([0.5 + edge * np.sin(angles), y - edge * np.cos(angles)], axis=1)),
        ("second", ellipse(0.5, y, *[mix(0.075, 0.15, centre)] * 2)),
    ]
    return shapes, (0.5, y, 0.66 * radius, 0.66 * radius)


def mug(width, height, taper, handle):
    """Has its handle on the right. Proportions: width, height, how much narrower the foot is, size of the handle."""
    wide, high, loop = mix(0.44, 0.64, width), mix(0.56, 0.84, height), mix(0.13, 0.24, handle)
    left, top, foot = 0.06, 0.98 - high, mix(0.0, 0.11, taper)
    right, y = left + wide, 0.98 - 0.55 * high
    arc = np.linspace(-np.pi / 2, np.pi / 2, 17)
    outer = np.stack([right - 0.06 + (0.06 + loop) * np.cos(arc), y + loop * 1.1 * np.sin(arc)], axis=1)
    inner = np.stack(
        [right - 0.06 + (loop - 0.03) * np.cos(arc), y + (loop * 1.1 - 0.085) * np.sin(arc)], axis=1
    )
    shapes = [
        ("second", np.concatenate([outer, inner[::-1]])),
        ("body", polygon(left, top, right, top, right - foot, 0.93, right - foot - 0.04, 0.98,
                         left + foot + 0.04, 0.98, left + foot, 0.93)),
        ("second", ellipse(left + wide / 2, top, wide / 2, 0.085)),
        ("accent", ellipse(left + wide / 2, top + 0.005, wide / 2 - 0.06, 0.045)),
    ]  # fmt: skip
    return shapes, (left + wide / 2, 0.98 - 0.46 * high, wide / 2 - foot - 0.13, 0.46 * high - 0.21)


def car(height, cabin_height, cabin_length, wheel):
    """Drives to the left. Proportions: height of the body, height and length of the cabin, size of the wheels."""
    low, tall, long = mix(0.27, 0.40, height), mix(0.17, 0.34, cabin_height), mix(0.40, 0.74, cabin_length)
    radius = mix(0.10, 0.165, wheel)
    bottom = 0.97 - radius
    top, right = bottom - low, 0.90
    left = right - long
    roof = top - tall
    pane = (roof + 0.055, top)
    middle = (left + 0.10 + right - 0.06) / 2
    shapes = [
        ("second", polygon(left, top + 0.03, left + 0.13, roof, right - 0.06, roof, right, top + 0.03)),
        (
            "light",
            polygon(
                left + 0.09, pane[1], left + 0.165, pane[0], middle - 0.02, pane[0], middle - 0.02, pane[1]
            ),
        ),
        ("light", box(middle + 0.03, pane[0], right - 0.09, pane[1])),
        ("body", round_box(0.01, top, 0.99, bottom, 0.07)),
    ]
    for x in (0.22, 0.78):
        shapes += [
            ("ink", ellipse(x, bottom, radius, radius)),
            ("accent", ellipse(x, bottom, *[radius * 0.62] * 2)),
        ]
    return shapes, (0.5, (top + bottom) / 2 - 0.01, 0.11, max(0.0, low / 2 - 0.135))


def tree(tiers, width, trunk, taper):
    """Is a conifer in a pot. Proportions: number of tiers, width, height of the trunk, how much narrower the top is."""
    number, half, pot = round(mix(2, 4, tiers)), mix(0.31, 0.46, width), 0.84
    base, narrow = pot - mix(0.05, 0.20, trunk), mix(0.35, 0.85, taper)
    rise = (base - 0.01) / number
    right = []
    for i in range(number):  # from the top tier down
        at = mix(narrow, 1.0, (i + 1) / number) * half
        right += [(0.5 + at, 0.01 + (i + 1) * rise)]
        right += [(0.5 + 0.45 * at, 0.01 + (i + 1) * rise)] if i < number - 1 else []
    left = [(1 - x, y) for x, y in reversed(right)]
    shapes = [
        ("second", box(0.435, base - 0.05, 0.565, pot + 0.04)),
        ("accent", polygon(0.28, pot, 0.72, pot, 0.65, 0.99, 0.35, 0.99)),
        ("body", np.array([(0.5, 0.01), *right, *left])),
    ]
    return shapes, (0.5, base - 0.20, 0.10, 0.07)


def butterfly(upper, lower, spread, length):
    """Has its wings open. Proportions: size of the upper wings, of the lower ones, how far apart they stand, length of the trunk."""
    big, small, tilt = mix(0.19, 0.27, upper), mix(0.11, 0.20, lower), mix(15, 55, spread)
    half = mix(0.22, 0.36, length)
    shapes = []
    for side in (-1, 1):
        shapes.append(("second", ellipse(0.5 + side * (small + 0.06), 0.72, small * 1.25, small, side * 35)))
    for side in (-1, 1):
        x, y = 0.5 + side * (0.22 + 0.1 * (0.27 - big)), 0.36
        shapes.append(("body", ellipse(x, y, big * 1.08, big * 0.86, -side * tilt)))
    for side in (-1, 1):
        shapes.append(
            (
                "ink",
                polygon(
                    0.5, 0.56 - half, 0.5 + side * 0.15, 0.03, 0.5 + side * 0.11, 0.02, 0.48, 0.56 - half
                ),
            )
        )
    shapes.append(("accent", ellipse(0.5, 0.56, 0.055, half)))
    return shapes, (0.5, 0.36, 0.23, 0.04)


def bear(head, ears, width, limbs):
    """Sits and looks at us. Proportions: size of the head, of the ears, width of the body, size of the limbs."""
    radius, ear, half, paw = (
        mix(0.20, 0.29, head),
        mix(0.075, 0.14, ears),
        mix(0.22, 0.34, width),
        mix(0.085, 0.145, limbs),
    )
    y = 0.06 + radius
    neck = y + 0.72 * radius
    shapes = []
    for side in (-1, 1):
        x = 0.5 + side * 0.80 * radius
        shapes += [
            ("body", ellipse(x, y - 0.72 * radius, ear, ear)),
            ("second", ellipse(x, y - 0.72 * radius, *[ear * 0.5] * 2)),
        ]
        shapes.append(
            ("accent", ellipse(0.5 + side * (half + 0.02), neck + 0.20, paw * 0.8, paw * 1.25, side * 30))
        )
    shapes.append(("body", ellipse(0.5, (neck + 0.95) / 2, half, (0.95 - neck) / 2 + 0.02)))
    for side in (-1, 1):
        shapes.append(("accent", ellipse(0.5 + side * half * 0.62, 0.90, paw * 1.15, paw * 0.75)))
    shapes.append(("body", ellipse(0.5, y, radius * 1.08, radius)))
    shapes.append(("second", ellipse(0.5, y + 0.40 * radius, radius * 0.46, radius * 0.36)))
    shapes.append(("ink", ellipse(0.5, y + 0.28 * radius, radius * 0.17, radius * 0.13)))
    for side in (-1, 1):
        shapes.append(("ink", ellipse(0.5 + side * 0.42 * radius, y - 0.18 * radius, 0.035, 0.04)))
    return shapes, (0.5, (neck + 0.84) / 2 + 0.01, half - 0.17, 0.04)


PLANS = {
    "fish": fish, "house": house, "flower": flower, "mug": mug,
    "car": car, "tree": tree, "butterfly": butterfly, "bear": bear,
}  # fmt: skip


def _star(points, inner):
    angles = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _plus(arm):
    return polygon(-arm, -1, arm, -1, arm, -arm, 1, -arm, 1, arm, arm, arm, arm, 1, -arm, 1, -arm, arm, -1, arm,
                   -1, -arm, -arm, -arm)  # fmt: skip


def _turned(points, degrees):
    angle = math.radians(degrees)
    return points @ np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))


_TURN = np.linspace(0, 2 * np.pi, 33)[:-1]
_ARC = np.linspace(-0.75 * np.pi, 0.75 * np.pi, 17)
# Signs within [−1, 1]², each a list of polygons.
MARKS = {
    "disc": [ellipse(0, 0, 0.8, 0.8)],
    "ring": [
        np.concatenate([ellipse(0, 0, 1, 1), _CIRCLE[:1], 0.5 * _CIRCLE[:1], ellipse(0, 0, 0.5, 0.5)[::-1]])
    ],
    "plus": [_plus(0.33)],
    "cross": [_turned(_plus(0.30), 45)],
    "triangle": [polygon(0, -1, 1, 0.8, -1, 0.8)],
    "star": [_star(5, 0.42)],
    "heart": [
        np.stack(
            [
                np.sin(_TURN) ** 3,
                -(13 * np.cos(_TURN) - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN) - np.cos(4 * _TURN))
                / 15,
            ],
            axis=1,
        )
    ],
    "moon": [
        np.concatenate(
            [
                np.stack([-np.cos(_ARC), np.sin(_ARC)], axis=1),
                np.stack([0.35 - 0.75 * np.cos(_ARC[::-1] * 0.93), 0.75 * np.sin(_ARC[::-1] * 0.93)], axis=1),
            ]
        )
    ],
    "bolt": [polygon(0.35, -1, -0.75, 0.2, -0.1, 0.2, -0.4, 1, 0.75, -0.25, 0.1, -0.25)],
    "bars": [box(-1, -0.8, 1, -0.2), box(-1, 0.25, 1, 0.85)],
    "pair": [ellipse(-0.55, 0, 0.45, 0.7), ellipse(0.55, 0, 0.45, 0.7)],
    "tee": [polygon(-1, -0.9, 1, -0.9, 1, -0.25, 0.33, -0.25, 0.33, 1, -0.33, 1, -0.33, -0.25, -1, -0.25)],
}
