"""The committed small model as a pipeline, a quick concept for it, and what a concept could change."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from perfusion_pytorch import (
    add_concept_token_,
    concept_inputs,
    tokenize_with_concept,
    wrap_cross_attentions_,
)

MODEL = Path(__file__).parents[2] / "examples" / "shapes" / "tiny-sd"


def make_pipe():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, prompt, **options):
    """The latents that two steps make of a prompt, from fixed noise."""
    count = 1 if isinstance(prompt, str) else len(prompt)
    count *= options.get("num_images_per_prompt", 1)
    noise = (
        torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        .expand(count, -1, -1, -1)
        .clone()
    )
    return pipe(prompt, num_inference_steps=2, latents=noise, output_type="latent", **options).images


def train(pipe, token, superclass, seed=0):
    """Teach a pipeline a concept, as far as one step and a kick go."""
    generator = torch.Generator().manual_seed(seed)
    embedding = add_concept_token_(pipe.text_encoder, pipe.tokenizer, token, superclass)
    embedding.concept_embedding.data += 0.05 * torch.randn(
        embedding.concept_embedding.shape, generator=generator
    )
    d = pipe.unet.config.cross_attention_dim
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(7)) / d**0.5
    layers = wrap_cross_attentions_(pipe.unet.train(), C=root @ root.T + torch.eye(d))
    ids = tokenize_with_concept(pipe.tokenizer, [f"a {token}", f"a photo of a {token} on red"], token)
    prompts = embedding.with_superclass(ids)
    with torch.no_grad():
        text_enc, superclass_enc = (
            pipe.text_encoder(ids).last_hidden_state,
            pipe.text_encoder(prompts.ids).last_hidden_state,
        )
        call = {"concept_indices": prompts.concept_indices, "superclass_indices": prompts.superclass_indices}
        with concept_inputs(pipe.unet, text_enc_with_superclass=superclass_enc, **call):
            pipe.unet(torch.zeros(2, 4, 16, 16), 1, text_enc)
        for layer in layers.values():
            if not layer.is_key_proj:
                layer.concept_output += 0.5 * torch.randn(layer.concept_output.shape, generator=generator)
    pipe.unet.eval()
    return layers


def state_of(pipe):
    """Everything of a pipeline that a concept could change; of large weights a sample."""
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    tokenizers = {
        key: part for key, part in pipe.components.items() if key.startswith("tokenizer") and part is not None
    }
    tokenizers = {
        key: json.loads(tokenizer.backend_tokenizer.to_str()) for key, tokenizer in tokenizers.items()
    }
    return (
        {(key, name): id(m) for key, module in modules.items() for name, m in module.named_modules()},
        {
            (key, name): (id(p), p.requires_grad, p.detach().flatten()[:1000].clone())
            for key, module in modules.items()
            for name, p in module.named_parameters()
        },
        {(key, name): m.training for key, module in modules.items() for name, m in module.named_modules()},
        # truncation and padding are the last call's
        {
            (key, part): value
            for key, state in tokenizers.items()
            for part, value in state.items()
            if part not in ("truncation", "padding")
        },
        sorted(vars(pipe)),
        # of transformers' own making, at its first call with hidden states
        {
            key: sorted(vars(module).keys() - {"_output_capturing_hooks_installed"})
            for key, module in modules.items()
        },
        {
            (key, name): getattr(m, "eos_token_id", None)
            for key, module in modules.items()
            for name, m in module.named_modules()
        },
    )


def assert_unchanged(pipe, state):
    now = state_of(pipe)
    assert now[0] == state[0] and now[2:] == state[2:]
    assert now[1].keys() == state[1].keys()
    for key, (identity, flag, value) in state[1].items():
        assert now[1][key][:2] == (identity, flag) and torch.equal(now[1][key][2], value), key
