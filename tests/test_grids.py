"""Labelled grids of pictures."""

import pytest
from PIL import Image, ImageChops

from perfusion_pytorch.grids import GAP, SMALLEST_CELL, labelled_grid


def pictures(size, *colours):
    return [Image.new("RGB", size, colour) for colour in colours]


def test_pictures_stand_under_their_labels():
    grid = labelled_grid(
        [
            ("beta 0.5", pictures((200, 160), "red", "blue")),
            ("beta 0.9", pictures((200, 160), "green", "black")),
        ],
        ["a", "b"],
    )
    left, top = grid.width - 2 * (200 + GAP), grid.height - 2 * (160 + GAP)
    centres = [
        grid.getpixel((left + x * (200 + GAP) + 100, top + y * (160 + GAP) + 80))
        for y in (0, 1)
        for x in (0, 1)
    ]
    assert centres == [(255, 0, 0), (0, 0, 255), (0, 128, 0), (0, 0, 0)]
    for labels in (grid.crop((left, 0, grid.width, top)), grid.crop((0, top, left, grid.height))):
        assert ImageChops.invert(labels).getbbox() is not None  # something is written there


def test_small_pictures_are_enlarged_and_long_labels_broken():
    one = labelled_grid([("", pictures((16, 16), "red"))], ["a car"])
    long = labelled_grid(
        [("", pictures((16, 16), "red"))], ["a photo of a car on a red background left of a house " * 3]
    )
    assert one.width == long.width == SMALLEST_CELL + 2 * GAP
    assert long.height > one.height > SMALLEST_CELL
    assert one.getpixel((SMALLEST_CELL // 2, one.height - 20)) == (255, 0, 0)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [("", [])],
        [("", pictures((8, 8), "red"))],
        [("", [*pictures((8, 8), "red"), *pictures((8, 9), "red")])],
    ],
    ids=["no rows", "no pictures", "a picture too few", "two sizes"],
)
def test_pictures_that_do_not_make_a_grid(rows):
    with pytest.raises(ValueError, match="a picture of one size for each of 2 columns"):
        labelled_grid(rows, ["a", "b"])
