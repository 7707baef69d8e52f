"""Uploads: bounded, and copied under names that are only names."""

from pathlib import Path

import pytest
from PIL import Image

from perfusion_pytorch.app import uploads
from perfusion_pytorch.app.uploads import check_picture, stage_pictures


@pytest.fixture
def picture(tmp_path):
    """Return a function that writes a picture of a name, as the server keeps it, and returns its path."""

    def write(name, size=(8, 8), folder="sent"):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size).save(path)
        return str(path)

    return write


def test_pictures_and_masks_are_copied_as_training_finds_them(picture, tmp_path):
    sent = [picture("a b.PNG"), picture("..sécret$.jpg")]
    folder = stage_pictures(sent, [picture("a b.png", folder="masks")], tmp_path / "run" / "pictures")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "a b.png",
        "masks/a b.png",
        "sécret_.jpg",
    ]


@pytest.mark.parametrize("count", [0, 51])
def test_their_number_is_bounded(picture, tmp_path, count):
    with pytest.raises(ValueError, match=f"There must be 1 to 50 pictures .* got {count} pictures"):
        stage_pictures([picture("a.png")] * count, [], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_their_bytes_are_bounded(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match=r"a\.png must be at most 0 MB"):
        stage_pictures([picture("a.png")], [], tmp_path / "run")


def test_their_pixels_are_bounded_before_they_are_read(picture, monkeypatch):
    path = Path(picture("large.png", size=(10, 11)))
    monkeypatch.setattr(uploads, "MOST_PIXELS", 109)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("read as a whole"))
    with pytest.raises(ValueError, match=r"large\.png must have at most 109 pixels"):
        check_picture(path)


def test_what_is_not_a_picture_is_refused(tmp_path, picture):
    (tmp_path / "sent").mkdir()
    for name, text in (("a.svg", "<svg/>"), ("b.png", "not a picture")):
        (tmp_path / "sent" / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} must be a (whole )?picture"):
            stage_pictures([str(tmp_path / "sent" / name)], [], tmp_path / "run")


def test_a_mask_without_a_picture_and_two_of_a_name_are_refused(picture, tmp_path):
    with pytest.raises(ValueError, match=r"Each mask must have its picture's name, but \['b.png'\]"):
        stage_pictures([picture("a.png")], [picture("b.png")], tmp_path / "run")
    with pytest.raises(ValueError, match=r"Files must differ in name, got \['a.png', 'a.png'\]"):
        stage_pictures([picture("a.png"), picture("a.png", folder="other")], [], tmp_path / "run")
