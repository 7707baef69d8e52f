"""Read training pictures from files or memory, with captions beside them and masks of the object."""

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from beartype import beartype
from torch import Tensor

from perfusion_pytorch.extras import required
from perfusion_pytorch.training.image_reading import ReadImage, is_path, pillow, read_image
from perfusion_pytorch.training.picture_checks import Findings, warn_of_masks, warn_of_pictures
from perfusion_pytorch.training.picture_files import (
    MASKS,
    captions_beside,
    masks_in,
    masks_missing,
    pictures_in,
)

if TYPE_CHECKING:
    from PIL.Image import Image

GIVEN, ALPHA, MASK_MODEL = "given", "alpha channel", "mask model"  # where a mask is from, if not from a file
MOSTLY = 0.5  # part of an object
COLOURED = 32  # of 255: a mask's channels may differ by rounding, and by lossy compression


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
        mask_source: where the mask comes from: its file, "given", "alpha channel", or "mask model"; None
            without a mask.
    """

    name: str
    pixels: Tensor
    mask: Tensor | None
    captions: tuple[str, ...]
    original_size: tuple[int, int]
    crop: tuple[int, int]
    mask_source: str | None = None

    def image(self) -> "Image":
        """Return the square as a Pillow image."""
        return pillow().Image.fromarray(((self.pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


class Mask(NamedTuple):
    """A mask of a whole picture: an image in the mode L, white is the object; and where it comes from."""

    image: "Image"
    source: str


@beartype
def load_pictures(
    images: str | os.PathLike | Iterable,
    *,
    resolution: int,
    masks: str | os.PathLike | Iterable | None = None,
    use_masks: bool = True,
    captions: Sequence[str | None] | None = None,
    center_crop: bool = True,
) -> list[Picture]:
    """Read training pictures, with their captions and masks.

    A picture is turned as its EXIF data says, its numbers are scaled by the range of its own format, its
    colours are in sRGB, and what one sees through is white. Of an animation the first frame is read.

    Args:
        images: a folder of pictures (see `SUFFIXES`; in the order of their names), or several pictures:
            paths, Pillow images, arrays of shape (h, w, channels), or tensors of shape (channels, h, w).
        resolution: edge of the square that each picture becomes, in pixels.
        masks: a folder with a mask of the same name (any of the suffixes) for each picture, or a mask for
            each, or None for it. A mask that can be seen through somewhere marks the object by its alpha
            channel, any other by its brightness: white is the object. By default the folder `masks` in the
            pictures' folder, if it exists. A picture without such a mask is masked by its own alpha channel,
            if it can be seen through somewhere.
        use_masks: False uses no masks at all.
        captions: a text for each picture, or None. By default the lines of the text file beside a picture, of
            the same name: one caption a line.
        center_crop: scale the shorter side to the resolution and cut out the middle; otherwise the whole
            picture is squeezed into the square.

    Raises:
        ValueError: no pictures, a broken one, one whose numbers have no known range, a mask that is missing,
            of another shape or empty, or counts that differ.
        ImportError: a picture's format needs a package that is missing.

    Warns:
        UserWarning: something will hardly be what is meant: what is left out of the folder, pictures that are
            small, long, or the same, masks that mark everything or look inverted, and more.
    """
    if masks is not None and not use_masks:
        raise ValueError(
            "`masks` must not be given along with `use_masks=False`, which uses none. Leave one of them out."
        )
    if resolution < 1:
        raise ValueError(f"`resolution` must be at least 1 pixel, got {resolution}.")
    given: list[Any] = list(pictures_in(Path(images))) if is_path(images) else _listed(images, "images", 4)
    if not given:
        raise ValueError("`images` must hold at least one picture, got none.")
    names = [Path(image).name if is_path(image) else f"picture {i}" for i, image in enumerate(given)]
    texts = _captions(captions, given)
    chosen = _chosen_masks(images, masks) if use_masks else None
    found = _masks(chosen, names, tell_unused=is_path(images))
    findings = Findings()
    pictures: list[Picture] = []
    missing: list[str] = []
    for name, image, mask, lines in zip(names, given, found, texts, strict=True):
        read = read_image(image, name)
        for note in read.notes:
            findings.add(note, name)
        whole = _mask(read, mask, name, findings) if use_masks else None
        if whole is None:
            missing.append(name)
        pictures.append(_square(name, read.colours, whole, lines, resolution, center_crop, findings))
    if missing and is_path(chosen):
        raise masks_missing(Path(chosen), missing)
    findings.warn()
    warn_of_pictures(pictures, resolution, center_crop=center_crop)
    warn_of_masks(pictures)
    return pictures


def _chosen_masks(images: Any, masks: Any) -> Any:
    """Return the given masks, or by default the folder of masks in the folder of pictures."""
    if masks is None and is_path(images) and (Path(images) / MASKS).is_dir():
        return Path(images) / MASKS
    if is_path(images) and is_path(masks) and Path(masks).resolve() == Path(images).resolve():
        raise ValueError(f"`masks` must be another folder than that of the pictures, got {masks} for both.")
    return masks


def _listed(several: Any, name: str, axes: int) -> list[Any]:
    """Return pictures or masks as a list; refuse an array of one, whose rows would be taken for many."""
    if isinstance(several, (Set, Mapping)):
        raise ValueError(
            f"`{name}` must be several in an order, got a {type(several).__name__}. Give a list, so that "
            "masks and captions go with their pictures."
        )
    shape = getattr(several, "shape", None)
    if shape is not None and len(shape) < axes:
        raise ValueError(
            f"`{name}` must be several, or an array or tensor of them with {axes} axes, got the shape "
            f"{tuple(shape)}. Put a single one into a list."
        )
    return list(several)


def _captions(captions: Sequence[str | None] | None, images: list[Any]) -> list[tuple[str, ...]]:
    """Return the captions of each picture."""
    if captions is None:
        return [tuple(captions_beside(Path(image))) if is_path(image) else () for image in images]
    if isinstance(captions, str):
        raise ValueError(f"`captions` must be a list with a text for each picture, got {captions!r}.")
    if len(captions) != len(images):
        raise ValueError(
            f"`captions` must hold one for each of the {len(images)} pictures, or None, got {len(captions)}."
        )
    return [(text,) if text else () for text in captions]


def _masks(masks: Any, names: list[str], *, tell_unused: bool) -> list[Any]:
    """Return a mask for each picture: a path, an image, or None."""
    if masks is None:
        return [None] * len(names)
    if is_path(masks):
        return masks_in(Path(masks), names, tell_unused=tell_unused)
    listed = _listed(masks, "masks", 3)
    if len(listed) != len(names):
        raise ValueError(
            f"`masks` must hold one for each of the {len(names)} pictures, or None, got {len(listed)}."
        )
    return listed


def _mask(picture: ReadImage, mask: Any, name: str, findings: Findings) -> Mask | None:
    """Return the mask of a whole picture, or None if it has none."""
    if mask is None:
        return None if picture.alpha is None else Mask(picture.alpha, ALPHA)
    read = _aligned(picture, read_image(mask, f"the mask of {name}"), name, findings)
    for note in read.notes:
        findings.add(note, f"the mask of {name}")
    source = os.fspath(mask) if is_path(mask) else GIVEN
    if read.alpha is not None:
        return Mask(read.alpha, source)
    channels = read.colours.split()
    differences = [required("PIL.ImageChops").difference(channels[0], other) for other in channels[1:]]
    if max(difference.getextrema()[1] for difference in differences) > COLOURED:
        findings.add(
            "Masks in colour mark the object by their brightness, which is hardly what is meant: {}. "
            "Give masks in black and white, or with an alpha channel.",
            name,
        )
    return Mask(read.colours.convert("L"), source)


def _aligned(picture: ReadImage, mask: ReadImage, name: str, findings: Findings) -> ReadImage:
    """Return a mask turned as its picture is; a ValueError if its shape is another.

    Where their EXIF orientations differ, the mask may be made from the picture as it is seen, or as it is
    stored. The shapes tell which, if only one fits.
    """
    size = picture.colours.size
    if mask.orientation != picture.orientation:
        as_stored = mask.turned_like(picture.orientation)
        fits = _is_shaped_like(size, mask.colours.size)
        if fits and _is_shaped_like(size, as_stored.colours.size):
            findings.add(
                "EXIF data turns the picture or its mask, but not both alike: {}. The mask is used as image "
                "viewers show it. Check that it covers the object, or save both without EXIF data.",
                f"{name} (orientation {picture.orientation}, its mask {mask.orientation})",
            )
        elif not fits:
            mask = as_stored
    if not _is_shaped_like(size, mask.colours.size):
        raise ValueError(
            f"The mask of {name} must be of the picture's size, {size}, or of its shape at another scale, "
            f"got {mask.colours.size}. Make it from the same file."
        )
    if mask.colours.size != size:
        findings.add(
            "Masks of another size than their picture's are scaled to it: {}.",
            f"{name} {size}, {mask.colours.size}",
        )
    return mask


def _is_shaped_like(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Tell whether two sizes are of one shape, up to a pixel in each direction."""
    (width, height), (w, h) = size, other
    return size == other or abs(width * h - height * w) <= max(width + height, w + h)


def _square(
    name: str,
    image: "Image",
    mask: Mask | None,
    captions: tuple[str, ...],
    edge: int,
    center_crop: bool,
    findings: Findings,
) -> Picture:
    """Return a picture and its mask scaled to a square."""
    width, height = image.size
    scaled = (edge, edge)
    if center_crop:
        scale = edge / min(width, height)
        scaled = (max(edge, round(width * scale)), max(edge, round(height * scale)))
    crop = ((scaled[1] - edge) // 2, (scaled[0] - edge) // 2)
    filters = pillow().Image.Resampling
    pixels = _cut(image, scaled, crop, edge, filters.LANCZOS).permute(2, 0, 1) / 127.5 - 1
    shown = None
    if mask is not None:
        shown = _cut(mask.image, scaled, crop, edge, filters.BOX)[:, :, 0] / 255
        if not shown.any():
            raise ValueError(
                f"The mask of {name} must show the object within the square that is trained on, "
                "but it is empty there. Mark the object, cut out a square around it, or squeeze the whole "
                "picture (see `center_crop`)."
            )
        part = shown.mean() * edge**2 / (scaled[0] * scaled[1])
        if part < MOSTLY * _values(mask.image).mean() / 255:
            findings.add(
                "More than half of the object lies outside the middle square, which alone is trained on: {}. "
                "Cut out a square around it, or squeeze the whole picture (see `center_crop`).",
                name,
            )
    source = None if mask is None else mask.source
    return Picture(name, pixels, shown, captions, (height, width), crop, source)


def _cut(image: "Image", scaled: tuple[int, int], crop: tuple[int, int], edge: int, filter: Any) -> Tensor:
    """Return a square of a scaled image, shape (edge, edge, channels); `crop` is its (top, left).

    Nothing outside the square is scaled, so that a long picture needs no more memory than another.
    """
    (width, height), (top, left) = image.size, crop
    x, y = width / scaled[0], height / scaled[1]  # pixels of the image for one of the scaled image
    box = (left * x, top * y, min(width, (left + edge) * x), min(height, (top + edge) * y))
    return _values(image.resize((edge, edge), filter, box))


def _values(image: "Image") -> Tensor:
    """Return an image's numbers from 0 to 255 as floats, shape (h, w, channels)."""
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, -1).float()
