"""Wrapping whole models: tiny random UNets of diffusers, LoRA layers, any module by names."""

import copy

import oracle
import pytest
import torch
from helpers.models import NAMES, Attention, assert_same_state, layers_of, make_unet, run, state_of, wrap
from torch import nn

from perfusion_pytorch import (
    InputCovariance,
    Rank1EditModule,
    concept_inputs,
    make_key_value_proj_rank1_edit_modules_,
    unwrap_cross_attentions_,
    wrap_cross_attentions_,
)


@pytest.fixture
def unet():
    return make_unet()


def test_a_unets_cross_attentions_are_found(unet):
    wrapped = wrap_cross_attentions_(unet, C=torch.eye(12), num_concepts=2)
    assert sorted(wrapped) == sorted(NAMES)
    for name, layer in wrapped.items():
        assert unet.get_submodule(name) is layer
        assert layer.is_key_proj == name.endswith("to_k") and layer.num_concepts == 2
    assert len({id(layer.covariance) for layer in wrapped.values()}) == 1


def test_unwrapping_puts_back_the_very_same_modules(unet):
    text_enc = torch.randn(2, 5, 12)
    unet.get_submodule(NAMES[0]).weight.requires_grad_(False)
    before = dict(unet.named_modules())
    output = run(unet, text_enc)
    state = state_of(unet)
    flags = {name: p.requires_grad for name, p in unet.named_parameters()}
    wrap_cross_attentions_(unet, C=torch.eye(12))
    assert torch.equal(run(unet, text_enc), output)
    assert state.keys() <= unet.state_dict().keys()
    with concept_inputs(
        unet, text_enc_with_superclass=torch.randn(2, 5, 12), concept_indices=torch.tensor([1, 2])
    ):
        assert not torch.equal(run(unet, text_enc), output)
    assert not torch.equal(run(unet.eval(), text_enc), output)
    unwrap_cross_attentions_(unet.train())
    after = dict(unet.named_modules())
    assert after.keys() == before.keys() and all(after[name] is module for name, module in before.items())
    assert {name: p.requires_grad for name, p in unet.named_parameters()} == flags
    assert_same_state(unet, state)
    assert torch.equal(run(unet, text_enc), output)


def test_unwrapping_keeps_mode_and_changed_weights():
    model = Attention()
    to_v = model.first["to_v"]
    wrap(model).keys()
    model.eval()
    model.first["to_v"].weight = nn.Parameter(torch.ones(6, 8))
    unwrap_cross_attentions_(model)
    assert model.first["to_v"] is to_v and not to_v.training and torch.equal(to_v.weight, torch.ones(6, 8))


def test_unwrapping_keeps_a_changed_bias():
    model = nn.ModuleDict({"to_v": nn.Linear(8, 6)})
    original = model["to_v"]
    wrapped = wrap_cross_attentions_(model, C=None, value_names=["to_v"])["to_v"]
    wrapped.bias = nn.Parameter(torch.ones(6))
    unwrap_cross_attentions_(model)
    assert (
        model["to_v"] is original
        and torch.equal(original.bias, torch.ones(6))
        and original.bias.requires_grad
    )


def test_wrappers_in_wrappers_are_followed_to_the_projection():
    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

    inner = Adapter(nn.Linear(8, 6))
    model = nn.ModuleDict({"to_v": Adapter(inner)})
    original = inner.base_layer
    wrapped = wrap_cross_attentions_(model, C=None, value_names=["to_v"])
    assert inner.base_layer is wrapped["to_v"] and model["to_v"].base_layer is inner
    unwrap_cross_attentions_(model)
    assert inner.base_layer is original


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_layer_that_torch_quantised_is_refused():
    pytest.importorskip("torch.ao.quantization", reason="moves to torchao")
    model = torch.ao.quantization.quantize_dynamic(nn.ModuleDict({"to_v": nn.Linear(8, 8)}), {nn.Linear})
    quantised = model["to_v"]
    with pytest.raises(ValueError, match=r"'to_v' must be a plain nn\.Linear to be wrapped"):
        wrap_cross_attentions_(model, C=torch.eye(8), value_names=["to_v"])
    assert model["to_v"] is quantised


def test_wrapping_after_unwrapping_starts_afresh(unet):
    first = wrap_cross_attentions_(unet, C=torch.eye(12))
    unwrap_cross_attentions_(unet)
    unwrap_cross_attentions_(unet)  # nothing is wrapped: nothing happens
    second = wrap_cross_attentions_(unet, C=torch.eye(12))
    assert first.keys() == second.keys() and not {id(m) for m in first.values()} & {
        id(m) for m in second.values()
    }


def test_a_copy_of_a_wrapped_model_is_unwrapped_on_its_own():
    model = Attention()
    wrap(model)
    copied = copy.deepcopy(model)
    unwrap_cross_attentions_(copied)
    assert not layers_of(copied) and len(layers_of(model)) == 4
    text_enc = torch.randn(2, 5, 8)
    assert torch.equal(copied(text_enc), model(text_enc))
    assert copied.first["to_k"].weight.requires_grad and not model.first["to_k"].weight.requires_grad


def test_projections_are_found_by_name():
    assert sorted(wrap(Attention())) == ["first.to_k", "first.to_v", "second.to_k", "second.to_v"]
    wrapped = wrap_cross_attentions_(Attention(), C=None, key_names=["second.to_k"])
    assert list(wrapped) == ["second.to_k"] and wrapped["second.to_k"].is_key_proj


def test_a_projection_named_twice_is_wrapped_once():
    model = Attention()
    wrapped = wrap_cross_attentions_(model, C=None, key_names=["to_k", "first.to_k"])
    assert sorted(wrapped) == ["first.to_k", "second.to_k"]
    unwrap_cross_attentions_(model)
    assert all(p.requires_grad for p in model.parameters())


def test_added_projections_are_preferred():
    """Kandinsky sets `is_cross_attention`, but the text goes through `add_k_proj` and `add_v_proj`."""
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    model = nn.ModuleDict(
        {
            "attn": DiffusersAttention(
                8, cross_attention_dim=12, heads=1, dim_head=8, added_kv_proj_dim=6, bias=True
            )
        }
    )
    assert sorted(wrap_cross_attentions_(model, C=torch.eye(6))) == ["attn.add_k_proj", "attn.add_v_proj"]


def test_biased_projections(assert_near):
    """PixArt's have a bias, which is added once."""
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    model = nn.ModuleDict(
        {"attn2": DiffusersAttention(8, cross_attention_dim=12, heads=1, dim_head=8, bias=True)}
    )
    text_enc = torch.randn(2, 5, 12)
    layer = wrap_cross_attentions_(model, C=torch.eye(12))["attn2.to_v"]
    layer(text_enc, text_enc.flip(0), torch.tensor([1, 2]))
    expected = oracle.edit_of_one(
        text_enc,
        layer.weight,
        torch.eye(12),
        layer.concept_input[0, 0],
        layer.concept_output[0],
        layer.eval_beta[0],
        layer.eval_temperature[0],
    )
    assert_near(layer.eval()(text_enc), expected + layer.bias.double())


def test_self_attention_is_left_alone(unet):
    wrap_cross_attentions_(unet, C=torch.eye(12))
    assert all(
        type(module) is nn.Linear
        for name, module in unet.named_modules()
        if name.endswith(("attn1.to_k", "attn1.to_v"))
    )


@pytest.mark.parametrize("names", [("to_k", "to_v"), ("query_text", "value_text")])
def test_one_cross_attention_is_wrapped_by_the_names_of_its_projections(names):
    attention = nn.ModuleDict({name: nn.Linear(8, 4) for name in names} | {"to_q": nn.Linear(8, 4)})
    layers = make_key_value_proj_rank1_edit_modules_(
        attention, C=torch.eye(8), key_proj_name=names[0], value_proj_name=names[1], eval_beta=0.5
    )
    assert [layers[name] is attention[name] for name in names] == [True, True]
    assert [layers[name].is_key_proj for name in names] == [True, False] and layers[names[0]].eval_beta == 0.5
    assert type(attention["to_q"]) is nn.Linear


def test_a_diffusers_attention_needs_no_names(unet):
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert list(make_key_value_proj_rank1_edit_modules_(attention, C=torch.eye(12))) == ["to_k", "to_v"]


def test_one_name_alone_is_refused():
    with pytest.raises(ValueError, match="given together, got 'to_k' and None"):
        make_key_value_proj_rank1_edit_modules_(
            nn.ModuleDict({"to_k": nn.Linear(8, 4)}), C=None, key_proj_name="to_k"
        )


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"key_names": None, "value_names": None},
            "Attention has no cross attention.*`key_names` and `value_names`",
        ),
        (
            {"key_names": ["to_q"]},
            r"No module of the model is named 'to_q'. Its linear layers .* \['to_k', 'to_out', 'to_v'\]",
        ),
        ({"key_names": ["first"]}, "'first' must be a plain nn.Linear to be wrapped, got ModuleDict"),
        ({"value_names": ["to_v", "to_out"]}, "'second.to_out' takes 6 features, but the covariance is of 8"),
        (
            {"key_names": ["to_k"], "value_names": ["first.to_k"]},
            "'first.to_k' must be a key or a value projection, but is named as both",
        ),
        ({"num_concepts": 0}, "`num_concepts` must be at least 1"),
        ({"C": torch.ones(8, 8)}, "must be invertible"),
    ],
)
def test_a_refused_wrapping_leaves_the_model_as_it_was(options, message):
    model = Attention()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        wrap_cross_attentions_(
            model, **{"C": torch.eye(8), "key_names": ["to_k"], "value_names": ["to_v"], **options}
        )
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_is_wrapped_once(unet):
    wrap_cross_attentions_(unet, C=torch.eye(12))
    with pytest.raises(ValueError, match=r"got Rank1EditModule\. Wrap a model only once"):
        wrap_cross_attentions_(unet, C=torch.eye(12))
    assert len(layers_of(unet)) == len(NAMES)


def test_fused_projections_are_refused(unet):
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"fused projections.*`unfuse_qkv_projections\(\)`"):
        wrap_cross_attentions_(unet, C=torch.eye(12))


def test_the_covariance_is_checked_and_inverted_once_for_a_model(unet):
    """The d × d matrix is not stored once a layer."""
    C = InputCovariance(torch.eye(12))
    wrapped = wrap_cross_attentions_(unet, C=C)
    assert all(layer.covariance is C for layer in wrapped.values())
    assert not any(
        tensor.shape == (12, 12) for layer in wrapped.values() for tensor in layer.state_dict().values()
    )


def test_a_projection_in_several_places_is_wrapped_in_all():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            to_v = nn.Linear(8, 8)
            self.first = nn.ModuleDict({"to_v": to_v, "twin": to_v})
            self.second = nn.ModuleDict({"to_v": to_v})

    model = Shared()
    original = model.first["to_v"]
    wrapped = wrap_cross_attentions_(model, C=torch.eye(8), value_names=["to_v", "twin"])
    assert list(wrapped) == ["first.to_v", "second.to_v", "first.twin"]
    assert model.first["to_v"] is model.first["twin"] is model.second["to_v"] is wrapped["first.to_v"]
    unwrap_cross_attentions_(model)
    assert model.first["to_v"] is model.first["twin"] is model.second["to_v"] is original


def test_one_projection_as_key_and_value_is_refused():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"to_k": shared, "to_v": shared})
    with pytest.raises(
        ValueError, match="'to_v' must be a key or a value projection, but the same module is the other one"
    ):
        wrap_cross_attentions_(model, C=torch.eye(8), key_names=["to_k"], value_names=["to_v"])
    assert model["to_k"] is shared and shared.weight.requires_grad


def test_training_with_projections_fused_after_wrapping_is_refused(unet):
    wrap_cross_attentions_(unet, C=None)
    unet.fuse_qkv_projections()
    block = concept_inputs(unet, text_enc_with_superclass=None, concept_indices=torch.tensor([1]))
    with pytest.raises(ValueError, match="has fused projections, which bypass the edit"), block:
        pass
    unet.unfuse_qkv_projections()
    with concept_inputs(unet, text_enc_with_superclass=None, concept_indices=torch.tensor([1])):
        pass


def test_wrapped_layers_run_and_load_on_the_meta_device():
    with torch.device("meta"):
        layer = Rank1EditModule(nn.Linear(8, 6), C=None, num_concepts=2)
        layer.load_state_dict(layer.state_dict(), assign=True)
        assert layer.eval()(torch.empty(2, 5, 8)).shape == (2, 5, 6)


def test_a_model_with_one_quantised_projection_is_left_as_it_was():
    model = nn.ModuleDict({"to_k": nn.Linear(8, 8), "to_v": nn.Linear(8, 8)})
    model["to_v"].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError,
        match=r"`to_v` must have a floating point nn.Parameter as its weight, got Parameter of torch.int8",
    ):
        wrap_cross_attentions_(model, C=torch.eye(8), key_names=["to_k"], value_names=["to_v"])
    assert type(model["to_k"]) is nn.Linear and model["to_k"].weight.requires_grad
