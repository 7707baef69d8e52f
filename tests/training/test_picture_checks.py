"""Pictures and masks that cannot teach what is meant are named before training starts."""

import re
import warnings

import numpy as np
import pytest
from helpers.pictures import half_red, left_white
from PIL import Image

from perfusion_pytorch.training.pictures import load_pictures

EDGE = 64


def disc(inverted=False):
    """A mask, or one that marks the background."""
    y, x = np.mgrid[:EDGE, :EDGE]
    inside = (x - 30) ** 2 + (y - 34) ** 2 < 15**2
    return Image.fromarray(np.where(inside != inverted, 255, 0).astype(np.uint8))


def on_the_ground(inverted=False):
    """A mask of something that reaches to the lower edge."""
    mask = Image.new("L", (EDGE, EDGE), 255 if inverted else 0)
    mask.paste(0 if inverted else 255, (18, 18, 46, EDGE))
    return mask


def in_corner(share):
    mask = Image.new("L", (EDGE, EDGE))
    edge = round(EDGE * share**0.5)
    mask.paste(255, (0, 0, edge, edge))
    return mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (EDGE, EDGE), 255), "mark all of the square keep nothing out: picture 0"),
        (disc(inverted=True), "look inverted, since they are white all around and dark within: picture 0"),
        (on_the_ground(inverted=True), "look inverted, since they are white all around .*: picture 0"),
        (in_corner(0.0003), "mark less than 0.2 % of the square .*: picture 0"),
        (disc().point(lambda v: v // 255), "below half of white are scaled up to white: picture 0"),
        (half_red(), "Masks in colour mark the object by their brightness, .*: picture 0"),
    ],
    ids=["white", "inverted", "inverted on the ground", "tiny", "faint", "colour"],
)
def test_masks_that_cannot_be_meant(mask, message):
    with pytest.warns(UserWarning, match=message):
        load_pictures([half_red()], resolution=EDGE, masks=[mask])


@pytest.mark.parametrize(
    "mask",
    [
        disc(),
        on_the_ground(),
        left_white(),
        in_corner(0.9),
        in_corner(0.01),
        Image.new("L", (EDGE, EDGE), 255).rotate(20),
        disc().convert("RGB"),
    ],
)
def test_ordinary_pictures_and_masks_are_not_warned_of(mask):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pictures([half_red(), half_red().rotate(90)], resolution=EDGE, masks=[mask, disc()])


def test_an_object_outside_of_the_middle_square():
    mask = Image.new("L", (150, EDGE))
    mask.paste(255, (0, 10, 60, 50))
    with pytest.warns(
        UserWarning, match="More than half of the object lies outside the middle square.*picture 0"
    ):
        load_pictures([half_red(150, EDGE)], resolution=EDGE, masks=[mask])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pictures([half_red(150, EDGE)], resolution=EDGE, masks=[mask], center_crop=False)


def test_an_empty_mask_is_refused_with_a_remedy():
    mask = Image.new("L", (150, EDGE))
    mask.paste(255, (0, 10, 20, 50))  # outside the middle square
    with pytest.raises(
        ValueError,
        match=r"mask of picture 0 must show the object .*squeeze the whole picture \(see `center_crop`\)",
    ):
        load_pictures([half_red(150, EDGE)], resolution=EDGE, masks=[mask])


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (half_red(40, 90), {}, r"smaller than the resolution of 64 .*: picture 0 \(40 x 90\)"),
        (half_red(8000, 50), {}, r"middle square of long pictures .*: picture 0 \(8000 x 50\)"),
        (half_red(8000, 50), {"center_crop": False}, r"squeezed into a square: picture 0 \(8000 x 50\)"),
        (Image.new("RGB", (EDGE, EDGE), "teal"), {}, "hardly more than one colour show nothing: picture 0"),
        (Image.new("L", (1, 1)), {}, "hardly more than one colour"),
    ],
)
def test_pictures_that_can_hardly_be_learned_from(image, options, message):
    with pytest.warns(UserWarning) as warned:
        load_pictures([image], resolution=EDGE, **options)
    assert any(re.search(message, str(warning.message)) for warning in warned)


def test_the_same_picture_several_times(tmp_path):
    for name in ("a.png", "b.bmp", "c.tif"):
        half_red().save(tmp_path / name)
    half_red().rotate(90).save(tmp_path / "d.png")
    with pytest.warns(UserWarning, match="pictures are the same, .*: a.png = b.bmp, a.png = c.tif"):
        load_pictures(tmp_path, resolution=EDGE)


def test_one_warning_names_all_that_it_concerns():
    white = Image.new("L", (EDGE, EDGE), 255)
    images = [half_red(), half_red().rotate(90), half_red().rotate(180)]
    with pytest.warns(UserWarning) as warned:
        load_pictures(images, resolution=EDGE, masks=[white, disc(), white])
    (message,) = (str(w.message) for w in warned)
    assert "picture 0, picture 2" in message


def test_only_the_first_frame_of_several_is_told(tmp_path):
    frames = [half_red(), half_red().rotate(90)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="Only the first frame is read of pictures with several: a.gif"):
        (picture,) = load_pictures(tmp_path, resolution=EDGE)
    assert picture.pixels[0, :, :28].mean() > 0.9


def test_long_lists_of_names_are_cut():
    images = [Image.new("RGB", (EDGE, EDGE), (0, 0, i)) for i in range(25)]
    with pytest.warns(UserWarning, match="picture 18, picture 19 and 5 more"):
        load_pictures(images, resolution=EDGE)


def test_copies_saved_in_another_way_are_the_same_picture(tmp_path):
    photo = Image.linear_gradient("L").resize((EDGE, EDGE)).convert("RGB")
    photo.paste("red", (10, 20, 40, 60))
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "b.jpg", quality=80)
    photo.resize((2 * EDGE, 2 * EDGE)).save(tmp_path / "c.webp")
    photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "other.png")
    with pytest.warns(UserWarning, match="pictures are the same, .*: a.png = b.jpg, a.png = c.webp. Diff"):
        load_pictures(tmp_path, resolution=EDGE)
