"""What a run says before its first step, through the log."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.inputs import TrainingInputs
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.pictures import Picture
from perfusion_pytorch.training.resuming import Start

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def announce(
    pipe: StableDiffusion,
    options: TrainingOptions,
    accelerator: "Accelerator",
    inputs: TrainingInputs,
    start: Start | None,
) -> None:
    """Log what a run will do: its pictures and masks, the hardware, the steps, and its folder."""
    if not accelerator.is_main_process:
        return
    logger.info("Training %s (%s).", options.token, options.superclass)
    for name, text in _facts(pipe, options, accelerator, inputs, start):
        logger.info("  %-10s %s", name, text)


def announce_covariance(covariance: InputCovariance, seconds: float) -> None:
    """Log what the input covariance is of, and how long it took: next to nothing if it was cached."""
    tokens = f"{covariance.num_tokens:,} tokens, " if covariance.num_tokens > 1 else ""
    logger.info("  %-10s %s%d features, after %.1f s", "covariance", tokens, covariance.dim, seconds)


def _facts(
    pipe: StableDiffusion,
    options: TrainingOptions,
    accelerator: "Accelerator",
    inputs: TrainingInputs,
    start: Start | None,
) -> Iterator[tuple[str, str]]:
    count, edge = len(inputs.pictures), inputs.resolution
    where = f" of {options.images}" if isinstance(options.images, str | os.PathLike) else ""
    shape = "cut to the middle square" if options.center_crop else "squeezed into a square"
    yield "pictures", f"{count}{where}, {shape}, {edge} x {edge} pixels"
    yield "masks", _masks(options, inputs)
    yield "prompts", f"{len(inputs.prompts)}, such as {inputs.prompts[0]!r}"
    weights = str(pipe.unet.dtype).removeprefix("torch.")
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    precision = accelerator.mixed_precision
    yield "hardware", f"{accelerator.device}, weights in {weights}, mixed precision: {precision}{processes}"
    rows = options.train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes
    yield "steps", f"{options.max_train_steps} of {rows} rows: {_phases(options)}"
    if start is not None:
        yield "resumes", f"{start.checkpoint}, after step {start.step} of {options.max_train_steps}"
    interval = options.checkpointing_steps
    kept = f", of which {limit} are kept" if (limit := options.checkpoints_total_limit) else ""
    checkpoints = "no checkpoints" if interval is None else f"a checkpoint every {interval} steps{kept}"
    yield "output", f"{options.output_dir}, {checkpoints}"


def _phases(options: TrainingOptions) -> str:
    first = options.num_embedding_steps
    if first == 0:
        return "embedding and value outputs at once"
    return f"{first} for the embedding, then {options.max_train_steps - first} for the value outputs"


def _masks(options: TrainingOptions, inputs: TrainingInputs) -> str:
    """Say how many pictures have a mask, and where it is from."""
    count = sum(picture.mask is not None for picture in inputs.pictures)
    if not count:
        return "none, so that the background is learned too"
    sources = Counter(
        _source(picture, options) for picture in inputs.pictures if picture.mask is not None
    ).most_common()
    # Of several sources, each with its number.
    names = [f"{number} {source}" if len(sources) > 1 else source for source, number in sources]
    return f"{count} of {len(inputs.pictures)}: {', '.join(names)}"


def _source(picture: Picture, options: TrainingOptions) -> str:
    """Say where a picture's mask is from."""
    if options.mask_model is not None:
        return f"by {options.mask_model}"
    source = getattr(picture, "mask_source", None)
    if source is not None:
        path = Path(source)
        return f"in {path.parent}" if path.is_file() else str(source)
    if isinstance(options.masks, str | os.PathLike):
        return f"in {options.masks}"
    if options.masks is None and isinstance(options.images, str | os.PathLike):
        return f"in {Path(options.images) / 'masks'}"
    return "given"
