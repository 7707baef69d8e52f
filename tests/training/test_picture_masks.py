"""What the numbers of a mask are, and over which pixels of its picture it lies."""

import warnings

import numpy as np
import pytest
import torch
from helpers.pictures import half_red, left_white
from PIL import Image

from perfusion_pytorch.training.pictures import load_pictures


def load(image, **options):
    (picture,) = load_pictures([image], resolution=64, **options)
    return picture


def is_left(mask):
    return bool((mask[:, :31] > 0.99).all() and (mask[:, 33:] < 0.01).all())


def cut_out(colour="black"):
    """An object of one colour that covers the left half, as background removers write it."""
    image = Image.new("RGBA", (64, 64), colour)
    image.putalpha(left_white())
    return image


def palette_cut_out():
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.paste(0, (0, 0, 32, 64))
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "palette"])
@pytest.mark.parametrize("colour", ["black", "white", "orange"])
def test_a_mask_that_can_be_seen_through_is_its_alpha_channel(mode, colour):
    mask = palette_cut_out() if mode == "palette" else cut_out(colour).convert(mode)
    assert is_left(load(half_red(), masks=[mask]).mask)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "F", "CMYK", "bool", "uint8"])
def test_a_mask_that_cannot_is_its_brightness(mode):
    """Also in RGBA, as editors write black and white with an alpha channel that is opaque everywhere."""
    mask = left_white()
    if mode in ("bool", "uint8"):
        mask = np.asarray(mask).astype(mode) if mode == "bool" else np.asarray(mask)
    elif mode == "F":
        mask = Image.fromarray(np.asarray(mask) / np.float32(255))
    elif mode == "I;16":
        mask = Image.frombytes("I;16", (64, 64), (np.asarray(mask).astype("<u2") * 257).tobytes())
    else:
        mask = mask.convert("RGB").convert(mode)
    assert is_left(load(half_red(), masks=[mask]).mask)


def test_16_bit_masks_keep_their_greys():
    grey = Image.new("I;16", (64, 64), 257 * 100)
    grey.paste(65535, (0, 0, 8, 64))
    mask = load(half_red(), masks=[grey]).mask
    assert torch.allclose(mask[:, 16:], torch.tensor(100 / 255)) and (mask[:, :7] == 1).all()


def test_a_picture_with_an_alpha_channel_brings_its_own_mask():
    picture = load(cut_out("orange"))
    assert is_left(picture.mask) and picture.mask_source == "alpha channel"
    assert (picture.pixels[:, :, 33:] == 1).all() and picture.pixels[2, :, :31].max() == -1
    assert load(cut_out(), use_masks=False).mask is None
    assert load(half_red(mode="RGBA")).mask is None  # opaque everywhere


def test_a_mask_of_its_own_goes_before_the_alpha_channel(tmp_path):
    right = left_white().rotate(180)
    picture = load(cut_out(), masks=[right])
    assert is_left(1 - picture.mask) and picture.mask_source == "given"
    cut_out("orange").save(tmp_path / "a.png")
    cut_out("red").save(tmp_path / "b.png")
    (tmp_path / "masks").mkdir()
    right.save(tmp_path / "masks" / "b.png")
    first, second = load_pictures(tmp_path, resolution=64)
    assert is_left(first.mask) and first.mask_source == "alpha channel"
    assert is_left(1 - second.mask) and second.mask_source == str(tmp_path / "masks" / "b.png")


def test_a_list_of_masks_may_leave_some_out():
    with pytest.warns(UserWarning, match="without a mask are learned with their background.*: picture 1"):
        one, other = load_pictures(
            [half_red(), half_red().rotate(90)], resolution=64, masks=[left_white(), None]
        )
    assert is_left(one.mask) and other.mask is None


# What was done to pixels that are stored with an EXIF orientation: turned back, they are upright again.
STORED = {3: "ROTATE_180", 2: "FLIP_LEFT_RIGHT", 6: "ROTATE_90", 8: "ROTATE_270", 5: "TRANSPOSE"}


def stored(image, orientation, says=True):
    image = image.transpose(getattr(Image.Transpose, STORED[orientation]))
    if says:
        image.getexif()[0x0112] = orientation
    return image


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("orientation", STORED)
def test_picture_and_mask_that_say_the_same_are_turned_together(no_warnings, orientation):
    picture = load(stored(half_red(), orientation), masks=[stored(left_white(), orientation)])
    assert picture.pixels[0, :, :31].min() > 0.9 and is_left(picture.mask)


@pytest.mark.parametrize("orientation", [5, 6, 8])
@pytest.mark.parametrize("who", ["picture", "mask"])
def test_where_one_says_how_it_is_turned_the_shapes_decide(no_warnings, orientation, who):
    """An upright mask of a turned photo, and one that was made from its stored pixels; and the reverse."""
    image, mask = half_red(90, 64), left_white(90, 64)
    if who == "picture":
        image = stored(image, orientation)
        others = [mask, stored(mask, orientation, says=False)]
    else:
        others = [stored(mask, orientation)]
        mask.getexif()[0x0112] = orientation  # left behind by a tool that turned the pixels
        others.append(mask)
    for other in others:
        picture = load(image, masks=[other])
        assert picture.pixels[0, :, :31].min() > 0.9 and is_left(picture.mask)


@pytest.mark.parametrize("orientation", [3, 2, 6])
def test_where_the_shapes_cannot_decide_the_user_is_told(orientation):
    with pytest.warns(
        UserWarning, match=rf"not both alike: picture 0 \(orientation {orientation}, its mask 1\)"
    ):
        picture = load(stored(half_red(), orientation), masks=[left_white()])
    assert is_left(picture.mask)  # as viewers show both
    with pytest.warns(UserWarning, match=rf"\(orientation 1, its mask {orientation}\)"):
        picture = load(half_red(), masks=[stored(left_white(), orientation)])
    assert is_left(picture.mask)


def test_an_alpha_channel_turns_with_its_picture(no_warnings):
    image = cut_out("orange").transpose(Image.Transpose.ROTATE_180)
    image.getexif()[0x0112] = 3
    assert is_left(load(image).mask)


@pytest.mark.parametrize("size", [(45, 32), (180, 128), (91, 65)])
def test_a_mask_of_another_size_is_scaled_with_a_warning(size):
    with pytest.warns(UserWarning, match=rf"scaled to it: picture 0 \(90, 64\), \({size[0]}, {size[1]}\)"):
        picture = load(half_red(90, 64), masks=[left_white(*size)])
    assert (picture.mask[:, :29] == 1).all() and (picture.mask[:, 35:] == 0).all()


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"or of its shape at another scale, got \(64, 64\)"):
        load(half_red(90, 64), masks=[left_white()])


def test_masks_and_no_masks_together_are_refused():
    with pytest.raises(ValueError, match="`masks` must not be given along with `use_masks=False`"):
        load_pictures([half_red()], resolution=64, masks=[left_white()], use_masks=False)
