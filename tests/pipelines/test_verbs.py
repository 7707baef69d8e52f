"""Load, save, choose, switch off and unload concepts on a pipeline."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers.small_model import assert_unchanged, latents, make_pipe, state_of, train
from safetensors.torch import load_file
from torch import nn

from perfusion_pytorch import (
    Concept,
    apply_rank1_edit,
    delete_concepts,
    disable_concepts,
    enable_concepts,
    get_active_concepts,
    get_list_concepts,
    load_concept,
    save_concept,
    set_concepts,
)
from perfusion_pytorch.layers.loaded import LoadedProjection
from perfusion_pytorch.pipelines.parts import loaded_on


def test_a_saved_concept_makes_the_same_picture_on_another_pipeline(tmp_path, pipe):
    trained = make_pipe()
    train(trained, "<bear-1>", "teddy bear")
    save_concept(trained, tmp_path / "bear.safetensors", dtype=torch.float32)
    assert load_concept(pipe, tmp_path / "bear.safetensors") == "<bear-1>"
    prompt = "a photo of a <bear-1> on a green background"
    # Without guidance, because what was trained edits the negative prompt's rows too.
    one, other = (latents(p, prompt, guidance_scale=1.0) for p in (pipe, trained))
    assert torch.allclose(one, other, atol=1e-5)
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


def test_the_same_file_twice_is_one_concept(pipe, files):
    """As where a notebook's cell is run again: the name that it has, its gates as they were set."""
    assert load_concept(pipe, files / "car.safetensors", token="<mine>") == "<mine>"
    load_concept(pipe, files / "bear.safetensors")
    set_concepts(pipe, "<mine>", beta=0.3)
    alone = latents(pipe, "a <mine> on red")
    assert load_concept(pipe, files / "car.safetensors") == "<mine>"
    assert get_active_concepts(pipe) == ["<mine>"]
    assert torch.equal(latents(pipe, "a <mine> on red"), alone)
    for switch_off in (disable_concepts, lambda pipe: set_concepts(pipe, [])):
        switch_off(pipe)
        assert load_concept(pipe, files / "car.safetensors") == "<mine>"
        assert "<mine>" in get_active_concepts(pipe)
    assert get_list_concepts(pipe) == ["<mine>", "<bear-1>"]


def test_the_same_file_under_another_token_is_refused(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    state = state_of(pipe)
    with pytest.raises(ValueError, match="another than those loaded, but is that of <car-1>"):
        load_concept(pipe, files / "car.safetensors", token="<mine>")
    assert_unchanged(pipe, state)


def test_a_runs_folder_is_its_concept(pipe, files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold concept\.safetensors.*but holds \[\]"):
        load_concept(pipe, tmp_path)
    shutil.copy(files / "car.safetensors", tmp_path / "concept.safetensors")
    assert load_concept(pipe, tmp_path) == load_concept(pipe, str(tmp_path)) == "<car-1>"


def test_concepts_of_different_covariances_are_in_one_picture(pipe, files, tmp_path):
    """The projection is oblique then. A prompt with both has both."""
    bear = Concept.load(files / "bear.safetensors")
    noise = torch.randn(bear.dim, generator=torch.Generator().manual_seed(0)) / bear.concept_input.norm()
    dual = bear.concept_dual + 0.5 * noise
    other = replace(bear, concept_dual=dual / (dual @ bear.concept_input))
    other.save(tmp_path / "bear.safetensors", dtype=torch.float32)
    load_concept(pipe, files / "car.safetensors")
    load_concept(pipe, tmp_path / "bear.safetensors")
    layer = next(m for m in pipe.unet.modules() if isinstance(m, LoadedProjection) and not m.is_key_proj)
    prompt = "a <car-1> beside a <bear-1> on red"
    text_enc, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    both = list(loaded_on(pipe).concepts.values())
    i, dual = (torch.stack([getattr(c, key) for c in both]) for key in ("concept_input", "concept_dual"))
    o = torch.stack([c.outputs[layer.name] for c in both])
    beta, temperature = torch.tensor([c.eval_gate for c in both]).T
    expected = apply_rank1_edit(
        text_enc, layer.weight, i, dual, o, beta, temperature, gates_removal=both[0].gates_removal
    )
    assert torch.allclose(layer(text_enc), expected, atol=1e-4)
    both = latents(pipe, prompt)
    for name in ("<car-1>", "<bear-1>"):
        set_concepts(pipe, name)
        assert not torch.allclose(latents(pipe, prompt), both, atol=1e-3)


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
    gates = [concept.eval_gate for concept in loaded_on(pipe).concepts.values()]
    assert gates == [(0.7, 0.2), (0.3, 0.2)]
    disable_concepts(pipe)
    assert get_active_concepts(pipe) == [] and not any(
        isinstance(m, LoadedProjection) for m in pipe.unet.modules()
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
    layers = [m for m in pipe.unet.modules() if isinstance(m, LoadedProjection)]
    gate = loaded_on(pipe).concepts["<car-1>"].eval_gate
    with pytest.raises(ValueError, match=message):
        call(pipe)
    assert [m for m in pipe.unet.modules() if isinstance(m, LoadedProjection)] == layers
    assert loaded_on(pipe).concepts["<car-1>"].eval_gate == gate
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


def test_no_pipeline():
    with pytest.raises(ValueError, match="must be a diffusers pipeline"):
        get_list_concepts(nn.Linear(2, 2))
