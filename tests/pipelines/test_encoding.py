"""Encodings are those that the pipelines' own `encode_prompt` hands to the UNet."""

import pytest
import torch
from helpers.real_pipelines import make_pipe

from perfusion_pytorch import add_concept_token_, calculate_input_covariance, tokenize_with_concept
from perfusion_pytorch.pipelines.encoding import encode_token_ids, prompt_encoder, token_ids

TEXTS = ["a photo of a car", "", "a red house on a blue background"]


@torch.no_grad()
def encoded_by(pipe, texts):
    """What the pipeline's own `encode_prompt` returns."""
    return pipe.encode_prompt(
        prompt=texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SDXL"])
def test_encodings_are_those_of_the_pipeline(name):
    pipe = make_pipe(name)
    expected = encoded_by(pipe, TEXTS)
    encodings, mask = prompt_encoder(pipe)(TEXTS)
    assert torch.equal(encodings, expected[0]) and not encodings.requires_grad
    assert mask.all() and mask.shape == encodings.shape[:2]
    _, pooled = encode_token_ids(pipe, token_ids(pipe, TEXTS))
    assert torch.equal(pooled, expected[2]) if name == "SDXL" else pooled is None


def test_gradients_reach_the_concept_of_every_encoder():
    pipe = make_pipe("SDXL")
    parts = {
        name: (getattr(pipe, name), getattr(pipe, name.replace("text_encoder", "tokenizer")))
        for name in ("text_encoder", "text_encoder_2")
    }
    rows = [
        add_concept_token_(encoder, tokenizer, "<car-1>", "car").concept_embedding
        for encoder, tokenizer in parts.values()
    ]
    ids = {
        name: tokenize_with_concept(tokenizer, ["a <car-1>"], "<car-1>")
        for name, (_, tokenizer) in parts.items()
    }
    encodings, _ = encode_token_ids(pipe, ids)
    assert encodings.shape == (1, 20, 768 + 1280)
    assert torch.equal(encodings, encoded_by(pipe, ["a <car-1>"])[0])
    encodings.square().sum().backward()
    assert all(row.grad.abs().sum() > 0 for row in rows)


def test_a_covariance_of_a_pipeline(assert_near):
    """The second moment of what the pipeline itself encodes, over all positions."""
    pipe = make_pipe("SD 1.5")
    covariance = calculate_input_covariance(TEXTS, prompt_encoder(pipe), batch_size=2)
    rows = encoded_by(pipe, TEXTS)[0].flatten(0, 1).double()
    assert covariance.num_tokens == len(rows) == 60
    assert_near(covariance.matrix, rows.T @ rows / 60, torch.float32)


def test_what_is_refused():
    with pytest.raises(ValueError, match="must be of Stable Diffusion"):
        prompt_encoder(make_pipe("PixArt"))
    pipe = make_pipe("SD 1.5")
    with pytest.raises(
        ValueError, match="for each of \\['text_encoder'\\], got them for \\['text_encoder_2'\\]"
    ):
        encode_token_ids(pipe, {"text_encoder_2": torch.zeros(1, 20, dtype=torch.int64)})
    pipe = make_pipe("SDXL")
    pipe.tokenizer_2.model_max_length = 30
    with pytest.raises(ValueError, match="one length, got \\[20, 30\\]"):
        prompt_encoder(pipe)
