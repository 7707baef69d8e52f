"""Concepts and pipelines that do not fit are refused, and the pipeline is left as it was."""

import random
import shutil

import pytest
import torch
from helpers.damage import damaged_files
from helpers.small_model import assert_unchanged, latents, make_pipe, state_of
from torch import nn

from perfusion_pytorch import (
    Concept,
    delete_concepts,
    disable_concepts,
    get_active_concepts,
    load_concept,
    unload_concepts,
    wrap_cross_attentions_,
)


def changed(path, target, **changes):
    fields = vars(Concept.load(path)) | changes
    Concept(**fields).save(target, dtype=torch.float32)
    return target


def narrowed(concept):
    ones = torch.ones(9)
    return {"concept_input": ones, "concept_dual": ones / 9, "superclass_input": ones.clone()}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            lambda c: {"base_model": "PixArtTransformer2DModel"},
            "is for a PixArtTransformer2DModel, but the pipeline has a UNet2D",
        ),
        (
            lambda c: {"outputs": {k: torch.ones(len(v) + 1) for k, v in c.outputs.items()}},
            "of 128 features is expected, got 129",
        ),
        (
            lambda c: {"outputs": {f"x{k}": v for k, v in c.outputs.items()}},
            "an output of 128 features is expected, got none",
        ),
        (
            lambda c: {"embeddings": {"text_encoder_2": torch.ones(160)}},
            "has embeddings of .*text_encoder_2.*text encoders are",
        ),
        (lambda c: {"embeddings": {"text_encoder": torch.ones(16)}}, "has embeddings of"),
        (narrowed, "of 9 features, but the pipeline's have"),
    ],
)
def test_a_concept_that_does_not_fit_is_refused(pipe, files, tmp_path, changes, message):
    load_concept(pipe, files / "car.safetensors")
    state = state_of(pipe)
    bear = Concept.load(files / "bear.safetensors")
    path = changed(files / "bear.safetensors", tmp_path / "wrong.safetensors", **changes(bear))
    with pytest.raises(ValueError, match=message):
        load_concept(pipe, path)
    assert_unchanged(pipe, state)


@pytest.mark.slow
def test_no_damaged_file_is_ever_loaded_on_a_pipeline(pipe, files, tmp_path):
    load_concept(pipe, files / "bear.safetensors")
    state, whole, damaged = state_of(pipe), tmp_path / "car.safetensors", tmp_path / "damaged.safetensors"
    shutil.copy(files / "car.safetensors", whole)
    content, cases = whole.read_bytes(), 0
    for what, changed_content in damaged_files(whole, random.Random(1)):
        if changed_content != content:
            damaged.write_bytes(changed_content)
            with pytest.raises(ValueError, match=r"damaged\.safetensors"):
                load_concept(pipe, damaged)
                pytest.fail(what)
            assert_unchanged(pipe, state)
            cases += 1
    assert cases >= 500, cases
    assert load_concept(pipe, whole) == "<car-1>"


def test_a_pipeline_that_is_being_trained_or_fused_is_refused(pipe, files):
    wrap_cross_attentions_(pipe.unet, C=None)
    with pytest.raises(ValueError, match="layers wrapped for training"):
        load_concept(pipe, files / "car.safetensors")
    fused = make_pipe()
    fused.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="fused projections"):
        load_concept(fused, files / "car.safetensors")
    later = make_pipe()
    load_concept(later, files / "car.safetensors")
    later.fuse_qkv_projections(vae=False)
    for call in (
        lambda: latents(later, "a <car-1>"),
        lambda: disable_concepts(later),
        lambda: delete_concepts(later, "<car-1>"),
    ):
        with pytest.raises(ValueError, match="fused projections"):
            call()
    assert get_active_concepts(later) == ["<car-1>"]
    later.unfuse_qkv_projections()
    unload_concepts(later)


@pytest.mark.parametrize("part", ["projection", "embedding", "encode_prompt"])
def test_a_pipeline_that_cannot_hold_concepts_is_left_as_it_was(pipe, files, part, monkeypatch):
    if part == "projection":
        layer = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2.to_k"))
        layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
        message = "must have a floating point nn.Parameter as its weight, got Parameter of torch.int8"
    elif part == "embedding":
        pipe.text_encoder.get_input_embeddings().__class__ = type("Quantised", (nn.Embedding,), {})
        message = "CLIPTextModel must have a plain nn.Embedding, got Quantised"
    else:
        monkeypatch.delattr(type(pipe), "encode_prompt")
        message = "must have `encode_prompt`, where prompts are checked, but StableDiffusionPipeline has none"
    state = state_of(pipe)
    with pytest.raises(ValueError, match=message):
        load_concept(pipe, files / "car.safetensors")
    assert_unchanged(pipe, state)
