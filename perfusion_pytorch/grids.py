"""Pictures side by side under labels, as one picture, and pictures as files."""

import io
import os
from collections.abc import Sequence

from beartype import beartype

from perfusion_pytorch.files import write_atomically

SMALLEST_CELL = 160  # pixels; smaller pictures are enlarged, so that labels fit above them
GAP = 4


@beartype
def labelled_grid(rows: Sequence[tuple[str, Sequence]], columns: Sequence[str]):
    """Lay pictures of one size out in rows, with a label to the left of each row and above each column.

    Args:
        rows: for each row its label, which may be empty, and a Pillow image for each column.
        columns: labels, broken into lines where they are longer than a picture is wide.

    Returns:
        A Pillow image.

    Raises:
        ValueError: there are no pictures, they differ in size, or a row has another number of them than there are columns.

    Example:
        labelled_grid([("beta 0.5", images)], ["a photo of a <teddy-1>", "a <teddy-1> in a boat"]).save("grid.png")
    """
    from PIL import Image, ImageDraw, ImageFont

    sizes = {image.size for _, images in rows for image in images}
    if len(sizes) != 1 or any(len(images) != len(columns) for _, images in rows):
        counts = [len(images) for _, images in rows]
        raise ValueError(
            f"There must be a picture of one size for each of {len(columns)} columns, got {counts} of the sizes {sorted(sizes)}."
        )
    ((width, height),) = sizes
    zoom = max(1, -(-SMALLEST_CELL // min(width, height)))
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(max(14, width // 24))
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def wrapped(text, limit):
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and pen.textlength(longer, font) > limit:
                lines.append(word)
            else:
                lines[-1] = longer
        return "\n".join(lines)

    heads = [wrapped(label, width) for label in columns]
    sides = [label.replace(", ", "\n") for label, _ in rows]
    # From (0, 0), which lies above the first letter's top.
    top = max(pen.multiline_textbbox((0, 0), head, font)[3] for head in heads) + 3 * GAP
    left = (
        max((pen.multiline_textbbox((0, 0), side, font)[2] for side in sides if side), default=-2 * GAP)
        + 3 * GAP
    )
    sheet = Image.new(
        "RGB", (int(left) + len(columns) * (width + GAP), int(top) + len(rows) * (height + GAP)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        pen.multiline_text((int(left) + i * (width + GAP), GAP), head, "black", font)
    for j, (side, (_, images)) in enumerate(zip(sides, rows, strict=True)):
        y = int(top) + j * (height + GAP)
        pen.multiline_text((GAP, y + GAP), side, "black", font)
        for i, image in enumerate(images):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST) if zoom > 1 else image
            sheet.paste(enlarged, (int(left) + i * (width + GAP), y))
    return sheet


def write_png(path: str | os.PathLike, image, description: str | None = None) -> None:
    """Write a Pillow image whole or not at all, with a text that viewers show; an OSError where it cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    about, data = PngInfo(), io.BytesIO()
    if description is not None:
        about.add_itxt("Description", description)
    image.save(data, "PNG", pnginfo=about)
    write_atomically(path, data.getvalue())
