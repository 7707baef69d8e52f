"""Uploads: bounded, and copied under names that are only names."""

from pathlib import Path

import pytest
from PIL import Image

from perfusion_pytorch.app import uploads
from perfusion_pytorch.app.uploads import check_picture, stage_files, stage_pictures


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


@pytest.fixture
def weights(tmp_path):
    """Return a function that writes files as the server keeps them, and returns their paths."""

    def write(*names):
        paths = [tmp_path / "sent" / str(number) / name for number, name in enumerate(names)]
        for path in paths:
            path.parent.mkdir(parents=True)
            path.write_bytes(path.name.encode())
        return [str(path) for path in paths]

    return write


def test_weights_are_copied_under_plain_names_and_pefts_configuration_beside_its_own(weights, tmp_path):
    sent = weights("..a$.SAFETENSORS", "adapter_model.safetensors", "adapter_config.json")
    staged = stage_files(sent, tmp_path / "run")
    assert [path.relative_to(tmp_path / "run").as_posix() for path in staged] == [
        "a_/a_.safetensors",
        "adapter_model/adapter_model.safetensors",
    ]
    assert staged[0].read_bytes() == b"..a$.SAFETENSORS"
    assert [path.name for path in (tmp_path / "run").rglob("*.json")] == ["adapter_config.json"]
    assert staged[1].with_name("adapter_config.json").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.safetensors"] * 9, "At most 8 files can be added, got 9"),
        (["a.bin"], r"a\.bin must be a \.safetensors file, or peft's adapter_config\.json"),
        (["a$.safetensors", "a%.safetensors"], r"Files must differ in name, got \['a_\.safetensors', 'a_"),
        (["a.safetensors", "adapter_config.json"], "belongs to adapter_model.safetensors, which is missing"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        stage_files(weights(*names), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_bytes_of_weights_are_bounded(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_BYTES", 5)
    with pytest.raises(ValueError, match=r"a\.safetensors must be at most 0 MB"):
        stage_files(weights("a.safetensors"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"adapter_config\.json must be at most 0 MB"):
        monkeypatch.setattr(uploads, "MOST_BYTES", 26)
        Path(tmp_path / "large").mkdir()
        (tmp_path / "large" / "adapter_config.json").write_bytes(bytes(27))
        (tmp_path / "large" / "adapter_model.safetensors").write_bytes(bytes(2))
        stage_files([str(path) for path in (tmp_path / "large").iterdir()], tmp_path / "run")
