"""What loaded concepts survive: one table of what people do to pipelines, each with its picture compared."""

import copy
import io
import pickle

import accelerate
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from helpers.tiny_concepts import PROMPT, picture, tiny_concept
from helpers.tiny_pipes import tiny_pipe
from torch import nn

from perfusion_pytorch import (
    get_active_concepts,
    load_concept,
    set_concepts,
    unload_concepts,
)
from perfusion_pytorch.layers.loaded import LoadedProjection

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


# ----------------------------------------------------------------------- what changes no number of the model


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


CASES = [
    pytest.param(
        operation, id=operation.__name__, marks=[pytest.mark.slow] * ("compiled" in operation.__name__)
    )
    for operation in LOSSLESS
]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()


def assert_same(one, other):
    assert torch.allclose(one, other, atol=2e-5), (one - other).abs().max()


@pytest.mark.parametrize("operation", CASES)
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
    assert not any(isinstance(module, LoadedProjection) for module in changed.unet.modules())
    load_concept(changed, file)
    assert_same(picture(changed), before)


@pytest.mark.parametrize("operation", CASES)
def test_a_concept_is_loaded_after(operation, file, tmp_path):
    expected = tiny_pipe()
    load_concept(expected, file)
    pipe = operation(tiny_pipe(), tmp_path)
    load_concept(pipe, file)
    assert_same(picture(pipe), picture(expected))
    unload_concepts(pipe)
    assert_same(picture(pipe, BASE_PROMPT), picture(tiny_pipe(), BASE_PROMPT))


# -------------------------------------------------------------------------- what rounds, or moves, the model


def pictures_of(convert, file):
    """The pictures of a concept that was loaded before a conversion and of one that was loaded after it."""
    before, after = tiny_pipe(), tiny_pipe()
    load_concept(before, file)
    for pipe in (before, after):
        convert(pipe)
    load_concept(after, file)
    return before, after


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_in_every_dtype_that_computes(file, dtype):
    before, after = pictures_of(lambda pipe: pipe.to(dtype), file)
    assert torch.equal(picture(before), picture(after))
    exact = tiny_pipe()
    load_concept(exact, file)
    assert torch.allclose(picture(before), picture(exact), atol=0.05)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_concepts_state_is_kept_in_every_floating_dtype(file, dtype):
    """There and back: what the base model loses, a concept does not."""
    before, after = pictures_of(lambda pipe: pipe.to(dtype).to(torch.float32), file)
    assert torch.equal(picture(before), picture(after))
    unload_concepts(before)
    base = tiny_pipe().to(dtype).to(torch.float32)
    assert torch.equal(picture(before, BASE_PROMPT), picture(base, BASE_PROMPT))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16], ids=str)
def test_layerwise_casting(file, dtype):
    """Loaded before or after it, set within it, and unloaded: the base model goes on casting."""

    def cast(pipe):
        pipe.unet.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)

    before, after = pictures_of(cast, file)
    expected = picture(after)
    assert torch.equal(picture(before), expected)
    assert torch.equal(picture(before), expected)  # weights are cast back after each call
    base = tiny_pipe()
    cast(base)
    for pipe in (before, after):
        layers = [module for module in pipe.unet.modules() if isinstance(module, LoadedProjection)]
        assert {layer.weight.dtype for layer in layers} == {dtype}
        assert layers[0].edits.table.on(torch.device("cpu"))["concept_input"].dtype == torch.float32
        set_concepts(pipe, "<car-1>", beta=0.3)
        set_concepts(pipe, "<car-1>", beta=0.7)
        assert torch.equal(picture(pipe), expected)
        unload_concepts(pipe)
        assert torch.equal(picture(pipe, BASE_PROMPT), picture(base, BASE_PROMPT))
        projection = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        assert type(projection) is nn.Linear and projection.weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_layerwise_casting_of_a_text_encoder(file, dtype):
    def cast(pipe):
        apply_layerwise_casting(pipe.text_encoder, dtype, torch.float32, skip_modules_pattern=("norm",))

    def encodings(pipe, prompt):
        with torch.no_grad():
            return pipe.text_encoder(**pipe.tokenizer(prompt, return_tensors="pt")).last_hidden_state

    before, after = pictures_of(cast, file)
    assert torch.equal(encodings(before, PROMPT), encodings(after, PROMPT))
    assert before.text_encoder.get_input_embeddings().concept_embedding.dtype == torch.float32
    base = tiny_pipe()
    cast(base)
    for pipe in (before, after):
        unload_concepts(pipe)
        assert torch.equal(encodings(pipe, BASE_PROMPT), encodings(base, BASE_PROMPT))
        embedding = pipe.text_encoder.get_input_embeddings()
        assert type(embedding) is nn.Embedding and embedding.weight.dtype == dtype


def offloaded_in_pieces(pipe):
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def offloaded_in_groups(kind):
    def offload(pipe):
        for name in ("unet", "text_encoder"):
            apply_group_offloading(
                getattr(pipe, name),
                onload_device=torch.device("cpu"),
                offload_type=kind,
                num_blocks_per_group=1,
            )

    return offload


@pytest.mark.parametrize(
    "offload, message",
    [
        (offloaded_in_pieces, r"denoiser .* by hooks that this pipeline did not set.*remove_hook_from_sub"),
        (offloaded_in_groups("leaf_level"), "offloaded in groups. Load and set them first"),
        (offloaded_in_groups("block_level"), "offloaded in groups. Load and set them first"),
    ],
    ids=["pieces", "leaves", "blocks"],
)
def test_offloading_by_hooks_of_others(file, offload, message):
    """A loaded concept survives it; it is not loaded, set or unloaded under it, and nothing moves."""
    loaded, bare = tiny_pipe(), tiny_pipe()
    load_concept(loaded, file)
    before, base = picture(loaded), picture(bare, BASE_PROMPT)
    for pipe in (loaded, bare):
        offload(pipe)
    assert_same(picture(loaded), before)
    modules = {name: [*getattr(bare, name).modules()] for name in ("unet", "text_encoder")}
    with pytest.raises(ValueError, match=message):
        load_concept(bare, file)
    assert modules == {name: [*getattr(bare, name).modules()] for name in modules}
    assert_same(picture(bare, BASE_PROMPT), base)
    for call in (unload_concepts, lambda pipe: set_concepts(pipe, "<car-1>", beta=0.3)):
        with pytest.raises(ValueError, match=message):
            call(loaded)
    assert_same(picture(loaded), before)
    if offload is offloaded_in_pieces:
        accelerate.hooks.remove_hook_from_submodules(loaded.unet)
        unload_concepts(loaded)
        assert_same(picture(loaded, BASE_PROMPT), base)


def test_a_text_encoder_offloaded_in_pieces(file):
    """Its pipeline cannot run without an accelerator, with or without concepts; the encoder alone can."""
    loaded, bare = tiny_pipe(), tiny_pipe()
    load_concept(loaded, file)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        before = loaded.text_encoder(ids).last_hidden_state
        for pipe in (loaded, bare):
            accelerate.cpu_offload(pipe.text_encoder, execution_device=torch.device("cpu"))
        assert torch.equal(loaded.text_encoder(ids).last_hidden_state, before)
    for call in (lambda: load_concept(bare, file), lambda: unload_concepts(loaded)):
        with pytest.raises(ValueError, match=r"text_encoder \(CLIPTextModel\) is offloaded by hooks"):
            call()


def test_offloading_piece_by_piece(file):
    """The pipeline's own: it is taken off and put on again around every change."""
    pipe = tiny_pipe()
    pipe.enable_sequential_cpu_offload(device="cpu")
    load_concept(pipe, file)
    assert pipe.unet.conv_in.weight.is_meta
    reference = tiny_pipe()
    load_concept(reference, file)
    pipe.remove_all_hooks()
    assert_same(picture(pipe), picture(reference))


# ------------------------------------------------------------------------------ what is made of a base model


def test_a_controlnet_of_a_unet_with_concepts_is_the_base_models(file):
    pipe = tiny_pipe()
    expected = ControlNetModel.from_unet(pipe.unet).state_dict()
    load_concept(pipe, file)
    made = ControlNetModel.from_unet(pipe.unet).state_dict()
    shared = [name for name in expected if not name.startswith("controlnet_cond_embedding")]
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in shared)


def test_a_motion_model_of_a_unet_with_concepts_is_the_base_models(file):
    pipe = tiny_pipe()
    options = {"block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 4}
    adapter = MotionAdapter(**options, motion_num_attention_heads=2, use_motion_mid_block=False)
    torch.manual_seed(0)
    expected = UNetMotionModel.from_unet2d(pipe.unet, adapter).state_dict()
    load_concept(pipe, file)
    torch.manual_seed(0)
    made = UNetMotionModel.from_unet2d(pipe.unet, adapter).state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def test_what_is_saved_and_loaded_again_is_the_base_model_to_the_bit(file, tmp_path):
    """Weights, configurations, tokenizer, and pictures, of all that share the concept."""
    pipe = tiny_pipe()
    base = picture(pipe, BASE_PROMPT)
    vocabulary = pipe.tokenizer.get_vocab()
    load_concept(pipe, file)
    with_concept = picture(pipe)
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    for name, saver in {"own": pipe, "sibling": sibling, "copy": copy.deepcopy(pipe)}.items():
        saver.save_pretrained(tmp_path / name)
        again = StableDiffusionPipeline.from_pretrained(
            tmp_path / name, safety_checker=None, requires_safety_checker=False, local_files_only=True
        )
        assert again.tokenizer.get_vocab() == vocabulary and len(again.tokenizer) == len(vocabulary)
        assert torch.equal(picture(again, BASE_PROMPT), base)
        assert torch.equal(picture(again), picture(tiny_pipe()))
        load_concept(again, file)
        assert torch.equal(picture(again), with_concept)
    assert torch.equal(picture(pipe), with_concept)


def test_a_concept_is_loaded_on_animatediff(file):
    """Its UNet has the layers of the UNet that it was made of; frames show the concept."""
    pipe = tiny_pipe()
    options = {"block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 4}
    adapter = MotionAdapter(**options, motion_num_attention_heads=2, use_motion_mid_block=False)
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    animated = AnimateDiffPipeline(**parts, motion_adapter=adapter)
    animated.set_progress_bar_config(disable=True)

    def frames(prompt):
        generator = torch.Generator().manual_seed(0)
        options = {"num_frames": 2, "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
        return animated(prompt, generator=generator, **options).frames

    base = frames(BASE_PROMPT)
    load_concept(animated, file)
    shown = frames(PROMPT)
    set_concepts(animated, "<car-1>", beta=100.0)
    assert not torch.allclose(frames(PROMPT), shown, atol=1e-3)
    unload_concepts(animated)
    assert torch.equal(frames(BASE_PROMPT), base)
