"""Masks of the object, made by a CLIPSeg model."""

import pytest
import torch
from helpers.pictures import half_red
from helpers.tiny_pipes import TOKENIZER
from transformers import (
    AutoTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    ViTImageProcessor,
)

from perfusion_pytorch.training.masks import add_masks
from perfusion_pytorch.training.pictures import load_pictures


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory):
    """A folder with a tiny random CLIPSeg."""
    folder = tmp_path_factory.mktemp("clipseg")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 20,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = small | {"image_size": 32, "patch_size": 8}
    options = {
        "projection_dim": 16,
        "reduce_dim": 8,
        "extract_layers": [0, 1],
        "decoder_num_attention_heads": 2,
    }
    model = CLIPSegForImageSegmentation(
        CLIPSegConfig(text_config=text, vision_config=vision, decoder_intermediate_size=16, **options)
    )
    model.save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def test_masks_by_clipseg(clipseg):
    pictures = add_masks(load_pictures([half_red(), half_red().rotate(90)], resolution=64), "car", clipseg)
    one, other = (picture.mask for picture in pictures)
    assert one.shape == (64, 64) and one.dtype == torch.float32 and 0 <= one.min() < one.max() <= 1
    assert not torch.allclose(one, other, atol=1e-4)
    (house,) = add_masks(pictures[:1], "house", clipseg)
    assert not torch.allclose(one, house.mask, atol=1e-6)


def test_an_object_that_is_not_found_is_warned_of(clipseg, monkeypatch):
    forward = CLIPSegForImageSegmentation.forward

    def doubting(self, **inputs):
        output = forward(self, **inputs)
        output.logits = output.logits * 0 - 4
        return output

    monkeypatch.setattr(CLIPSegForImageSegmentation, "forward", doubting)
    with pytest.warns(UserWarning, match="does not find 'car' in \\['picture 0'\\]"):
        add_masks(load_pictures([half_red()], resolution=64), "car", clipseg)


def test_a_model_of_masks_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="must be a CLIPSeg model's name or folder"):
        add_masks(load_pictures([half_red()], resolution=64), "car", tmp_path)
