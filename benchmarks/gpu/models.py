"""Stable Diffusion 1.5 and XL at their real configurations, with random weights, and small ones like them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TOKENIZER = Path(__file__).parents[2] / "examples" / "shapes" / "tiny-sd" / "tokenizer"
MAX_TOKENS = 77
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
CLIP_BIG_G = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}
SMALL_AUTOENCODER = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2,
    "latent_channels": 4,
}


def small_clip(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 2000,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width,
    }


@dataclass(frozen=True)
class Model:
    """The configurations of a pipeline's parts. Two text encoders make it Stable Diffusion XL."""

    unet: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]
    vae: Mapping[str, Any]
    resolution: int


MODELS = {
    "SD 1.5": Model(
        unet={
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        text_encoders=(CLIP_L,),
        vae=AUTOENCODER | {"sample_size": 512, "scaling_factor": 0.18215},
        resolution=512,
    ),
    "SDXL": Model(
        unet={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        text_encoders=(CLIP_L, CLIP_BIG_G),
        vae=AUTOENCODER | {"sample_size": 1024, "scaling_factor": 0.13025},
        resolution=1024,
    ),
}
SMALL_MODELS = {
    "SD 1.5": Model(
        unet=SMALL_UNET | {"cross_attention_dim": 32},
        text_encoders=(small_clip(32),),
        vae=SMALL_AUTOENCODER,
        resolution=16,
    ),
    "SDXL": Model(
        unet=SMALL_UNET
        | {
            "cross_attention_dim": 32 + 20,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 20 + 6 * 4,
        },
        text_encoders=(small_clip(32), small_clip(20)),
        vae=SMALL_AUTOENCODER,
        resolution=16,
    ),
}


def build(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a pipeline with random weights, frozen.

    The tokenizer is the repository's small model's, with prompts of 77 tokens. It knows fewer words than
    CLIP's, which changes no shape that a GPU sees.
    """
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    parts: dict[str, Any] = {
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
    }
    with torch.device(device):
        parts["unet"] = UNet2DConditionModel(**model.unet)
        parts["vae"] = AutoencoderKL(**model.vae)
        for kind, suffix, settings in zip(kinds, ("", "_2"), model.text_encoders, strict=False):
            tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, model_max_length=MAX_TOKENS)
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": 2}  # as shipped ones have it
            config = CLIPTextConfig(**settings, max_position_embeddings=MAX_TOKENS, **ids)
            parts[f"text_encoder{suffix}"], parts[f"tokenizer{suffix}"] = kind(config), tokenizer
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype).eval().requires_grad_(False)
    if len(model.text_encoders) == 1:
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **options)
    else:
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shared_copy(pipe: Any) -> Any:
    """Return a copy of a pipeline with its own modules and tokenizers, whose weights are the very same.

    So contenders can take turns without holding the model several times.
    """
    memo: dict[int, Any] = {}
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            memo |= {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
    return copy.deepcopy(pipe, memo)


def weight_bytes(pipe: Any) -> int:
    """Return the bytes of a pipeline's weights."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
