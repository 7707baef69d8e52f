"""Training pictures, with their masks and captions."""

import numpy as np
import pytest
import torch
from helpers.pictures import half_red, left_white
from PIL import Image

from perfusion_pytorch.training.pictures import load_pictures


def white(width=64, height=64):
    return Image.new("L", (width, height), "white")


def test_a_folder_of_several_formats_captions_and_masks(tmp_path):
    for name in ("3.webp", "1.JPG", "2.png"):
        half_red().save(tmp_path / name)
    (tmp_path / "2.txt").write_text("a red car\n\na car on blue\n")
    (tmp_path / "masks").mkdir()
    for name in ("1.png", "2.png", "3.png"):
        half_red().convert("L").point(lambda v: 255 if v > 50 else 0).save(tmp_path / "masks" / name)
    pictures = load_pictures(tmp_path, resolution=64)
    assert [p.name for p in pictures] == ["1.JPG", "2.png", "3.webp"]
    assert [p.captions for p in pictures] == [(), ("a red car", "a car on blue"), ()]
    for picture in pictures:
        assert picture.pixels.shape == (3, 64, 64) and picture.mask.shape == (64, 64)
        assert picture.pixels[0, :, :28].mean() > 0.9 and picture.pixels[0, :, 36:].mean() < -0.9
        assert picture.mask[:, :32].all() and not picture.mask[:, 32:].any()
    png = pictures[1]
    assert (
        png.pixels[0, 0, 0] == 1
        and png.pixels[1, 0, 0] == -1
        and png.image().tobytes() == half_red().tobytes()
    )
    assert all(p.mask is None for p in load_pictures(tmp_path, resolution=64, use_masks=False))


def test_cropping_squeezing_and_the_sizes_for_sdxl():
    (cut,) = load_pictures([half_red(200, 100)], resolution=50, masks=[left_white(200, 100)])
    assert (cut.original_size, cut.crop) == ((100, 200), (0, 25))
    (squeezed,) = load_pictures([half_red(200, 100)], resolution=50, center_crop=False)
    assert (squeezed.original_size, squeezed.crop) == ((100, 200), (0, 0))
    for picture in (cut, squeezed):
        assert (
            picture.pixels.shape == (3, 50, 50)
            and picture.pixels[0, :, 20].mean() > 0.9 > -0.9 > picture.pixels[0, :, 30].mean()
        )


def test_pictures_are_rotated_by_exif_and_transparent_pixels_become_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right: what was left is on top
    half_red().save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = half_red(mode="RGBA")
    image.putalpha(0)
    turned, clear = load_pictures([tmp_path / "a.jpg", image], resolution=64, use_masks=False)
    assert turned.pixels[0, :28].mean() > 0.9 and turned.pixels[0, 36:].mean() < -0.9
    assert (clear.pixels == 1).all() and clear.mask is None
    mask = white().convert("RGBA")
    mask.paste((255, 255, 255, 0), (0, 0, 32, 64))  # a mask that is drawn in its alpha channel
    (masked,) = load_pictures([half_red()], resolution=64, masks=[mask])
    assert (masked.mask[:, :28] == 0).all() and (masked.mask[:, 36:] == 1).all()


def test_a_long_picture_is_cut_as_if_it_were_scaled_whole():
    long = Image.effect_noise((400, 40), 90).convert("RGB")
    with pytest.warns(UserWarning, match="middle square of long pictures"):
        (cut,) = load_pictures([long], resolution=32)
    whole = long.resize((320, 32), Image.Resampling.LANCZOS).crop((144, 0, 176, 32))
    assert abs(np.asarray(cut.image()).astype(int) - np.asarray(whole)).max() <= 1
    with pytest.warns(UserWarning, match=r"picture 0 \(100000 x 2\)"):
        load_pictures(
            [Image.effect_noise((100_000, 2), 90)], resolution=512
        )  # 26 million x 512 if scaled whole


KINDS = {
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "array": lambda images: np.stack([np.asarray(image) for image in images]),
    "tensor": lambda images: torch.stack([torch.tensor(np.asarray(image)) for image in images]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_several_pictures_and_masks_of_every_kind(kind):
    images, masks = [half_red(), half_red().rotate(180)], [left_white(), left_white().rotate(180)]
    expected = load_pictures(images, resolution=64, masks=masks)
    given = KINDS[kind](images)
    if kind == "tensor":
        given = given.movedim(-1, 1)
    pictures = load_pictures(given, resolution=64, masks=KINDS[kind](masks))
    for one, other in zip(pictures, expected, strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.mask, other.mask)


@pytest.mark.parametrize("single", [np.zeros((8, 8, 3)), torch.zeros(3, 8, 8), np.zeros((8, 8))])
def test_a_single_array_is_not_taken_for_its_rows(single):
    with pytest.raises(
        ValueError, match=r"`images` must be several, or an array.* Put a single one into a list"
    ):
        load_pictures(single, resolution=8)
    with pytest.raises(ValueError, match="`masks` must be several"):
        load_pictures([half_red(8, 8)], resolution=8, masks=np.zeros((8, 8)))


@pytest.mark.parametrize("kind", [set, frozenset, dict.fromkeys])
@pytest.mark.parametrize("name", ["images", "masks"])
def test_what_has_no_order_is_refused(name, kind):
    """A set of masks would be given to the pictures at random."""
    options = {"images": [half_red()], name: kind(["a.png"])}
    with pytest.raises(ValueError, match=f"`{name}` must be several in an order, got a .*Give a list"):
        load_pictures(**options, resolution=64)


def broken(folder):
    data = (folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "change, options, message",
    [
        (broken, {}, "b.png cannot be read as a picture"),
        (
            lambda f: (f / "b.png").write_text("no picture"),
            {},
            "b.png cannot be read as a picture: cannot identify",
        ),
        (lambda f: (f / "a.png").unlink(), {}, "must hold pictures"),
        (lambda f: half_red().save(f / "a.jpg"), {}, "not in suffix alone.*\\['a.jpg', 'a.png'\\]"),
        (
            lambda f: (f / "masks").mkdir(),
            {},
            "must have a mask of the same name in .*masks, or an alpha channel, but \\['a.png'\\] have none",
        ),
        (lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\xff"), {}, "must be text in UTF-8"),
        (None, {"resolution": 0}, "`resolution` must be at least 1"),
        (None, {"masks": "nowhere"}, "`masks` must be a folder or a list of masks, got nowhere"),
        (None, {"masks": [white(), white()]}, "`masks` must hold one for each of the 1 pictures, .* got 2"),
        (
            None,
            {"masks": [white(64, 32)]},
            "mask of a.png must be of the picture's size, \\(64, 64\\), or of its shape.*, got \\(64, 32\\)",
        ),
        (None, {"masks": [Image.new("L", (64, 64))]}, "mask of a.png must show the object"),
        (
            None,
            {"masks": [3]},
            "the mask of a.png must be a path, a Pillow image, an array or a tensor, got int",
        ),
        (None, {"captions": "a"}, "`captions` must be a list with a text for each picture, got 'a'"),
        (None, {"captions": []}, "`captions` must hold one for each of the 1 pictures"),
        (None, {"images": []}, "`images` must hold at least one picture"),
        (None, {"images": "nowhere"}, "`images` must be a folder"),
    ],
)
def test_what_is_refused(tmp_path, change, options, message):
    half_red().save(tmp_path / "a.png")
    if change is not None:
        change(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pictures(**{"images": tmp_path, "resolution": 64} | options)
