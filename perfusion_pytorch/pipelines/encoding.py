"""Text encodings as they reach a pipeline's cross attentions.

    SD 1.x, SD 2.x:  e = last_hidden_state of the one text encoder
    SDXL:            e = hidden_states[-2] of encoder 1 and of encoder 2, side by side, without the final
        layer
                     norms; the pooled output of encoder 2 goes to the UNet beside them

These pipelines pass no attention mask: the UNet attends to every position, padding included.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from perfusion_pytorch.pipelines.parts import denoiser_of, text_encoders_of
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.token_wiring import input_embedding


@beartype
def check_encodes_like_stable_diffusion(pipe: Pipeline) -> None:
    """Check that a pipeline's encodings are made as those of Stable Diffusion 1.x, 2.x or XL.

    Raises:
        ValueError: it is not one of these, or its tokenizers make prompts of different lengths.
    """
    encoders = text_encoders_of(pipe)
    denoiser: Any = denoiser_of(pipe)
    width = getattr(denoiser.config, "cross_attention_dim", None)
    embeddings: list[Any] = [input_embedding(encoder) for encoder, _ in encoders.values()]
    found = sum(embedding.embedding_dim for embedding in embeddings)
    is_known = getattr(pipe, "unet", None) is denoiser and "text_encoder_3" not in encoders
    is_projected = getattr(denoiser.config, "encoder_hid_dim_type", None) is not None
    if not is_known or is_projected or found != width:
        raise ValueError(
            "`pipe` must be of Stable Diffusion 1.x, 2.x or XL, whose UNet takes text encodings as they are, "
            f"got {type(pipe).__name__} with a {type(denoiser).__name__} for {width} features and text "
            f"encoders of {found} in all."
        )
    lengths = {tokenizer.model_max_length for _, tokenizer in encoders.values()}
    if len(lengths) > 1:
        raise ValueError(f"The pipeline's tokenizers must make prompts of one length, got {sorted(lengths)}.")


@beartype
def encode_token_ids(pipe: Pipeline, ids: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Encode token ids as the pipeline does. Axes: b batch, n tokens, d features.

    Gradients flow, into concept embeddings for instance.

    Args:
        pipe: a pipeline of Stable Diffusion 1.x, 2.x or XL.
        ids: for each text encoder, by its name in the pipeline, integers of shape (b, n).

    Returns:
        The encodings that reach the cross attentions, shape (b, n, d), and the pooled output of the last
        encoder, shape (b, features), or None for the models that do not use it.

    Raises:
        ValueError: ids of an encoder are missing.
    """
    encoders = text_encoders_of(pipe)
    if ids.keys() != encoders.keys():
        raise ValueError(f"`ids` must hold token ids for each of {list(encoders)}, got them for {list(ids)}.")
    if "text_encoder_2" not in encoders:
        ((name, (encoder, _)),) = encoders.items()
        return encoder(ids[name].to(encoder.device)).last_hidden_state, None
    halves = []
    for name, (encoder, _) in encoders.items():
        output = encoder(ids[name].to(encoder.device), output_hidden_states=True)
        halves.append(output.hidden_states[-2])
    return torch.cat(halves, dim=-1), output[0]  # a CLIP with projection gives its pooled output first


@beartype
def token_ids(pipe: Pipeline, texts: list[str]) -> dict[str, Tensor]:
    """Tokenize prompts as the pipeline does, padded and cut to the full length.

    Returns:
        For each text encoder, by its name in the pipeline, ids of shape (b, n).
    """
    return {
        name: tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_attention_mask=False,
            return_tensors="pt",
        ).input_ids
        for name, (_, tokenizer) in text_encoders_of(pipe).items()
    }


@beartype
def prompt_encoder(pipe: Pipeline) -> Callable[[list[str]], tuple[Tensor, Tensor]]:
    """Return a function `texts -> (encodings (b, n, d), mask (b, n))` for a pipeline.

    It is what `calculate_input_covariance` and `token_similarities` take. The mask is True everywhere: every
    position reaches the UNet, padding included, and so counts. No gradients are kept.

    Raises:
        ValueError: the pipeline is not of Stable Diffusion 1.x, 2.x or XL.

    Example:
        covariance = calculate_input_covariance(captions, prompt_encoder(pipe), ridge=1e-6)
    """
    check_encodes_like_stable_diffusion(pipe)

    @torch.no_grad()
    def encode(texts: Iterable[str]) -> tuple[Tensor, Tensor]:
        encodings, _ = encode_token_ids(pipe, token_ids(pipe, list(texts)))
        return encodings, torch.ones(encodings.shape[:2], dtype=torch.bool, device=encodings.device)

    return encode
