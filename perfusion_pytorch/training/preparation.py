"""Get a pipeline ready for training a concept, and give it back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perfusion_pytorch.embedding import (
    EmbeddingWrapper,
    add_concept_token_,
    remove_concept_token_,
    superclass_token_ids,
    tokenize_with_concept,
)
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.precision import without_autocast
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.pipelines.encoding import check_encodes_like_stable_diffusion, encode_token_ids
from perfusion_pytorch.pipelines.parts import (
    CONCEPTS,
    POOLS_AT_LARGEST_ID,
    pool_at_end_token_,
    text_encoders_of,
)
from perfusion_pytorch.training.pictures import Picture
from perfusion_pytorch.wiring import unwrap_cross_attentions_, wrap_cross_attentions_

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_pipeline(pipe, token: str, superclass: str) -> None:
    """Raise a ValueError where a concept cannot be trained on a pipeline, before anything of it changes."""
    check_encodes_like_stable_diffusion(pipe)
    if hasattr(pipe.unet, CONCEPTS):
        raise ValueError(
            "`pipe` must have no loaded concepts while one is trained. Call `unload_concepts` first."
        )
    encoders = text_encoders_of(pipe)
    embeddings = [encoder.get_input_embeddings() for encoder, _ in encoders.values()]
    if any(isinstance(m, Rank1EditModule) for m in pipe.unet.modules()) or any(
        isinstance(e, EmbeddingWrapper) for e in embeddings
    ):
        raise ValueError(
            "`pipe` must not be wrapped for training already. Save its concept, and load the pipeline anew."
        )
    if any(hasattr(module, "_hf_hook") for _, module in _modules(pipe) for module in module.modules()):
        raise ValueError(
            "`pipe` must be without offloading while it is trained. Call its `remove_all_hooks` and move it to a device."
        )
    channels = getattr(pipe.vae.config, "latent_channels", None)
    if pipe.unet.config.in_channels != channels:
        raise ValueError(
            f"`pipe` must have a UNet that takes latents alone, of {channels} channels, got {pipe.unet.config.in_channels}. Take the base "
            "model and not the one for inpainting."
        )
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"The scheduler's `prediction_type` must be one of {', '.join(PREDICTIONS)}, got {prediction!r}."
        )
    for _, tokenizer in encoders.values():
        superclass_token_ids(tokenizer, token, superclass)


def _modules(pipe):
    return [(name, module) for name, module in pipe.components.items() if isinstance(module, nn.Module)]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is trained of a pipeline: its wrapped layers by name, and the embedding of each text encoder by the encoder's name."""

    layers: dict[str, Rank1EditModule]
    embeddings: dict[str, EmbeddingWrapper]


@contextmanager
def on_device(pipe, device: torch.device) -> Iterator[None]:
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
def token_added(pipe, token: str, superclass: str) -> Iterator[dict[str, EmbeddingWrapper]]:
    """Freeze a pipeline, and add a concept's token to it, whose embedding is to be trained; afterwards it is what it was.

    Yields:
        The embedding of each text encoder, by the encoder's name in the pipeline.
    """
    flags = [(p, p.requires_grad) for _, parent in _modules(pipe) for p in parent.parameters()]
    tokens, pooling, embeddings = [], [], {}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for name, (encoder, tokenizer) in text_encoders_of(pipe).items():
            embeddings[name] = add_concept_token_(encoder, tokenizer, token, superclass)
            tokens.append((encoder, tokenizer))
            pooling += pool_at_end_token_(encoder, tokenizer)
        yield embeddings
    finally:
        for encoder, tokenizer in reversed(tokens):
            remove_concept_token_(encoder, tokenizer, token)
        for module in pooling:
            module.eos_token_id = POOLS_AT_LARGEST_ID
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def prepared_for_training(
    pipe,
    embeddings: dict[str, EmbeddingWrapper],
    covariance: InputCovariance,
    *,
    gradient_checkpointing: bool,
    layer_options: dict,
) -> Iterator[Prepared]:
    """Wrap the cross attentions of a pipeline that has the token; afterwards it is what it was.

    Everything is in eval mode but for the wrapped layers, so that no dropout draws random numbers.
    """
    modes = [(module, module.training) for _, parent in _modules(pipe) for module in parent.modules()]
    was_checkpointing = pipe.unet.is_gradient_checkpointing
    try:
        for module, _ in modes:
            module.training = False
        layers = wrap_cross_attentions_(pipe.unet, C=covariance, **layer_options)
        for layer in layers.values():
            layer.train()
        if gradient_checkpointing and not was_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        yield Prepared(layers, embeddings)
    finally:
        if pipe.unet.is_gradient_checkpointing and not was_checkpointing:
            pipe.unet.disable_gradient_checkpointing()
        unwrap_cross_attentions_(pipe.unet)
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True, eq=False)
class Cached:
    """What the frozen model says of pictures and prompts, computed once. Axes: b pictures, p prompts, n tokens, d features.

    Attributes:
        latents: shape (b, channels, h, w), float32.
        masks: shape (b, 1, h, w), float32.
        time_ids: shape (b, 6), what SDXL is told of sizes and crops.
        ids: token ids of the prompts for each text encoder, shape (p, n).
        superclass_encodings: of the prompts with the superclass in the concept's place, shape (p, n, d).
        concept_indices, superclass_indices: positions in the prompts, shape (p,).
    """

    latents: Tensor
    masks: Tensor
    time_ids: Tensor
    ids: dict[str, Tensor]
    superclass_encodings: Tensor
    concept_indices: Tensor
    superclass_indices: Tensor


@torch.no_grad()
def cache_inputs(pipe, prepared: Prepared, pictures: list[Picture], prompts: list[str], token: str) -> Cached:
    """Encode pictures and prompts with the pipeline's own parts.

    Raises:
        ValueError: a prompt is too long, holds the token twice, or stands differently in the text encoders' tokens.
    """
    device = pipe.unet.device
    ids, superclass_ids, positions = {}, {}, {}
    for name, (_, tokenizer) in text_encoders_of(pipe).items():
        ids[name] = tokenize_with_concept(tokenizer, prompts, token).to(device)
        with_superclass = prepared.embeddings[name].with_superclass(ids[name])
        superclass_ids[name] = with_superclass.ids
        positions[name] = with_superclass.concept_indices, with_superclass.superclass_indices
    first, *others = positions.values()
    for other in others:
        if not all(torch.equal(a, b) for a, b in zip(first, other, strict=True)):
            raise ValueError(
                "A concept must stand at one position for all text encoders, but their tokenizers split prompts differently."
            )
    encodings = [
        encode_token_ids(pipe, {name: rows[[p]] for name, rows in superclass_ids.items()})[0]
        for p in range(len(prompts))
    ]
    latents = encode_pictures(pipe.vae, pictures)
    edge = pictures[0].pixels.shape[-1]
    whole = torch.ones(edge, edge)
    masks = torch.stack([whole if picture.mask is None else picture.mask for picture in pictures]).unsqueeze(
        1
    )
    return Cached(
        latents=latents.to(device),
        masks=nn.functional.interpolate(masks, latents.shape[-2:], mode="area").to(device),
        time_ids=torch.tensor(
            [[*p.original_size, *p.crop, edge, edge] for p in pictures], dtype=torch.float32, device=device
        ),
        ids=ids,
        superclass_encodings=torch.cat(encodings),
        concept_indices=first[0],
        superclass_indices=first[1],
    )


@torch.no_grad()
def encode_pictures(vae: nn.Module, pictures: list[Picture]) -> Tensor:
    """Return the latents of pictures as the denoiser is trained on them, shape (b, channels, h, w), float32, on the CPU.

    They are the means of what the VAE says; a VAE in half precision works in float32 meanwhile, since some overflow.
    """
    dtype, inputs = vae.dtype, [picture.pixels[None].to(vae.device) for picture in pictures]
    try:
        nn.Module.to(vae, torch.float32)  # diffusers' own warns
        with without_autocast(inputs[0]):
            rows = [vae.encode(pixels).latent_dist.mean.cpu() for pixels in inputs]
    finally:
        nn.Module.to(vae, dtype)
    latents = torch.cat(rows) * vae.config.scaling_factor
    if not latents.isfinite().all():
        raise ValueError(
            "The VAE's latents of the pictures must be finite, but some are infinite or NaN. Look at the VAE's weights."
        )
    return latents
