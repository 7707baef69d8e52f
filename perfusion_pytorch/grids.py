"""Pictures side by side under labels, as one picture, and pictures as files."""

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from beartype import beartype

from perfusion_pytorch.files import write_atomically

if TYPE_CHECKING:
    import PIL.Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

SMALLEST_CELL = 160  # pixels; smaller pictures are enlarged, so that labels fit above them
GAP = 4


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


def write_png(path: str | os.PathLike, image: "PIL.Image.Image", description: str | None = None) -> None:
    """Write a Pillow image as a PNG file, atomically.

    Args:
        path: the file.
        image: the picture.
        description: a text that viewers show with it.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    if description is not None:
        about.add_itxt("Description", description)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=about)
    write_atomically(path, data.getvalue())
