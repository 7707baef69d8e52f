"""Concepts on diffusers pipelines: loaded, mixed, taken off again, beside what others do to a pipeline."""

import copy
import random
import shutil
import warnings

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from helpers.damage import damaged_files
from helpers.small_model import assert_unchanged, latents, make_pipe, state_of, train
from safetensors.torch import load_file, save_file
from torch import nn

from perfusion_pytorch import (
    Concept,
    Rank1EditModule,
    delete_concepts,
    disable_concepts,
    enable_concepts,
    get_active_concepts,
    get_list_concepts,
    global_key_lock,
    load_concept,
    save_concept,
    set_concepts,
    unload_concepts,
    wrap_cross_attentions_,
)


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Concept files: a car, a bear of two words, another car under the same token."""
    folder = tmp_path_factory.mktemp("concepts")
    for name, token, superclass, seed in (
        ("car", "<car-1>", "car", 1),
        ("bear", "<bear-1>", "teddy bear", 2),
        ("twin", "<car-1>", "car", 3),
    ):
        trained = make_pipe()
        train(trained, token, superclass, seed)
        save_concept(trained, folder / f"{name}.safetensors", dtype=torch.float32)
    return folder


def test_a_saved_concept_makes_the_same_picture_on_another_pipeline(tmp_path, pipe):
    trained = make_pipe()
    train(trained, "<bear-1>", "teddy bear")
    save_concept(trained, tmp_path / "bear.safetensors", dtype=torch.float32)
    assert load_concept(pipe, tmp_path / "bear.safetensors") == "<bear-1>"
    prompt = "a photo of a <bear-1> on a green background"
    assert torch.equal(latents(pipe, prompt), latents(trained, prompt))
    assert not torch.allclose(
        latents(pipe, prompt), latents(make_pipe(), prompt.replace("<bear-1>", "teddy bear")), atol=1e-2
    )
    concept = Concept.load(tmp_path / "bear.safetensors")
    assert (concept.token, concept.superclass, concept.base_model) == (
        "<bear-1>",
        "teddy bear",
        "UNet2DConditionModel",
    )
    save_concept(pipe, tmp_path / "again.safetensors", dtype=torch.float32)
    for name, tensor in load_file(tmp_path / "bear.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again.safetensors")[name], tensor)


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


def test_the_same_token_twice_gets_a_new_name(pipe, files):
    assert [load_concept(pipe, files / f"{name}.safetensors") for name in ("car", "twin", "bear")] == [
        "<car-1>",
        "<car-2>",
        "<bear-1>",
    ]
    one, other = latents(pipe, "a <car-1> on red"), latents(pipe, "a <car-2> on red")
    assert not torch.allclose(one, other, atol=1e-2)
    second = make_pipe()
    assert load_concept(second, files / "car.safetensors", token="<mine>") == "<mine>"
    set_concepts(pipe, "<car-1>")
    assert torch.allclose(latents(pipe, "a <car-1> on red"), latents(second, "a <mine> on red"), atol=1e-4)
    with pytest.raises(ValueError, match="'<mine>' already"):
        load_concept(second, files / "bear.safetensors", token="<mine>")
    assert get_list_concepts(second) == ["<mine>"]


def test_the_same_concept_twice_is_refused(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    state = state_of(pipe)
    with pytest.raises(ValueError, match=r"\['<car-1>', '<car-2>'\] cannot be active together"):
        load_concept(pipe, files / "car.safetensors")
    assert_unchanged(pipe, state)


def test_choosing_concepts_and_their_gates(pipe, files):
    for name in ("car", "bear"):
        load_concept(pipe, files / f"{name}.safetensors")
    prompt = "a <car-1> beside a <bear-1> on red"
    both = latents(pipe, prompt)
    set_concepts(pipe, "<car-1>")
    assert get_active_concepts(pipe) == ["<car-1>"] and get_list_concepts(pipe) == ["<car-1>", "<bear-1>"]
    alone = latents(pipe, prompt)
    assert not torch.allclose(both, alone, atol=1e-3)
    set_concepts(pipe, ["<car-1>", "<bear-1>"], beta={"<bear-1>": 0.3}, temperature=0.2)
    layer = next(m for m in pipe.unet.modules() if isinstance(m, Rank1EditModule))
    assert torch.allclose(layer.eval_beta, torch.tensor([0.7, 0.3])) and torch.allclose(
        layer.eval_temperature, torch.tensor([0.2, 0.2])
    )
    disable_concepts(pipe)
    assert get_active_concepts(pipe) == [] and not any(
        isinstance(m, Rank1EditModule) for m in pipe.unet.modules()
    )
    assert torch.equal(latents(pipe, "a car on red"), latents(make_pipe(), "a car on red"))
    enable_concepts(pipe)
    assert get_active_concepts(pipe) == ["<car-1>", "<bear-1>"]
    set_concepts(pipe, get_list_concepts(pipe), beta=0.7, temperature=0.15)
    assert torch.equal(latents(pipe, prompt), both)
    delete_concepts(pipe, "<car-1>")
    assert get_list_concepts(pipe) == get_active_concepts(pipe) == ["<bear-1>"]
    only = make_pipe()
    load_concept(only, files / "bear.safetensors")
    assert torch.allclose(latents(pipe, "a <bear-1> on red"), latents(only, "a <bear-1> on red"), atol=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda pipe: set_concepts(pipe, ["<dog-1>"]),
            r"\['<dog-1>'\] are not loaded. Loaded are \['<car-1>'\]",
        ),
        (lambda pipe: set_concepts(pipe, "<car-1>", beta={"<dog-1>": 1}), "are not loaded"),
        (lambda pipe: set_concepts(pipe, "<car-1>", temperature=0), "τ above 0"),
        (lambda pipe: set_concepts(pipe, "<car-1>", beta=float("nan")), "must be"),
        (lambda pipe: delete_concepts(pipe, ["<car-1>", "<dog-1>"]), "are not loaded"),
        (
            lambda pipe: save_concept(pipe, "nowhere", name="<dog-1>"),
            r"one of the pipeline's concepts \['<car-1>'\]",
        ),
    ],
)
def test_bad_calls_change_nothing(pipe, files, call, message):
    load_concept(pipe, files / "car.safetensors")
    layers = [m for m in pipe.unet.modules() if isinstance(m, Rank1EditModule)]
    gates = [layer.eval_beta.clone() for layer in layers]
    with pytest.raises(ValueError, match=message):
        call(pipe)
    assert [m for m in pipe.unet.modules() if isinstance(m, Rank1EditModule)] == layers
    assert all(torch.equal(layer.eval_beta, gate) for layer, gate in zip(layers, gates, strict=True))
    assert get_active_concepts(pipe) == ["<car-1>"]


def test_calls_without_a_loaded_concept(pipe, tmp_path):
    for call in (
        disable_concepts,
        enable_concepts,
        lambda p: set_concepts(p, "<a>"),
        lambda p: delete_concepts(p, "<a>"),
    ):
        with pytest.raises(ValueError, match=r"no loaded concept\. Call `load_concept` first"):
            call(pipe)
    with pytest.raises(ValueError, match="text encoders know no concept"):
        save_concept(pipe, tmp_path / "file")


def changed(path, target, **changes):
    fields = vars(Concept.load(path)) | changes
    Concept(**fields).save(target, dtype=torch.float32)
    return target


def other_covariance(concept):
    dual = concept.concept_dual + 0.5 * torch.randn(concept.dim) / concept.concept_input.norm()
    return dual / (dual @ concept.concept_input)


@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda c: {"base_model": "PixArtTransformer2DModel"}, "is for a PixArtTransformer2DModel, but the pipeline has a UNet2D"),
        (lambda c: {"outputs": {k: torch.ones(len(v) + 1) for k, v in c.outputs.items()}}, "of 128 features is expected, got 129"),
        (lambda c: {"outputs": {f"x{k}": v for k, v in c.outputs.items()}}, "an output of 128 features is expected, got none"),
        (lambda c: {"embeddings": {"text_encoder_2": torch.ones(160)}}, "has embeddings of .*text_encoder_2.*text encoders are"),
        (lambda c: {"embeddings": {"text_encoder": torch.ones(16)}}, "has embeddings of"),
        (lambda c: {"concept_dual": other_covariance(c)}, "<bear-1> and <car-1> were trained with different input covariances"),
        (
            lambda c: {
                "concept_input": torch.ones(9), "concept_dual": torch.ones(9) / 9, "superclass_input": torch.ones(9),
            },
            "of 9 features, but the pipeline's have",
        ),
    ],
)  # fmt: skip
def test_a_concept_that_does_not_fit_is_refused(pipe, files, tmp_path, changes, message):
    load_concept(pipe, files / "car.safetensors")
    state = state_of(pipe)
    bear = Concept.load(files / "bear.safetensors")
    path = changed(files / "bear.safetensors", tmp_path / "wrong.safetensors", **changes(bear))
    with pytest.raises(ValueError, match=message):
        load_concept(pipe, path)
    assert_unchanged(pipe, state)


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


def test_prompts_that_would_lose_a_concept(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    with pytest.raises(ValueError, match="must be written '<car-1>', in lower case"):
        latents(pipe, "a <Car-1> on red")
    with pytest.raises(ValueError, match="first 18 tokens, apart from other words, but was lost from the prompt"):
        latents(pipe, "a " * 19 + "<car-1>")
    with pytest.raises(ValueError, match="first 18 tokens, apart from other words, but was lost from the prompt"):
        latents(pipe, "a house", negative_prompt="a " * 19 + "<car-1>")
    with pytest.warns(UserWarning, match=r"No concept named <car-7> is loaded.*\['<car-1>'\]"):
        latents(pipe, "a <car-7> on red")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipe, "a <car-1> on red")


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
    for owner in (sibling, pipe.unet, pipe.text_encoder):
        with pytest.raises(
            ValueError, match="must be saved by `save_pretrained` of the pipeline that they were loaded on"
        ):
            owner.save_pretrained(tmp_path / "sibling")
    unload_concepts(pipe)
    sibling.save_pretrained(tmp_path / "sibling")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "sibling" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_pipelines_that_share_a_denoiser_share_its_concepts(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert get_active_concepts(other) == ["<car-1>"]
    load_concept(other, files / "bear.safetensors")
    assert get_active_concepts(pipe) == ["<car-1>", "<bear-1>"]
    unload_concepts(pipe)
    assert get_list_concepts(other) == [] and "encode_prompt" not in vars(pipe)
    other.encode_prompt("a car on red", "cpu", 1, False)  # its own are still watched, and do as ever


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


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_is_kept_while_concepts_come_and_go(pipe, files, kind):
    """Piece by piece, weights are on the meta device between calls. A CPU cannot run that, but its hooks can be taken off again."""
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
            layer = next(m for m in pipe.unet.modules() if isinstance(m, Rank1EditModule) and m.is_key_proj)
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


def test_a_fused_lora_is_part_of_the_base_model(pipe, files):
    """Fused before or after a concept is loaded: the same pictures, which are neither the LoRA's nor the concept's alone."""
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


def test_global_key_locking(pipe, files):
    """Keys are the plain ones of the superclass prompt, token by token, though the superclass has two; values are edited as ever."""
    load_concept(pipe, files / "bear.safetensors")
    seen = {}
    hooked = [m for m in pipe.unet.modules() if isinstance(m, Rank1EditModule)]
    layers = {layer.is_key_proj: layer for layer in hooked}
    prompt, n = "a <bear-1> left of a house", pipe.tokenizer.model_max_length

    def calls(**options):
        seen.clear()
        latents(pipe, prompt, **options)
        return seen["keys"], seen["values"]

    with global_key_lock(pipe):
        handles = [
            layers[is_key].register_forward_hook(
                lambda _, __, output, key=key: seen.setdefault(key, output.detach())
            )
            for key, is_key in (("keys", True), ("values", False))
        ]
        locked_keys, locked_values = calls()
    with torch.no_grad():
        plain = pipe.encode_prompt(prompt.replace("<bear-1>", "teddy bear"), "cpu", 1, False)[0]
    where = [0, 1, *range(3, n), n - 1]  # of "teddy bear" the last token stays
    assert torch.allclose(
        locked_keys[1], nn.functional.linear(plain[0, where], layers[True].weight), atol=1e-4
    )
    keys, values = calls()
    assert torch.equal(values, locked_values)
    assert torch.equal(keys[0], locked_keys[0])  # the empty prompt keeps its own
    assert not torch.allclose(keys[1], locked_keys[1], atol=1e-2)
    for handle in handles:
        handle.remove()
    assert not any(layer._forward_hooks for layer in hooked)
    house = latents(pipe, "a house on red")
    with global_key_lock(pipe):
        assert torch.equal(latents(pipe, "a house on red"), house)
        with pytest.raises(RuntimeError, match="cannot be nested"), global_key_lock(pipe):
            pass


def test_key_locks_hold_while_concepts_are_set(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    prompt, reference = "a <car-1> on red", []
    for beta in (0.3, 0.6):
        set_concepts(pipe, "<car-1>", beta=beta)
        with global_key_lock(pipe):
            reference.append(latents(pipe, prompt))
    assert not torch.allclose(*reference, atol=1e-3)
    with global_key_lock(pipe):
        for beta, expected in zip((0.3, 0.6), reference, strict=True):
            set_concepts(pipe, "<car-1>", beta=beta)
            assert torch.equal(latents(pipe, prompt), expected)
        assert len(pipe.unet._perfusion_key_lock.pairs) == 1  # however often the prompt came
        unload_concepts(pipe)
        assert torch.equal(latents(pipe, "a car on red"), latents(make_pipe(), "a car on red"))


def test_key_locks_beside_a_lora_and_an_inversion_of_several_vectors(pipe, files, tmp_path):
    """A LoRA's part of the keys is that of the superclass prompt too; a word that stands for several vectors shifts what follows."""
    from peft import LoraConfig

    width, n = pipe.text_encoder.config.hidden_size, pipe.tokenizer.model_max_length
    save_file(
        {"<many>": torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 0.1},
        tmp_path / "many.safetensors",
    )
    pipe.load_textual_inversion(tmp_path / "many.safetensors", token="<many>")
    load_concept(pipe, files / "bear.safetensors")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    outer = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2.to_k"))
    seen, prompt = [], "a <many> beside a <bear-1> on red"
    handle = outer.register_forward_hook(lambda _, inputs, keys: seen.append(keys.detach()))
    with global_key_lock(pipe):
        latents(pipe, prompt)
    handle.remove()
    set_concepts(pipe, [])
    with torch.no_grad():
        plain = pipe.encode_prompt(prompt.replace("<bear-1>", "teddy bear"), "cpu", 1, False)[0]
        where = [
            *range(7),
            *range(8, n),
            n - 1,
        ]  # after the start: a, three vectors, beside, a, and of "teddy bear" the last token
        assert torch.allclose(seen[0][1], outer(plain[:, where])[0], atol=1e-4)


def test_key_locks_are_gone_after_an_exception(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    before = latents(pipe, "a <car-1>")
    with pytest.raises(KeyError), global_key_lock(pipe):
        latents(pipe, "a <car-1>")
        raise KeyError
    assert torch.equal(latents(pipe, "a <car-1>"), before)


def test_a_deep_copy_has_concepts_of_its_own(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    unet = copy.deepcopy(pipe.unet)
    unload_concepts(pipe)
    assert any(isinstance(m, Rank1EditModule) for m in unet.modules())


def test_no_pipeline():
    with pytest.raises(ValueError, match="must be a diffusers pipeline"):
        get_list_concepts(nn.Linear(2, 2))
