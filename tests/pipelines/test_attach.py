"""What concepts do to a pipeline, beside what others do to it, and that all of it is undone."""

import copy

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from helpers.small_model import assert_unchanged, latents, make_pipe, state_of
from safetensors.torch import save_file
from torch import nn

from perfusion_pytorch import (
    get_active_concepts,
    get_list_concepts,
    global_key_lock,
    load_concept,
    set_concepts,
    unload_concepts,
)
from perfusion_pytorch.layers.loaded import LoadedProjection


def test_after_unloading_the_pipeline_is_what_it_was(pipe, files):
    before = latents(pipe, "a car on a red background")
    state, random_state = state_of(pipe), torch.get_rng_state()
    for name in ("car", "bear"):
        load_concept(pipe, files / f"{name}.safetensors")
    assert torch.equal(torch.get_rng_state(), random_state)
    with global_key_lock(pipe):
        latents(pipe, "a <car-1> beside a <bear-1>")
    unload_concepts(pipe)
    assert_unchanged(pipe, state)
    assert torch.equal(latents(pipe, "a car on a red background"), before)
    unload_concepts(pipe)  # nothing to do
    assert get_list_concepts(pipe) == get_active_concepts(pipe) == []


def test_layers_that_somebody_took_off_are_put_back_where_concepts_are_chosen(pipe, files):
    car = load_concept(pipe, files / "car.safetensors")
    before = latents(pipe, f"a {car} on a red background")
    layers = [m for m in pipe.unet.modules() if isinstance(m, LoadedProjection)]
    attention = next(m for m in pipe.unet.modules() if getattr(m, "to_k", None) is layers[0])
    attention.to_k = nn.Linear(layers[0].weight.shape[1], layers[0].weight.shape[0], bias=False)
    attention.to_k.weight = layers[0].weight
    set_concepts(pipe, car)
    assert sum(isinstance(m, LoadedProjection) for m in pipe.unet.modules()) == len(layers)
    assert torch.equal(latents(pipe, f"a {car} on a red background"), before)


@pytest.mark.slow
def test_the_gate_depends_on_the_data_alone(pipe, files):
    """Whatever else is in the batch: negative prompts, other prompts, several images of a prompt."""
    load_concept(pipe, files / "car.safetensors")
    prompt = "a <car-1> on a blue background"
    alone = latents(pipe, prompt)
    together = latents(pipe, ["a house on red", prompt])
    assert torch.allclose(together[1:], alone, atol=1e-3)
    several = latents(pipe, ["a house on red", prompt], num_images_per_prompt=2)
    assert torch.allclose(several[2:], alone.expand(2, -1, -1, -1), atol=1e-3)
    negative = latents(pipe, prompt, negative_prompt="a house on red")
    assert not torch.allclose(negative, alone, atol=1e-3)
    other_way = latents(pipe, "a house on red", negative_prompt=prompt)
    assert other_way.isfinite().all() and not torch.allclose(
        other_way, latents(pipe, "a house on red"), atol=1e-3
    )
    free = latents(pipe, prompt, guidance_scale=1.0)
    assert torch.allclose(latents(pipe, [prompt, prompt], guidance_scale=1.0)[1:], free, atol=1e-3)


@pytest.mark.slow
def test_tokens_that_others_added_keep_their_ids(pipe, files, tmp_path):
    """Textual inversion before and after: what it loaded works on when the concepts are gone."""
    width = pipe.text_encoder.config.hidden_size
    for name in ("first", "later"):
        save_file({f"<{name}>": torch.randn(width) * 0.1}, tmp_path / f"{name}.safetensors")
    reference = make_pipe()
    for p in (pipe, reference):
        p.load_textual_inversion(tmp_path / "first.safetensors", token="<first>")
    load_concept(pipe, files / "car.safetensors")
    for p in (pipe, reference):
        p.load_textual_inversion(tmp_path / "later.safetensors", token="<later>")
    later = pipe.tokenizer.convert_tokens_to_ids("<later>")
    prompt = "a <first> beside a <later>"
    set_concepts(pipe, [])
    assert torch.allclose(latents(pipe, prompt), latents(reference, prompt), atol=1e-4)
    set_concepts(pipe, "<car-1>")
    unload_concepts(pipe)
    assert (
        pipe.tokenizer.convert_tokens_to_ids("<later>") == later
        and "<car-1>" not in pipe.tokenizer.get_vocab()
    )
    assert torch.equal(latents(pipe, prompt), latents(reference, prompt))
    assert type(pipe.text_encoder.get_input_embeddings()) is nn.Embedding
    load_concept(pipe, files / "car.safetensors")
    assert pipe.tokenizer.convert_tokens_to_ids("<later>") == later
    edited = latents(pipe, "a <car-1>")
    assert not torch.allclose(edited, latents(reference, "a car"), atol=1e-2)
    set_concepts(pipe, "<car-1>", beta=0.4)
    edited = latents(pipe, "a <car-1>")
    pipe.unload_textual_inversion()  # diffusers counts tokens anew and makes a new embedding
    assert "<later>" not in pipe.tokenizer.get_vocab() and torch.allclose(
        latents(pipe, "a <car-1>"), edited, atol=1e-4
    )
    unload_concepts(pipe)
    assert torch.equal(latents(pipe, "a car"), latents(make_pipe(), "a car"))


def test_what_is_saved_is_the_base_model(pipe, files, tmp_path):
    pipe.save_pretrained(tmp_path / "before")
    for name in ("car", "bear"):
        load_concept(pipe, files / f"{name}.safetensors")
    set_concepts(pipe, "<bear-1>", beta=0.4)
    with_concepts = latents(pipe, "a <bear-1>")
    pipe.save_pretrained(tmp_path / "after")
    for path in (p for p in (tmp_path / "before").rglob("*") if p.is_file()):
        assert (
            path.read_bytes() == (tmp_path / "after" / path.relative_to(tmp_path / "before")).read_bytes()
        ), path
    assert get_list_concepts(pipe) == ["<car-1>", "<bear-1>"] and get_active_concepts(pipe) == ["<bear-1>"]
    assert torch.equal(latents(pipe, "a <bear-1>"), with_concepts)
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    sibling.save_pretrained(tmp_path / "sibling")
    for part in ("unet", "text_encoder", "tokenizer"):
        getattr(pipe, part).save_pretrained(tmp_path / "alone" / part)
    for folder in ("sibling", "alone"):
        for name in (
            "unet/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "tokenizer/tokenizer.json",
        ):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert torch.equal(latents(pipe, "a <bear-1>"), with_concepts)


def test_pipelines_that_share_a_denoiser_share_its_concepts(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert get_active_concepts(other) == ["<car-1>"]
    load_concept(other, files / "bear.safetensors")
    assert get_active_concepts(pipe) == ["<car-1>", "<bear-1>"]
    unload_concepts(pipe)
    assert get_list_concepts(other) == [] and "encode_prompt" not in vars(pipe)
    other.encode_prompt("a car on red", "cpu", 1, False)  # its own are still watched, and do as ever


@pytest.mark.slow
@pytest.mark.parametrize("is_lora_first", [True, False])
def test_beside_a_lora(pipe, files, is_lora_first):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    steps = [lambda: pipe.unet.add_adapter(config), lambda: load_concept(pipe, files / "car.safetensors")]
    for step in steps if is_lora_first else steps[::-1]:
        torch.manual_seed(0)
        step()
    both = latents(pipe, "a <car-1> on red")
    reference = make_pipe()
    torch.manual_seed(0)
    reference.unet.add_adapter(config)
    assert not torch.allclose(both, latents(reference, "a car on red"), atol=1e-2)
    set_concepts(pipe, "<car-1>", beta=0.3)  # layers are made anew, under the LoRA
    unload_concepts(pipe)
    assert torch.equal(latents(pipe, "a car on red"), latents(reference, "a car on red"))
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe, "a car on red"), latents(make_pipe(), "a car on red"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_is_kept_while_concepts_come_and_go(pipe, files, kind):
    """Piece by piece, weights are on the meta device between calls: a CPU cannot run that, only undo it."""
    getattr(pipe, f"enable_{kind}_cpu_offload")(device="cpu")
    hooks = {
        name: type(module._hf_hook) for name, module in pipe.components.items() if hasattr(module, "_hf_hook")
    }
    assert {"unet", "text_encoder"} <= set(hooks) and pipe.unet.conv_in.weight.is_meta == (
        kind == "sequential"
    )
    load_concept(pipe, files / "car.safetensors")
    load_concept(pipe, files / "bear.safetensors")
    set_concepts(pipe, "<car-1>")
    if kind == "sequential":
        with global_key_lock(pipe), pytest.raises(RuntimeError, match="needs the weights in place"):
            layer = next(m for m in pipe.unet.modules() if isinstance(m, LoadedProjection) and m.is_key_proj)
            pipe.unet._perfusion_key_lock.add(*torch.zeros(2, 2, layer.in_features))
            (text_enc,) = next(iter(layer._forward_pre_hooks.values()))(
                layer, (torch.zeros(1, 2, layer.in_features),)
            )
            next(iter(layer._forward_hooks.values()))(layer, (text_enc,), None)
    assert {
        name: type(module._hf_hook) for name, module in pipe.components.items() if hasattr(module, "_hf_hook")
    } == hooks
    assert pipe.unet.conv_in.weight.is_meta == (kind == "sequential")
    if kind == "sequential":
        pipe.remove_all_hooks()
    reference = make_pipe()
    load_concept(reference, files / "car.safetensors")
    assert torch.allclose(
        latents(pipe, "a <car-1> on red"), latents(reference, "a <car-1> on red"), atol=1e-5
    )
    unload_concepts(pipe)
    assert torch.equal(latents(pipe, "a car on red"), latents(make_pipe(), "a car on red"))


@pytest.mark.slow
def test_a_fused_lora_is_part_of_the_base_model(pipe, files):
    """Fused before or after a concept is loaded: the same pictures, unlike either alone."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    before, after = pipe, make_pipe()
    for p in (before, after):
        torch.manual_seed(0)
        p.unet.add_adapter(config)
    before.fuse_lora()
    for p in (before, after):
        load_concept(p, files / "car.safetensors")
    after.fuse_lora()
    prompt = "a <car-1> on red"
    assert torch.allclose(latents(before, prompt), latents(after, prompt), atol=1e-3)
    only_concept = make_pipe()
    load_concept(only_concept, files / "car.safetensors")
    assert not torch.allclose(latents(before, prompt), latents(only_concept, prompt), atol=1e-2)
    fused_alone = make_pipe()
    torch.manual_seed(0)
    fused_alone.unet.add_adapter(config)
    fused_alone.fuse_lora()
    assert not torch.allclose(latents(before, prompt), latents(fused_alone, "a car on red"), atol=1e-2)
    for p in (before, after):
        unload_concepts(p)
        assert torch.allclose(latents(p, "a car on red"), latents(fused_alone, "a car on red"), atol=1e-5)
        p.unfuse_lora()
        p.unload_lora_weights()
        assert torch.allclose(
            latents(p, "a car on red"), latents(make_pipe(), "a car on red"), atol=1e-3
        )  # unfusing rounds


def test_a_deep_copy_has_concepts_of_its_own(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    unet = copy.deepcopy(pipe.unet)
    prompt = "a <car-1> on red"
    with_concept = latents(pipe, prompt)
    pipe.unet, original = unet, pipe.unet
    assert get_active_concepts(pipe) == ["<car-1>"]
    assert torch.equal(latents(pipe, prompt), with_concept)
    pipe.unet = original
    unload_concepts(pipe)
    layers = [m for m in unet.modules() if isinstance(m, LoadedProjection)]
    assert layers and all(layer.edits is unet._perfusion_concepts.concepts.edits for layer in layers)
    assert list(unet._perfusion_concepts.concepts) == ["<car-1>"] and len(layers[0].edits.active) == 1
    assert not any(isinstance(m, LoadedProjection) for m in pipe.unet.modules())
