"""Colours of photos that are stored for another colour space than sRGB, such as a phone's Display P3."""

import io
from typing import TYPE_CHECKING

from perfusion_pytorch.extras import required

if TYPE_CHECKING:
    from PIL.Image import Image

UNREADABLE = "A damaged colour profile is left aside: {}."
PROFILED = ("RGB", "RGBA", "RGBX", "CMYK")  # modes whose embedded profiles are followed


def in_srgb(image: "Image") -> tuple["Image", str | None]:
    """Return an image with its colours in sRGB, as models are trained on and viewers show them.

    Args:
        image: of any mode. An alpha channel stays as it is; so does an image without a profile.

    Returns:
        The image, and a sentence with {} for its name if its profile cannot be used.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in PROFILED:
        return image, None
    cms = required("PIL.ImageCms")
    try:
        own = cms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in cms.getProfileDescription(own):
            return image, None  # to the bit
        colours = image if image.mode == "CMYK" else image.convert("RGB")
        converted = cms.profileToProfile(colours, own, cms.createProfile("sRGB"), outputMode="RGB")
    except (cms.PyCMSError, ImportError, OSError, ValueError, TypeError):
        return image, UNREADABLE
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    elif "transparency" in image.info:
        return image, None  # one of the stored colours is transparent
    return converted, None
