"""Get a pipeline ready for training a concept, and give it back as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from perfusion_pytorch.embedding import EmbeddingWrapper, superclass_token_ids
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.pipelines.encoding import check_encodes_like_stable_diffusion
from perfusion_pytorch.pipelines.parts import (
    add_token_,
    find_loaded,
    pool_at_largest_id_,
    remove_token_,
    requires_grad_kept,
    text_encoders_of,
)
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.wiring import unwrap_cross_attentions_, wrap_cross_attentions_

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_pipeline(pipe: StableDiffusion, token: str, superclass: str) -> None:
    """Raise a ValueError where a concept cannot be trained on a pipeline; nothing of the pipeline changes."""
    check_encodes_like_stable_diffusion(pipe)
    _check_is_bare(pipe)
    channels = getattr(pipe.vae.config, "latent_channels", None)
    if pipe.unet.config.in_channels != channels:
        raise ValueError(
            f"`pipe` must have a UNet that takes latents alone, of {channels} channels, "
            f"got {pipe.unet.config.in_channels}. Choose the base model instead of the one for inpainting."
        )
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"The scheduler's `prediction_type` must be one of {', '.join(PREDICTIONS)}, got {prediction!r}."
        )
    for _, tokenizer in text_encoders_of(pipe).values():
        superclass_token_ids(tokenizer, token, superclass)


def _check_is_bare(pipe: StableDiffusion) -> None:
    """Raise a ValueError where a pipeline has concepts, wrapped layers or offloading hooks."""
    if find_loaded(pipe) is not None:
        raise ValueError(
            "`pipe` must have no loaded concepts while one is trained. Call `unload_concepts` first."
        )
    embeddings = [encoder.get_input_embeddings() for encoder, _ in text_encoders_of(pipe).values()]
    if any(isinstance(module, Rank1EditModule) for module in pipe.unet.modules()) or any(
        isinstance(embedding, EmbeddingWrapper) for embedding in embeddings
    ):
        raise ValueError(
            "`pipe` must not be wrapped for training already. Save its concept, and load the pipeline again."
        )
    if any(hasattr(module, "_hf_hook") for part in _parts(pipe) for module in part.modules()):
        raise ValueError(
            "`pipe` must not be offloaded while it is trained. "
            "Call its `remove_all_hooks` and move it to a device."
        )


def _parts(pipe: StableDiffusion) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


@dataclass(frozen=True, eq=False)
class Trainables:
    """What is trained of a pipeline.

    Attributes:
        layers: its wrapped layers, by name.
        embeddings: the embedding of each text encoder, by the encoder's name.
    """

    layers: dict[str, Rank1EditModule]
    embeddings: dict[str, EmbeddingWrapper]


@contextmanager
def on_device(pipe: StableDiffusion, device: torch.device) -> Iterator[None]:
    """Move a pipeline to a device, and afterwards back to where it was."""
    before = pipe.device
    try:
        if before != device:
            pipe.to(device)
        yield
    finally:
        if pipe.device != before:
            pipe.to(before)


@contextmanager
def token_added(pipe: StableDiffusion, token: str, superclass: str) -> Iterator[dict[str, EmbeddingWrapper]]:
    """Freeze a pipeline and add a concept's token, to be trained; afterwards it is what it was.

    Yields:
        The embedding of each text encoder, by the encoder's name in the pipeline.
    """
    parts = _parts(pipe)
    with requires_grad_kept(parts):
        for part in parts:
            part.requires_grad_(False)
        added = add_token_(pipe, token, superclass)
        try:
            yield added.embeddings
        finally:
            remove_token_(pipe, token)
            pool_at_largest_id_(added.pooling)


@contextmanager
def wrapped_for_training(
    pipe: StableDiffusion,
    embeddings: dict[str, EmbeddingWrapper],
    covariance: InputCovariance,
    *,
    gradient_checkpointing: bool,
    layer_options: Mapping[str, Any],
) -> Iterator[Trainables]:
    """Wrap the cross attentions of a pipeline that has the token; afterwards the pipeline is what it was.

    All but the wrapped layers is in eval mode, so that no dropout draws random numbers.

    Args:
        pipe: the pipeline.
        embeddings: what `token_added` yielded.
        covariance: the input covariance.
        gradient_checkpointing: whether the UNet recomputes in backward.
        layer_options: options of `Rank1EditModule`.

    Yields:
        What is trained.
    """
    modes = [(module, module.training) for part in _parts(pipe) for module in part.modules()]
    was_checkpointing = pipe.unet.is_gradient_checkpointing
    try:
        for module, _ in modes:
            module.training = False
        layers = wrap_cross_attentions_(pipe.unet, C=covariance, **layer_options)
        for layer in layers.values():
            layer.train()
        if gradient_checkpointing and not was_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        yield Trainables(layers, embeddings)
    finally:
        if pipe.unet.is_gradient_checkpointing and not was_checkpointing:
            pipe.unet.disable_gradient_checkpointing()
        unwrap_cross_attentions_(pipe.unet)
        for module, mode in modes:
            module.training = mode
