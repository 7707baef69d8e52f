"""LoRA beside concepts, by peft and by diffusers: before and after wrapping, trained, fused and unfused."""

import copy

import pytest
import torch
from helpers.models import Attention, inputs, layers_of, make_unet, run, wrap
from torch import nn

from perfusion_pytorch import (
    concept_inputs,
    concept_similarity,
    unwrap_cross_attentions_,
    wrap_cross_attentions_,
)


def lora_on(model, targets):
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)


def test_the_base_layer_of_a_lora_is_reached():
    model = lora_on(Attention(), ["to_k", "to_v"])
    text_enc = torch.randn(2, 5, 8)
    before = model(text_enc)
    originals = [m for m in model.modules() if type(m) is nn.Linear]
    wrapped = wrap(model)
    assert sorted(wrapped) == ["first.to_k", "first.to_v", "second.to_k", "second.to_v"]
    assert model.first["to_k"].base_layer is wrapped["first.to_k"] and hasattr(model.first["to_k"], "lora_A")
    assert torch.equal(model(text_enc), before)
    with concept_inputs(model, **inputs()[1]):
        assert not torch.equal(model(text_enc), before)
    unwrap_cross_attentions_(model)
    assert [id(m) for m in model.modules() if type(m) is nn.Linear] == [id(m) for m in originals]
    assert torch.equal(model(text_enc), before)


def trained_attention():
    model = Attention()
    wrap(model)
    text_enc, rest = inputs()
    with concept_inputs(model, **rest):
        model(text_enc)
    return model.eval(), text_enc


@pytest.mark.parametrize("name", ["to_k", "to_v"])
def test_a_lora_loads_on_wrapped_layers(assert_near, name):
    """peft takes an `nn.Linear` subclass as a target; the LoRA's output is added to the edited one."""
    model, text_enc = trained_attention()
    edited = model.first[name](text_enc)
    lora = lora_on(model, [name]).eval().first[name]
    added = (
        text_enc @ lora.lora_A["default"].weight.T @ lora.lora_B["default"].weight.T * lora.scaling["default"]
    )
    assert_near(lora(text_enc), edited + added)


@pytest.mark.parametrize("name", ["to_k", "to_v"])
def test_fusing_a_lora_edits_the_fused_weight(assert_near, name):
    """Fusing removes the LoRA's part in the concept too, BA i* r(e), and locked keys become (W + BA) s."""
    model, text_enc = trained_attention()
    lora = lora_on(model, [name]).eval().first[name]
    unfused = lora(text_enc)
    layer = lora.base_layer
    weight = layer.weight.clone()
    lora.merge()
    fused = lora(text_enc)
    update = layer.weight - weight
    similarity = concept_similarity(text_enc, layer.concept_dual)
    expected = unfused - similarity @ layer.concept_input[:, 0] @ update.T
    if name == "to_k":
        expected = (
            expected + torch.sigmoid((similarity - 0.7) / 0.15) @ layer.superclass_input[:, 0] @ update.T
        )
    assert_near(fused, expected)
    assert not torch.allclose(fused, unfused, rtol=1e-2)
    lora.unmerge()
    assert_near(lora(text_enc), unfused)


@pytest.mark.parametrize("name", ["to_k", "to_v"])
def test_a_lora_fused_before_wrapping_is_part_of_the_weight(assert_near, name):
    """Fused first and wrapped then is the same as wrapped first and fused then."""
    torch.manual_seed(0)
    wrapped_first, text_enc = trained_attention()
    fused_first = Attention()
    fused_first.load_state_dict(
        {key: value for key, value in wrapped_first.state_dict().items() if key in fused_first.state_dict()}
    )
    for model in (wrapped_first, fused_first):
        torch.manual_seed(1)
        lora_on(model, [name]).first[name].merge()
    wrap(fused_first)
    fused_first.load_state_dict(wrapped_first.state_dict())
    assert torch.equal(fused_first.eval().first[name](text_enc), wrapped_first.first[name](text_enc))


@pytest.mark.parametrize("is_lora_first", [True, False])
@pytest.mark.parametrize("name", ["to_k", "to_v"])
def test_a_training_call_under_a_lora(assert_near, name, is_lora_first):
    """The LoRA adds to the edit of a training call, and the averages and o* are those without it."""
    model = Attention()
    plain = copy.deepcopy(model)
    wrap(plain)
    if is_lora_first:
        wrap(lora_on(model, [name]))
    else:
        wrap(model)
        lora_on(model, [name])
    text_enc, rest = inputs()
    lora = model.first[name]
    layer = plain.first[name]
    with concept_inputs(model, **rest), concept_inputs(plain, **rest):
        output = lora(text_enc)
        edited = layer(text_enc)
    assert_near(
        output,
        edited
        + text_enc
        @ lora.lora_A["default"].weight.T
        @ lora.lora_B["default"].weight.T
        * lora.scaling["default"],
    )
    for key in ("concept_input", "superclass_input", "concept_dual") + (
        ("concept_output",) if name == "to_v" else ()
    ):
        assert torch.equal(getattr(lora.base_layer, key), getattr(layer, key)), key


@pytest.mark.parametrize("is_lora_first", [True, False])
def test_diffusers_loads_fuses_and_unloads_a_lora(assert_near, is_lora_first):
    """With the UNet's own methods; in the end the wrapped model is left."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    config = LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False)

    def seeded_unet():
        torch.manual_seed(0)
        return make_unet()

    donor = seeded_unet()
    donor.add_adapter(config)
    lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(donor))
    text_enc, call = inputs(d=12)

    def train(unet):
        with concept_inputs(unet.train(), **call):
            run(unet, text_enc)
        return unet.eval()

    expected = seeded_unet()
    wrap_cross_attentions_(expected, C=torch.eye(12))
    train(expected)
    unet = seeded_unet()
    if is_lora_first:
        unet.load_lora_adapter(copy.deepcopy(lora), prefix=None)
        wrap_cross_attentions_(unet, C=torch.eye(12))
        unet.disable_lora()
        train(unet)
        unet.enable_lora()
    else:
        wrap_cross_attentions_(unet, C=torch.eye(12))
        train(unet)
        unet.load_lora_adapter(copy.deepcopy(lora), prefix=None)
    with_lora = run(unet, text_enc)
    without = run(expected, text_enc)
    assert len(layers_of(unet)) == len(layers_of(expected))
    assert not torch.allclose(with_lora, without, rtol=1e-3)
    unet.fuse_lora()
    unet.unfuse_lora()
    assert_near(run(unet, text_enc), with_lora)
    unet.disable_lora()
    assert_near(run(unet, text_enc), without)
    unet.unload_lora()
    assert_near(run(unet, text_enc), without)
    unwrap_cross_attentions_(unet)
    assert_near(run(unet, text_enc), run(seeded_unet().eval(), text_enc))
