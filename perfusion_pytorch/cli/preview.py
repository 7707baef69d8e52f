"""`perfusion train --preview`: show what would be trained on, and train nothing."""

from collections.abc import Mapping
from typing import Any

import torch

from perfusion_pytorch.cli.command import Say
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.preview import write_preview


def run_preview(pipe: StableDiffusion, options: Mapping[str, Any], device: torch.device, say: Say) -> None:
    """Write the sheet of squares and masks of a run, and say what to look at.

    Args:
        pipe: the pipeline to be trained.
        options: the arguments of `train_concept`.
        device: where a model that makes masks runs.
        say: shows a line.
    """
    path, inputs = write_preview(pipe, TrainingOptions(**options), device)
    masked = sum(picture.mask is not None for picture in inputs.pictures)
    edge, count = inputs.resolution, len(inputs.pictures)
    say(
        f"Wrote {path}: {count} pictures of {edge} x {edge} pixels, {masked} with masks. Nothing was trained."
    )
    say("What to look at:")
    say("  left          the object is whole, upright and sharp in every square")
    say("  middle        it is white, and all else is black; an all-white mask marks everything")
    say("  right         it has its own colours, and all else is tinted")
    say("To train on this, type the same command without --preview.")
