"""Tiny random pipelines of Stable Diffusion 1.x, 2.x and XL to train concepts on, and pictures for them."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from perfusion_pytorch import Concept, InputCovariance, train_concept
from perfusion_pytorch.training.loop import Run

TOKENIZER = Path(__file__).parents[2] / "examples" / "shapes" / "tiny-sd" / "tokenizer"
RESOLUTION = 16
KINDS = {"SD 1": "epsilon", "SD 2": "v_prediction", "SDXL": "epsilon"}  # and what they predict
WIDTHS = {"SD 1": (12,), "SD 2": (12,), "SDXL": (12, 20)}  # of the text encoders


def text_encoder(kind, width, tokenizer, **options):
    """A small CLIP that pools where the id is largest, as all shipped ones do."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": 2,
    }
    return kind(CLIPTextConfig(**settings | options)).eval()


def stable_diffusion(unet, vae, scheduler, widths, **options):
    """A pipeline of a UNet, with a text encoder for each width: two make it SDXL."""
    parts = {
        "unet": unet,
        "vae": vae,
        "scheduler": scheduler,
        "tokenizer": AutoTokenizer.from_pretrained(TOKENIZER),
    }
    parts["text_encoder"] = text_encoder(CLIPTextModel, widths[0], parts["tokenizer"], **options)
    if len(widths) == 1:
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    parts["tokenizer_2"] = AutoTokenizer.from_pretrained(TOKENIZER)
    options["projection_dim"] = widths[1]
    parts["text_encoder_2"] = text_encoder(
        CLIPTextModelWithProjection, widths[1], parts["tokenizer_2"], **options
    )
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def tiny_pipe(kind="SD 1"):
    logging.disable_progress_bar()
    torch.manual_seed(0)
    conditions = {}
    if kind == "SDXL":
        conditions = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 20 + 6 * 4,
        }
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=sum(WIDTHS[kind]),
        attention_head_dim=4,
        **conditions,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.5,
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=KINDS[kind])
    pipe = stable_diffusion(unet, vae, scheduler, WIDTHS[kind])
    pipe.unet.eval(), pipe.vae.eval()
    return pipe


def covariance_of(kind="SD 1"):
    width = sum(WIDTHS[kind])
    root = torch.randn(width, width, generator=torch.Generator().manual_seed(7)) / width**0.5
    return InputCovariance(root @ root.T + torch.eye(width))


def disc(number, edge=RESOLUTION, mode="RGB"):
    """A picture of a disc somewhere, or its mask."""
    image = Image.new(mode, (edge, edge), "teal" if mode == "RGB" else 0)
    left = number % 3 * edge // 5
    ImageDraw.Draw(image).ellipse(
        (left, edge // 4, left + edge // 2, 3 * edge // 4), fill="orange" if mode == "RGB" else 255
    )
    return image


IMAGES, MASKS = [disc(i) for i in range(3)], [disc(i, mode="L") for i in range(3)]


def options_for(output_dir, kind="SD 1", **options):
    """Arguments of a short training run."""
    defaults = {
        "token": "<car-1>",
        "superclass": "car",
        "output_dir": output_dir,
        "covariance": covariance_of(kind),
        "masks": MASKS,
        "max_train_steps": 4,
        "train_batch_size": 4,
        "checkpointing_steps": 2,
        "templates": ["a {}", "a photo of a {}"],
        "progress": False,
    }
    return defaults | options


def assert_same_runs(one, other, step):
    """Two runs have the same concept, and the same checkpoint of a step, to the bit."""
    files = [(folder / f"checkpoint-{step}" / "state.safetensors").read_bytes() for folder in (one, other)]
    assert files[0] == files[1]
    # Not the files' bytes, since their metadata are in any order.
    first, second = (Concept.load(folder / "concept.safetensors") for folder in (one, other))
    assert first.concept_norm == second.concept_norm and first.tensors().keys() == second.tensors().keys()
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())


class _Captured(Exception):
    """Leaves `train_concept` from within."""


def with_trainer(output_dir, use, images=IMAGES, kind="SD 1", **options):
    """Return what `use(trainer)` returns; it is called in the place of the steps of a run."""
    results = []

    def steps(run, trainer, first, last):
        results.append(use(trainer))
        raise _Captured

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Captured):
        patch.setattr(Run, "steps", steps)
        train_concept(tiny_pipe(kind), images, **options_for(output_dir, kind, **options))
    return results[0]


def learned(folder, step):
    """What a checkpoint has of what is learned and averaged, without the optimizer's."""
    tensors = load_file(folder / f"checkpoint-{step}" / "state.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}


def assert_close(one, other, rtol=1e-4):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        scale = other[name].float().abs().max().item()
        assert torch.allclose(tensor.float(), other[name].float(), rtol=rtol, atol=rtol * scale), name
