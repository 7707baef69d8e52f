"""A sheet of the squares and masks of a run, to look at before it is trained."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perfusion_pytorch.extras import required
from perfusion_pytorch.grids import write_png
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.checkpoints import check_output_dir
from perfusion_pytorch.training.inputs import TrainingInputs, check_folders, load_inputs
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.pictures import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

PREVIEW_FILE = "preview.png"
HEADING = "Left: trained on. Middle: the mask, white counts. Right: the rest is tinted."
PAGE = (225, 225, 225)  # so that the edge of a white square is seen
TINT = (255, 0, 255)  # of what does not count
STRENGTH = 0.65
SMALLEST_SQUARE = 160  # smaller ones are enlarged, larger ones are shown pixel by pixel
MOST_PIXELS = 60_000_000  # of a sheet; beyond it, squares are reduced
GAP = 6


def write_preview(
    pipe: StableDiffusion, options: TrainingOptions, device: torch.device
) -> tuple[Path, TrainingInputs]:
    """Write `preview.png` into a run's folder: its squares and masks, from the function that training uses.

    Args:
        pipe: the pipeline to be trained.
        options: the run's.
        device: where a model that makes masks runs.

    Returns:
        The file, and what the run would be trained on.

    Raises:
        ValueError: what `load_inputs` refuses.
        OSError: the file cannot be written.
    """
    check_folders(options)
    inputs = load_inputs(pipe, options, device)
    path = check_output_dir(options.output_dir, 0) / PREVIEW_FILE
    write_png(path, preview_sheet(inputs.pictures))
    return path, inputs


def preview_sheet(pictures: Sequence[Picture]) -> "Image":
    """Lay out pictures: the square, its mask, and both together, with name and source of the mask under them.

    Args:
        pictures: one or more, of one resolution.

    Returns:
        A Pillow image.
    """
    required("PIL.ImageDraw"), required("PIL.ImageFont")
    pil = required("PIL")
    edge, columns = pictures[0].pixels.shape[-1], _columns(len(pictures))
    rows = ceil(len(pictures) / columns)
    shown = edge * ceil(SMALLEST_SQUARE / edge)  # a multiple, so that pixels stay squares
    while 3 * shown**2 * columns * rows > MOST_PIXELS:
        shown //= 2
    font = pil.ImageFont.load_default(max(14, shown // 24))
    line = sum(font.getmetrics()) + GAP if hasattr(font, "getmetrics") else 14 + GAP
    width, height = 3 * (shown + GAP) + GAP, shown + 2 * line + 2 * GAP
    top = line + 2 * GAP
    sheet = pil.Image.new("RGB", (columns * width + GAP, top + rows * height), PAGE)
    pen = pil.ImageDraw.Draw(sheet)
    pen.text((2 * GAP, GAP), _fitting(HEADING, sheet.width - 3 * GAP, pen, font), "black", font)
    for number, picture in enumerate(pictures):
        x, y = GAP + number % columns * width, top + number // columns * height
        for i, square in enumerate(_squares(picture)):
            resampling = pil.Image.Resampling.NEAREST if shown >= edge else pil.Image.Resampling.BOX
            sheet.paste(square.resize((shown, shown), resampling), (x + GAP + i * (shown + GAP), y))
        for i, text in enumerate(_about(picture)):
            place = (x + GAP, y + shown + GAP + i * line)
            pen.text(place, _fitting(text, width - 2 * GAP, pen, font), "black", font)
    return sheet


def _columns(count: int) -> int:
    """Return how many pictures stand side by side: each is thrice as wide as high."""
    return ceil((count / 3) ** 0.5)


def _squares(picture: Picture) -> list["Image"]:
    """Return the square, its mask, and the square with the tint where the mask does not count."""
    pil = required("PIL.Image")
    image = picture.image()
    mask = pil.new("L", image.size, 255)
    if picture.mask is not None:
        weights = picture.mask / picture.mask.max()  # as the loss scales it
        mask = pil.fromarray((weights * 255).round().byte().numpy())
    tinted = pil.blend(image, pil.new("RGB", image.size, TINT), STRENGTH)
    return [image, mask.convert("RGB"), pil.composite(image, tinted, mask)]


def _about(picture: Picture) -> tuple[str, str]:
    """Return two lines: name and size; the mask."""
    height, width = picture.original_size
    name = f"{picture.name} ({width} x {height})"
    if picture.mask is None:
        return name, "no mask: the background is learned too"
    return name, f"mask: {picture.mask_source}, {picture.mask.mean().item():.0%} of the square"


def _fitting(text: str, limit: int, pen: Any, font: Any) -> str:
    """Return a text that is at most so many pixels wide, with dots in its middle where it was longer."""
    kept = len(text)
    shorter = text
    while kept > 8 and pen.textlength(shorter, font) > limit:
        kept -= max(1, kept // 20)
        shorter = f"{text[: kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shorter
