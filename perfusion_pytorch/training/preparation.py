"""Get a pipeline ready for training a concept, and give it back as it was."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.pipelines.parts import (
    add_token_,
    pool_at_largest_id_,
    remove_token_,
    requires_grad_kept,
)
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.assumptions import modules_of
from perfusion_pytorch.wiring import unwrap_cross_attentions_, wrap_cross_attentions_


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
    parts = list(modules_of(pipe).values())
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
    modes = [(module, module.training) for part in modules_of(pipe).values() for module in part.modules()]
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


@contextmanager
def gate_of(layers: Collection[Rank1EditModule], beta: float, temperature: float) -> Iterator[None]:
    """Give layers another gate for inference within the block."""
    before = [(layer.eval_beta.clone(), layer.eval_temperature.clone()) for layer in layers]
    try:
        for layer in layers:
            layer.eval_beta.fill_(beta)
            layer.eval_temperature.fill_(temperature)
        yield
    finally:
        for layer, (old_beta, old_temperature) in zip(layers, before, strict=True):
            layer.eval_beta.copy_(old_beta)
            layer.eval_temperature.copy_(old_temperature)
