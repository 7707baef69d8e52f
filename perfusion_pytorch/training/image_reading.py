"""Read an image of any kind and pixel depth: upright, in 8 bits, its alpha channel beside its colours."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from perfusion_pytorch.extras import required
from perfusion_pytorch.training.colour_profiles import in_srgb
from perfusion_pytorch.training.image_numbers import grey_of_wide, image_of_numbers

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112  # the EXIF tag
# How pixels are turned for each EXIF orientation to be seen upright, by the names of Pillow's `Transpose`.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
INVERSE = {6: 8, 8: 6}  # the other turns are their own inverses
# Pillow scales these greys of PNG files to 255, but not the grey that such a file declares to be transparent.
GREY_STEPS = {"L;2": 85, "L;4": 17}
SEQUENCES = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")  # formats of several frames; a phone's JPEG hides previews
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
FIRST_FRAME = "Only the first frame is read of pictures with several: {}."
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error)


@dataclass(frozen=True, eq=False)
class ReadImage:
    """An image as it is meant to be seen, in 8 bits a channel.

    Attributes:
        colours: a Pillow image in RGB, on white where one sees through it.
        alpha: how opaque each pixel is, in 8 bits; None if all are opaque.
        orientation: the EXIF orientation, 1 to 8, from which it was turned upright; 1 for none.
        notes: what the user should know of it: sentences with {} for the names of images.
    """

    colours: "Image"
    alpha: "Image | None"
    orientation: int
    notes: tuple[str, ...] = ()

    def turned_like(self, orientation: int) -> "ReadImage":
        """Return the image as it is seen if its stored pixels are of another orientation."""

        def turn(image: "Image") -> "Image":
            back = INVERSE.get(self.orientation, self.orientation)
            return turned(turned(image, back), orientation)

        alpha = None if self.alpha is None else turn(self.alpha)
        return ReadImage(turn(self.colours), alpha, orientation, self.notes)


def pillow() -> Any:
    """Return the package PIL."""
    required("PIL.ImageOps")  # and with it PIL.Image
    return required("PIL")


def is_path(image: object) -> TypeGuard[str | os.PathLike]:
    """Tell whether this is a path, not an image in memory."""
    return isinstance(image, (str, os.PathLike))


def turned(image: "Image", orientation: int) -> "Image":
    """Turn stored pixels of an EXIF orientation upright."""
    if orientation not in TURNS:
        return image
    return image.transpose(getattr(pillow().Image.Transpose, TURNS[orientation]))


def read_image(image: Any, name: str) -> ReadImage:
    """Read an image whole.

    Args:
        image: a path; a Pillow image; an array of shape (h, w) or (h, w, channels); or a tensor of shape
            (h, w) or (channels, h, w). Numbers are booleans, bytes, 16-bit integers, or floats from 0 to 1.
        name: what messages call it.

    Raises:
        ValueError: it is damaged, or the range of its numbers is not known.
        ImportError: its format needs a package that is missing.
    """
    pil = pillow()
    if is_path(image):
        with _open(pil, Path(image), name) as opened:  # a file of several frames stays open otherwise
            read = _read(pil, opened, name)
            is_sequence = opened.format in SEQUENCES and getattr(opened, "n_frames", 1) > 1
            return replace(read, notes=(*read.notes, FIRST_FRAME)) if is_sequence else read
    if isinstance(image, pil.Image.Image):
        return _read(pil, image, name)
    return _read(pil, image_of_numbers(image, name), name)


def _read(pil: Any, opened: Any, name: str) -> ReadImage:
    """Read an image that Pillow has opened."""
    with _damage_told(name):
        raw_mode = str(opened.tile[0][3]) if getattr(opened, "tile", None) else ""
        orientation = _orientation(opened)  # which loads a PNG file
        opened.load()
        remaining = _orientation(opened)  # Pillow turns TIFF files while it loads them
    is_wide = opened.mode == "F" or opened.mode.startswith("I")
    bytewise = grey_of_wide(opened, name) if is_wide else opened
    with _damage_told(name):
        bytewise, fault = in_srgb(bytewise)
        colours, alpha = _colours_and_alpha(pil, bytewise, raw_mode)
        whole = turned(colours, remaining), None if alpha is None else turned(alpha, remaining)
    return ReadImage(*whole, orientation, () if fault is None else (fault,))


@contextmanager
def _damage_told(name: str) -> Iterator[None]:
    try:
        yield
    except (*DAMAGE, pillow().Image.DecompressionBombError) as error:
        remedy = "Save it again, or remove it."
        if isinstance(error, PermissionError):
            remedy = "Allow this user to read it, or remove it."
        elif isinstance(error, FileNotFoundError):
            remedy = "Check the path."
        elif isinstance(error, pillow().Image.DecompressionBombError):
            remedy = "Save it smaller."
        raise ValueError(f"{name} cannot be read as a picture: {error}. {remedy}") from error


def _open(pil: Any, path: Path, name: str) -> "Image":
    """Open a file; name the package that its format needs."""
    with _damage_told(name):
        with path.open("rb") as file:
            head = file.read(12)
        brand = head[8:12] if head[4:8] == b"ftyp" else b""
        if brand in HEIF_BRANDS:
            _add_heif(name)
        elif brand in (b"avif", b"avis") and not required("PIL.features").check("avif"):
            raise ImportError(
                f"{name} is an AVIF picture, which this Pillow cannot read. "
                "Run pip install --upgrade pillow, or save it as PNG."
            )
        return pil.Image.open(path)


def _add_heif(name: str) -> None:
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise ImportError(
            f"{name} is a HEIC picture, which needs the package pillow-heif ({error}). "
            "Run pip install pillow-heif, or save it as JPEG."
        ) from error


def _orientation(image: "Image") -> int:
    value = image.getexif().get(ORIENTATION, 1)
    return value if value in TURNS else 1


def _colours_and_alpha(pil: Any, image: "Image", raw_mode: str) -> tuple["Image", "Image | None"]:
    """Return colours on white, and the alpha channel if any pixel can be seen through."""
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    if image.mode == "La":
        image = image.convert("LA")
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and (raw_mode.startswith("RGB;16") or max(clear) > 255):
        clear = tuple(value >> 8 for value in clear)
    elif isinstance(clear, int):
        clear *= GREY_STEPS.get(raw_mode, 1)
    if clear != image.info.get("transparency"):
        image = image.copy()  # the user's own image keeps its info
        image.info["transparency"] = clear
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return rgba.convert("RGB"), None
    white = pil.Image.new("RGBA", image.size, "white")
    return pil.Image.alpha_composite(white, rgba).convert("RGB"), alpha
