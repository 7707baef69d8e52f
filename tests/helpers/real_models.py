"""Denoisers that people use, at their real configurations, with random weights that need no memory."""

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

STABLE_DIFFUSION = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "sample_size": 64}

MODELS = {
    "SD 1.5": (
        UNet2DConditionModel,
        STABLE_DIFFUSION | {"cross_attention_dim": 768, "attention_head_dim": 8},
    ),
    "SD 2.1": (
        UNet2DConditionModel,
        STABLE_DIFFUSION
        | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    ),
    "SDXL": (
        UNet2DConditionModel,
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
    ),
    "PixArt": (
        PixArtTransformer2DModel,
        {
            "num_layers": 28,
            "caption_channels": 4096,
            "cross_attention_dim": 1152,
            "sample_size": 16,
            "use_additional_conditions": False,
        },
    ),
}

# name: (cross attentions, input features, sum of the output features of keys and values, bias)
EXPECTED = {
    "SD 1.5": (16, 768, 24_960, False),
    "SD 2.1": (16, 1024, 24_960, False),
    "SDXL": (70, 2048, 166_400, False),
    "PixArt": (28, 1152, 28 * 2 * 1152, True),
}


def real_model(name):
    """Return a denoiser of a real configuration, at random weights that share one small tensor."""
    kind, options = MODELS[name]
    with torch.device("meta"):
        model = kind(**options)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(max(p.numel() for p in model.parameters()), generator=generator) * 0.02
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            is_norm = "norm" in type(module).__name__.lower() and key == "weight"
            value = (
                torch.ones(parameter.shape) if is_norm else shared[: parameter.numel()].view(parameter.shape)
            )
            setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, torch.randn(buffer.shape, generator=generator) * 0.02)
    return model
