"""Pictures of one size on one sheet, from which they can be cut again to the bit."""

import numpy as np
from PIL import Image
from task import SIZE

COLUMNS = 10


def lay_out(images):
    """Lay pictures out in rows of ten."""
    sheet = Image.new("RGB", (COLUMNS * SIZE, -(-len(images) // COLUMNS) * SIZE))
    for i, image in enumerate(images):
        sheet.paste(image, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    return sheet


def cut(sheet, count):
    """Return the first `count` pictures of a sheet."""
    boxes = [(i % COLUMNS * SIZE, i // COLUMNS * SIZE) for i in range(count)]
    return [sheet.crop((x, y, x + SIZE, y + SIZE)) for x, y in boxes]


def cached(path, make, count):
    """Return the pictures of a sheet's file; where it is missing, `make()` makes them for it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}-{np.random.default_rng().integers(2**32)}.partial")
        lay_out(make()).save(partial, format="PNG")
        partial.replace(path)
    with Image.open(path) as sheet:
        return cut(sheet.convert("RGB"), count)
