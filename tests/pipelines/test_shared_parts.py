"""What holds on every pipeline that shares parts with the one that a concept was loaded on, and on copies."""

import copy
import pickle

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from helpers.tiny_concepts import PROMPT, picture, tiny_concept
from helpers.tiny_pipes import tiny_pipe
from safetensors.torch import load_file, save_file
from torch import nn

from perfusion_pytorch import (
    get_active_concepts,
    get_list_concepts,
    global_key_lock,
    load_concept,
    set_concepts,
    unload_concepts,
    wrap_cross_attentions_,
)
from perfusion_pytorch.layers.loaded import LoadedProjection
from perfusion_pytorch.pipelines import attach
from perfusion_pytorch.pipelines.fitting import check_fits

SHARED = [
    lambda pipe: pipe,
    lambda pipe: StableDiffusionImg2ImgPipeline.from_pipe(pipe),
    lambda pipe: StableDiffusionPipeline(**pipe.components, requires_safety_checker=False),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("concept") / "car.safetensors"
    tiny_concept(tiny_pipe()).save(path, dtype=torch.float32)
    return path


@pytest.fixture
def pipe(file):
    pipe = tiny_pipe()
    load_concept(pipe, file)
    return pipe


# ------------------------------------------------------------------------------------------------ siblings


@pytest.mark.parametrize("share", SHARED, ids=["itself", "from_pipe", "components"])
def test_prompts_are_checked_on_every_sibling(pipe, share):
    sibling = share(pipe)
    for prompt, message in (
        ("a <Car-1> on red", "must be written '<car-1>', in lower case"),
        ("a " * 19 + "<car-1>", "was lost from the prompt"),
    ):
        for options in ({"prompt": prompt}, {"prompt": "a house", "negative_prompt": prompt}):
            with pytest.raises(ValueError, match=message):
                sibling.encode_prompt(
                    device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **options
                )
    with pytest.warns(UserWarning, match=r"No concept named <car-7> is loaded.*\['<car-1>'\]") as found:
        sibling.encode_prompt("a <car-7>", "cpu", 1, False)
    assert {record.filename for record in found} == {__file__}


@pytest.mark.parametrize("share", SHARED, ids=["itself", "from_pipe", "components"])
@pytest.mark.parametrize("tokens", [None, "<later>"])
def test_textual_inversion_is_unloaded_on_every_sibling(pipe, file, tmp_path, share, tokens):
    """The concept stays, under its name, and so does what it was loaded over."""
    before = picture(pipe)
    save_file({"<later>": torch.randn(12)}, tmp_path / "later.safetensors")
    pipe.load_textual_inversion(tmp_path / "later.safetensors", token="<later>")
    with_inversion = picture(pipe, "a <later> on red")
    sibling = share(pipe)
    if tokens is None:
        with pytest.warns(UserWarning, match=r"\['<car-1>'\] stay loaded"):
            sibling.unload_textual_inversion()
    else:
        sibling.unload_textual_inversion(tokens)
    assert "<later>" not in pipe.tokenizer.get_vocab()
    assert torch.equal(picture(pipe), before)
    pipe.load_textual_inversion(tmp_path / "later.safetensors", token="<later>")
    assert torch.equal(picture(pipe, "a <later> on red"), with_inversion)
    sibling.unload_textual_inversion("<later>")
    unload_concepts(sibling)
    assert get_list_concepts(pipe) == []
    assert type(pipe.text_encoder.get_input_embeddings()) is nn.Embedding
    assert torch.equal(picture(pipe, "a car on red"), picture(tiny_pipe(), "a car on red"))
    assert pipe.tokenizer.get_vocab() == tiny_pipe().tokenizer.get_vocab()


def test_two_denoisers_on_one_text_encoder(pipe, file):
    """Unloading from one leaves the other's concept as it is."""
    other = StableDiffusionPipeline.from_pipe(pipe, unet=tiny_pipe().unet)
    assert load_concept(other, file) == "<car-2>"
    expected = picture(pipe)
    assert torch.allclose(picture(other, PROMPT.replace("1", "2")), expected, atol=1e-5)
    unload_concepts(pipe)
    assert torch.allclose(picture(other, PROMPT.replace("1", "2")), expected, atol=1e-5)
    unload_concepts(other)
    assert pipe.tokenizer.get_vocab() == tiny_pipe().tokenizer.get_vocab()


# -------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_of_a_pipeline_is_whole_and_its_own(pipe, tmp_path, duplicate):
    """Its prompts are encoded by its own text encoder, and its own weights are saved."""
    copied, before = duplicate(pipe), picture(pipe)
    with torch.no_grad():
        for name in ("unet", "text_encoder"):
            for parameter in getattr(copied, name).parameters():
                parameter.mul_(1.5)
    assert not torch.allclose(copied.encode_prompt(PROMPT, "cpu", 1, False)[0], encoded(pipe), atol=1e-2)
    copied.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["conv_in.weight"], copied.unet.conv_in.weight)
    set_concepts(copied, [])
    copied.load_textual_inversion({"<later>": torch.randn(12)}, token="<later>")
    unload_concepts(copied)
    assert get_active_concepts(pipe) == ["<car-1>"]
    assert torch.equal(picture(pipe), before)


def encoded(pipe):
    return pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]


def test_a_copied_tokenizer_is_checked_and_saved_by_itself(pipe, tmp_path):
    for duplicate in (copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))):
        tokenizer = duplicate(pipe.tokenizer)
        assert type(tokenizer) is type(pipe.tokenizer)
        with pytest.raises(ValueError, match="in lower case"):
            tokenizer("a <Car-1>")
        tokenizer.save_pretrained(tmp_path)
        assert "<car-1>" not in type(tokenizer).from_pretrained(tmp_path).get_vocab()
        assert "<car-1>" in tokenizer.get_vocab()


# --------------------------------------------------------------------------------------- tokens in prompts


def test_tokens_within_tokens(file):
    pipe = tiny_pipe()
    concept = tiny_concept(pipe, seed=1)
    assert load_concept(pipe, file, token="my-car") == "my-car"
    attach.attach(pipe, concept.__class__(**vars(concept) | {"token": "my-car2"}))
    names = ["my-car", "my-car2"]
    set_concepts(pipe, names[1])
    alone = picture(pipe, "a my-car2 on red")
    assert torch.isfinite(picture(pipe, "a my-car beside my-car2")).all()
    with pytest.raises(ValueError, match="'my-car2' must stand within"):
        picture(pipe, "a my-car " + "a " * 19 + "my-car2")
    with pytest.raises(ValueError, match="must be written 'my-car2'"):
        picture(pipe, "a My-Car2")
    with global_key_lock(pipe):
        picture(pipe, "a my-car2 on red")
        ((_, other),) = pipe.unet._perfusion_key_lock.pairs
    plain = pipe.encode_prompt("a car on red", "cpu", 1, False)[0][0]
    assert torch.allclose(other, plain, atol=1e-5)
    assert torch.equal(picture(pipe, "a my-car2 on red"), alone)


# ------------------------------------------------------------------------------------------ bypassed edits


class OwnKeys(nn.Module):
    """A user's processor, with a projection of its own."""

    def __init__(self):
        super().__init__()
        self.text_to_key = nn.Linear(12, 8)


BYPASSES = {
    "CustomDiffusionAttnProcessor2_0": lambda: CustomDiffusionAttnProcessor2_0(
        train_kv=True, train_q_out=False, hidden_size=8, cross_attention_dim=12
    ),
    "OwnKeys": OwnKeys,
}


def attention_of(pipe):
    return next(m for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False))


@pytest.mark.parametrize("name", BYPASSES)
@pytest.mark.parametrize("share", SHARED, ids=["itself", "from_pipe", "components"])
def test_processors_that_bypass_the_edit_are_refused_by_name(pipe, file, name, share):
    message = f"has the processor {name} with projections .* of its own, which bypass the edit"
    sibling, bare = share(pipe), tiny_pipe()
    for one in (sibling, bare):
        attention_of(one).processor = BYPASSES[name]()
    calls = [
        lambda: load_concept(bare, file),
        lambda: wrap_cross_attentions_(bare.unet, C=None),
        lambda: sibling.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 12)),
        lambda: set_concepts(sibling, []),
        lambda: unload_concepts(sibling),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    attention_of(sibling).set_processor(AttnProcessor2_0())
    unload_concepts(sibling)


@pytest.mark.parametrize(
    "processor",
    [
        lambda: CustomDiffusionAttnProcessor2_0(train_kv=False, train_q_out=False),
        lambda: IPAdapterAttnProcessor2_0(hidden_size=8, cross_attention_dim=12),
    ],
    ids=["custom diffusion without keys", "IP-Adapter"],
)
def test_processors_beside_which_the_edit_acts_are_taken(file, processor):
    pipe = tiny_pipe()
    attention_of(pipe).processor = processor()
    load_concept(pipe, file)
    assert any(isinstance(module, LoadedProjection) for module in pipe.unet.modules())


# ----------------------------------------------------------------------------------------- parts of others


def test_a_lora_on_the_token_embedding_is_refused_before_and_after(pipe, file):
    from peft import LoraConfig, inject_adapter_in_model

    bare = tiny_pipe()
    config = LoraConfig(r=2, target_modules=["token_embedding"], init_lora_weights=False)
    for one in (pipe, bare):
        inject_adapter_in_model(config, one.text_encoder)
    modules = [*bare.unet.modules(), *bare.text_encoder.modules()]
    for call in (
        lambda: load_concept(bare, file),
        lambda: unload_concepts(pipe),
        lambda: set_concepts(pipe, []),
    ):
        with pytest.raises(ValueError, match=r"but an adapter \(peft.* Unload the adapter"):
            call()
    assert modules == [*bare.unet.modules(), *bare.text_encoder.modules()]
    assert get_active_concepts(pipe) == ["<car-1>"]


def test_text_encoders_may_be_freed_after_loading(pipe, file):
    expected, (embeds, negative) = picture(pipe), pipe.encode_prompt(PROMPT, "cpu", 1, True)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    pipe.text_encoder = pipe.tokenizer = None
    assert torch.equal(picture(pipe, None, **given), expected)
    set_concepts(pipe, "<car-1>", beta=100.0)
    assert not torch.allclose(picture(pipe, None, **given), expected, atol=0.01)
    set_concepts(pipe, "<car-1>", beta=0.7)
    assert torch.equal(picture(pipe, None, **given), expected)
    unload_concepts(pipe)
    with pytest.raises(ValueError, match="Load the concept first, encode the prompts, and free"):
        load_concept(pipe, file)


def test_a_failed_change_leaves_all_as_it_was(pipe, file, monkeypatch):
    before, modules = picture(pipe), list(pipe.unet.modules())
    bare = tiny_pipe()
    base = picture(bare, "a car on red")

    def fail(*args):
        raise KeyError("half way")

    monkeypatch.setattr(attach, "watch_prompts", fail)
    with pytest.raises(KeyError):
        set_concepts(pipe, "<car-1>", beta=0.1)
    with pytest.raises(KeyError):
        load_concept(bare, file)
    monkeypatch.undo()
    assert list(pipe.unet.modules()) == modules
    assert torch.equal(picture(pipe), before)
    assert get_list_concepts(bare) == [] and torch.equal(picture(bare, "a car on red"), base)
    assert bare.tokenizer.get_vocab() == tiny_pipe().tokenizer.get_vocab()
    load_concept(bare, file)
    assert torch.equal(picture(bare), before)


# --------------------------------------------------------------------------------- locks that lock nothing


@pytest.mark.parametrize("how", ["before the block", "by a sibling"])
def test_a_lock_that_locks_nothing_warns(pipe, how):
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    unlocked = picture(pipe)
    sibling = StableDiffusionPipeline.from_pipe(pipe)
    with global_key_lock(pipe):
        with pytest.warns(UserWarning, match="within the block, or pass the prompts") as found:
            seen = picture(pipe, None, **given) if how == "before the block" else picture(sibling)
        assert len(found) == 1 and torch.equal(seen, unlocked)
        locked = picture(pipe)
        assert not torch.allclose(locked, unlocked, atol=1e-4)
        assert torch.equal(picture(pipe, None, **given), locked)  # known by now


def test_a_lock_without_a_concept_in_the_prompt_is_silent(pipe, recwarn):
    with global_key_lock(pipe):
        picture(pipe, "a house on red")
        picture(pipe)
    assert not [record for record in recwarn if "global_key_lock" in str(record.message)]


@pytest.mark.slow
@pytest.mark.parametrize("compile_", ["by assignment", "in place"])
def test_a_lock_holds_on_a_compiled_denoiser(pipe, file, compile_):
    """Compiled code does not see hooks that come after it, so the block runs without it."""
    other = tiny_pipe()
    load_concept(other, file)
    with global_key_lock(other):
        locked = picture(other)
    if compile_ == "in place":
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    unlocked = picture(pipe)
    with global_key_lock(pipe):
        assert torch.equal(picture(pipe), locked)
    assert torch.equal(picture(pipe), unlocked)
    assert not torch.allclose(locked, unlocked, atol=1e-3)


def test_a_copy_that_is_made_in_a_lock_is_not_locked(pipe):
    unlocked = picture(pipe)
    with global_key_lock(pipe):
        locked = picture(pipe)
        copied = copy.deepcopy(pipe)
    assert torch.equal(picture(copied), unlocked)
    with global_key_lock(copied):
        assert torch.equal(picture(copied), locked)


# --------------------------------------------------------------------------------- parts that are replaced


def test_a_denoiser_that_took_anothers_place_warns(pipe):
    pipe.unet = tiny_pipe().unet
    with pytest.warns(UserWarning, match="<car-1> is loaded on another denoiser than the pipeline has now"):
        picture(pipe)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_text_encoder_or_tokenizer_that_took_anothers_place_is_refused(pipe, file, part):
    setattr(pipe, part, getattr(tiny_pipe(), part))
    with pytest.raises(ValueError, match="must be known to the pipeline's text_encoder and its tokenizer"):
        picture(pipe)
    unload_concepts(pipe)
    assert torch.equal(picture(pipe, "a car on red"), picture(tiny_pipe(), "a car on red"))


def test_one_of_two_text_encoders_freed_before_loading_is_told():
    pipe = tiny_pipe("SDXL")
    concept = tiny_concept(pipe)
    pipe.text_encoder = pipe.tokenizer = None
    with pytest.raises(ValueError, match="text encoders were freed: load first, and free them then"):
        check_fits(concept, pipe)
