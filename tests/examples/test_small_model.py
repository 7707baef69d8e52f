"""The committed small model loads and runs as everyone types it, and its concepts mix with the README's."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.small_model import MODEL
from safetensors.torch import load_file

from perfusion_pytorch import Concept
from perfusion_pytorch.captions.sources import CaptionFile
from perfusion_pytorch.pipelines.covariance_cache import cached_covariance
from perfusion_pytorch.pipelines.model_notes import notes_of

WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def test_it_is_loaded_in_one_precision_with_every_stored_number():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    for name, path in WEIGHTS.items():
        assert (MODEL / path).stat().st_size <= 15 * 2**20
        stored = load_file(MODEL / path)
        state = getattr(pipe, name).state_dict()
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        by_name = {key.removeprefix("text_model."): tensor for key, tensor in stored.items()}
        assert by_name and all(torch.equal(state[key], tensor.float()) for key, tensor in by_name.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_needs_nothing_but_the_folder(dtype):
    """In the precision that is asked for, else in float32."""
    asked = {} if dtype == torch.float32 else {"torch_dtype": dtype}
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, **asked)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == dtype
    image = pipe("a car", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64) and image.getbbox() is not None


def test_pipelines_of_other_kinds_load_the_folder_too():
    from diffusers import AutoPipelineForImage2Image

    pipe = AutoPipelineForImage2Image.from_pretrained(MODEL)
    picture = StableDiffusionPipeline.from_pretrained(MODEL)("a car", num_inference_steps=1).images[0]
    assert pipe("a red car", image=picture, num_inference_steps=2, strength=0.5).images[0].size == (64, 64)


@pytest.mark.slow
def test_concepts_of_the_readmes_captions_mix_with_the_committed_ones(tmp_path):
    """They share one covariance: that of the captions in the file."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    covariance = cached_covariance(
        pipe, CaptionFile(MODEL / "captions.txt"), cache_dir=tmp_path, progress=False
    )
    inverse = covariance.inverse(dtype=torch.float64)
    for path in (MODEL.parent / "concepts").glob("*.safetensors"):
        concept = Concept.load(path)
        i = concept.concept_input.double()
        assert (i @ inverse @ i).item() == pytest.approx(concept.concept_norm, rel=1e-6)
        dual = inverse @ i / (i @ inverse @ i)
        assert (dual - concept.concept_dual).norm() < 1e-3 * dual.norm()


def test_the_picture_is_that_of_the_weights_converted_by_hand():
    """As it was typed before: every module made float32 after loading."""
    first = StableDiffusionPipeline.from_pretrained(MODEL)
    second = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float16).to(torch.float32)
    pictures = [
        pipe("a car", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].tobytes()
        for pipe in (first, second)
    ]
    assert pictures[0] == pictures[1]


def test_the_small_model_says_its_captions_and_templates():
    notes = notes_of(StableDiffusionPipeline.from_pretrained(MODEL))
    assert notes.captions == MODEL / "captions.txt"
    assert {"a {}", "a photo of a {}"} <= set(notes.templates)
