"""What the frozen model makes of pictures and prompts, computed once before training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perfusion_pytorch.embedding import EmbeddingWrapper, SuperclassPrompts
from perfusion_pytorch.layers.precision import without_autocast
from perfusion_pytorch.pipelines.encoding import encode_token_ids
from perfusion_pytorch.pipelines.parts import text_encoders_of
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.tokens import tokenize_with_concept
from perfusion_pytorch.training.assumptions import scaled_latents
from perfusion_pytorch.training.pictures import Picture


@dataclass(frozen=True, eq=False)
class Material:
    """The frozen model's outputs for pictures and prompts. Axes: b pictures, p prompts, n tokens, d features.

    Attributes:
        latents: shape (b, channels, h, w), float32.
        masks: shape (b, 1, h, w), float32.
        time_ids: shape (b, 6), the sizes and crops that SDXL is conditioned on.
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
def make_material(
    pipe: StableDiffusion,
    embeddings: Mapping[str, EmbeddingWrapper],
    pictures: list[Picture],
    prompts: list[str],
    token: str,
) -> Material:
    """Encode pictures and prompts with the pipeline's own parts.

    Args:
        pipe: a pipeline that has the concept's token.
        embeddings: the embedding of each text encoder, by the encoder's name.
        pictures, prompts: what to encode.
        token: the concept's token.

    Raises:
        ValueError: a prompt is too long, holds the token twice, or is split differently by the tokenizers.
    """
    device = pipe.unet.device
    ids: dict[str, Tensor] = {}
    with_superclass: dict[str, SuperclassPrompts] = {}
    for name, (_, tokenizer) in text_encoders_of(pipe).items():
        ids[name] = tokenize_with_concept(tokenizer, prompts, token).to(device)
        with_superclass[name] = embeddings[name].with_superclass(ids[name])
    concept_indices, superclass_indices = _shared_positions(list(with_superclass.values()))
    encodings = [
        encode_token_ids(pipe, {name: rows.ids[[p]] for name, rows in with_superclass.items()})[0]
        for p in range(len(prompts))
    ]
    latents = encode_pictures(pipe.vae, pictures)
    edge = pictures[0].pixels.shape[-1]
    sizes = [[*picture.original_size, *picture.crop, edge, edge] for picture in pictures]
    return Material(
        latents=latents.to(device),
        masks=_masks_of_latents(pictures, latents).to(device),
        time_ids=torch.tensor(sizes, dtype=torch.float32, device=device),
        ids=ids,
        superclass_encodings=torch.cat(encodings),
        concept_indices=concept_indices,
        superclass_indices=superclass_indices,
    )


def _shared_positions(prompts: list[SuperclassPrompts]) -> tuple[Tensor, Tensor]:
    """Return where concept and superclass stand; a ValueError where text encoders differ about it."""
    first = prompts[0]
    for other in prompts[1:]:
        if not (
            torch.equal(first.concept_indices, other.concept_indices)
            and torch.equal(first.superclass_indices, other.superclass_indices)
        ):
            raise ValueError(
                "A concept must stand at one position for all text encoders, "
                "but their tokenizers split prompts differently."
            )
    return first.concept_indices, first.superclass_indices


def _masks_of_latents(pictures: list[Picture], latents: Tensor) -> Tensor:
    """Return masks of the latents' size, shape (b, 1, h, w); all ones for a picture without one."""
    whole = torch.ones(pictures[0].pixels.shape[-2:])
    masks = torch.stack([whole if picture.mask is None else picture.mask for picture in pictures])
    return nn.functional.interpolate(masks.unsqueeze(1), latents.shape[-2:], mode="area")


@torch.no_grad()
def encode_pictures(vae: Any, pictures: list[Picture]) -> Tensor:
    """Return the latents that the denoiser is trained on, shape (b, channels, h, w), float32, on the CPU.

    They are the means of the VAE's distributions, scaled as the pipeline decodes them. A VAE in half
    precision is put into float32 for this, since some overflow.

    Args:
        vae: the pipeline's VAE.
        pictures: what to encode.

    Raises:
        ValueError: a latent is not finite.
    """
    dtype = vae.dtype
    inputs = [picture.pixels[None].to(vae.device) for picture in pictures]
    try:
        nn.Module.to(vae, torch.float32)  # the VAE's own `to` would warn
        with without_autocast(inputs[0]):
            rows = [vae.encode(pixels).latent_dist.mean.cpu() for pixels in inputs]
    finally:
        nn.Module.to(vae, dtype)
    latents = scaled_latents(torch.cat(rows), vae.config)
    if not latents.isfinite().all():
        raise ValueError(
            "The VAE's latents of the pictures must be finite, but some are infinite or NaN. "
            "Check the VAE's weights."
        )
    return latents
