"""Read training pictures from files or memory, with captions beside them and masks of the object."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from beartype import beartype
from torch import Tensor

from perfusion_pytorch.extras import required
from perfusion_pytorch.user_warnings import warn_user

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MASKS = "masks"  # the folder of masks within a folder of pictures


@dataclass(frozen=True, eq=False)
class Picture:
    """A training picture, cut and scaled to a square. Axes: h, w pixels of the square.

    Attributes:
        name: its file's name, or its number if it has none.
        pixels: shape (3, h, w), in [-1, 1].
        mask: shape (h, w), from 0 to 1: how far each pixel belongs to the object; None if every pixel counts
            equally.
        captions: texts; none where the templates are used.
        original_size: (height, width) of the whole picture.
        crop: (top, left) of the square in the scaled picture.
    """

    name: str
    pixels: Tensor
    mask: Tensor | None
    captions: tuple[str, ...]
    original_size: tuple[int, int]
    crop: tuple[int, int]

    def image(self) -> "Image":
        """Return the square as a Pillow image."""
        return _pillow().Image.fromarray(((self.pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def _pillow() -> Any:
    required("PIL.ImageOps")  # and with it PIL.Image
    return required("PIL")


@beartype
def load_pictures(
    images: str | os.PathLike | Sequence,
    *,
    resolution: int,
    masks: str | os.PathLike | Sequence | None = None,
    use_masks: bool = True,
    captions: Sequence[str | None] | None = None,
    center_crop: bool = True,
) -> list[Picture]:
    """Read training pictures, with their captions and masks.

    Args:
        images: a folder (jpg, png and webp files, in the order of their names), or a sequence of paths or
            Pillow images. They are rotated as their EXIF data says.
        resolution: edge of the square that each picture becomes, in pixels.
        masks: a folder with a mask of the same name (any of the suffixes) for each picture, or a mask for
            each; white is the object. By default the folder `masks` in the pictures' folder, if it exists.
        use_masks: False ignores that folder too.
        captions: a text for each picture, or None. By default the lines of the text file beside a picture, of
            the same name: one caption a line.
        center_crop: scale the shorter side to the resolution and cut out the middle; otherwise the whole
            picture is squeezed into the square.

    Raises:
        ValueError: no pictures, a broken one, a mask that is missing, of another size or empty, or counts
            that differ.

    Warns:
        UserWarning: the folder holds other files, or a picture is smaller than the resolution.
    """
    pil = _pillow()
    if resolution < 1:
        raise ValueError(f"`resolution` must be at least 1 pixel, got {resolution}.")
    folder = None
    if isinstance(images, (str, os.PathLike)):
        folder = Path(images)
        images = _paths(folder)
        if masks is None and (folder / MASKS).is_dir():
            masks = folder / MASKS
    if not images:
        raise ValueError("`images` must hold at least one picture, got none.")
    names = [Path(image).name if _is_path(image) else f"picture {i}" for i, image in enumerate(images)]
    found = _masks(masks if use_masks else None, names)
    if captions is not None and len(captions) != len(images):
        raise ValueError(
            f"`captions` must hold one for each of the {len(images)} pictures, or None, got {len(captions)}."
        )
    pictures = []
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        opened = _opened(pil, image, name, "RGB")
        mask = None if found is None else _opened(pil, found[i], f"the mask of {name}", "L")
        if mask is not None and mask.size != opened.size:
            raise ValueError(
                f"The mask of {name} must be of the picture's size, {opened.size}, got {mask.size}. "
                "Make it from the same file."
            )
        picture = _square(pil, name, opened, mask, resolution, center_crop)
        texts = _captions_beside(image) if captions is None else [text for text in (captions[i],) if text]
        pictures.append(replace(picture, captions=tuple(texts)))
    small = [p.name for p in pictures if min(p.original_size) < resolution]
    if small:
        warn_user(
            f"Pictures smaller than the resolution of {resolution} are scaled up, and blurred: {small}."
        )
    return pictures


def _is_path(image: object) -> TypeGuard[str | os.PathLike]:
    return isinstance(image, (str, os.PathLike))


def _paths(folder: Path) -> list[Path]:
    """Return the pictures of a folder, in the order of their names; warn of other files."""
    if not folder.is_dir():
        raise ValueError(
            f"`images` must be a folder of pictures or a list of them, got {folder}, which is not a folder."
        )
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(f"{folder} must hold pictures ({', '.join(SUFFIXES)}), but none was found.")
    stems = [path.stem for path in paths]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(
            "Pictures in one folder must differ in name, not in suffix alone, since captions and masks have "
            f"the same names: {twice}."
        )
    stray = [
        path.name
        for path in files
        if path not in paths and not (path.suffix == ".txt" and path.stem in stems)
    ]
    if stray:
        warn_user(f"{folder} holds files that are not pictures; they are left out: {stray}.")
    return paths


def _captions_beside(image: object) -> list[str]:
    """Return the lines of the text file beside a picture, if it exists."""
    if not _is_path(image) or not (path := Path(image).with_suffix(".txt")).is_file():
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The caption {path} must be text in UTF-8, but it cannot be read: {error}."
        ) from error


def _masks(masks: str | os.PathLike | Sequence[Any] | None, names: list[str]) -> list[Any] | None:
    """Return a mask for each picture, a path or an image; or None."""
    if masks is None:
        return None
    if not isinstance(masks, (str, os.PathLike)):
        if len(masks) != len(names):
            raise ValueError(
                f"`masks` must hold one for each of the {len(names)} pictures, got {len(masks)}."
            )
        return list(masks)
    folder = Path(masks)
    if not folder.is_dir():
        raise ValueError(f"`masks` must be a folder or a list of masks, got {folder}, which is not a folder.")
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    missing = [name for name in names if Path(name).stem not in found]
    if missing:
        raise ValueError(
            f"Every picture must have a mask of the same name in {folder}, but {missing} have none."
        )
    return [found[Path(name).stem] for name in names]


def _opened(pil: Any, image: Any, name: str, mode: str) -> "Image":
    """Return an image as it is meant to be seen: read whole, rotated, without an alpha channel.

    Transparent pixels become white in a picture, and background in a mask.
    """
    if not _is_path(image) and not isinstance(image, pil.Image.Image):
        raise ValueError(f"{name} must be a path or a Pillow image, got {type(image).__name__}.")
    try:
        image = pil.Image.open(image) if _is_path(image) else image
        image = pil.ImageOps.exif_transpose(image)
        image.load()
        if image.has_transparency_data:
            behind = pil.Image.new("RGBA", image.size, "white" if mode == "RGB" else "black")
            image = pil.Image.alpha_composite(behind, image.convert("RGBA"))
        return image.convert(mode)
    except (OSError, SyntaxError, ValueError, pil.Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} cannot be read as a picture: {error}. Save it again, or remove it."
        ) from error


def _values(image: "Image") -> Tensor:
    """Return an image's numbers from 0 to 255 as floats, shape (h, w, channels)."""
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, -1).float()


def _square(
    pil: Any, name: str, image: "Image", mask: "Image | None", edge: int, center_crop: bool
) -> Picture:
    """Return a picture and its mask scaled to a square, without captions."""
    width, height = image.size
    size = (edge, edge)
    if center_crop:
        scale = edge / min(width, height)
        size = (max(edge, round(width * scale)), max(edge, round(height * scale)))
    left = (size[0] - edge) // 2
    top = (size[1] - edge) // 2

    def cut(whole: "Image", resampling: Any) -> Tensor:
        scaled = whole.resize(size, resampling) if whole.size != size else whole
        return _values(scaled.crop((left, top, left + edge, top + edge)))

    pixels = cut(image, pil.Image.Resampling.LANCZOS).permute(2, 0, 1) / 127.5 - 1
    shown = None
    if mask is not None:
        shown = cut(mask, pil.Image.Resampling.BOX)[:, :, 0] / 255
        if not shown.any():
            raise ValueError(
                f"The mask of {name} must show the object within the square that is trained on, "
                "but it is empty there."
            )
    return Picture(name, pixels, shown, (), (height, width), (top, left))
