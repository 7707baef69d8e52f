"""Masks of the object, made by a model that finds in a picture what a text names."""

import os
from dataclasses import replace

import torch
from beartype import beartype

from perfusion_pytorch.extras import required
from perfusion_pytorch.hub import check_is_available
from perfusion_pytorch.training.pictures import MASK_MODEL, Picture
from perfusion_pytorch.user_warnings import warn_user

CLEAR_MASK = 0.1  # where the largest probability of a picture is below this, the model sees no object there


@beartype
def add_masks(
    pictures: list[Picture], text: str, model: str | os.PathLike, *, device: torch.device | str = "cpu"
) -> list[Picture]:
    """Return the pictures with masks from a CLIPSeg model, as in the paper: where is what the text names?

    Args:
        pictures: where to find the object.
        text: the superclass, such as "teddy bear".
        model: name or folder of a CLIPSeg model for transformers, such as "CIDAS/clipseg-rd64-refined".
        device: where the model runs.

    Raises:
        ValueError: the model cannot be loaded.

    Warns:
        UserWarning: the model does not find the object in a picture.
    """
    transformers = required("transformers")
    try:
        check_is_available(str(model), filename="config.json")
        processor = transformers.CLIPSegProcessor.from_pretrained(model)
        network = transformers.CLIPSegForImageSegmentation.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`mask_model` must be a CLIPSeg model's name or folder, but {str(model)!r} cannot be loaded: "
            f"{error}"
        ) from error
    network = network.eval().to(device)
    masked = []
    unseen = []
    for picture in pictures:
        inputs = processor(text=[text], images=[picture.image()], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = network(**inputs.to(device)).logits
        found = logits.float().sigmoid().reshape(1, 1, *logits.shape[-2:])
        if found.max() < CLEAR_MASK:
            unseen.append(picture.name)
        size = picture.pixels.shape[1:]
        mask = torch.nn.functional.interpolate(found, size, mode="bilinear", antialias=True)
        masked.append(replace(picture, mask=mask[0, 0].clamp(0, 1).cpu(), mask_source=MASK_MODEL))
    if unseen:
        warn_user(
            f"The mask model does not find {text!r} in {unseen}; its masks there may mark anything. "
            "Draw masks by hand."
        )
    return masked
