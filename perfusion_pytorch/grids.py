"""Pictures side by side under labels, as one picture, and pictures as files."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.extras import required
from perfusion_pytorch.files import write_atomically

if TYPE_CHECKING:
    import PIL.Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

SMALLEST_CELL = 160  # pixels; smaller pictures are enlarged, so that labels fit above them
GAP = 4
FACTS = "perfusion"  # the name of the text in a PNG file that says what it was made with


@beartype
def labelled_grid(rows: Sequence[tuple[str, Sequence]], columns: Sequence[str]) -> "PIL.Image.Image":
    """Lay out pictures of one size in rows, with a label to the left of each row and above each column.

    Args:
        rows: for each row its label, which may be empty, and a Pillow image for each column.
        columns: labels, broken into lines where they are wider than a picture.

    Returns:
        A Pillow image.

    Raises:
        ValueError: there are no pictures, they differ in size, or a row does not have one for each column.

    Example:
        prompts = ["a photo of a <teddy-1>", "a <teddy-1> in a boat"]
        labelled_grid([("beta 0.5", images)], prompts).save("grid.png")
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = _size_of_pictures(rows, columns)
    zoom = max(1, -(-SMALLEST_CELL // min(width, height)))
    width *= zoom
    height *= zoom
    font = ImageFont.load_default(max(14, width // 24))
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heads = [_wrapped(label, width, pen, font) for label in columns]
    sides = [label.replace(", ", "\n") for label, _ in rows]
    # Measured from (0, 0), which lies above the top of the first letter.
    heights = [pen.multiline_textbbox((0, 0), head, font)[3] for head in heads]
    widths = [pen.multiline_textbbox((0, 0), side, font)[2] for side in sides if side]
    top = int(max(heights) + 3 * GAP)
    left = int(max(widths, default=-2 * GAP) + 3 * GAP)
    sheet = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        pen.multiline_text((left + i * (width + GAP), GAP), head, "black", font)
    for j, (side, (_, images)) in enumerate(zip(sides, rows, strict=True)):
        y = top + j * (height + GAP)
        pen.multiline_text((GAP, y + GAP), side, "black", font)
        for i, image in enumerate(images):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST) if zoom > 1 else image
            sheet.paste(enlarged, (left + i * (width + GAP), y))
    return sheet


def _size_of_pictures(rows: Sequence[tuple[str, Sequence]], columns: Sequence[str]) -> tuple[int, int]:
    """Return the (width, height) of all pictures; a ValueError where they do not fit together."""
    sizes = {image.size for _, images in rows for image in images}
    counts = [len(images) for _, images in rows]
    if len(sizes) != 1 or any(count != len(columns) for count in counts):
        raise ValueError(
            f"There must be a picture of one size for each of {len(columns)} columns, "
            f"got {counts} of the sizes {sorted(sizes)}."
        )
    return sizes.pop()


def _wrapped(text: str, limit: int, pen: "ImageDraw", font: "FreeTypeFont | ImageFont") -> str:
    """Break a text into lines of at most so many pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer, font) > limit:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def write_png(
    path: str | os.PathLike,
    image: "PIL.Image.Image",
    description: str | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a Pillow image as a PNG file, atomically; its folder is made where it does not exist.

    Args:
        path: the file.
        image: the picture.
        description: a text that viewers show with it.
        facts: what it was made with, for `read_picture_facts`; what JSON can hold.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    if description is not None:
        # An argument of the command line can hold bytes that are not text.
        about.add_itxt("Description", description.encode("utf-8", "replace").decode())
    if facts is not None:
        about.add_itxt(FACTS, json.dumps(facts))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=about)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())


@beartype
def read_picture_facts(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a picture of `perfusion generate` or of a training run was made with.

    Args:
        path: a PNG file.

    Returns:
        The prompts, seeds, steps and guidance; the model; the concepts with their gates and the SHA-256 of
        their files; the versions of this library and others.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a whole PNG file, or does not say what it was made with.

    Example:
        read_picture_facts("grid.png")["concepts"][0]["beta"]
    """
    Image = required("PIL.Image")
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no picture {path}.")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # texts may come after the pixels
            facts = json.loads(image.text.get(FACTS, "null"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} must be a whole PNG file, but it cannot be read: {error}.") from error
    if not isinstance(facts, dict):
        raise ValueError(
            f"{path} must say what it was made with, but it does not. Other programs leave this out when "
            "they save a picture."
        )
    return facts
