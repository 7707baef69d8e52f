"""Photos of other colour spaces keep their colours."""

import struct

import numpy as np
import pytest
from helpers.pictures import half_red, left_white
from PIL import Image, ImageCms

from perfusion_pytorch.training.colour_profiles import UNREADABLE
from perfusion_pytorch.training.image_reading import read_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def wide_profile():
    """sRGB's profile with red and blue exchanged, so that it is seen whether a profile is followed."""
    data = bytearray(SRGB)
    count = struct.unpack(">I", data[128:132])[0]
    tags = {data[132 + 12 * i : 136 + 12 * i].decode(): 132 + 12 * i for i in range(count)}
    red, blue = (bytes(data[tags[name] + 4 : tags[name] + 12]) for name in ("rXYZ", "bXYZ"))
    data[tags["rXYZ"] + 4 : tags["rXYZ"] + 12], data[tags["bXYZ"] + 4 : tags["bXYZ"] + 12] = blue, red
    return bytes(data).replace(b"s\0R\0G\0B", b"o\0t\0h\0e").replace(b"\0s\0R\0G\0B", b"\0o\0t\0h\0e")


def saved(image, folder, name, profile):
    image.save(folder / name, icc_profile=profile)
    return folder / name


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_profile_is_followed_and_the_alpha_channel_kept(tmp_path, mode):
    image = half_red(mode=mode)
    if mode == "RGBA":
        image.putalpha(left_white())
    read = read_image(saved(image, tmp_path, "a.png", wide_profile()), "a")
    colour = np.asarray(read.colours)[:, :30].reshape(-1, 3).mean(0)
    assert colour[2] > 240 and colour[0] < 15 and not read.notes  # what is stored as red is shown as blue
    assert (read.alpha is None) == (mode == "RGB")


def test_srgb_and_no_profile_are_left_to_the_bit(tmp_path):
    noise = Image.effect_noise((32, 32), 100).convert("RGB")
    for profile in (SRGB, None):
        assert read_image(saved(noise, tmp_path, "a.png", profile), "a").colours.tobytes() == noise.tobytes()


def test_a_damaged_profile_is_told(tmp_path):
    read = read_image(saved(half_red(), tmp_path, "a.png", SRGB[:200]), "a")
    assert read.notes == (UNREADABLE,) and read.colours.tobytes() == half_red().tobytes()


def test_the_users_image_keeps_its_profile(tmp_path):
    image = Image.open(saved(half_red(), tmp_path, "a.png", wide_profile()))
    image.load()
    before = image.tobytes()
    read_image(image, "a")
    assert image.tobytes() == before and image.info["icc_profile"] == wide_profile()
