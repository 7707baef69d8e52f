"""Warn of pictures and masks that cannot teach what their user means, before training starts."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.nn.functional import adaptive_avg_pool2d

from perfusion_pytorch.training.picture_files import MOST_NAMES
from perfusion_pytorch.user_warnings import warn_user

if TYPE_CHECKING:
    from torch import Tensor

    from perfusion_pytorch.training.pictures import Picture

LONG = (
    2.5  # a side this much longer than the other is hardly seen in a square, or squeezed beyond recognition
)
FLAT = 0.2  # of 2, the range of pixels: less contrast shows nothing
TINY = 0.002  # part of the square: at 512 pixels, 3 x 3 of the latents
WHOLE = 0.98
NEARLY_WHOLE = 0.95
FAINT = 0.5
EDGE = 0.9  # where the border of a mask is this white and something within is not, it looks inverted
SMALL = 16  # pixels of the edge at which pictures are compared
ALIKE = 3 / 127.5  # mean difference of copies there: saved again, or at another size


class Findings:
    """Warnings that are issued together, one for each kind, with the names of all that it concerns."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)

    def add(self, sentence: str, name: str) -> None:
        """Note that a sentence, with {} for the names, is true of something."""
        self._names[sentence].append(name)

    def warn(self) -> None:
        """Issue the warnings."""
        for sentence, names in self._names.items():
            shown = list(dict.fromkeys(names))
            more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
            warn_user(sentence.format(", ".join(shown[:MOST_NAMES]) + more))


def warn_of_pictures(pictures: Sequence["Picture"], resolution: int, *, center_crop: bool) -> None:
    """Warn of pictures that are small, long, without contrast, or the same."""
    findings = Findings()
    seen: list[tuple[str, Tensor]] = []
    for picture in pictures:
        height, width = picture.original_size
        sized = f"{picture.name} ({width} x {height})"
        if min(width, height) < resolution:
            findings.add(
                f"Pictures smaller than the resolution of {resolution} are scaled up, and blurred: {{}}. "
                "Use larger ones, or a lower resolution.",
                sized,
            )
        if max(width, height) > LONG * min(width, height):
            findings.add(
                "Only the middle square of long pictures is trained on: {}. Cut out the object yourself."
                if center_crop
                else "Long pictures are squeezed into a square: {}. Cut out the object yourself.",
                sized,
            )
        contrast = picture.pixels.amax((1, 2)) - picture.pixels.amin((1, 2))  # of each channel
        if contrast.max() < FLAT:
            findings.add("Pictures of hardly more than one colour show nothing: {}.", picture.name)
        small = adaptive_avg_pool2d(picture.pixels, SMALL)
        same = next((name for name, other in seen if (other - small).abs().mean() < ALIKE), None)
        if same is None:
            seen.append((picture.name, small))
        elif contrast.max() >= FLAT:
            findings.add(
                "Some pictures are the same, and are learned from more often than others: {}. "
                "Different views teach more.",
                f"{same} = {picture.name}",
            )
    findings.warn()


def warn_of_masks(pictures: Sequence["Picture"]) -> None:
    """Warn of masks that mark everything, nearly nothing, the background, or are faint or missing."""
    findings = Findings()
    unmasked = [picture.name for picture in pictures if picture.mask is None]
    for name in unmasked if len(unmasked) < len(pictures) else ():
        findings.add(
            "Pictures without a mask are learned with their background, unlike the others: {}.",
            name,
        )
    for picture in pictures:
        if picture.mask is not None and (sentence := _fault_of(picture.mask)) is not None:
            findings.add(sentence, picture.name)
    findings.warn()


def _fault_of(mask: "Tensor") -> str | None:
    """Return what looks wrong with a mask, shape (h, w), from 0 to 1."""
    brightest = mask.max()
    if brightest < FAINT:
        return (
            "Masks whose brightest point is below half of white are scaled up to white: {}. "
            "White, 255 of 255, means the object."
        )
    share = mask.mean()
    if share > WHOLE:
        return (
            "Masks that mark all of the square keep nothing out: {}. The background must be black, or clear."
        )
    if share < TINY:
        return "Masks that mark less than 0.2 % of the square leave little to learn from: {}."
    width = max(1, min(mask.shape) // 16)
    inner = mask[width:-width, width:-width]
    border = (mask.sum() - inner.sum()) / (mask.numel() - inner.numel())
    if (border > EDGE and share < NEARLY_WHOLE) or _is_dark_in_white_corners(mask, width):
        return (
            "Masks look inverted, since they are white all around and dark within: {}. "
            "White means the object."
        )
    return None


def _is_dark_in_white_corners(mask: "Tensor", width: int) -> bool:
    """Tell whether a mask looks inverted, with an object that reaches to one of the edges."""
    height, middle = mask.shape[0] // 4, mask.shape[1] // 4
    ends = (slice(None, width), slice(-width, None))
    corners = [mask[rows, columns].mean() for rows in ends for columns in ends]
    centre = mask[height : mask.shape[0] - height, middle : mask.shape[1] - middle].mean()
    return bool(min(corners) > EDGE and centre < FAINT)
