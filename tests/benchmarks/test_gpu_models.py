"""Models of the GPU benchmark: their real sizes, their copies, and what is put on these."""

import time

import pytest
import torch
from gpu.concepts import load_all, prompt_of, token_of, write_concepts
from gpu.models import MODELS, SMALL_MODELS, build, shared_copy, weight_bytes
from gpu.pictures import Contender, add_lora_, picture, waits_of

from perfusion_pytorch import get_active_concepts, get_list_concepts, load_concept

# Numbers of the published models.
UNETS = {"SD 1.5": 859_520_964, "SDXL": 2_567_463_684}
TEXT_ENCODERS = {"SD 1.5": [123_060_480], "SDXL": [123_060_480, 694_659_840]}
AUTOENCODER = 83_653_863


@pytest.fixture
def pipe():
    return build(SMALL_MODELS["SD 1.5"], torch.device("cpu"), torch.float32)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_real_models_have_as_many_numbers_as_the_published_ones(name):
    pipe = build(MODELS[name], torch.device("meta"), torch.bfloat16)
    encoders = [getattr(pipe, f"text_encoder{n}", None) for n in ("", "_2")]
    assert count(pipe.unet) == UNETS[name]
    assert [count(encoder) for encoder in encoders if encoder is not None] == TEXT_ENCODERS[name]
    assert count(pipe.vae) == AUTOENCODER
    assert weight_bytes(pipe) == 2 * (UNETS[name] + sum(TEXT_ENCODERS[name]) + AUTOENCODER)
    assert pipe.unet.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1) == (
        MODELS[name].resolution
    )
    assert pipe.tokenizer.model_max_length == 77


def test_a_copy_has_its_own_modules_on_the_same_weights(pipe):
    copy = shared_copy(pipe)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(copy, part), getattr(pipe, part)
        assert ours is not theirs
        assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert copy.tokenizer is not pipe.tokenizer and copy.scheduler is not pipe.scheduler


def test_concepts_on_a_copy_leave_the_pipeline_as_it_was(pipe, tmp_path):
    copy, vocabulary = shared_copy(pipe), len(pipe.tokenizer)
    seconds = load_all(copy, list(write_concepts(pipe, tmp_path, 3)), float("inf"))
    assert len(seconds) == 3 and min(seconds) > 0
    assert get_active_concepts(copy) == [token_of(number) for number in range(3)]
    assert get_list_concepts(pipe) == [] and len(pipe.tokenizer) == vocabulary
    assert type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v) is torch.nn.Linear


def test_a_prompt_holds_its_concepts():
    assert prompt_of(0) == "a car on a green background"
    assert prompt_of(2) == "a <concept-0> and a <concept-1> on a green background"


def test_loading_ends_at_its_deadline(pipe, tmp_path):
    paths = list(write_concepts(pipe, tmp_path, 2))
    with pytest.raises(TimeoutError, match="only 0 of 2 concepts were loaded before the deadline"):
        load_all(pipe, paths, time.perf_counter() - 1)


def test_a_lora_is_on_keys_and_values_of_cross_attentions_alone(pipe):
    parameters = add_lora_(pipe.unet, 4, torch.float64)
    places = {name.split(".lora_")[0] for name, _ in pipe.unet.named_parameters() if "lora_" in name}
    assert {place.rsplit(".", 2)[-2:][0] + "." + place.rsplit(".", 1)[-1] for place in places} == {
        "attn2.to_k",
        "attn2.to_v",
    }
    assert len(parameters) == 2 * len(places)
    assert {parameter.dtype for parameter in parameters} == {torch.float64}
    assert {min(parameter.shape) for parameter in parameters} == {4}


def test_a_picture_is_timed_in_parts_and_leaves_the_scheduler_as_it_was(pipe):
    parts = picture(Contender(pipe, prompt_of(0)), steps=2)
    assert list(parts) == ["encoding", "denoising"] and min(parts.values()) > 0
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_waits_are_errors_in_denoiser_calls_alone(pipe, tmp_path):
    (path,) = write_concepts(pipe, tmp_path, 1)
    load_concept(pipe, path)
    modes, seen = [], []
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
    layer.register_forward_pre_hook(lambda *_: seen.append(modes[-1]))
    assert waits_of(Contender(pipe, prompt_of(1)), modes.append) == "none"
    assert modes == ["error", "default"] * 2 + ["default"] and seen == ["error"] * 2


def test_a_wait_is_reported_and_the_mode_is_put_back(pipe):
    def waits(*_):
        raise RuntimeError("called a synchronizing CUDA operation")

    modes = []
    handle = pipe.unet.conv_in.register_forward_pre_hook(waits)
    contender = Contender(pipe, prompt_of(0))
    assert waits_of(contender, modes.append) == "RuntimeError: called a synchronizing CUDA operation"
    assert modes == ["error", "default"]
    handle.remove()
    picture(contender, steps=1)
    assert modes == ["error", "default"]
