"""The training calls of a layer: against the oracle, and their gradients."""

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers.layers import (
    DTYPES,
    STATE,
    assert_same_state,
    expected_at_inference,
    inputs,
    make_layer,
    slotted_calls,
    state_of,
    trained,
)
from torch import nn

from perfusion_pytorch import split_concepts
from perfusion_pytorch.layers.functional import add_product
from perfusion_pytorch.layers.training_call import TrainingSplit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_key_proj", [True, False])
def test_training_calls_meet_the_oracle(covariance, assert_near, is_key_proj, dtype):
    """The averages are those of the oracle.

    Each call's output, row by row, uses the averages with this call in them.
    """
    C = covariance(16)
    layer = make_layer(
        C, is_key_proj=is_key_proj, num_finetune_prompts=3, input_decay=0.8, bias=True, dtype=dtype
    )
    calls = slotted_calls(dtype=dtype)
    for number, (text_enc, superclass, indices, where, slots) in enumerate(calls):
        actual = layer(text_enc, superclass, indices, superclass_indices=where, prompt_ids=slots)
        done = calls[: number + 1]
        i = oracle.moving_averages([(c[0], c[2].tolist(), c[4].tolist()) for c in done], decay=0.8)
        s = oracle.moving_averages([(c[1], c[3].tolist(), c[4].tolist()) for c in done], decay=0.8)
        weight = layer.weight.double()
        assert actual.dtype == dtype
        for slot in range(3):
            assert layer.initialized[0, slot].item() == (slot in i)
            if slot in i:
                kept = torch.float64 if dtype == torch.float64 else torch.float32
                assert_near(layer.concept_input[0, slot], i[slot], kept)
                assert_near(layer.superclass_input[0, slot], s[slot], kept)
        for row in range(len(indices)):
            slot = slots[row].item()
            if indices[row] < 0:
                expected = nn.functional.linear(text_enc[row : row + 1].double(), weight)
            else:
                output = weight @ s[slot] if is_key_proj else layer.concept_output[0]
                expected = oracle.edit_of_one(text_enc[row : row + 1], weight, C, i[slot], output, 0.75, 0.1)
            assert_near(actual[row : row + 1], expected + layer.bias.double())


def test_averages_of_several_concepts_are_apart(covariance, assert_near):
    layer = make_layer(covariance(16), num_concepts=2, num_finetune_prompts=3)
    calls = slotted_calls(6)
    for number, (text_enc, superclass, indices, where, slots) in enumerate(calls):
        layer(
            text_enc, superclass, indices, superclass_indices=where, prompt_ids=slots, concept_id=number % 2
        )
    for concept in range(2):
        own = calls[concept::2]
        for slot, average in oracle.moving_averages(
            [(c[0], c[2].tolist(), c[4].tolist()) for c in own], decay=0.99
        ).items():
            assert_near(layer.concept_input[concept, slot], average)


def test_without_prompt_ids_all_rows_share_slot_0(covariance, assert_near):
    layer = make_layer(covariance(16), num_finetune_prompts=3)
    text_enc, superclass, indices = inputs()
    layer(text_enc, superclass, indices)
    assert layer.initialized.tolist() == [[True, False, False]]
    assert_near(layer.concept_input[0, 0], text_enc[torch.arange(4), indices].mean(dim=0))


def test_a_value_output_starts_at_the_projected_superclass(covariance, assert_near):
    layer = make_layer(covariance(16), num_concepts=2, bias=True)
    text_enc, superclass, indices = inputs()
    where = (indices + 1) % 6
    layer(text_enc, superclass, indices, superclass_indices=where, concept_id=1)
    s = oracle.moving_averages([(superclass, where.tolist(), [0] * 4)], 0.99)[0]
    assert_near(layer.concept_output[1], layer.weight.double() @ s)
    assert not layer.concept_output[0].any()
    before = layer.concept_output.clone()
    layer(*inputs(), concept_id=1)
    assert torch.equal(layer.concept_output, before)  # learned from here on, by the optimizer alone
    of_slots = make_layer(
        covariance(16), num_finetune_prompts=2
    )  # three rows of one slot and one of the other: the mean is over rows
    of_slots(text_enc, superclass, indices, superclass_indices=where, prompt_ids=torch.tensor([0, 1, 1, 1]))
    assert_near(of_slots.concept_output[0], of_slots.weight.double() @ s)


def test_superclass_positions_default_to_those_of_the_concept(covariance, assert_near):
    layer = make_layer(covariance(16), num_finetune_prompts=2)
    text_enc, superclass, _ = inputs(b=3)
    layer(text_enc, superclass, torch.tensor([0, 3, 5]), prompt_ids=torch.tensor([0, 0, 1]))
    assert_near(
        layer.superclass_input[0], torch.stack([(superclass[0, 0] + superclass[1, 3]) / 2, superclass[2, 5]])
    )


def test_the_first_call_of_a_later_slot_needs_superclass_encodings_too(covariance):
    layer = make_layer(covariance(16), num_finetune_prompts=2)
    text_enc, superclass, indices = inputs()
    layer(text_enc, superclass, indices)
    state = state_of(layer)
    with pytest.raises(
        ValueError, match="`text_enc_with_superclass` must be given in the first training call of a slot"
    ):
        layer(text_enc, None, indices, prompt_ids=torch.tensor([0, 0, 1, 0]))
    assert_same_state(layer, state)
    layer(text_enc, superclass, indices, prompt_ids=torch.tensor([0, 0, 1, 0]))
    assert torch.equal(
        layer.concept_output, state["concept_output"]
    )  # it started with the concept's first slot


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_the_training_gate_is_the_layers_own(covariance, assert_near, is_key_proj):
    C = covariance(16)
    layer = make_layer(
        C, is_key_proj=is_key_proj, train_beta=0.3, train_temperature=0.7, eval_beta=5.0, eval_temperature=9.0
    )
    text_enc, superclass, indices = inputs()
    actual = layer(text_enc, superclass, indices)
    output = (
        layer.weight.double() @ layer.superclass_input[0, 0].double()
        if is_key_proj
        else layer.concept_output[0]
    )
    assert_near(
        actual, oracle.edit_of_one(text_enc, layer.weight, C, layer.concept_input[0, 0], output, 0.3, 0.7)
    )


def test_key_outputs_are_locked(covariance, assert_near):
    """They follow W s; nothing of them is learned."""
    C = covariance(16)
    layer = make_layer(C, is_key_proj=True)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert not any(p.requires_grad for p in layer.parameters())
    text_enc, superclass, indices = inputs()
    layer(text_enc, superclass, indices)
    before = layer.eval()(text_enc)
    layer.superclass_input *= 2
    assert not torch.equal(layer(text_enc), before)
    assert_near(layer(text_enc), expected_at_inference(layer, text_enc, C))


def test_rows_without_the_concept_are_the_plain_layer_bit_for_bit(covariance, assert_near):
    C = covariance(16)
    for dtype in DTYPES:
        layer = make_layer(C, dtype=dtype)
        text_enc, superclass, _ = inputs(b=2, dtype=dtype)
        actual = layer(text_enc, superclass, torch.tensor([-1, 2]))
        assert torch.equal(actual[0], layer.original.module(text_enc)[0])
        state = layer.concept_input[0, 0], layer.concept_output[0]
        assert_near(actual[1:], oracle.edit_of_one(text_enc[1:], layer.weight, C, *state, 0.75, 0.1))


def test_a_call_of_no_row_with_the_concept_changes_nothing(covariance):
    for is_key_proj in (True, False):
        layer = make_layer(covariance(16), is_key_proj=is_key_proj)
        for _ in range(2):
            before = state_of(layer)
            text_enc, superclass, _ = inputs()
            assert torch.equal(
                layer(text_enc, superclass, torch.full((4,), -1)), layer.original.module(text_enc)
            )
            assert_same_state(layer, before)
            layer(*inputs())


def test_superclass_encodings_may_be_missing_once_a_slot_was_seen(covariance, assert_near):
    layer = make_layer(covariance(16), is_key_proj=True)
    first, second = inputs(), inputs()
    layer(*first)
    s = layer.superclass_input.clone()
    layer(second[0], None, second[2])
    assert torch.equal(layer.superclass_input, s)
    calls = [(call[0], call[2].tolist(), [0] * 4) for call in (first, second)]
    assert_near(layer.concept_input[0, 0], oracle.moving_averages(calls, 0.99)[0])


def test_validation_changes_nothing(covariance):
    """Neither eval mode, with indices or without, nor a call without indices in training mode."""
    layer = make_layer(covariance(16))
    layer(*inputs())
    before = state_of(layer)
    layer(inputs()[0])
    layer.eval()(*inputs())
    layer(inputs()[0])
    assert_same_state(layer, before)


def test_the_fraction_changes_gradients_and_no_output(covariance, assert_near):
    C = covariance(16)
    text_enc, superclass, indices = inputs()
    outputs = []
    gradients = []
    for fraction in (1.0, 0.1, 0.0):
        torch.manual_seed(1)
        layer = make_layer(C, frac_gradient_concept_embed=fraction)
        leaf = text_enc.clone().requires_grad_()
        outputs.append(layer(leaf, superclass, indices))
        outputs[-1].square().sum().backward()
        gradients.append(leaf.grad)
        assert layer.concept_output.grad.abs().sum() > 0
    assert torch.equal(outputs[1], outputs[0]) and torch.equal(outputs[2], outputs[0])
    assert_near(gradients[1], 0.1 * gradients[0])
    assert gradients[0].abs().sum() > 0 and not gradients[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_under_autocast_are_as_exact_as_without(covariance, assert_near, dtype):
    layer = make_layer(covariance(16), num_finetune_prompts=3)
    calls = slotted_calls(dtype=dtype)
    for text_enc, superclass, indices, where, slots in calls:
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(text_enc, superclass, indices, superclass_indices=where, prompt_ids=slots)
        assert output.dtype == torch.bfloat16
    for slot, average in oracle.moving_averages(
        [(c[0], c[2].tolist(), c[4].tolist()) for c in calls], 0.99
    ).items():
        assert_near(layer.concept_input[0, slot], average, torch.float32)
    for slot, average in oracle.moving_averages(
        [(c[1], c[3].tolist(), c[4].tolist()) for c in calls], 0.99
    ).items():
        assert_near(layer.superclass_input[0, slot], average, torch.float32)


@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("concepts", [1, 2])
def test_the_edit_under_autocast_is_made_in_float32(covariance, concepts, is_key_proj):
    layer = trained(covariance(16), concepts, is_key_proj=is_key_proj)
    text_enc = torch.randn(2, 5, 16)
    rest, gate = split_concepts(
        text_enc,
        layer.concept_input[:, 0],
        layer.concept_dual,
        layer.eval_beta,
        layer.eval_temperature,
        layer.initialized[:, 0],
    )
    if is_key_proj:
        rest = add_product(rest, gate, layer.superclass_input[:, 0])
    expected = F.linear(rest.bfloat16(), layer.weight.bfloat16())
    if not is_key_proj:
        expected = expected + (gate @ layer.concept_output).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(text_enc), expected)


def test_a_graph_that_waits_is_untouched_by_later_training_calls(covariance):
    layer = trained(covariance(16)).train()
    text_enc = torch.randn(2, 5, 16, requires_grad=True)
    layer(text_enc).square().sum().backward()
    expected, text_enc.grad = text_enc.grad, None
    output = layer(text_enc)
    layer(*inputs())
    output.square().sum().backward()
    assert torch.equal(text_enc.grad, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_indices_of_any_integer_dtype(covariance, dtype):
    layers = [make_layer(covariance(16), num_finetune_prompts=2) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].covariance = layers[0].covariance
    text_enc, superclass, indices = inputs()
    slots = torch.tensor([0, 1, 1, 0])
    expected = layers[0](text_enc, superclass, indices, superclass_indices=indices, prompt_ids=slots)
    actual = layers[1](
        text_enc,
        superclass,
        indices.to(dtype),
        superclass_indices=indices.to(dtype),
        prompt_ids=slots.to(dtype),
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_which_tensors_get_a_gradient(covariance, is_key_proj):
    """Value outputs and text encodings do; the projection, superclass encodings and statistics do not."""
    layer = make_layer(covariance(16), is_key_proj=is_key_proj, bias=True)
    text_enc, superclass, indices = inputs()
    text_enc.requires_grad_()
    superclass.requires_grad_()
    layer(text_enc, superclass, indices).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == (
        [] if is_key_proj else ["concept_output"]
    )
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == (
        [] if is_key_proj else ["concept_output"]
    )
    assert text_enc.grad.abs().sum(dim=-1).all()
    assert superclass.grad is None
    assert not any(getattr(layer, name).requires_grad for name in STATE)


def test_the_projection_stays_frozen(covariance):
    layer = make_layer(covariance(16), bias=True)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "concept_output"}


def reference_gradient(layer, C, text_enc, indices, output, average_of):
    """Return h and the gradient of Σ h² into the encodings, by dense algebra.

    Here i* = average_of(mean of the encodings at the indices).
    """
    e = text_enc.detach().clone().requires_grad_()
    i = average_of(e[torch.arange(len(e)), indices].mean(dim=0))
    dual = torch.linalg.solve(C, i)
    r = (e @ dual) / (i @ dual)
    h = (e - r.unsqueeze(-1) * i) @ layer.weight.T + torch.sigmoid((r - 0.75) / 0.1).unsqueeze(-1) * output
    h.square().sum().backward()
    return h, e.grad


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_the_gradient_into_the_concept_input_is_that_of_the_mean_itself(covariance, assert_near, is_key_proj):
    """Straight through: the average's value comes from history, its gradient from this call's mean."""
    C = covariance(16)
    layer = make_layer(C, is_key_proj=is_key_proj, dtype=torch.float64, frac_gradient_concept_embed=1.0)
    for _ in range(3):
        text_enc, superclass, indices = inputs(dtype=torch.float64)
        text_enc.requires_grad_()
        actual = layer(text_enc, superclass, indices)
        actual.square().sum().backward()
        average = layer.concept_input[0, 0].clone()
        s = layer.superclass_input[0, 0]
        output = (layer.weight @ s if is_key_proj else layer.concept_output[0]).detach()
        h, grad = reference_gradient(
            layer,
            C,
            text_enc,
            indices,
            output,
            lambda mean, average=average: mean + (average - mean).detach(),
        )
        assert_near(actual, h)
        assert_near(text_enc.grad, grad)


@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize(
    "indices, slots",
    [
        ([1, 0, 2], None),
        ([1, -1, 2], None),
        ([1, 0, 2], [0, 2, 2]),
        ([-1, 0, 2], [0, 2, 0]),
        ([-1, -1, -1], None),
    ],
)
def test_gradients_of_a_training_call(covariance, is_key_proj, indices, slots):
    """In the first call i* is the mean itself, so finite differences see what the closed form says."""
    C = covariance(4)
    text_enc, superclass, _ = inputs(b=3, n=3, d=4, dtype=torch.float64)
    untouched = make_layer(
        C,
        4,
        3,
        is_key_proj=is_key_proj,
        num_finetune_prompts=3,
        dtype=torch.float64,
        frac_gradient_concept_embed=1.0,
    )
    call = {
        "concept_indices": torch.tensor(indices),
        "prompt_ids": None if slots is None else torch.tensor(slots),
    }

    def first_call(text_enc):
        return copy.deepcopy(untouched)(text_enc, superclass, **call)

    assert torch.autograd.gradcheck(first_call, [text_enc.requires_grad_()])


def test_a_backward_under_autocast_is_as_exact_as_outside(covariance):
    layer = make_layer(covariance(16))
    call = inputs()
    gradients = []
    layer(*call)
    constants = layer.recent_calls[-1].call
    for is_inside in (False, True):
        leaf = call[0].clone().requires_grad_()
        rest, gate = TrainingSplit.apply(
            leaf, None, constants, layer.covariance.inverse("cpu", torch.float32), 0.75, 0.1, 1.0
        )
        loss = rest.square().sum() + gate.sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_inside):
            loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_gradients_of_an_inference_call(covariance):
    layer = trained(covariance(4), 2, d=4, o=3, dtype=torch.float64)
    text_enc = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(text_enc, concept_output):
        return torch.func.functional_call(layer, {"concept_output": concept_output}, (text_enc,))

    assert torch.autograd.gradcheck(call, [text_enc, layer.concept_output.detach().clone().requires_grad_()])


def test_two_concepts_in_one_backward(covariance):
    """The first call of a second concept writes its output while the graph of the first still waits."""
    layer = make_layer(covariance(16), num_concepts=2)
    calls = [inputs() for _ in range(2)]
    first, second = (
        layer(call[0].requires_grad_(), *call[1:], concept_id=concept) for concept, call in enumerate(calls)
    )
    (first.square().sum() + second.square().sum()).backward()
    assert layer.concept_output.grad.abs().sum(dim=1).all()


def test_training_moves_the_output_to_the_best_one(covariance):
    """With the encodings fixed, the loss is a square in o*, whose minimum is known."""
    layer = make_layer(covariance(16))
    text_enc, superclass, indices = inputs()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    target = torch.randn(12)
    losses = []
    for _ in range(200):
        loss = (layer(text_enc, superclass, indices)[torch.arange(4), indices] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    rows = torch.arange(4)
    i, dual = layer.concept_input[0, 0], layer.concept_dual[0]
    similarity = text_enc[rows, indices] @ dual
    gate = torch.sigmoid((similarity - 0.75) / 0.1).unsqueeze(1)
    missing = target - (text_enc[rows, indices] - similarity.unsqueeze(1) * i) @ layer.weight.T
    best = (gate * missing).sum(dim=0) / gate.square().sum()
    assert losses[-1] == pytest.approx((gate * best - missing).square().mean().item(), rel=1e-3)
    assert losses[-1] < losses[0]


def test_rows_without_the_concept_may_hold_anything(covariance):
    """0 · NaN is NaN: what stands in such a row must not reach the averages."""
    layer = make_layer(covariance(16))
    text_enc, superclass, indices = inputs()
    indices[0] = -1
    text_enc[0], superclass[0] = float("nan"), float("inf")
    layer(text_enc, superclass, indices)
    for name in STATE:
        assert getattr(layer, name).isfinite().all(), name
