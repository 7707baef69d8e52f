"""What a user gives to a training run: pictures, prompts, and the input covariance."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.pipelines.covariance_cache import cached_covariance
from perfusion_pytorch.pipelines.model_notes import notes_of
from perfusion_pytorch.pipelines.parts import text_encoders_of
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.tokens import tokenize_with_concept
from perfusion_pytorch.training.masks import add_masks
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.picture_checks import warn_of_masks
from perfusion_pytorch.training.picture_files import MASKS
from perfusion_pytorch.training.pictures import Picture, load_pictures
from perfusion_pytorch.training.templates import TEMPLATES, training_prompts
from perfusion_pytorch.user_warnings import warn_user

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, eq=False)
class TrainingInputs:
    """The pictures and prompts of a run.

    Attributes:
        pictures: the training pictures.
        prompts: all training prompts, each once.
        prompts_of_pictures: for each picture, the numbers of the prompts that it may be trained with.
        resolution: edge of the pictures in pixels.
    """

    pictures: list[Picture]
    prompts: list[str]
    prompts_of_pictures: list[list[int]]
    resolution: int


def load_inputs(pipe: StableDiffusion, options: TrainingOptions, device: torch.device) -> TrainingInputs:
    """Read the pictures, make masks where a model is to make them, and put the prompts together.

    Args:
        pipe: the pipeline, which decides on the resolution where none is given.
        options: the run's.
        device: where the model that makes masks runs.

    Raises:
        ValueError: a picture, mask, caption or template does not fit, or the model does not take the
            resolution.
    """
    resolution = options.resolution or own_resolution(pipe)
    if resolution is None:
        raise ValueError("`resolution` must be given, since the UNet's `sample_size` is None. Try 512.")
    if resolution % pipe.vae_scale_factor:
        raise ValueError(
            f"`resolution` must be a multiple of {pipe.vae_scale_factor} pixels, got {resolution}."
        )
    pictures = load_pictures(
        options.images,
        resolution=resolution,
        masks=options.masks,
        use_masks=options.use_masks and options.mask_model is None,
        captions=options.captions,
        center_crop=options.center_crop,
    )
    if options.mask_model is not None:
        if isinstance(options.images, (str, os.PathLike)) and (Path(options.images) / MASKS).is_dir():
            warn_user(f"{Path(options.images) / MASKS} is not used, since `mask_model` makes the masks.")
        pictures = add_masks(pictures, options.superclass, options.mask_model, device=device)
        warn_of_masks(pictures)
    prompts, prompts_of_pictures = training_prompts(
        len(pictures),
        options.token,
        options.superclass,
        captions=[picture.captions for picture in pictures],
        templates=_templates(pipe, options),
    )
    return TrainingInputs(pictures, prompts, prompts_of_pictures, resolution)


def check_folders(options: TrainingOptions) -> None:
    """Raise an error where a run's pictures would be taken for training pictures, or where trackers
    cannot write.
    """
    output = os.path.realpath(options.output_dir)
    for name in ("images", "masks"):
        given = getattr(options, name)
        if not isinstance(given, (str, os.PathLike)):
            continue
        taken = [given, Path(given) / MASKS] if name == "images" else [given]
        if output in map(os.path.realpath, taken):
            raise ValueError(
                f"`output_dir` must be another folder than `{name}` and its masks, got {options.output_dir} "
                f"for {given}."
            )
    folder = options.logging_folder
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if options.tracker is not None and not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise OSError(f"`logging_dir` must be a folder that can be written to, but {existing} cannot.")


def _templates(pipe: StableDiffusion, options: TrainingOptions) -> Sequence[str]:
    """Return the templates of a run: as given, else the model's own, else the built-in ones."""
    if options.templates is not None:
        return options.templates
    return notes_of(pipe).templates or TEMPLATES


def own_resolution(pipe: StableDiffusion) -> int | None:
    """Return the edge of the pictures that a model was made for, in pixels; None if it does not say."""
    size = pipe.unet.config.sample_size
    if size is None:
        return None
    return (size if isinstance(size, int) else min(size)) * pipe.vae_scale_factor


def check_prompts(pipe: StableDiffusion, prompts: list[str], token: str) -> None:
    """Raise a ValueError where the concept's token does not arrive in each text encoder.

    Training itself would find it too, but only after the covariance is computed, or at the first validation
    picture.
    """
    for _, tokenizer in text_encoders_of(pipe).values():
        tokenize_with_concept(tokenizer, prompts, token)


def input_covariance(
    pipe: StableDiffusion, options: TrainingOptions, accelerator: "Accelerator"
) -> InputCovariance:
    """Return the covariance to train with: given, made by the given function, or from the cache."""
    given = options.covariance
    if isinstance(given, InputCovariance):
        return given
    if isinstance(given, Tensor):
        return InputCovariance(given)
    with accelerator.main_process_first():  # the other processes find it in the cache
        if given is not None:
            return given()
        return cached_covariance(pipe, progress=options.progress and accelerator.is_main_process)
