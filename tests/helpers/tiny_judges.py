"""Tiny random CLIP and DINO models in folders, and what they compute, written out in plain torch.

Axes: b pictures or texts, n patches or tokens with the class token, f features.
"""

import math

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from helpers.tiny_pipes import TOKENIZER

EDGE, PATCH, WIDTH, HEADS = 16, 8, 16, 2
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def save_clip(folder):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(1)
    common = {
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": EDGE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=common | text, vision_config=common | vision, projection_dim=8))
    _save(model, folder)
    size = {"height": EDGE, "width": EDGE}
    pixels = CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size=size, image_mean=MEAN, image_std=STD)
    CLIPProcessor(pixels, tokenizer).save_pretrained(folder)
    return folder


def save_dino(folder):
    torch.manual_seed(2)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            mlp_ratio=2,
            image_size=EDGE,
            patch_size=PATCH,
            layerscale_value=0.7,
        )
    )
    _save(model, folder)
    size = {"height": EDGE, "width": EDGE}
    BitImageProcessor(
        size={"shortest_edge": EDGE}, crop_size=size, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return folder


def _save(model, folder):
    """Save a model whose weights are far from 0, so that pictures differ."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name or "class" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)


def _pixels(images):
    """(b, 3, h, w), normalised; the pictures have the models' own size."""
    rows = [
        torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float64).view(EDGE, EDGE, 3) / 255
        for image in images
    ]
    mean, std = (torch.tensor(numbers, dtype=torch.float64) for numbers in (MEAN, STD))
    return ((torch.stack(rows) - mean) / std).permute(0, 3, 1, 2)


def _patches(images, weight, bias):
    """(b, patches, f): each patch times the weights, one after the other."""
    pixels = _pixels(images)
    corners = [(i, j) for i in range(0, EDGE, PATCH) for j in range(0, EDGE, PATCH)]
    cut = [pixels[:, :, i : i + PATCH, j : j + PATCH].flatten(1) for i, j in corners]
    rows = torch.stack([patch @ weight.flatten(1).T for patch in cut], dim=1)
    return rows if bias is None else rows + bias


def _attended(x, names, weights, causal=False):
    """Self-attention (b, n, f), head by head; `names` are those of queries, keys, values and the output."""
    queries, keys, values = (x @ weights[f"{n}.weight"].T + weights[f"{n}.bias"] for n in names[:3])
    d, heads = WIDTH // HEADS, []
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        scores = queries[..., part] @ keys[..., part].transpose(1, 2) / math.sqrt(d)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ values[..., part])
    return torch.cat(heads, -1) @ weights[f"{names[3]}.weight"].T + weights[f"{names[3]}.bias"]


def _norm(x, name, weights, eps=1e-5):
    return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def _clip_layer(x, tower, weights, causal):
    layer = f"{tower}.encoder.layers.0"
    names = [f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    x = x + _attended(_norm(x, f"{layer}.layer_norm1", weights), names, weights, causal)
    first, second = f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"
    hidden = (
        _norm(x, f"{layer}.layer_norm2", weights) @ weights[f"{first}.weight"].T + weights[f"{first}.bias"]
    )
    hidden = hidden * (1.702 * hidden).sigmoid()  # CLIP's quick GELU
    return x + hidden @ weights[f"{second}.weight"].T + weights[f"{second}.bias"]


def _weights(folder):
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def clip_of_pictures(folder, images):
    """CLIP's embeddings of pictures, of length 1, in float64."""
    w, tower = _weights(folder), "vision_model"
    patches = _patches(images, w[f"{tower}.embeddings.patch_embedding.weight"], None)
    first = w[f"{tower}.embeddings.class_embedding"].expand(len(images), 1, -1)
    x = torch.cat([first, patches], 1) + w[f"{tower}.embeddings.position_embedding.weight"]
    x = _clip_layer(_norm(x, f"{tower}.pre_layrnorm", w), tower, w, causal=False)
    pooled = _norm(x[:, 0], f"{tower}.post_layernorm", w) @ w["visual_projection.weight"].T
    return pooled / pooled.norm(dim=1, keepdim=True)


def clip_of_text(folder, text):
    """CLIP's embedding of a text, of length 1, in float64."""
    w, tower = _weights(folder), "text_model"
    ids = AutoTokenizer.from_pretrained(TOKENIZER)(text).input_ids
    x = w[f"{tower}.embeddings.token_embedding.weight"][ids]
    x = (x + w[f"{tower}.embeddings.position_embedding.weight"][: len(ids)])[None]
    x = _norm(_clip_layer(x, tower, w, causal=True), f"{tower}.final_layer_norm", w)
    pooled = x[0, -1] @ w["text_projection.weight"].T  # at the end token
    return pooled / pooled.norm()


def dino_of_pictures(folder, images):
    """DINOv2's class token of pictures, of length 1, in float64."""
    w, layer = _weights(folder), "encoder.layer.0"
    place = "embeddings.patch_embeddings.projection"
    patches = _patches(images, w[f"{place}.weight"], w[f"{place}.bias"])
    first = w["embeddings.cls_token"].expand(len(images), 1, -1)
    x = torch.cat([first, patches], 1) + w["embeddings.position_embeddings"]
    attention = [f"{layer}.attention.attention.{part}" for part in ("query", "key", "value")]
    names = [*attention, f"{layer}.attention.output.dense"]
    x = x + w[f"{layer}.layer_scale1.lambda1"] * _attended(_norm(x, f"{layer}.norm1", w, 1e-6), names, w)
    first, second = f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"
    hidden = F.gelu(_norm(x, f"{layer}.norm2", w, 1e-6) @ w[f"{first}.weight"].T + w[f"{first}.bias"])
    mlp = hidden @ w[f"{second}.weight"].T + w[f"{second}.bias"]
    pooled = _norm(x + w[f"{layer}.layer_scale2.lambda1"] * mlp, "layernorm", w, 1e-6)[:, 0]
    return pooled / pooled.norm(dim=1, keepdim=True)
