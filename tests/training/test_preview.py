"""The sheet of squares and masks shows what training uses, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers.pictures import half_red, left_white
from helpers.small_model import MODEL
from helpers.tiny_pipes import RESOLUTION, options_for, tiny_pipe, with_trainer
from PIL import Image

from perfusion_pytorch.training import preview
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.pictures import load_pictures
from perfusion_pytorch.training.preview import GAP, PREVIEW_FILE, TINT, preview_sheet, write_preview

PICTURES = Path(__file__).parents[2] / "examples" / "shapes" / "pictures"


def odd_pictures(folder):
    """A folder with a long photo that is turned by EXIF, a 16-bit grey with a mask, and a cut-out."""
    folder.mkdir()
    photo = half_red(24, 40).transpose(Image.Transpose.ROTATE_90)
    photo.getexif()[0x0112] = 6
    photo.save(folder / "a.jpg", exif=photo.getexif(), quality=95)
    greys = np.arange(32 * 32, dtype="<u2").reshape(32, 32) * 64
    Image.frombytes("I;16", (32, 32), greys.tobytes()).save(folder / "b.png")
    cut_out = half_red(20, 20).convert("RGBA")
    cut_out.putalpha(left_white(20, 20))
    cut_out.save(folder / "c.webp", lossless=True)
    (folder / "masks").mkdir()
    left_white(24, 40).save(folder / "masks" / "a.png")
    left_white(32, 32).save(folder / "masks" / "b.png")
    return folder


def place_of(sheet, square):
    """Return (top, left) of a square within a sheet, or None where it is nowhere."""
    height, width = square.shape[:2]
    rows = np.lib.stride_tricks.sliding_window_view(sheet[:, :, 0], width, axis=1)
    for top, left in np.argwhere((rows == square[0, :, 0]).all(-1)):
        if np.array_equal(sheet[top : top + height, left : left + width], square):
            return int(top), int(left)
    return None


def test_the_sheet_has_the_pixels_and_masks_that_training_uses(tmp_path, monkeypatch):
    images = odd_pictures(tmp_path / "pictures")
    options = options_for(tmp_path / "out", masks=None)
    encoded, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(
        AutoencoderKL, "encode", lambda vae, pixels: encoded.append(pixels) or encode(vae, pixels)
    )
    masks = with_trainer(tmp_path / "run", lambda trainer: trainer.material.masks, images, masks=None)
    path, inputs = write_preview(tiny_pipe(), TrainingOptions(images=images, **options), torch.device("cpu"))
    assert path == tmp_path / "out" / PREVIEW_FILE and len(inputs.pictures) == len(encoded) == 3
    sheet = np.asarray(Image.open(path)).astype(int)
    zoom = 160 // RESOLUTION
    shown = zoom * RESOLUTION
    for pixels, mask in zip(encoded, masks, strict=True):
        square = ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().int().numpy()
        top, left = place_of(sheet, square.repeat(zoom, 0).repeat(zoom, 1))
        cells = [
            sheet[top : top + shown : zoom, x : x + shown : zoom]
            for x in (left + shown + GAP, left + 2 * (shown + GAP))
        ]
        weights = torch.tensor(cells[0][:, :, 0] / 255)
        pooled = torch.nn.functional.interpolate(weights[None, None], mask.shape[-2:], mode="area")
        assert torch.allclose(pooled[0], mask.double() / mask.max(), atol=1 / 255) and mask.min() == 0
        tinted = square + preview.STRENGTH * (np.array(TINT) - square)
        expected = weights[..., None].numpy() * (square - tinted) + tinted
        assert abs(cells[1] - expected).max() <= 2


def texts_of(monkeypatch, pictures):
    texts = []
    from PIL import ImageDraw

    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda pen, place, text, *rest: texts.append(text) or draw(pen, place, text, *rest),
    )
    return preview_sheet(pictures), texts


def test_each_picture_is_named_with_its_mask(tmp_path, monkeypatch):
    images = odd_pictures(tmp_path / "pictures")
    (images / "masks" / "b.png").unlink()
    pictures = [*load_pictures(images, resolution=16, masks=[left_white(24, 40), None, None])]
    _, texts = texts_of(monkeypatch, pictures)
    assert texts[0] == preview.HEADING
    assert texts[1:] == [
        "a.jpg (24 x 40)",
        "mask: given, 50% of the square",
        "b.png (32 x 32)",
        "no mask: the background is learned too",
        "c.webp (20 x 20)",
        "mask: alpha channel, 50% of the square",
    ]


def test_long_and_foreign_names_fit(tmp_path, monkeypatch):
    name = "写真 " + "very long " * 30
    picture = tmp_path / f"{name[:200]}.png"
    half_red().save(picture)
    sheet, texts = texts_of(monkeypatch, load_pictures([picture], resolution=64))
    assert "…" in texts[1] and texts[1].startswith("写真") and texts[1].endswith("(64 x 64)")
    assert (np.asarray(sheet)[:, -GAP:] == preview.PAGE).all()  # nothing reaches the edge


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 1), (5, 2), (12, 2), (20, 3)])
def test_many_pictures_stand_in_columns(count, columns):
    (picture,) = load_pictures([half_red()], resolution=64)
    sheet = preview_sheet([picture] * count)
    assert (sheet.width - GAP) // columns == 3 * (192 + GAP) + GAP


def test_a_sheet_of_many_large_squares_is_reduced(monkeypatch):
    (picture,) = load_pictures([half_red(256, 256)], resolution=256)
    monkeypatch.setattr(preview, "MOST_PIXELS", 3 * 128**2 * 4)
    sheet = np.asarray(preview_sheet([picture] * 4))
    half = np.asarray(half_red(128, 128))
    assert place_of(sheet.astype(int), half.astype(int)) is not None


def test_the_command_writes_the_sheet_and_trains_nothing(run, tmp_path, monkeypatch):
    from perfusion_pytorch.cli import train as cli_train

    monkeypatch.setattr(cli_train, "train_concept", None)
    monkeypatch.setattr(cli_train, "cached_covariance", None)
    flags = ["--pretrained_model_name_or_path", MODEL, "--instance_data_dir", PICTURES]
    flags += ["--token", "<car-1>", "--superclass", "car", "--output_dir", tmp_path / "out", "--preview"]
    code, out, err = run("train", *flags)
    assert code == 0 and err == "" and [p.name for p in (tmp_path / "out").iterdir()] == [PREVIEW_FILE]
    assert f"Wrote {tmp_path / 'out' / PREVIEW_FILE}: 5 pictures of 64 x 64 pixels, 5 with masks." in out
    assert "Nothing was trained" in out and "without --preview" in out
    sheet = np.asarray(Image.open(tmp_path / "out" / PREVIEW_FILE)).astype(int)
    for number in range(1, 6):
        square = np.asarray(Image.open(PICTURES / f"{number}.png").convert("RGB")).astype(int)
        assert place_of(sheet, square.repeat(3, 0).repeat(3, 1)) is not None


def test_what_training_refuses_the_preview_refuses(run, tmp_path):
    flags = ["--pretrained_model_name_or_path", MODEL, "--instance_data_dir", tmp_path / "none"]
    flags += ["--token", "<car-1>", "--superclass", "car", "--output_dir", tmp_path / "out", "--preview"]
    code, out, err = run("train", *flags)
    assert (code, out) == (1, "") and "--instance_data_dir must be a folder of pictures" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inner", ["", "masks"])
def test_a_preview_does_not_become_a_training_picture(tmp_path, inner):
    folder = tmp_path / "pictures"
    (folder / "masks").mkdir(parents=True)
    half_red().save(folder / "a.png")
    left_white().save(folder / "masks" / "a.png")
    given = {"images": folder, "token": "<car-1>", "superclass": "car"}
    options = TrainingOptions(**given, output_dir=folder / inner)
    with pytest.raises(ValueError, match="`output_dir` must be another folder than `images` and its masks"):
        write_preview(tiny_pipe(), options, torch.device("cpu"))
    assert not list(folder.rglob(PREVIEW_FILE))
