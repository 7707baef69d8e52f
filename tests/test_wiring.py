"""Wrapping whole models: tiny random UNets of diffusers, LoRA layers, any module by names; the context of concept inputs."""

import copy
import threading

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perfusion_pytorch import (
    InputCovariance,
    Rank1EditModule,
    concept_inputs,
    concept_similarity,
    make_key_value_proj_rank1_edit_modules_,
    unwrap_cross_attentions_,
    wrap_cross_attentions_,
)
from perfusion_pytorch.rank1_edit import NUM_RECENT_CALLS

NAMES = [
    f"{block}.transformer_blocks.0.attn2.{projection}"
    for block in ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
    for projection in ("to_k", "to_v")
]


def make_unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        **options,
    )


@pytest.fixture
def unet():
    return make_unet()


def run(unet, text_enc):
    generator = torch.Generator().manual_seed(1)
    return unet(torch.randn(len(text_enc), 4, 8, 8, generator=generator), 3, text_enc).sample


class Attention(nn.Module):
    """Two cross attentions of a model that is not diffusers'."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleDict({"to_k": nn.Linear(8, 6), "to_v": nn.Linear(8, 6)})
        self.second = nn.ModuleDict({"to_k": nn.Linear(8, 6), "to_v": nn.Linear(8, 6), "to_out": nn.Linear(6, 6)})

    def forward(self, text_enc):
        keys, values = (self.first[name](text_enc) + self.second[name](text_enc) for name in ("to_k", "to_v"))
        return torch.tanh(keys) * values


def wrap(model, C=None, **options):
    return wrap_cross_attentions_(model, C=torch.eye(8) if C is None else C, key_names=["to_k"], value_names=["to_v"], **options)


def inputs(b=2, n=5, d=8):
    """Return (text_enc, keyword arguments for `concept_inputs`)."""
    return torch.randn(b, n, d), {"text_enc_with_superclass": torch.randn(b, n, d), "concept_indices": torch.randint(0, n, (b,))}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, Rank1EditModule)]


# ------------------------------------------------------------------------------------------------------------ wrap and unwrap


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
    before, output, state = dict(unet.named_modules()), run(unet, text_enc), state_of(unet)
    flags = {name: p.requires_grad for name, p in unet.named_parameters()}
    wrap_cross_attentions_(unet, C=torch.eye(12))
    assert torch.equal(run(unet, text_enc), output)
    assert state.keys() <= unet.state_dict().keys()
    with concept_inputs(unet, text_enc_with_superclass=torch.randn(2, 5, 12), concept_indices=torch.tensor([1, 2])):
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


def test_wrapping_after_unwrapping_starts_afresh(unet):
    first = wrap_cross_attentions_(unet, C=torch.eye(12))
    unwrap_cross_attentions_(unet)
    unwrap_cross_attentions_(unet)  # nothing is wrapped: nothing happens
    second = wrap_cross_attentions_(unet, C=torch.eye(12))
    assert first.keys() == second.keys() and not {id(m) for m in first.values()} & {id(m) for m in second.values()}


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
    """Kandinsky's attentions say `is_cross_attention`, but the text goes through `add_k_proj` and `add_v_proj`."""
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    model = nn.ModuleDict({"attn": DiffusersAttention(8, cross_attention_dim=12, heads=1, dim_head=8, added_kv_proj_dim=6, bias=True)})
    assert sorted(wrap_cross_attentions_(model, C=torch.eye(6))) == ["attn.add_k_proj", "attn.add_v_proj"]


def test_biased_projections(assert_near):
    """PixArt's have a bias, which is added once."""
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    model = nn.ModuleDict({"attn2": DiffusersAttention(8, cross_attention_dim=12, heads=1, dim_head=8, bias=True)})
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
    assert all(type(module) is nn.Linear for name, module in unet.named_modules() if name.endswith(("attn1.to_k", "attn1.to_v")))


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
        make_key_value_proj_rank1_edit_modules_(nn.ModuleDict({"to_k": nn.Linear(8, 4)}), C=None, key_proj_name="to_k")


# -------------------------------------------------------------------------------------------------------------------- LoRA


def lora_on(model, targets):
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)


def test_the_base_layer_of_a_lora_is_reached():
    model = lora_on(Attention(), ["to_k", "to_v"])
    before, originals = model(text_enc := torch.randn(2, 5, 8)), [m for m in model.modules() if type(m) is nn.Linear]
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
    """An `nn.Linear` subclass is a supported target: the LoRA adds to the edit, and its weight is under the layer's own output."""
    model, text_enc = trained_attention()
    edited = model.first[name](text_enc)
    lora = lora_on(model, [name]).eval().first[name]
    added = text_enc @ lora.lora_A["default"].weight.T @ lora.lora_B["default"].weight.T * lora.scaling["default"]
    assert_near(lora(text_enc), edited + added)


@pytest.mark.parametrize("name", ["to_k", "to_v"])
def test_fusing_a_lora_edits_the_fused_weight(assert_near, name):
    """What fusing changes: the LoRA's part in the concept, BA i* r(e), is removed too, and locked keys become (W + BA) s; unfusing undoes it."""
    model, text_enc = trained_attention()
    lora = lora_on(model, [name]).eval().first[name]
    unfused, layer, weight = lora(text_enc), lora.base_layer, lora.base_layer.weight.clone()
    lora.merge()
    fused, update = lora(text_enc), layer.weight - weight
    similarity = concept_similarity(text_enc, layer.concept_dual)
    expected = unfused - similarity @ layer.concept_input[:, 0] @ update.T
    if name == "to_k":
        expected = expected + torch.sigmoid((similarity - 0.7) / 0.15) @ layer.superclass_input[:, 0] @ update.T
    assert_near(fused, expected)
    assert not torch.allclose(fused, unfused, rtol=1e-2)
    lora.unmerge()
    assert_near(lora(text_enc), unfused)


# ----------------------------------------------------------------------------------------------------------------- context


def test_the_context_equals_direct_calls():
    model, direct = Attention(), Attention()
    direct.load_state_dict(model.state_dict())
    wrap(model, num_finetune_prompts=3, num_concepts=2), wrap(direct, num_finetune_prompts=3, num_concepts=2)
    text_enc, rest = inputs()
    extras = {"superclass_indices": torch.tensor([0, 4]), "prompt_ids": torch.tensor([2, 0]), "concept_id": 1}
    with concept_inputs(model, **rest, **extras):
        model(text_enc)
    for layer in layers_of(direct):
        layer(text_enc, rest["text_enc_with_superclass"], rest["concept_indices"], **extras)
    assert_same_state(model, state_of(direct))
    assert layers_of(model)[0].initialized.tolist() == [[False] * 3, [True, False, True]]


def test_a_training_step_of_a_unet_reaches_every_value_output(unet):
    """All value layers learn, no projection does, and the text encodings get a gradient."""
    wrapped = wrap_cross_attentions_(unet, C=torch.eye(12))
    unet.requires_grad_(False)
    for name, layer in wrapped.items():
        if name.endswith("to_v"):
            layer.concept_output.requires_grad_(True)
    text_enc = torch.randn(2, 5, 12, requires_grad=True)
    with concept_inputs(unet, text_enc_with_superclass=torch.randn(2, 5, 12), concept_indices=torch.tensor([1, 2])):
        run(unet, text_enc).square().sum().backward()
    trained = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {f"{name}.concept_output" for name in NAMES if name.endswith("to_v")}
    assert text_enc.grad.abs().sum() > 0


def test_a_unets_gradient_checkpointing_advances_the_averages_once(unet):
    """Backward, inside the context or after it, recomputes every layer: state moves once, and the gradients are the same."""
    wrap_cross_attentions_(unet, C=torch.eye(12), input_decay=0.5)
    recomputed, late = copy.deepcopy(unet), copy.deepcopy(unet)
    for model in (recomputed, late):
        model.enable_gradient_checkpointing()
    for _ in range(2):
        text_enc, superclass, indices = torch.randn(2, 5, 12), torch.randn(2, 5, 12), torch.randint(0, 5, (2,))
        gradients = []
        for model in (unet, recomputed, late):
            leaf = text_enc.clone().requires_grad_()
            with concept_inputs(model, text_enc_with_superclass=superclass, concept_indices=indices):
                loss = run(model, leaf * 1.0).square().sum()
                if model is not late:
                    loss.backward()
            if model is late:
                loss.backward()
            gradients.append([leaf.grad] + [layer.concept_output.grad.clone() for layer in layers_of(model) if not layer.is_key_proj])
        for others in gradients[1:]:
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(others, gradients[0], strict=True))
        assert_same_state(recomputed, state_of(unet))
        assert_same_state(late, state_of(unet))


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_inside_the_context(use_reentrant, backward_inside):
    direct = Attention()
    wrap(direct, input_decay=0.5)
    recomputed = copy.deepcopy(direct)
    for _ in range(3):
        text_enc, rest = inputs()
        leaves = [text_enc.clone().requires_grad_() for _ in range(2)]
        with concept_inputs(direct, **rest):
            expected = direct(leaves[0])
        expected.square().sum().backward()
        with concept_inputs(recomputed, **rest):
            actual = checkpoint(recomputed, leaves[1], use_reentrant=use_reentrant)
            if backward_inside:
                actual.square().sum().backward()
        if not backward_inside:
            actual.square().sum().backward()
        assert torch.equal(actual, expected) and torch.equal(leaves[1].grad, leaves[0].grad)
        for a, b in zip(layers_of(recomputed), layers_of(direct), strict=True):
            assert a.is_key_proj or torch.equal(a.concept_output.grad, b.concept_output.grad)
        assert_same_state(recomputed, state_of(direct))


def test_a_recomputation_that_lost_its_inputs_raises():
    model = Attention()
    wrap(model)
    leaf = torch.randn(2, 5, 8, requires_grad=True)
    with concept_inputs(model, **inputs()[1]):
        output = checkpoint(model, leaf, use_reentrant=False)
        for layer in layers_of(model):
            layer._recent_calls.clear()
        before = state_of(model)
        with pytest.raises(RuntimeError, match="recomputed in backward, but its inputs are no longer known"):
            output.sum().backward()
    assert_same_state(model, before)


def test_a_recomputation_after_the_context_that_lost_its_inputs_raises():
    """A plain output in the edited one's place would be a silently wrong gradient; torch counts the tensors that it saves."""
    model = Attention()
    wrap(model)
    leaf = torch.randn(2, 5, 8, requires_grad=True)
    with concept_inputs(model, **inputs()[1]):
        output = checkpoint(model, leaf, use_reentrant=False)
        for _ in range(NUM_RECENT_CALLS):
            model(torch.randn(2, 5, 8))
    with pytest.raises(RuntimeError, match="recomput"):
        output.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_call_without_the_concept_between_training_calls_is_recomputed_as_what_it_was(use_reentrant):
    """Prior preservation: ordinary prompts in training mode, some with the very encodings of a training call."""
    direct = Attention()
    wrap(direct)
    recomputed = copy.deepcopy(direct)
    text_enc, rest = inputs()
    gradients = []
    for model in (direct, recomputed):
        leaf = text_enc.clone().requires_grad_()
        with concept_inputs(model, **rest):
            model(text_enc)
        output = checkpoint(model, leaf, use_reentrant=use_reentrant) if model is recomputed else model(leaf)
        output.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_the_context_serves_other_threads():
    """A training step in a thread of its own, whose backward recomputes in one of autograd's."""
    direct = Attention()
    wrap(direct)
    threaded = copy.deepcopy(direct)
    text_enc, rest = inputs()
    with concept_inputs(direct, **rest):
        direct(text_enc).sum().backward()

    def step():
        checkpoint(threaded, text_enc.clone().requires_grad_(), use_reentrant=False).sum().backward()

    with concept_inputs(threaded, **rest):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert_same_state(threaded, state_of(direct))
    for a, b in zip(layers_of(threaded), layers_of(direct), strict=True):
        assert a.is_key_proj or torch.equal(a.concept_output.grad, b.concept_output.grad)


def test_positions_past_the_end_are_refused_without_superclass_encodings_too():
    model = Attention()
    wrap(model)
    text_enc, rest = inputs()
    with concept_inputs(model, **rest):
        model(text_enc)
    before = state_of(model)
    with (
        concept_inputs(model, text_enc_with_superclass=None, concept_indices=torch.tensor([1, 5])),
        pytest.raises(ValueError, match="`concept_indices` must be from -1 to 4, got 5"),
    ):
        model(text_enc)
    assert_same_state(model, before)


def test_nothing_is_left_after_an_exception():
    model = Attention()
    wrap(model)
    text_enc, rest = inputs()
    with pytest.raises(KeyError, match="mine"), concept_inputs(model, **rest):
        model(text_enc)
        raise KeyError("mine")
    assert all(layer._concept_inputs is None and not layer._recent_calls for layer in layers_of(model))
    before = state_of(model)
    model(text_enc)
    assert_same_state(model, before)
    with concept_inputs(model, **rest):  # and the next block may be entered
        model(text_enc)


def test_after_the_context_a_call_is_an_inference_call():
    model = Attention()
    wrap(model)
    text_enc, rest = inputs()
    with concept_inputs(model, **rest):
        model(text_enc)
    before = state_of(model)
    training = model(text_enc)
    assert torch.equal(model.eval()(text_enc), training)
    assert_same_state(model, before)


def test_eval_mode_inside_the_context_changes_nothing():
    model = Attention()
    wrap(model)
    before = state_of(model)
    text_enc, rest = inputs()
    with concept_inputs(model.eval(), **rest):
        model(text_enc)
    assert_same_state(model, before)


# ------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"key_names": None, "value_names": None}, "Attention has no cross attention.*`key_names` and `value_names`"),
        ({"key_names": ["to_q"]}, r"No module of the model is named 'to_q'. Its linear layers are named \['to_k', 'to_out', 'to_v'\]"),
        ({"key_names": ["first"]}, "'first' must be a plain nn.Linear to be wrapped, got ModuleDict"),
        ({"value_names": ["to_v", "to_out"]}, "'second.to_out' takes 6 features, but the covariance is of 8"),
        ({"key_names": ["to_k"], "value_names": ["first.to_k"]}, "'first.to_k' must be a key or a value projection, but is named as both"),
        ({"num_concepts": 0}, "`num_concepts` must be at least 1"),
        ({"C": torch.ones(8, 8)}, "must be invertible"),
    ],
)
def test_a_refused_wrapping_leaves_the_model_as_it_was(options, message):
    model = Attention()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        wrap_cross_attentions_(model, **{"C": torch.eye(8), "key_names": ["to_k"], "value_names": ["to_v"], **options})
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_enc_with_superclass": torch.zeros(2, 5, 7)}, r"`text_enc_with_superclass` must have shape \(b, n, 8\)"),
        ({"concept_indices": torch.tensor([1])}, r"`concept_indices` must have shape \(2,\)"),
        ({"concept_indices": torch.tensor([1, 5])}, "`concept_indices` must be from -1 to 4"),
        ({"superclass_indices": torch.tensor([1, 5])}, "`superclass_indices` must be from -1 to 4"),
        ({"prompt_ids": torch.tensor([0, 1])}, "`prompt_ids` must be from 0 to 0"),
        ({"concept_id": 1}, "`concept_id` must be"),
    ],
)
def test_a_refused_context_leaves_nothing(change, message):
    model = Attention()
    wrap(model)
    with pytest.raises(ValueError, match=message), concept_inputs(model, **{**inputs()[1], **change}):
        raise AssertionError("the block was entered")
    assert all(layer._concept_inputs is None for layer in layers_of(model))


def test_text_encodings_of_another_batch_or_length_are_refused_inside_the_context():
    model = Attention()
    wrap(model)
    before = state_of(model)
    for shape in ((3, 5, 8), (2, 3, 8)):
        with pytest.raises(ValueError, match="must have shape"), concept_inputs(model, **inputs()[1]):
            model(torch.randn(shape))
    assert_same_state(model, before)


def test_contexts_are_not_nested():
    model = Attention()
    wrap(model)
    _, rest = inputs()
    with concept_inputs(model, **rest):
        with pytest.raises(RuntimeError, match="cannot be nested"), concept_inputs(model, **rest):
            raise AssertionError("the block was entered")
        assert all(layer._concept_inputs is not None for layer in layers_of(model))


def test_a_model_without_wrapped_layers_is_an_error():
    with pytest.raises(ValueError, match="Attention has no wrapped layer"), concept_inputs(Attention(), **inputs()[1]):
        raise AssertionError("the block was entered")


def test_the_covariance_is_checked_and_inverted_once_for_a_model(unet):
    """The d × d matrix is not stored once a layer."""
    C = InputCovariance(torch.eye(12))
    wrapped = wrap_cross_attentions_(unet, C=C)
    assert all(layer.covariance is C for layer in wrapped.values())
    assert not any(tensor.shape == (12, 12) for layer in wrapped.values() for tensor in layer.state_dict().values())
