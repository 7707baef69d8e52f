"""Concepts on the pipelines that people use.

Denoisers of real configurations, text encoders of real widths and one layer, small pictures. The tokenizer is
the small model's in all of them; its end token has the largest id, as CLIP's has.
"""

import re

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from helpers.real_models import MODELS
from helpers.real_pipelines import make_pipe
from helpers.small_model import assert_unchanged, state_of

from perfusion_pytorch import (
    Concept,
    get_list_concepts,
    global_key_lock,
    load_concept,
    set_concepts,
    unload_concepts,
)
from perfusion_pytorch.layers.loaded import LoadedProjection
from perfusion_pytorch.wiring import cross_attention_projections


def latents(pipe, prompt):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = noise if isinstance(prompt, str) else noise.expand(len(prompt), -1, -1, -1)
    options = {"num_inference_steps": 1, "latents": noise, "output_type": "latent", "height": 8, "width": 8}
    if isinstance(pipe, PixArtAlphaPipeline):
        options |= {"max_sequence_length": 20, "use_resolution_binning": False, "clean_caption": False}
    return pipe(prompt, **options).images


@torch.no_grad()
def made_up(pipe, prompt, path):
    """Write a concept for a pipeline whose input is what it encodes at the fourth token of a prompt."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    encodings = pipe.encode_prompt(
        prompt, do_classifier_free_guidance=False, device="cpu", num_images_per_prompt=1
    )[0]
    if isinstance(pipe, PixArtAlphaPipeline):
        encodings = denoiser.caption_projection(encodings)
    i = encodings[0, 4]
    encoders = {
        name: getattr(pipe, name)
        for name in ("text_encoder", "text_encoder_2")
        if getattr(pipe, name, None) is not None
    }
    car = pipe.tokenizer("car", add_special_tokens=False).input_ids[0]
    Concept(
        token="<car-1>",
        superclass="car",
        base_model=type(denoiser).__name__,
        embeddings={name: encoder.get_input_embeddings().weight[car] for name, encoder in encoders.items()},
        concept_input=i,
        concept_dual=i / (i @ i),
        superclass_input=encodings[0, 5],
        concept_norm=(i @ i).item(),
        outputs={
            n: torch.randn(denoiser.get_submodule(n).out_features)
            for n, is_key in cross_attention_projections(denoiser)
            if not is_key
        },
    ).save(path)
    return encodings


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_concept_is_loaded_used_and_unloaded(name, tmp_path):
    pipe = make_pipe(name)
    with_car, path = "a photo of car on red", tmp_path / "car.safetensors"
    before = latents(pipe, with_car)
    made_up(pipe, with_car, path)
    state = state_of(pipe)
    assert load_concept(pipe, path) == "<car-1>"
    prompt = with_car.replace("car", "<car-1>")
    edited = latents(pipe, prompt)
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    layers = [m for m in denoiser.modules() if isinstance(m, LoadedProjection)]
    assert len(layers) == len(list(cross_attention_projections(denoiser)))
    assert edited.isfinite().all() and not torch.allclose(edited, before, rtol=1e-3)
    set_concepts(pipe, [])
    plain = latents(pipe, prompt)  # the token's row is half precision's of "car"
    assert torch.allclose(plain, before, rtol=1e-2, atol=1e-2 * before.abs().max().item())
    assert (plain - before).abs().max() < 0.2 * (edited - before).abs().max()
    unload_concepts(pipe)
    assert_unchanged(pipe, state)
    assert torch.equal(latents(pipe, with_car), before) and get_list_concepts(pipe) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD 1.5", "PixArt"])
def test_a_row_without_the_concept_is_the_base_models_to_the_bit(name, tmp_path):
    """Also where the denoiser projects text encodings before its layers read them."""
    pipe = make_pipe(name)
    prompts = ["a photo of car on red", "a house"]
    before = latents(pipe, prompts)
    made_up(pipe, prompts[0], tmp_path / "car.safetensors")
    load_concept(pipe, tmp_path / "car.safetensors")
    after = latents(pipe, [prompts[0].replace("car", "<car-1>"), prompts[1]])
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0], before[0], rtol=1e-3)


@pytest.mark.slow
def test_a_concept_does_not_take_over_the_pooled_output(tmp_path):
    """CLIP pools at the largest id where its configuration names the end token 2: a concept's is larger."""
    pipe = make_pipe("SDXL")
    made_up(pipe, "a photo of car on red", tmp_path / "car.safetensors")
    encode = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        expected = pipe.encode_prompt("a photo of car on red", **encode)[2]
        load_concept(pipe, tmp_path / "car.safetensors")
        pooled = pipe.encode_prompt("a photo of <car-1> on red", **encode)[2]
        assert torch.equal(pipe.encode_prompt("a photo of car on red", **encode)[2], expected)
    assert torch.allclose(pooled, expected, atol=1e-2 * expected.abs().max().item())
    for module in pipe.text_encoder_2.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2  # as it was: the trap is there
    with torch.no_grad():
        taken_over = pipe.encode_prompt("a photo of <car-1> on red", **encode)[2]
    assert not torch.allclose(taken_over, expected, atol=1e-1 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SDXL", "PixArt"])
def test_keys_are_locked_to_those_of_the_superclass_prompt(name, tmp_path):
    pipe = make_pipe(name)
    prompt = "a photo of <car-1> on red"
    made_up(pipe, "a photo of car on red", tmp_path / "car.safetensors")
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    key = denoiser.get_submodule(next(n for n, is_key in cross_attention_projections(denoiser) if is_key))
    handle = key.register_forward_hook(lambda _, inputs, keys: seen.append(keys[-1].detach()))
    seen = []
    latents(pipe, prompt.replace("<car-1>", "car"))
    handle.remove()
    load_concept(pipe, tmp_path / "car.safetensors")
    with global_key_lock(pipe):
        key = denoiser.get_submodule(next(n for n, is_key in cross_attention_projections(denoiser) if is_key))
        key.register_forward_hook(lambda _, inputs, keys: seen.append(keys[-1].detach()))
        latents(pipe, prompt)
        if name == "SDXL":
            with pytest.raises(
                ValueError, match="needs one prompt for all text encoders, got 'a <car-1>' and 'a car'"
            ):
                pipe("a <car-1>", prompt_2="a car")
    latents(pipe, prompt)
    plain, locked, edited = seen
    scale = plain.abs().max().item()
    assert torch.allclose(locked, plain, atol=1e-4 * scale) and not torch.allclose(
        edited, plain, atol=1e-2 * scale
    )


def test_a_token_that_is_cleaned_away_is_refused(tmp_path, monkeypatch):
    """PixArt removes what looks like HTML from prompts, where the packages for it are installed."""
    pipe = make_pipe("PixArt")
    made_up(pipe, "a photo of car on red", tmp_path / "car.safetensors")
    load_concept(pipe, tmp_path / "car.safetensors")
    monkeypatch.setattr(
        pipe, "_text_preprocessing", lambda text, clean_caption: [re.sub("<[^>]*>", "", text)]
    )
    with pytest.raises(
        ValueError,
        match=r"<car-1> is cleaned away from 'a <car-1>'\. Call the pipeline with `clean_caption=False`",
    ):
        pipe.encode_prompt("a <car-1>", clean_caption=True)
