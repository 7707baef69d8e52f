"""What is computed once before training: latents and encodings."""

import pytest
import torch
from helpers.tiny_pipes import (
    IMAGES,
    RESOLUTION,
    SETTLED,
    options_for,
    tiny_pipe,
)

from perfusion_pytorch import (
    train_concept,
)
from perfusion_pytorch.training.material import encode_pictures
from perfusion_pytorch.training.options import PAPER
from perfusion_pytorch.training.pictures import load_pictures


@pytest.mark.parametrize("way", [PAPER, SETTLED], ids=["joint", "settled"])
def test_pictures_and_superclass_prompts_are_encoded_once(way, tmp_path, monkeypatch):
    """And those with the trained token once more: before the outputs are trained, or for the report."""
    pipe, encoded = tiny_pipe(), {"pictures": 0, "prompts": 0}
    encode, forward = pipe.vae.encode, pipe.text_encoder.forward
    monkeypatch.setattr(
        pipe.vae, "encode", lambda *args: encoded.update(pictures=encoded["pictures"] + 1) or encode(*args)
    )

    def encode_text(*args, **options):
        encoded["prompts"] += not torch.is_grad_enabled()
        return forward(*args, **options)

    monkeypatch.setattr(pipe.text_encoder, "forward", encode_text)
    train_concept(pipe, IMAGES, **options_for(tmp_path, **way))
    assert encoded == {"pictures": len(IMAGES), "prompts": 2 + 2}  # of two templates


def test_pictures_are_encoded_in_float32_whatever_the_precision():
    """In half precision, some VAEs overflow."""
    pipe, pictures = tiny_pipe(), load_pictures(IMAGES, resolution=RESOLUTION)
    expected = encode_pictures(pipe.vae, pictures)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encode_pictures(pipe.vae, pictures), expected)
    pipe.vae.to(torch.bfloat16)
    assert (
        torch.allclose(encode_pictures(pipe.vae, pictures), expected, atol=0.02)
        and pipe.vae.dtype == torch.bfloat16
    )
    pipe.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="latents of the pictures must be finite"):
        encode_pictures(pipe.vae, pictures)
