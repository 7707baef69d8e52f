"""What belongs to a training run of what is in a folder, and what is said of the rest."""

import os
from pathlib import Path

import pytest
from helpers.pictures import half_red, left_white
from PIL import Image

from perfusion_pytorch.training.pictures import load_pictures


@pytest.mark.parametrize(
    "suffix", ["avif", "bmp", "gif", "jfif", "jpeg", "JPG", "png", "tif", "tiff", "WebP"]
)
def test_pictures_of_every_suffix_are_found(tmp_path, suffix):
    form = {"avif": "AVIF", "jfif": "JPEG"}.get(suffix)
    half_red().save(tmp_path / f"a.{suffix}", form)
    (picture,) = load_pictures(tmp_path, resolution=64)
    assert picture.pixels[0, :, :28].mean() > 0.9 and picture.pixels[0, :, 36:].mean() < -0.9


def test_what_is_left_out_of_a_folder_is_named(tmp_path):
    half_red().save(tmp_path / "a.png")
    for name in ("notes.txt", "a.txt", "a.TXT", ".hidden.png", "film.mp4"):
        (tmp_path / name).write_text("a car")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "more").mkdir()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.warns(UserWarning) as warned:
        (picture,) = load_pictures(tmp_path, resolution=64)
    assert picture.captions == ("a car",)
    (message,) = (str(warning.message) for warning in warned)
    assert "files that are not pictures: ['a.TXT', 'film.mp4', 'notes.txt', 'pipe.png']" in message
    assert "folders: ['folder.png', 'more']" in message
    assert "links that lead nowhere: ['b.png', 'loop.png']" in message and "hidden" not in message


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "day 1").mkdir()
    half_red().save(tmp_path / "day 1" / "a.png")
    with pytest.raises(ValueError, match=r"must hold pictures .* It holds folders: \['day 1'\]"):
        load_pictures(tmp_path, resolution=64)


def test_pictures_behind_links_are_read(tmp_path):
    (tmp_path / "store").mkdir()
    half_red().save(tmp_path / "store" / "x.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(tmp_path / "store" / "x.png")
    (picture,) = load_pictures(tmp_path / "links", resolution=64)
    assert picture.name == "a.png"


def with_masks(folder, *names):
    (folder / "masks").mkdir(exist_ok=True)
    for name in names:
        left_white().save(folder / "masks" / name)


def test_two_masks_of_one_picture_are_refused(tmp_path):
    half_red().save(tmp_path / "a.png")
    with_masks(tmp_path, "a.jpg", "a.png")
    with pytest.raises(ValueError, match=r"Masks in one folder must differ in name.*\['a.jpg', 'a.png'\]"):
        load_pictures(tmp_path, resolution=64)


def test_one_mask_of_two_pictures_is_refused(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        half_red().save(tmp_path / folder / "a.png")
    with_masks(tmp_path, "a.png")
    images = [tmp_path / "one" / "a.png", tmp_path / "two" / "a.png"]
    with pytest.raises(
        ValueError, match=r"must have names of their own where a folder of masks.*\['a.png'\]"
    ):
        load_pictures(images, resolution=64, masks=tmp_path / "masks")
    assert len(load_pictures(images, resolution=64)) == 2


def test_masks_that_belong_to_no_picture_are_named(tmp_path):
    half_red().save(tmp_path / "a.png")
    with_masks(tmp_path, "a.png", "b.png", "b.jpg")
    with pytest.warns(UserWarning, match=r"masks without a picture.*left out: \['b.jpg', 'b.png'\]"):
        load_pictures(tmp_path, resolution=64)


def test_a_missing_mask_is_named_with_what_there_is(tmp_path):
    half_red().save(tmp_path / "a.png")
    with_masks(tmp_path, "a_mask.png")
    with (
        pytest.warns(UserWarning, match="masks without a picture"),
        pytest.raises(ValueError, match=r"but \['a.png'\] have none. The folder holds \['a_mask.png'\]"),
    ):
        load_pictures(tmp_path, resolution=64)


def test_a_mask_that_leads_nowhere_is_refused(tmp_path):
    half_red().save(tmp_path / "a.png")
    with_masks(tmp_path)
    (tmp_path / "masks" / "a.png").symlink_to("gone")
    with pytest.raises(ValueError, match=r"these are folders or lead nowhere: \['a.png'\]"):
        load_pictures(tmp_path, resolution=64)


def test_the_pictures_are_not_taken_for_their_masks(tmp_path):
    half_red().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="`masks` must be another folder than that of the pictures"):
        load_pictures(tmp_path, resolution=64, masks=tmp_path / "." / "")


def test_a_picture_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    half_red().save(tmp_path / "a.png")

    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture: .*denied.* Allow this user"):
        load_pictures(tmp_path, resolution=64)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match=r"must be a folder that can be read, .*denied"):
        load_pictures(tmp_path, resolution=64)


def test_odd_names_are_found_with_their_masks_and_captions(tmp_path):
    for stem in ("ein Bär.v2", "a.b", "-x"):
        half_red().save(tmp_path / f"{stem}.png")
        (tmp_path / f"{stem}.txt").write_text(f"a car of {stem}", encoding="utf-8")
        with_masks(tmp_path, f"{stem}.png")
    with pytest.warns(UserWarning, match="Some pictures are the same"):
        pictures = load_pictures(tmp_path, resolution=64)
    assert [p.captions for p in pictures] == [("a car of -x",), ("a car of a.b",), ("a car of ein Bär.v2",)]
    assert all(p.mask is not None for p in pictures)


def test_a_mask_may_have_any_suffix(tmp_path):
    half_red().save(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    Image.merge("RGB", [left_white()] * 3).save(tmp_path / "masks" / "a.BMP")
    (picture,) = load_pictures(tmp_path, resolution=64)
    assert picture.mask[:, :32].all() and not picture.mask[:, 32:].any()
    assert picture.mask_source == str(tmp_path / "masks" / "a.BMP")


def test_masks_and_captions_are_found_however_letters_with_marks_are_written(tmp_path):
    """An archive from a Mac writes ä as two characters."""
    composed, decomposed = "B\u00e4r", "Ba\u0308r"
    half_red().save(tmp_path / f"{composed}.png")
    (tmp_path / f"{decomposed}.txt").write_text("a car", encoding="utf-8")
    with_masks(tmp_path, f"{decomposed}.png")
    (picture,) = load_pictures(tmp_path, resolution=64)
    assert picture.captions == ("a car",) and picture.mask is not None
