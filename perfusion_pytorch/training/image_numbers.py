"""Images whose numbers are not bytes: 16 bits, 32 bits, floats; and images as arrays and tensors."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perfusion_pytorch.extras import required

if TYPE_CHECKING:
    from PIL.Image import Image

TOP_16 = 2**16 - 1
ACCEPTED = "booleans, unsigned 8-bit or 16-bit integers, or floats from 0 to 1"
ARRAY_DTYPES = ("bool", "uint8", "uint16", "float16", "float32", "float64")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


def grey_of_wide(image: "Image", name: str) -> "Image":
    """Scale a grey image of 16 bits, 32 bits or floats by its own range, to 8 bits.

    Args:
        image: of Pillow's mode I;16 and its siblings, I or F. Pillow itself clips it at 255.
        name: what messages call it.

    Returns:
        An image in the mode L, or LA if a grey is declared to be transparent.

    Raises:
        ValueError: the range of its numbers is not known.
    """
    tags = getattr(image, "tag_v2", {})
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        raise ValueError(
            f"{name} must store black as 0, but it is a TIFF of mode {image.mode} that stores white as 0. "
            "Save it in 8 bits."
        )
    if image.mode == "F":
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32)
        grey = _bytes_of_floats(values, f"{name}, of Pillow's mode F,")
    else:
        top = TOP_16
        if image.mode == "I":
            if image.format not in ("PNG", "PPM"):  # these have 16 bits
                raise ValueError(
                    f"{name} is of Pillow's mode I, whose largest number can be anything. "
                    "Save it in 8 or 16 bits, or give an array of unsigned 8-bit or 16-bit integers."
                )
        elif TIFF_BITS in tags:
            top = 2 ** tags[TIFF_BITS][0] - 1  # 12 bits are stored in the lower ones of 16
        values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
        grey = _scaled(values, top)
    pil = required("PIL.Image")
    whole = pil.frombytes("L", image.size, grey.numpy().tobytes())
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        opaque = (values != clear).to(torch.uint8) * 255
        whole = pil.merge("LA", (whole, pil.frombytes("L", image.size, opaque.numpy().tobytes())))
    return whole


def image_of_numbers(numbers: Any, name: str) -> "Image":
    """Return an array or a tensor as a Pillow image.

    Args:
        numbers: an array of shape (h, w) or (h, w, channels), or a tensor of shape (h, w) or
            (channels, h, w).
        name: what messages call it.

    Raises:
        ValueError: it is something else, or the range of its numbers is not known.
    """
    is_tensor = isinstance(numbers, Tensor)
    if not is_tensor and not hasattr(numbers, "__array_interface__"):
        raise ValueError(
            f"{name} must be a path, a Pillow image, an array or a tensor, got {type(numbers).__name__}."
        )
    shape = tuple(numbers.shape)
    channels = 1 if len(shape) == 2 else shape[0 if is_tensor else -1] if len(shape) == 3 else 0
    if channels not in MODES or 0 in shape:
        expected = "(1, 3 or 4 channels, h, w)" if is_tensor else "(h, w, 1, 3 or 4 channels)"
        raise ValueError(f"{name} must have shape (h, w) or {expected}, got {shape}.")
    if is_tensor:
        if numbers.is_meta or numbers.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor that holds numbers, got {numbers.layout}.")
        pixels = numbers.detach().cpu()
    else:
        array = required("numpy").array(numbers, order="C")  # a copy, since torch takes no flipped arrays
        if array.dtype.name not in ARRAY_DTYPES:
            raise ValueError(f"{name} must hold {ACCEPTED}, got {array.dtype}.")
        pixels = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    if len(shape) == 3 and is_tensor:
        pixels = pixels.movedim(0, -1)
    grey = _bytes_of(pixels, name).contiguous()
    size = (grey.shape[1], grey.shape[0])
    return required("PIL.Image").frombytes(MODES[channels], size, grey.numpy().tobytes())


def _bytes_of(pixels: Tensor, name: str) -> Tensor:
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.uint16:
        return _scaled(pixels.to(torch.int32), TOP_16)
    if pixels.is_floating_point():
        return _bytes_of_floats(pixels.float(), name)
    raise ValueError(f"{name} must hold {ACCEPTED}, got {pixels.dtype}.")


def _scaled(values: Tensor, top: int) -> Tensor:
    return ((values * 255 + top // 2) // top).to(torch.uint8)


def _bytes_of_floats(values: Tensor, name: str) -> Tensor:
    if not ((values >= 0) & (values <= 1)).all():
        low, high = values.min().item(), values.max().item()
        raise ValueError(
            f"{name} must hold floats from 0 to 1, got {low:.4g} to {high:.4g}. "
            "Scale them, or save it in 8 bits."
        )
    return (values * 255).round().to(torch.uint8)
