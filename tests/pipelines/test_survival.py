"""What loaded concepts survive: one table of what people do to pipelines, each with its picture compared."""

import copy
import io
import pickle

import accelerate
import pytest
import torch
from diffusers import (
    ControlNetModel,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from helpers.small_model import assert_unchanged, state_of
from helpers.tiny_concepts import PROMPT, picture, tiny_concept
from helpers.tiny_pipes import tiny_pipe
from torch import nn

from perfusion_pytorch import (
    Rank1EditModule,
    get_active_concepts,
    load_concept,
    set_concepts,
    unload_concepts,
)

BASE_PROMPT = "a car on red"
FLOATS = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("concept") / "car.safetensors"
    tiny_concept(tiny_pipe()).save(path, dtype=torch.float32)
    return path


# ------------------------------------------------------------------------- what changes no number of the model


def to_float64_and_back(pipe, tmp_path):
    return pipe.to(torch.float64).to(torch.float32)


def to_another_memory_format(pipe, tmp_path):
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def deep_copy(pipe, tmp_path):
    return copy.deepcopy(pipe)


def pickled(pipe, tmp_path):
    return pickle.loads(pickle.dumps(pipe))


def modules_saved_by_torch(pipe, tmp_path):
    for name in ("unet", "text_encoder"):
        file = io.BytesIO()
        torch.save(getattr(pipe, name), file)
        file.seek(0)
        setattr(pipe, name, torch.load(file, weights_only=False))
    return pipe


def modules_copied(pipe, tmp_path):
    pipe.unet, pipe.text_encoder = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    return pipe


def from_pipe_there_and_back(pipe, tmp_path):
    return StableDiffusionPipeline.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(pipe))


def from_components(pipe, tmp_path):
    return StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)


def unet_compiled_by_assignment(pipe, tmp_path):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    return pipe


def unet_compiled_in_place(pipe, tmp_path):
    pipe.unet.compile(backend="eager")
    return pipe


def text_encoder_compiled_by_assignment(pipe, tmp_path):
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    return pipe


def text_encoder_compiled_in_place(pipe, tmp_path):
    pipe.text_encoder.compile(backend="eager")
    return pipe


def an_attention_compiled_by_assignment(pipe, tmp_path):
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2 = torch.compile(block.attn2, backend="eager")
    return pipe


def repeated_blocks_compiled(pipe, tmp_path):
    for module in pipe.unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(backend="eager")
    return pipe


def offloaded_by_models(pipe, tmp_path):
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def one_module_offloaded_by_accelerate(pipe, tmp_path):
    accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    return pipe


def attention_sliced(pipe, tmp_path):
    pipe.enable_attention_slicing()
    return pipe


def hooked_by_the_user(pipe, tmp_path):
    for module in pipe.unet.modules():
        module.register_forward_hook(lambda module, arguments, output: None)
    return pipe


def fused_and_unfused(pipe, tmp_path):
    pipe.fuse_qkv_projections(vae=False)
    pipe.unfuse_qkv_projections(vae=False)
    return pipe


def trained_in_between(pipe, tmp_path):
    pipe.unet.train().eval()
    pipe.text_encoder.train().eval()
    return pipe


def state_dict_loaded(pipe, tmp_path):
    for name in ("unet", "text_encoder"):
        module = getattr(pipe, name)
        module.load_state_dict(getattr(tiny_pipe(), name).state_dict(), strict=True)
    return pipe


LOSSLESS = [
    to_float64_and_back,
    to_another_memory_format,
    deep_copy,
    pickled,
    modules_saved_by_torch,
    modules_copied,
    from_pipe_there_and_back,
    from_components,
    unet_compiled_by_assignment,
    unet_compiled_in_place,
    text_encoder_compiled_by_assignment,
    text_encoder_compiled_in_place,
    an_attention_compiled_by_assignment,
    repeated_blocks_compiled,
    offloaded_by_models,
    one_module_offloaded_by_accelerate,
    attention_sliced,
    hooked_by_the_user,
    fused_and_unfused,
    trained_in_between,
    state_dict_loaded,
]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()


def assert_same(one, other):
    assert torch.allclose(one, other, atol=2e-5), (one - other).abs().max()


@pytest.mark.parametrize("operation", LOSSLESS, ids=lambda operation: operation.__name__)
def test_a_loaded_concept_survives(operation, file, tmp_path):
    """The picture is the same; then the concept is set, unloaded and loaded again."""
    pipe = tiny_pipe()
    base = picture(pipe, BASE_PROMPT)
    load_concept(pipe, file)
    before = picture(pipe)
    assert not torch.allclose(before, base, atol=0.05)
    changed = operation(pipe, tmp_path)
    assert get_active_concepts(changed) == ["<car-1>"]
    assert_same(picture(changed), before)
    set_concepts(changed, "<car-1>", beta=100.0)
    shut = picture(changed)
    assert not torch.allclose(shut, before, atol=0.05)
    set_concepts(changed, "<car-1>", beta=0.7)
    assert_same(picture(changed), before)
    unload_concepts(changed)
    assert_same(picture(changed, BASE_PROMPT), base)
    assert not any(isinstance(module, Rank1EditModule) for module in changed.unet.modules())
    load_concept(changed, file)
    assert_same(picture(changed), before)


@pytest.mark.parametrize("operation", LOSSLESS, ids=lambda operation: operation.__name__)
def test_a_concept_is_loaded_after(operation, file, tmp_path):
    expected = tiny_pipe()
    load_concept(expected, file)
    pipe = operation(tiny_pipe(), tmp_path)
    load_concept(pipe, file)
    assert_same(picture(pipe), picture(expected))
    unload_concepts(pipe)
    assert_same(picture(pipe, BASE_PROMPT), picture(tiny_pipe(), BASE_PROMPT))
