"""The state of a layer: it is a linear layer, keeps its precision, and is copied, saved and loaded."""

import copy
import io
import pickle

import pytest
import torch
from helpers.layers import (
    STATE,
    assert_same_state,
    inputs,
    make_layer,
    state_of,
    trained,
)
from torch import nn

from perfusion_pytorch import InputCovariance, Rank1EditModule


def test_the_layer_is_a_linear_layer_with_its_keys(covariance):
    plain = nn.Linear(16, 12)
    parameters = dict(plain.named_parameters())
    layer = Rank1EditModule(plain, C=covariance(16))
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (16, 12)
    assert layer.weight is parameters["weight"] and layer.bias is parameters["bias"]
    assert set(layer.state_dict()) == {"weight", "bias", "concept_output", *STATE}
    assert set(make_layer(covariance(16), is_key_proj=True).state_dict()) == {"weight", *STATE}
    assert [type(m) for m in layer.modules()] == [Rank1EditModule]
    assert "in_features=16, out_features=12, bias=True, is_key_proj=False" in repr(layer)


def test_the_linear_layers_methods_are_inherited():
    """An overridden `parameters` hid the value outputs from an earlier implementation's optimizer.

    A weight that `train` and `eval` rewrite goes stale.
    """
    own = {
        name
        for name in vars(Rank1EditModule)
        if callable(getattr(nn.Module, name, None)) and not name.startswith("__")
    }
    assert own == {"forward", "extra_repr", "_apply"}


def test_the_covariance_is_shared_and_stored_nowhere(covariance):
    """The d × d matrix is held once for all layers, and in no state dict."""
    C = InputCovariance(covariance(16))
    layers = nn.ModuleList(make_layer(C, is_key_proj=i % 2 == 0) for i in range(4))
    assert all(layer.covariance is C for layer in layers)
    assert not any(tensor.shape == (16, 16) for tensor in layers.state_dict().values())
    assert not any(
        tensor.shape == (16, 16) for layer in layers for tensor in (*layer.buffers(), *layer.parameters())
    )
    layers.half()
    assert C.inverse().dtype == torch.float32


def test_no_random_numbers_are_drawn(covariance):
    plain, C, call = nn.Linear(16, 12), covariance(16), inputs()
    state = torch.get_rng_state()
    layer = Rank1EditModule(plain, C=C)
    layer(*call)
    layer.eval()(call[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_training_mode_is_taken_over(covariance):
    assert Rank1EditModule(nn.Linear(16, 12), C=covariance(16)).training
    assert not Rank1EditModule(nn.Linear(16, 12).eval(), C=covariance(16)).training


HALF = [torch.float16, torch.bfloat16]
EIGHT_BITS = [getattr(torch, f"float8_{kind}") for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")]


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_statistics_and_output_stay_float32_in_8_bits(covariance, dtype):
    layer = trained(covariance(16), 2)
    before = state_of(layer)
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    for name in (*STATE, "concept_output"):
        assert torch.equal(getattr(layer, name), before[name]), name


@pytest.mark.parametrize("dtype", HALF)
def test_statistics_and_output_stay_float32(covariance, assert_near, dtype):
    layer = trained(covariance(16), 2).train()
    layer(*inputs()).sum().backward()
    before = state_of(layer)
    assert layer.to(dtype) is layer
    assert layer.weight.dtype == dtype
    for name in (*STATE, "concept_output"):
        kept = getattr(layer, name)
        assert kept.dtype == (torch.bool if name == "initialized" else torch.float32), name
        assert torch.equal(kept, before[name]), name
    assert layer.concept_output.grad.dtype == torch.float32
    text_enc, superclass, indices = inputs(dtype=dtype)
    layer(text_enc, superclass, indices).square().sum().backward()
    torch.optim.SGD([layer.concept_output], lr=1e-3).step()
    assert layer.concept_output.dtype == torch.float32 and layer.concept_input.dtype == torch.float32
    assert layer.concept_output.grad.abs().sum() > 0
    assert_near(layer.concept_output, before["concept_output"] - 1e-3 * layer.concept_output.grad)


def test_a_bfloat16_average_moves(covariance, assert_near):
    """In bfloat16 arithmetic, one step at a decay of 0.99 would be rounded away."""
    layer = make_layer(covariance(16)).bfloat16()
    text_enc, superclass, indices = inputs(dtype=torch.bfloat16)
    layer(text_enc, superclass, indices)
    before = layer.concept_input.clone()
    layer(text_enc * 1.05, superclass, indices)
    mean = (text_enc * 1.05)[torch.arange(4), indices].double().mean(dim=0)
    # The tolerance of float32, relative to the step itself.
    assert_near(layer.concept_input - before, (0.01 * (mean - before.double())), torch.bfloat16)
    assert_near(layer.concept_input[0, 0], 0.99 * before[0, 0].double() + 0.01 * mean)


def test_double_and_back_converts_everything(covariance):
    layer = trained(covariance(16)).double()
    assert all(t.dtype == torch.float64 for name, t in layer.state_dict().items() if name != "initialized")
    assert layer(torch.randn(1, 3, 16, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_apart(covariance, duplicate, is_key_proj):
    layer = make_layer(covariance(16), is_key_proj=is_key_proj, num_finetune_prompts=2)
    layer(*inputs())
    copied = duplicate(layer)
    assert copied.original.module.weight is copied.weight and copied.weight is not layer.weight
    assert_same_state(copied, state_of(layer))
    before, call = state_of(layer), inputs()
    output = copied(*call)
    assert_same_state(layer, before)
    assert torch.equal(layer(*call), output)
    assert_same_state(copied, state_of(layer))


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_a_state_dict_round_trip_gives_an_equal_layer(covariance, is_key_proj):
    C = covariance(16)
    layer = trained(C, 2, is_key_proj=is_key_proj, num_finetune_prompts=2)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make_layer(None, is_key_proj=is_key_proj, num_concepts=2, num_finetune_prompts=2).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    text_enc = torch.randn(2, 5, 16)
    assert torch.equal(other(text_enc), layer(text_enc))
    assert not torch.equal(other(text_enc), other.original.module(text_enc))


def test_a_state_of_one_concept_does_not_fit_two(covariance):
    layer = make_layer(covariance(16), num_concepts=2)
    before = state_of(layer)
    with pytest.raises(RuntimeError, match="size mismatch for concept_output"):
        layer.load_state_dict(make_layer(None).state_dict())
    assert before.keys() == layer.state_dict().keys()


def test_training_continues_from_a_state_dict(covariance):
    C, first, second = covariance(16), inputs(), inputs()
    layer = make_layer(C)
    resumed = make_layer(C)
    layer(*first)
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(resumed(*second), layer(*second))
    assert_same_state(resumed, state_of(layer))


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_inference_after_double_and_half(covariance, assert_near, is_key_proj):
    layer = trained(covariance(16), is_key_proj=is_key_proj)
    text_enc = torch.randn(2, 5, 16)
    expected = layer(text_enc)
    actual = layer.double().half()(text_enc.half())
    assert actual.dtype == torch.half
    assert_near(actual, expected)
