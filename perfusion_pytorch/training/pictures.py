"""Training pictures: a folder of files or pictures in memory, captions beside them, masks of the object."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from beartype import beartype
from torch import Tensor

from perfusion_pytorch.extras import required

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MASKS = "masks"  # the folder of masks within a folder of pictures
CLEAR_MASK = 0.1  # below this largest probability, the model that makes masks sees no object


@dataclass(frozen=True, eq=False)
class Picture:
    """A training picture, cut and scaled to a square. Axes: h, w pixels of the square.

    Attributes:
        name: its file's name, or its number where it has none.
        pixels: shape (3, h, w), in [-1, 1].
        mask: shape (h, w), from 0 to 1: how much each pixel is of the object; None where every pixel counts alike.
        captions: texts, none where the templates are meant.
        original_size: (height, width) of the whole picture.
        crop: (top, left) of the square in the scaled picture.
    """

    name: str
    pixels: Tensor
    mask: Tensor | None
    captions: tuple[str, ...]
    original_size: tuple[int, int]
    crop: tuple[int, int]

    def image(self):
        """Return the square as a Pillow image."""
        return _pillow().Image.fromarray(((self.pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def _pillow():
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
        images: a folder (jpg, png, webp, in the order of their names), or pictures: paths or Pillow's images. Turned as EXIF says.
        resolution: edge of the square that each becomes, in pixels.
        masks: a folder with a mask of the same name (any of the suffixes) for each picture, or a mask for each; white is the object. By
            default the folder `masks` in the pictures' own, where there is one.
        use_masks: False leaves even that folder alone.
        captions: a text for each picture, None where it has none. By default what stands beside a picture in a text file of its name,
            one caption a line.
        center_crop: scale the shorter side to the resolution and cut out the middle; otherwise the whole picture is squeezed into the
            square.

    Raises:
        ValueError: no pictures, a broken one, a mask that is missing, of another size or empty, or counts that differ.

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
    masks = _masks(masks if use_masks else None, images, names)
    if captions is not None and len(captions) != len(images):
        raise ValueError(
            f"`captions` must hold one for each of the {len(images)} pictures, None where there is none, got {len(captions)}."
        )
    pictures = []
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        opened = _opened(pil, image, name, "RGB")
        mask = None if masks is None else _opened(pil, masks[i], f"the mask of {name}", "L")
        if mask is not None and mask.size != opened.size:
            raise ValueError(
                f"The mask of {name} must be of the picture's size, {opened.size}, got {mask.size}. Make it of the same file."
            )
        texts = _captions(image) if captions is None else [captions[i]] if captions[i] else []
        picture = _square(pil, name, opened, mask, resolution, center_crop)
        pictures.append(replace(picture, captions=tuple(texts)))
    small = [p.name for p in pictures if min(p.original_size) < resolution]
    if small:
        warnings.warn(
            f"Pictures smaller than the resolution of {resolution} are scaled up, and blurred: {small}.",
            stacklevel=2,
        )
    return pictures


def _is_path(image):
    return isinstance(image, (str, os.PathLike))


def _paths(folder):
    if not folder.is_dir():
        raise ValueError(
            f"`images` must be a folder of pictures or a list of them, got {folder}, which is no folder."
        )
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(f"{folder} must hold pictures ({', '.join(SUFFIXES)}), but none was found.")
    stems = [path.stem for path in paths]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(
            f"Pictures in one folder must differ in name, not in suffix alone, since captions and masks have it: {twice}."
        )
    stray = [
        path.name
        for path in files
        if path not in paths and not (path.suffix == ".txt" and path.stem in stems)
    ]
    if stray:
        warnings.warn(f"{folder} holds files that are no pictures; they are left out: {stray}.", stacklevel=3)
    return paths


def _captions(image):
    if not _is_path(image) or not (path := Path(image).with_suffix(".txt")).is_file():
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The caption {path} must be text in UTF-8, but it cannot be read: {error}."
        ) from error


def _masks(masks, images, names):
    """Return a mask for each picture, a path or an image, or None."""
    if masks is None:
        return None
    if not _is_path(masks):
        if len(masks) != len(images):
            raise ValueError(
                f"`masks` must hold one for each of the {len(images)} pictures, got {len(masks)}."
            )
        return list(masks)
    folder = Path(masks)
    if not folder.is_dir():
        raise ValueError(f"`masks` must be a folder or a list of masks, got {folder}, which is no folder.")
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    missing = [name for name in names if Path(name).stem not in found]
    if missing:
        raise ValueError(
            f"Every picture must have a mask of its name in {folder}, but there is none for {missing}."
        )
    return [found[Path(name).stem] for name in names]


def _opened(pil, image, name, mode):
    """Return an image as it is meant to be seen: read whole, turned, without an alpha channel."""
    if not _is_path(image) and not isinstance(image, pil.Image.Image):
        raise ValueError(f"{name} must be a path or a Pillow image, got {type(image).__name__}.")
    try:
        image = pil.Image.open(image) if _is_path(image) else image
        image = pil.ImageOps.exif_transpose(image)
        image.load()
        if (
            image.has_transparency_data
        ):  # what is seen through is white in a picture, and not of the object in a mask
            image, behind = image.convert("RGBA"), "white" if mode == "RGB" else "black"
            image = pil.Image.alpha_composite(pil.Image.new("RGBA", image.size, behind), image)
        return image.convert(mode)
    except (OSError, SyntaxError, ValueError, pil.Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} cannot be read as a picture: {error}. Save it again, or take it out."
        ) from error


def _values(image):
    """Return an image's numbers from 0 to 255 as floats, shape (h, w, channels)."""
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, -1).float()


def _square(pil, name, image, mask, edge, center_crop):
    width, height = image.size
    size = (edge, edge)
    if center_crop:
        scale = edge / min(width, height)
        size = (max(edge, round(width * scale)), max(edge, round(height * scale)))
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    box = (left, top, left + edge, top + edge)
    pixels = image.resize(size, pil.Image.Resampling.LANCZOS) if image.size != size else image
    pixels = _values(pixels.crop(box)).permute(2, 0, 1) / 127.5 - 1
    if mask is not None:
        mask = mask.resize(size, pil.Image.Resampling.BOX) if mask.size != size else mask
        mask = _values(mask.crop(box))[:, :, 0] / 255
        if not mask.any():
            raise ValueError(
                f"The mask of {name} must show the object within the square that is trained on, but it is empty there."
            )
    return Picture(name, pixels, mask, (), (height, width), (top, left))


@beartype
def add_masks(
    pictures: list[Picture], text: str, model: str | os.PathLike, *, device: torch.device | str = "cpu"
) -> list[Picture]:
    """Return the pictures with masks that a CLIPSeg model makes of them, as the paper does: where is what a text names?

    Args:
        pictures: what to find the object in.
        text: the superclass, such as "teddy bear".
        model: name or folder of a CLIPSeg model for transformers, such as "CIDAS/clipseg-rd64-refined".
        device: where the model runs.

    Raises:
        ValueError: the model cannot be loaded.

    Warns:
        UserWarning: the model finds no such thing in a picture.
    """
    transformers = required("transformers")
    try:
        processor = transformers.CLIPSegProcessor.from_pretrained(model)
        network = transformers.CLIPSegForImageSegmentation.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`mask_model` must be a CLIPSeg model's name or folder, but {str(model)!r} cannot be loaded: {error}"
        ) from error
    network = network.eval().to(device)
    masked, unseen = [], []
    for picture in pictures:
        inputs = processor(text=[text], images=[picture.image()], padding=True, return_tensors="pt").to(
            device
        )
        with torch.no_grad():
            logits = network(**inputs).logits
        found = logits.float().sigmoid().reshape(1, 1, *logits.shape[-2:])
        if found.max() < CLEAR_MASK:
            unseen.append(picture.name)
        mask = torch.nn.functional.interpolate(
            found, picture.pixels.shape[1:], mode="bilinear", antialias=True
        )
        masked.append(replace(picture, mask=mask[0, 0].clamp(0, 1).cpu()))
    if unseen:
        warnings.warn(
            f"The model of masks sees no {text!r} in {unseen} and may mark anything. Draw masks by hand.",
            stacklevel=2,
        )
    return masked
