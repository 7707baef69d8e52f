"""Files on a pipeline: the same pictures as by hand, at each strength, and nothing left behind."""

import pytest
import torch
from helpers.small_model import assert_unchanged, state_of
from helpers.tiny_concepts import picture
from helpers.tiny_pipes import tiny_pipe
from safetensors.torch import load_file, save_file

from perfusion_pytorch import load_concept, set_concepts
from perfusion_pytorch.evaluation.candidates import candidates_of
from perfusion_pytorch.evaluation.loading import check_is_plain, loaded

NEAR = 1e-5


def candidate(path, words="a sks car"):
    return candidates_of([path], words)[0]


def pictures_at(pipe, path, prompt, *strengths):
    with loaded(pipe, candidate(path)) as set_strength:
        results = []
        for strength in strengths:
            set_strength(strength)
            results.append(picture(pipe, prompt))
        return results


def assert_same_modules(pipe, state):
    """The very modules and weights, without a look at what else they have."""
    now = state_of(pipe)
    assert now[0] == state[0] and now[1].keys() == state[1].keys()
    assert all(
        now[1][key][0] == row[0] and torch.equal(now[1][key][2], row[2]) for key, row in state[1].items()
    )


def test_a_concept_at_its_betas(pipe, made):
    low, high = pictures_at(pipe, made / "mine.safetensors", "a <car-1> on red", 0.3, 0.9)
    other = tiny_pipe()
    name = load_concept(other, made / "mine.safetensors")
    for beta, image in ((0.3, low), (0.9, high)):
        set_concepts(other, name, beta=beta)
        assert torch.equal(picture(other, "a <car-1> on red"), image)
    assert not torch.equal(low, high)


def test_a_lora_at_its_scales(pipe, made):
    half, whole = pictures_at(pipe, made / "diffusers", "a car", 0.5, 1.0)
    other = tiny_pipe()
    lora = load_file(made / "diffusers" / "pytorch_lora_weights.safetensors")
    for scale, image in ((0.5, half), (1.0, whole)):  # the update, written out: B A times alpha / rank, 6 / 2
        other = tiny_pipe()
        for name in {key.split(".lora")[0] for key in lora}:
            a, b = (lora[f"{name}.lora.{way}.weight"] for way in ("down", "up"))
            layer = other.unet.get_submodule(name.removeprefix("unet."))
            layer.weight.data += scale * 3 * b @ a
        assert (picture(other, "a car") - image).abs().max() < NEAR
    assert (half - whole).abs().max() > 0.01


def test_a_lora_that_peft_wrote_is_the_same_as_diffusers(pipe, made):
    for scale in (0.5, 1.0):
        (one,) = pictures_at(pipe, made / "diffusers", "a car", scale)
        (other,) = pictures_at(pipe, made / "peft", "a car", scale)
        assert (one - other).abs().max() < NEAR and (one - picture(tiny_pipe(), "a car")).abs().max() > 0.01


@pytest.mark.parametrize(("name", "words"), [("inversion", None), ("two-rows", "<two>")])
def test_a_textual_inversion(pipe, made, name, words):
    path = made / f"{name}.safetensors"
    one = candidate(path, words)
    with loaded(pipe, one):
        image = picture(pipe, f"a {one.words} on red")
    other = tiny_pipe()
    other.load_textual_inversion(str(made), weight_name=path.name, token=one.words)
    assert torch.equal(picture(other, f"a {one.words} on red"), image)


@pytest.mark.parametrize(
    "name", ["mine.safetensors", "diffusers", "peft", "inversion.safetensors", "two-rows.safetensors"]
)
def test_the_pipeline_is_the_base_model_again(pipe, made, name):
    vocab_size = pipe.text_encoder.config.vocab_size
    before, random = picture(pipe, "a car on red"), torch.get_rng_state()
    state = state_of(pipe)
    for _ in range(2):
        pictures_at(pipe, made / name, "a car", None)
    assert torch.equal(picture(pipe, "a car on red"), before)
    assert pipe.text_encoder.config.vocab_size == vocab_size == len(pipe.tokenizer)
    if "safetensors" in name:
        assert_unchanged(pipe, state)
        assert torch.equal(torch.get_rng_state(), random)
    else:  # of a LoRA diffusers leaves marks on its modules, and draws random numbers for its start
        assert_same_modules(pipe, state)


def test_a_textual_inversion_of_sdxl_is_loaded_on_both_encoders(tmp_path):
    pipe = tiny_pipe("SDXL")
    rows = {"clip_l": torch.randn(1, 12), "clip_g": torch.randn(1, 20)}
    save_file(rows, tmp_path / "a.safetensors")
    noise = torch.randn(1, 4, 8, 8)
    pipe("a car", latents=noise, num_inference_steps=1, height=16, width=16)
    state = state_of(pipe)
    with loaded(pipe, candidate(tmp_path / "a.safetensors", "<a>")):
        for encoder, tokenizer, key in (
            (pipe.text_encoder, pipe.tokenizer, "clip_l"),
            (pipe.text_encoder_2, pipe.tokenizer_2, "clip_g"),
        ):
            number = tokenizer("<a>", add_special_tokens=False).input_ids
            assert torch.equal(encoder.get_input_embeddings().weight[number], rows[key])
        assert pipe("a <a>", latents=noise, num_inference_steps=1, height=16, width=16).images
    assert_unchanged(pipe, state)


def test_what_does_not_fit_is_refused_and_leaves_nothing(pipe, made, tmp_path):
    state = state_of(pipe)
    save_file({"<a>": torch.ones(1, 13)}, tmp_path / "wide.safetensors")
    with pytest.raises(
        ValueError, match=r"for each text encoder, of these widths: \{'text_encoder': 12\}, got .*13"
    ):
        pictures_at(pipe, tmp_path / "wide.safetensors", "a")
    lora = load_file(made / "diffusers" / "pytorch_lora_weights.safetensors")
    save_file({f"other.{key}": tensor for key, tensor in lora.items()}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="must have weights for the base model's layers, but none of its names"
    ):
        pictures_at(pipe, tmp_path / "other.safetensors", "a")
    wide = {key: tensor.repeat(2, 2) for key, tensor in lora.items()}
    save_file(wide, tmp_path / "wide-lora.safetensors")
    with pytest.raises(ValueError, match=r"wide-lora.safetensors does not fit the base model"):
        pictures_at(pipe, tmp_path / "wide-lora.safetensors", "a")
    assert_same_modules(pipe, state)


def test_a_pipeline_with_something_loaded_is_refused(pipe, made):
    check_is_plain(pipe)
    with (
        loaded(pipe, candidate(made / "peft")),
        pytest.raises(ValueError, match=r"has \['evaluated'\] loaded"),
    ):
        check_is_plain(pipe)
    load_concept(pipe, made / "mine.safetensors")
    with pytest.raises(ValueError, match=r"must be the base model alone, but has \['<car-1>'\] loaded"):
        check_is_plain(pipe)
