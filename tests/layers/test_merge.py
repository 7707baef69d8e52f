"""Merging separately trained concepts."""

import copy
import warnings

import oracle
import pytest
import torch
from torch import nn

from perfusion_pytorch import (
    InputCovariance,
    Rank1EditModule,
    merge_rank1_edit_modules,
    unwrap_cross_attentions_,
    wrap_cross_attentions_,
)

D, OUT = 12, 8


def trained(C, proj, seed, *, is_key_proj=False, **options):
    """Return a layer over a copy of a projection that has seen one concept."""
    layer = Rank1EditModule(copy.deepcopy(proj), C=C, is_key_proj=is_key_proj, **options)
    generator = torch.Generator().manual_seed(seed)
    encodings = torch.randn(2, 3, 5, D, generator=generator)
    layer(*encodings, torch.tensor([0, 2, 4]))
    if not is_key_proj:
        layer.concept_output.data.normal_(generator=generator)
    return layer.eval()


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_merged_layers_meet_the_oracle(covariance, assert_near, is_key_proj):
    C, proj = InputCovariance(covariance(D)), nn.Linear(D, OUT, bias=False)
    layers = [trained(C, proj, seed, is_key_proj=is_key_proj) for seed in range(3)]
    for layer, beta in zip(layers, (0.3, 0.6, 0.9), strict=True):
        layer.eval_beta.fill_(beta)
    merged = merge_rank1_edit_modules(*layers)
    assert merged.num_concepts == 3 and not merged.training
    text_enc = torch.randn(2, 4, D)
    inputs = torch.cat([layer.concept_input[:, 0] for layer in layers])
    outputs = [
        proj(layer.superclass_input[0, 0]) if is_key_proj else layer.concept_output[0] for layer in layers
    ]
    args = (inputs, torch.stack(outputs), (0.3, 0.6, 0.9), (0.15,) * 3)
    assert_near(merged(text_enc), oracle.edit_of_many(text_enc, proj.weight, C.matrix, *args))
    for i, layer in enumerate(layers):
        assert_near(merged(text_enc, concept_id=i), layer(text_enc))


def test_gates_and_options_are_kept(covariance, assert_near):
    C, proj = InputCovariance(covariance(D), ridge=0.1), nn.Linear(D, OUT)
    options = {
        "text_seq_len": 5,
        "input_decay": 0.5,
        "train_beta": 0.4,
        "train_temperature": 0.3,
        "frac_gradient_concept_embed": 0.2,
    }
    layers = [
        trained(C, proj, seed, eval_beta=0.1 + seed, eval_temperature=0.2 + seed, **options)
        for seed in range(2)
    ]
    merged = merge_rank1_edit_modules(*layers)
    assert {name: getattr(merged, name) for name in options} == options
    assert torch.equal(merged.eval_beta, torch.tensor([0.1, 1.1]))
    assert torch.equal(merged.eval_temperature, torch.tensor([0.2, 1.2]))
    assert merged.covariance is C  # the ridge is the covariance's own
    text_enc = torch.randn(2, 5, D)
    for i, layer in enumerate(layers):
        assert_near(merged(text_enc, concept_id=i), layer(text_enc))


def test_slots_of_different_numbers(covariance, assert_near):
    C, proj = InputCovariance(covariance(D)), nn.Linear(D, OUT)
    few = trained(C, proj, 0)
    many = trained(C, proj, 1, num_finetune_prompts=4)
    text_enc = torch.randn(2, 4, D)
    merged = merge_rank1_edit_modules(few, many)
    assert merged.initialized.tolist() == [[True, False, False, False]] * 2
    assert_near(merged(text_enc, concept_id=0), few(text_enc))
    assert_near(merged(text_enc, concept_id=1), many(text_enc))


def test_the_layers_are_left_as_they_were(covariance):
    C, proj = InputCovariance(covariance(D)), nn.Linear(D, OUT)
    layers = [trained(C, proj, seed) for seed in range(2)]
    states = copy.deepcopy([layer.state_dict() for layer in layers])
    random_state = torch.get_rng_state()
    merged = merge_rank1_edit_modules(*layers)
    merged.concept_output.data.zero_(), merged.concept_input.zero_(), merged.eval_beta.zero_()
    assert torch.equal(torch.get_rng_state(), random_state)
    for layer, state in zip(layers, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_a_merged_layer_unwraps_to_the_original(covariance):
    model = nn.ModuleDict({"to_v": nn.Linear(D, OUT)})
    original = model["to_v"]
    layer = wrap_cross_attentions_(model, C=covariance(D), value_names=["to_v"])["to_v"]
    layer(torch.randn(1, 3, D), torch.randn(1, 3, D), torch.tensor([1]))
    model["to_v"] = merge_rank1_edit_modules(layer, trained(layer.covariance, original, 1))
    assert not model["to_v"].weight.requires_grad
    unwrap_cross_attentions_(model)
    assert model["to_v"] is original and original.weight.requires_grad and original.bias.requires_grad


def test_the_scale_of_the_covariance_does_not_matter(covariance):
    C, proj = covariance(D), nn.Linear(D, OUT)
    merge_rank1_edit_modules(trained(C, proj, 0), trained(3 * C, proj, 1))


def test_parallel_concepts_are_reported_and_refused_together(covariance):
    C, proj = InputCovariance(covariance(D)), nn.Linear(D, OUT)
    layer = trained(C, proj, 0)
    twin = copy.deepcopy(layer)
    with pytest.warns(UserWarning, match="nearly parallel"):
        merged = merge_rank1_edit_modules(layer, twin)
    text_enc = torch.randn(1, 2, D)
    merged.concept_dual.fill_(1.0), merged.concept_input.fill_(1.0)  # R of exact ones is exactly singular
    with pytest.raises(ValueError, match=r"are parallel.*one at a time"):
        merged(text_enc)
    merged(text_enc, concept_id=1)
    with pytest.warns(UserWarning, match="nearly parallel"):
        copy.deepcopy(merged).load_state_dict(merged.state_dict())


def test_parallel_concepts_are_reported_while_the_second_is_trained(covariance):
    layer = Rank1EditModule(nn.Linear(D, OUT), C=covariance(D), num_concepts=2)
    call = torch.randn(1, 3, D), torch.randn(1, 3, D), torch.tensor([1])
    layer(*call)
    with pytest.warns(UserWarning, match="nearly parallel"):
        layer(*call, concept_id=1)


def test_concepts_apart_do_not_warn(covariance):
    C, proj = InputCovariance(covariance(D)), nn.Linear(D, OUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge_rank1_edit_modules(trained(C, proj, 0), trained(C, proj, 1))
        merged.load_state_dict(merged.state_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda C, proj: trained(C, proj, 1, is_key_proj=True), "all of keys or all of values"),
        (
            lambda C, proj: trained(C, nn.Linear(D, OUT + 1), 1),
            r"weights of shape \(8, 12\), but number 1 has \(9, 12\)",
        ),
        (lambda C, proj: trained(C, nn.Linear(D, OUT), 1), "equal projections.*number 1"),
        (
            lambda C, proj: Rank1EditModule(copy.deepcopy(proj), C=C),
            r"trained.*number 1 has never seen its concepts \[0\]",
        ),
    ],
)
def test_layers_that_do_not_belong_together_are_refused(covariance, change, message):
    C, proj = covariance(D), nn.Linear(D, OUT)
    with pytest.raises(ValueError, match=message):
        merge_rank1_edit_modules(trained(C, proj, 0), change(C, proj))


@pytest.mark.parametrize("gates_removal", [False, True])
def test_concepts_of_different_covariances_mix(covariance, assert_near, gates_removal):
    """Each keeps its own metric, and nothing of a concept is left at its input."""
    covariances, proj = [covariance(D), covariance(D)], nn.Linear(D, OUT, bias=False)
    layers = [trained(C, proj, seed, gates_removal=gates_removal) for seed, C in enumerate(covariances)]
    merged = merge_rank1_edit_modules(*layers).eval()
    assert merged.covariance is None
    i, o = merged.concept_input[:, 0], merged.concept_output
    text_enc = torch.cat([torch.randn(1, 4, D), i.unsqueeze(0)], dim=1)
    gates = merged.eval_beta, merged.eval_temperature
    forms = [gates_removal] * 2
    expected = oracle.oblique_edit_of_many(text_enc, merged.weight, covariances, i, o, *gates, forms)
    assert_near(merged(text_enc), expected)
    merged.eval_beta.fill_(-100.0)
    removed = merged(i.unsqueeze(0))[0]
    assert_near(removed, o.sum(dim=0).expand_as(removed))  # all gates are open, and of W iⱼ nothing is left


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="one or more"):
        merge_rank1_edit_modules()
