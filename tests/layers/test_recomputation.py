"""Activation checkpointing: a recomputed training call moves nothing and gives the same gradients."""

import copy
import gc
import weakref

import pytest
import torch
from helpers.layers import assert_same_state, inputs, make_layer, state_of, trained
from torch.utils.checkpoint import checkpoint


def run_checkpointed(layer, text_enc, superclass, indices, use_reentrant):
    """Return output and gradients of a training call, direct (None) or under a variant of checkpointing."""
    leaf = text_enc.clone().requires_grad_()

    def block(x):
        return layer(torch.tanh(x), superclass, indices)

    output = block(leaf) if use_reentrant is None else checkpoint(block, leaf, use_reentrant=use_reentrant)
    output.square().sum().backward()
    output_grad = None if layer.is_key_proj else layer.concept_output.grad.clone()
    layer.zero_grad()
    return output.detach(), leaf.grad, output_grad


@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_advances_the_average_once(covariance, use_reentrant, is_key_proj):
    direct = make_layer(covariance(16), is_key_proj=is_key_proj, input_decay=0.5)
    recomputed = copy.deepcopy(direct)
    for _ in range(3):
        call = inputs()
        expected = run_checkpointed(direct, *call, None)
        actual = run_checkpointed(recomputed, *call, use_reentrant)
        for a, b in zip(actual, expected, strict=True):
            assert b is None if a is None else torch.equal(a, b)
        assert_same_state(recomputed, state_of(direct))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_the_same_encodings_again_uses_the_latest_call(covariance, use_reentrant):
    """With a frozen embedding a prompt comes back bit for bit, while the averages moved on."""
    direct = make_layer(covariance(16), input_decay=0.5)
    recomputed = copy.deepcopy(direct)
    first, second = inputs(), inputs()
    for call in (first, second, first):
        expected = run_checkpointed(direct, *call, None)
        actual = run_checkpointed(recomputed, *call, use_reentrant)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_under_autocast(covariance, use_reentrant):
    direct = make_layer(covariance(16))
    recomputed = copy.deepcopy(direct)
    for _ in range(2):
        call = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            expected = run_checkpointed(direct, *call, None)
            actual = run_checkpointed(recomputed, *call, use_reentrant)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
        assert_same_state(recomputed, state_of(direct))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_inference(covariance, use_reentrant):
    layer = trained(covariance(16))
    leaf = torch.randn(2, 5, 16, requires_grad=True)
    layer(leaf).square().sum().backward()
    expected, leaf.grad, before = leaf.grad, None, state_of(layer)
    checkpoint(layer, leaf, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(leaf.grad, expected)
    assert_same_state(layer, before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_concepts_of_equal_encodings_in_one_checkpointed_step(covariance, assert_near, use_reentrant):
    """Each recomputation takes its own concept's constants, in whichever order backward comes to them."""
    gradients = []
    text_enc, superclass, indices = inputs()
    for run in (None, use_reentrant):
        torch.manual_seed(0)
        layer = make_layer(covariance(16), num_concepts=2)
        leaf = text_enc.clone().requires_grad_()
        outputs = []
        for concept_id, positions in ((0, indices), (1, (indices + 1) % 6)):

            def block(x, layer=layer, positions=positions, concept_id=concept_id):
                return layer(x, superclass, positions, concept_id=concept_id)

            outputs.append(block(leaf) if run is None else checkpoint(block, leaf, use_reentrant=run))
        (outputs[0].square().sum() + 3 * outputs[1].square().sum()).backward()
        gradients.append((leaf.grad, layer.concept_output.grad))
    for direct, recomputed in zip(*gradients, strict=True):
        assert_near(recomputed, direct)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_different_calls_that_cannot_be_told_apart_are_refused(covariance, use_reentrant):
    """Equal encodings and positions, but the averages moved between the forward passes.

    Neither call may get the other's constants.
    """
    layer = make_layer(covariance(16), input_decay=0.5)
    text_enc, superclass, indices = inputs()
    layer(torch.randn_like(text_enc), superclass, indices)
    leaf = text_enc.clone().requires_grad_()
    losses = [
        checkpoint(lambda x: layer(x, superclass, indices), leaf, use_reentrant=use_reentrant).sum()
        for _ in range(2)
    ]
    with pytest.raises(RuntimeError, match="several calls with the same text encodings wait"):
        sum(losses).backward()


def test_what_is_kept_for_recomputation_holds_no_graph(covariance):
    """Encodings come with the text encoder's graph; the last calls must not keep those of many steps."""
    layer = make_layer(covariance(16))
    text_enc, superclass, indices = inputs()
    text_enc = torch.tanh(text_enc.requires_grad_())
    layer(text_enc, superclass, indices)
    graph = weakref.ref(text_enc)
    other = weakref.ref(superclass)
    del text_enc, superclass
    gc.collect()
    assert graph() is None and other() is None
