"""The layer: against the oracle in training and inference, its state, its gradients, its errors."""

import copy
import io
import pickle
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from perfusion_pytorch import InputCovariance, Rank1EditModule

REAL = Path(__file__).parents[2] / "shared" / "data" / "clip_vit_l14_covariance.safetensors"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STATE = ("concept_input", "superclass_input", "initialized", "concept_dual", "eval_beta", "eval_temperature")


def make_layer(C, d=16, o=12, *, bias=False, dtype=torch.float32, **options):
    layer = Rank1EditModule(nn.Linear(d, o, bias=bias).to(dtype), C=C, **options)
    return layer.double() if dtype == torch.float64 else layer


def inputs(b=4, n=6, d=16, dtype=torch.float32):
    """Return (text_enc, text_enc_with_superclass, concept_indices)."""
    return torch.randn(b, n, d, dtype=dtype), torch.randn(b, n, d, dtype=dtype), torch.randint(0, n, (b,))


def state_of(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_state(layer, state):
    assert layer.state_dict().keys() == state.keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def trained(C, concepts=1, calls=2, **options):
    """Return a layer in eval mode whose concepts saw some training calls, with gates and outputs of their own."""
    layer = make_layer(C, num_concepts=concepts, **options)
    for concept in range(concepts):
        for _ in range(calls):
            encodings, superclass, indices = inputs(d=layer.in_features, dtype=layer.weight.dtype)
            slots = torch.randint(0, max(layer.num_finetune_prompts - 1, 1), (4,))  # of several slots, the last is never seen
            layer(encodings, superclass, indices, prompt_ids=slots, concept_id=concept)
    with torch.no_grad():
        layer.eval_beta.copy_(torch.linspace(0.5, 0.8, concepts))
        layer.eval_temperature.copy_(torch.linspace(0.1, 0.3, concepts))
        if not layer.is_key_proj:
            layer.concept_output += torch.randn_like(layer.concept_output)
    return layer.eval()


def seen_mean(buffer, initialized):
    """The mean of a concept's seen slots, one concept at a time."""
    return torch.stack([buffer[c].double()[initialized[c]].mean(dim=0) for c in range(len(buffer))])


def expected_at_inference(layer, text_enc, C, concepts=None):
    """The oracle's output for the layer's state, the bias added once."""
    chosen = list(range(layer.num_concepts)) if concepts is None else list(concepts)
    i = seen_mean(layer.concept_input, layer.initialized)[chosen]
    if layer.is_key_proj:
        o = seen_mean(layer.superclass_input, layer.initialized)[chosen] @ layer.weight.double().T
    else:
        o = layer.concept_output[chosen]
    result = oracle.edit_of_many(text_enc, layer.weight, C, i, o, layer.eval_beta[chosen], layer.eval_temperature[chosen])
    return result if layer.bias is None else result + layer.bias.double()


# ---------------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("concepts", [1, 2, 3])
@pytest.mark.parametrize("d, o", [(8, 6), (24, 32)])
def test_inference_meets_the_oracle(covariance, assert_near, d, o, concepts, tokens, is_key_proj, dtype):
    C = covariance(d)
    layer = trained(C, concepts, d=d, o=o, is_key_proj=is_key_proj, num_finetune_prompts=3, bias=tokens == 7, dtype=dtype)
    text_enc = torch.randn(2, tokens, d, dtype=dtype)
    text_enc[0, 0] = seen_mean(layer.concept_input, layer.initialized)[0].to(dtype)
    actual = layer(text_enc)
    assert actual.dtype == dtype
    assert_near(actual, expected_at_inference(layer, text_enc, C))


@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("concept_id", [0, 2, (1,), (2, 0), (0, 1, 2)])
def test_concepts_are_chosen_by_id(covariance, assert_near, is_key_proj, concept_id):
    C = covariance(16)
    layer = trained(C, 3, is_key_proj=is_key_proj)
    text_enc = torch.randn(2, 5, 16)
    chosen = (concept_id,) if isinstance(concept_id, int) else concept_id
    assert_near(layer(text_enc, concept_id=concept_id), expected_at_inference(layer, text_enc, C, chosen))


def test_an_empty_choice_of_concepts_is_the_plain_layer(covariance):
    layer = trained(covariance(16), 2)
    text_enc = torch.randn(2, 5, 16)
    assert torch.equal(layer(text_enc, concept_id=()), layer._original[0](text_enc))


def test_concepts_never_seen_are_left_out(covariance, assert_near):
    C = covariance(16)
    layer = make_layer(C, num_concepts=3)
    layer(*inputs(), concept_id=1)
    text_enc = torch.randn(2, 5, 16)
    with torch.no_grad():
        layer.concept_output[0] = 100.0
    layer.eval()
    assert_near(layer(text_enc), layer(text_enc, concept_id=1))
    for concept in (0, 2):
        assert torch.equal(layer(text_enc, concept_id=concept), layer._original[0](text_enc))


def test_nearly_parallel_concepts_meet_the_oracle(covariance, assert_near):
    C = covariance(16)
    layer = make_layer(C, num_concepts=2, dtype=torch.float64)
    encodings, superclass, indices = inputs(dtype=torch.float64)
    layer(encodings, superclass, indices, concept_id=0)
    layer(encodings + 1e-2 * torch.randn_like(encodings), superclass, indices, concept_id=1)
    layer.eval()
    text_enc = torch.randn(2, 5, 16, dtype=torch.float64)
    assert_near(layer(text_enc), expected_at_inference(layer, text_enc, C))


def test_at_the_concept_the_output_is_its_gated_output(covariance, assert_near):
    layer = trained(covariance(16))
    at_concept = layer(seen_mean(layer.concept_input, layer.initialized).float().unsqueeze(0))
    assert_near(at_concept[0], torch.sigmoid((1 - layer.eval_beta) / layer.eval_temperature).unsqueeze(1) * layer.concept_output)


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_permuting_the_batch_permutes_the_output(covariance, assert_near, is_key_proj):
    layer = trained(covariance(16), 2, is_key_proj=is_key_proj)
    text_enc = torch.randn(4, 5, 16)
    assert_near(layer(text_enc[[2, 0, 3, 1]]), layer(text_enc)[[2, 0, 3, 1]])


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_scaling_the_covariance_changes_nothing(covariance, assert_near, is_key_proj):
    C, weight, (encodings, superclass, indices) = covariance(16), torch.randn(12, 16), inputs()
    layers = [make_layer(c, is_key_proj=is_key_proj) for c in (C, C * 1e4)]
    outputs = []
    for layer in layers:
        layer.weight.data.copy_(weight)
        outputs.append(torch.cat([layer(encodings, superclass, indices), layer.eval()(encodings)]))
    assert_near(outputs[1], outputs[0])


def test_a_changed_weight_output_or_gate_shows_in_the_next_forward(covariance, assert_near):
    C = covariance(16)
    text_enc = torch.randn(2, 5, 16)
    for is_key_proj in (True, False):
        layer = trained(C, 2, is_key_proj=is_key_proj)
        for tensor in (layer.weight, layer.eval_beta, layer.eval_temperature, *([] if is_key_proj else [layer.concept_output])):
            before = layer(text_enc)
            tensor.data.mul_(1.5)
            assert not torch.equal(layer(text_enc), before)
            assert_near(layer(text_enc), expected_at_inference(layer, text_enc, C))


def test_text_encodings_without_a_batch_axis(covariance, assert_near):
    layer = trained(covariance(16), 2)
    text_enc = torch.randn(2, 5, 16)
    assert_near(layer(text_enc[1]), layer(text_enc)[1])


@pytest.mark.skipif(not REAL.exists(), reason="the real covariance is not in this checkout")
@pytest.mark.parametrize("concepts", [1, 2])
def test_the_real_covariance_meets_the_oracle(assert_near, concepts):
    C = load_file(REAL)["covariance"].double()
    C = (C + C.T) / 2
    layer = make_layer(C, 768, 8, num_concepts=concepts, train_beta=0.6)
    a = torch.linalg.cholesky(C)
    for concept in range(concepts):
        encodings = (torch.randn(2, 3, 768, dtype=torch.float64) @ a.T).float()  # as the text encoder's, by their second moment
        layer(encodings, encodings.roll(1, 0), torch.tensor([1, 2]), concept_id=concept)
    layer.eval()
    text_enc = (torch.randn(1, 3, 768, dtype=torch.float64) @ a.T).float()
    text_enc[0, 0] = layer.concept_input[0, 0]
    assert_near(layer(text_enc), expected_at_inference(layer, text_enc, C))


# ----------------------------------------------------------------------------------------------- before anything was seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_before_training_is_the_plain_layer_bit_for_bit(covariance, dtype, is_key_proj, bias):
    plain = nn.Linear(16, 12, bias=bias).to(dtype)
    text_enc = torch.randn(3, 5, 16, dtype=dtype)
    expected = plain(text_enc)
    for C in (covariance(16), None):
        layer = Rank1EditModule(copy.deepcopy(plain), C=C, is_key_proj=is_key_proj, num_concepts=2, num_finetune_prompts=3)
        for mode in (True, False):
            layer.train(mode)
            assert torch.equal(layer(text_enc), expected)
            assert torch.equal(layer(text_enc, concept_id=1), expected)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_returns_the_dtype_of_the_plain_layer(covariance, assert_near, dtype, to, is_trained):
    C = covariance(16)
    layer = trained(C, 2) if is_trained else make_layer(C).eval()
    plain, text_enc = copy.deepcopy(layer._original[0]), torch.randn(3, 5, 16).to(to if dtype == torch.float64 else dtype)
    with torch.autocast("cpu", to):
        actual, expected = layer(text_enc), plain(text_enc)
    assert actual.dtype == expected.dtype == to
    if is_trained:
        assert_near(actual, expected_at_inference(layer, text_enc, C))
        assert not torch.equal(actual, expected)
    else:
        assert torch.equal(actual, expected)


# ----------------------------------------------------------------------------------------------------------------- training


def slotted_calls(count=4, b=5, n=6, d=16, slots=3, dtype=torch.float32):
    """Return training calls (text_enc, superclass, concept indices, superclass indices, prompt ids); some rows are without the concept."""
    calls = []
    for _ in range(count):
        text_enc, superclass, indices = inputs(b, n, d, dtype)
        where = torch.randint(0, n, (b,))
        where[torch.rand(b) < 0.3] = -1
        indices[where < 0] = -1
        calls.append((text_enc, superclass, indices, where, torch.randint(0, slots, (b,))))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_key_proj", [True, False])
def test_training_calls_meet_the_oracle(covariance, assert_near, is_key_proj, dtype):
    """Each call's output uses the averages with this call in them, row by row, and the averages are those of the oracle."""
    C = covariance(16)
    layer = make_layer(C, is_key_proj=is_key_proj, num_finetune_prompts=3, input_decay=0.8, bias=True, dtype=dtype)
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
        layer(text_enc, superclass, indices, superclass_indices=where, prompt_ids=slots, concept_id=number % 2)
    for concept in range(2):
        own = calls[concept::2]
        for slot, average in oracle.moving_averages([(c[0], c[2].tolist(), c[4].tolist()) for c in own], decay=0.99).items():
            assert_near(layer.concept_input[concept, slot], average)


def test_without_prompt_ids_all_rows_share_slot_0(covariance):
    layer = make_layer(covariance(16), num_finetune_prompts=3)
    text_enc, superclass, indices = inputs()
    layer(text_enc, superclass, indices)
    assert layer.initialized.tolist() == [[True, False, False]]
    assert torch.allclose(layer.concept_input[0, 0], text_enc[torch.arange(4), indices].mean(dim=0), atol=1e-6)


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


def test_key_outputs_are_locked(covariance):
    layer = make_layer(covariance(16), is_key_proj=True)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert not any(p.requires_grad for p in layer.parameters())
    text_enc, superclass, indices = inputs()
    layer(text_enc, superclass, indices)
    before = layer.eval()(text_enc)
    layer.superclass_input *= 2
    assert not torch.equal(layer(text_enc), before)


def test_rows_without_the_concept_are_the_plain_layer_bit_for_bit(covariance):
    for dtype in DTYPES:
        layer = make_layer(covariance(16), dtype=dtype)
        text_enc, superclass, _ = inputs(b=2, dtype=dtype)
        actual = layer(text_enc, superclass, torch.tensor([-1, 2]))
        assert torch.equal(actual[0], layer._original[0](text_enc)[0])
        assert not torch.equal(actual[1], layer._original[0](text_enc)[1])


def test_a_call_of_no_row_with_the_concept_changes_nothing(covariance):
    for is_key_proj in (True, False):
        layer = make_layer(covariance(16), is_key_proj=is_key_proj)
        for _ in range(2):
            before = state_of(layer)
            text_enc, superclass, _ = inputs()
            assert torch.equal(layer(text_enc, superclass, torch.full((4,), -1)), layer._original[0](text_enc))
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
    C, (text_enc, superclass, indices) = covariance(16), inputs()
    outputs, gradients = [], []
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
    layer, calls = make_layer(covariance(16), num_finetune_prompts=3), slotted_calls(dtype=dtype)
    for text_enc, superclass, indices, where, slots in calls:
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(text_enc, superclass, indices, superclass_indices=where, prompt_ids=slots)
        assert output.dtype == torch.bfloat16
    for slot, average in oracle.moving_averages([(c[0], c[2].tolist(), c[4].tolist()) for c in calls], 0.99).items():
        assert_near(layer.concept_input[0, slot], average, torch.float32)
    for slot, average in oracle.moving_averages([(c[1], c[3].tolist(), c[4].tolist()) for c in calls], 0.99).items():
        assert_near(layer.superclass_input[0, slot], average, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_indices_of_any_integer_dtype(covariance, dtype):
    layers = [make_layer(covariance(16), num_finetune_prompts=2) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].covariance = layers[0].covariance
    text_enc, superclass, indices = inputs()
    slots = torch.tensor([0, 1, 1, 0])
    expected = layers[0](text_enc, superclass, indices, superclass_indices=indices, prompt_ids=slots)
    actual = layers[1](text_enc, superclass, indices.to(dtype), superclass_indices=indices.to(dtype), prompt_ids=slots.to(dtype))
    assert torch.equal(actual, expected)


# ---------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_which_tensors_get_a_gradient(covariance, is_key_proj):
    """Value outputs and the text encodings do; the projection, the superclass encodings and the statistics do not."""
    layer = make_layer(covariance(16), is_key_proj=is_key_proj, bias=True)
    text_enc, superclass, indices = inputs()
    text_enc.requires_grad_()
    superclass.requires_grad_()
    layer(text_enc, superclass, indices).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ([] if is_key_proj else ["concept_output"])
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ([] if is_key_proj else ["concept_output"])
    assert text_enc.grad.abs().sum(dim=-1).all()
    assert superclass.grad is None
    assert not any(getattr(layer, name).requires_grad for name in STATE)


def test_the_projection_stays_frozen(covariance):
    layer = make_layer(covariance(16), bias=True)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "concept_output"}


def reference_gradient(layer, C, text_enc, indices, output, average_of):
    """Gradient of Σ h² into the encodings, with i* = average_of(mean of the encodings at the indices), by dense algebra."""
    e = text_enc.detach().clone().requires_grad_()
    i = average_of(e[torch.arange(len(e)), indices].mean(dim=0))
    dual = torch.linalg.solve(C, i)
    r = (e @ dual) / (i @ dual)
    h = (e - r.unsqueeze(-1) * i) @ layer.weight.T + torch.sigmoid((r - 0.75) / 0.1).unsqueeze(-1) * output
    h.square().sum().backward()
    return h, e.grad


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_the_gradient_into_the_concept_input_is_that_of_the_mean_itself(covariance, assert_near, is_key_proj):
    """Straight through: the moving average takes its value from history, and its gradient is that of this call's mean."""
    C = covariance(16)
    layer = make_layer(C, is_key_proj=is_key_proj, dtype=torch.float64, frac_gradient_concept_embed=1.0)
    for _ in range(3):
        text_enc, superclass, indices = inputs(dtype=torch.float64)
        text_enc.requires_grad_()
        actual = layer(text_enc, superclass, indices)
        actual.square().sum().backward()
        average, s = layer.concept_input[0, 0].clone(), layer.superclass_input[0, 0]
        output = (layer.weight @ s if is_key_proj else layer.concept_output[0]).detach()
        h, grad = reference_gradient(layer, C, text_enc, indices, output, lambda mean, average=average: mean + (average - mean).detach())
        assert_near(actual, h)
        assert_near(text_enc.grad, grad)


def test_gradients_of_a_training_call(covariance):
    """In the first call i* is the mean itself, so finite differences see what autograd sees."""
    C = covariance(4)
    text_enc, superclass, indices = inputs(b=2, n=3, d=4, dtype=torch.float64)
    untouched = make_layer(C, 4, 3, is_key_proj=True, dtype=torch.float64, frac_gradient_concept_embed=1.0)

    def first_call(text_enc):
        return copy.deepcopy(untouched)(text_enc, superclass, indices)

    assert torch.autograd.gradcheck(first_call, [text_enc.requires_grad_()])


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
    first, second = (layer(call[0].requires_grad_(), *call[1:], concept_id=concept) for concept, call in enumerate(calls))
    (first.square().sum() + second.square().sum()).backward()
    assert layer.concept_output.grad.abs().sum(dim=1).all()


def test_training_moves_the_output_towards_a_target(covariance):
    layer = make_layer(covariance(16))
    text_enc, superclass, indices = inputs()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    target, losses = torch.randn(12), []
    for _ in range(60):
        loss = (layer(text_enc, superclass, indices)[torch.arange(4), indices] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ------------------------------------------------------------------------------------------------------------- recomputation


def run_checkpointed(layer, text_enc, superclass, indices, use_reentrant):
    """Return output and gradients of a training call, computed directly (None) or under a variant of checkpointing."""
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


# -------------------------------------------------------------------------------------------------------- state and drop-in


def test_the_layer_is_a_linear_layer_with_its_keys(covariance):
    plain = nn.Linear(16, 12)
    weight, bias = plain.weight, plain.bias
    layer = Rank1EditModule(plain, C=covariance(16))
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (16, 12)
    assert layer.weight is weight and layer.bias is bias
    assert set(layer.state_dict()) == {"weight", "bias", "concept_output", *STATE}
    assert set(make_layer(covariance(16), is_key_proj=True).state_dict()) == {"weight", *STATE}
    assert [type(m) for m in layer.modules()] == [Rank1EditModule]
    assert "in_features=16, out_features=12, bias=True, is_key_proj=False" in repr(layer)


def test_the_linear_layers_methods_are_inherited():
    """`parameters` overridden hid the value outputs from the optimizer; a weight rewritten in `train` and `eval` goes stale."""
    own = {name for name in vars(Rank1EditModule) if callable(getattr(nn.Module, name, None)) and not name.startswith("__")}
    assert own == {"forward", "extra_repr", "_apply"}


def test_the_covariance_is_shared_and_stored_nowhere(covariance):
    """The d × d matrix is held once for all layers, and in no state dict."""
    C = InputCovariance(covariance(16))
    layers = nn.ModuleList(make_layer(C, is_key_proj=i % 2 == 0) for i in range(4))
    assert all(layer.covariance is C for layer in layers)
    assert not any(tensor.shape == (16, 16) for tensor in layers.state_dict().values())
    assert not any(tensor.shape == (16, 16) for layer in layers for tensor in (*layer.buffers(), *layer.parameters()))
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_and_output_stay_float32(covariance, dtype):
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
    torch.optim.AdamW([layer.concept_output]).step()
    assert layer.concept_output.dtype == torch.float32 and layer.concept_input.dtype == torch.float32
    assert not torch.equal(layer.concept_output, before["concept_output"])


def test_a_bfloat16_average_moves(covariance):
    """0.99 in bfloat16 arithmetic would never move it."""
    layer = make_layer(covariance(16)).bfloat16()
    text_enc, superclass, indices = inputs(dtype=torch.bfloat16)
    layer(text_enc, superclass, indices)
    before = layer.concept_input.clone()
    layer(text_enc * 1.05, superclass, indices)
    moved = (layer.concept_input - before)[0, 0]
    assert ((moved - 0.01 * (0.05 * before[0, 0])).abs() < 2e-3 * before[0, 0].abs() + 1e-6).all() and moved.abs().sum() > 0


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
    assert copied._original[0].weight is copied.weight and copied.weight is not layer.weight
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
    assert not torch.equal(other(text_enc), other._original[0](text_enc))


def test_a_state_of_one_concept_does_not_fit_two(covariance):
    layer = make_layer(covariance(16), num_concepts=2)
    before = state_of(layer)
    with pytest.raises(RuntimeError, match="size mismatch for concept_output"):
        layer.load_state_dict(make_layer(None).state_dict())
    assert before.keys() == layer.state_dict().keys()


def test_training_continues_from_a_state_dict(covariance):
    C, first, second = covariance(16), inputs(), inputs()
    layer, resumed = make_layer(C), make_layer(C)
    layer(*first)
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(resumed(*second), layer(*second))
    assert_same_state(resumed, state_of(layer))


# --------------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("concept_id", [None, 1, (1, 0)])
def test_compile_and_export(covariance, assert_near, concept_id, is_key_proj):
    layer = trained(covariance(16), 2, is_key_proj=is_key_proj)
    text_enc = torch.randn(2, 5, 16)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(text_enc, concept_id=concept_id)
    assert_near(compiled, layer(text_enc, concept_id=concept_id))
    exported = torch.export.export(layer, (text_enc,), {"concept_id": concept_id}).module()
    assert_near(exported(text_enc, concept_id=concept_id), layer(text_enc, concept_id=concept_id))


def test_a_compiled_layer_in_training_mode_still_trains(covariance, assert_near):
    """A training call must not turn into an inference call without a word."""
    direct = make_layer(covariance(16))
    layer, call = copy.deepcopy(direct), inputs()
    torch.compiler.reset()
    output = torch.compile(layer, backend="eager")(*call)
    assert_near(output, direct(*call))
    assert_same_state(layer, state_of(direct))


# ------------------------------------------------------------------------------------------------------------------- errors


def test_the_references_usage_runs_and_warns():
    """A random matrix is no covariance: it is symmetrised, warned about, and used."""
    with pytest.warns(UserWarning, match="not positive definite"):
        wrapped = Rank1EditModule(nn.Linear(512, 1024, bias=False), C=torch.randn(512, 512), is_key_proj=True, num_finetune_prompts=32)
    text_enc, text_enc_with_superclass = torch.randn(4, 256, 512), torch.randn(4, 256, 512)
    concept_ids = torch.randint(0, 256, (4,))
    keys = wrapped(text_enc, text_enc_with_superclass, concept_ids)
    assert keys.shape == (4, 256, 1024) and keys.isfinite().all()
    assert wrapped.eval()(text_enc).shape == (4, 256, 1024)


def test_a_good_covariance_does_not_warn(covariance):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_layer(covariance(16))(*inputs())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_finetune_prompts": 0}, "`num_finetune_prompts` must be at least 1, got 0"),
        ({"num_concepts": 0}, "`num_concepts` must be at least 1, got 0"),
        ({"input_decay": 1.0}, r"`input_decay` must be in \[0, 1\), got 1.0"),
        ({"input_decay": -0.1}, "`input_decay` must be"),
        ({"train_temperature": 0}, "`train_temperature` must be above 0, got 0"),
        ({"eval_temperature": float("nan")}, "`eval_temperature` must be above 0, got nan"),
        ({"frac_gradient_concept_embed": 1.5}, r"`frac_gradient_concept_embed` must be in \[0, 1\], got 1.5"),
        ({"C": torch.eye(3)}, r"`C` must have shape \(16, 16\).*got \(3, 3\)"),
        ({"C": torch.ones(16, 16)}, "must be invertible"),
        ({"C": torch.full((16, 16), float("nan"))}, "must be finite"),
        ({"C": torch.ones(16, 8)}, "must be square"),
    ],
)
def test_construction_errors_leave_the_projection_alone(options, message):
    plain = nn.Linear(16, 12)
    with pytest.raises(ValueError, match=message):
        Rank1EditModule(plain, **{"C": torch.eye(16), **options})
    assert plain.weight.requires_grad and plain.bias.requires_grad


@pytest.mark.parametrize("wrong", [nn.Conv1d(4, 4, 1), nn.Identity(), nn.Bilinear(4, 4, 4)])
def test_only_plain_linear_layers_are_wrapped(wrong):
    with pytest.raises(ValueError, match=f"must be a plain nn.Linear, got {type(wrong).__name__}"):
        Rank1EditModule(wrong, C=torch.eye(4))


def test_a_wrapped_layer_is_not_wrapped_again(covariance):
    with pytest.raises(ValueError, match=r"must be a plain nn\.Linear, got Rank1EditModule"):
        Rank1EditModule(make_layer(covariance(16)), C=covariance(16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_enc": torch.zeros(4, 6, 8)}, r"`text_enc` must have shape \(b, n, 16\).*got \(4, 6, 8\)"),
        ({"text_enc": torch.zeros(3, 6, 16)}, "`text_enc` must have shape"),
        ({"text_enc": torch.zeros(6, 16)}, "`text_enc` must have shape"),
        ({"text_enc_with_superclass": torch.zeros(4, 6, 8)}, r"`text_enc_with_superclass` must have shape \(b, n, 16\)"),
        ({"text_enc_with_superclass": torch.zeros(6, 16)}, "`text_enc_with_superclass` must have shape"),
        ({"text_enc_with_superclass": torch.zeros(4, 3, 16)}, "`text_enc_with_superclass` must have shape"),
        ({"text_enc_with_superclass": None}, "`text_enc_with_superclass` must be given in the first training call"),
        ({"concept_indices": torch.zeros(3, dtype=torch.long)}, r"`concept_indices` must have shape \(4,\).*got \(3,\)"),
        ({"concept_indices": torch.zeros(4, 1, dtype=torch.long)}, "`concept_indices` must have shape"),
        ({"concept_indices": torch.zeros(4)}, "`concept_indices` must hold integers, got torch.float32"),
        ({"concept_indices": torch.ones(4, dtype=torch.bool)}, "`concept_indices` must hold integers"),
        ({"concept_indices": torch.tensor([0, 1, 2, 6])}, "`concept_indices` must be from -1 to 5, got values from 0 to 6"),
        ({"concept_indices": torch.tensor([0, 1, 2, -2])}, "`concept_indices` must be from -1 to 5"),
        ({"superclass_indices": torch.tensor([0, 1, 2, 6])}, "`superclass_indices` must be from -1 to 5"),
        ({"superclass_indices": torch.tensor([0, 1, 2])}, r"`superclass_indices` must have shape \(4,\)"),
        ({"superclass_indices": torch.tensor([0, 1, 2, -1])}, "`superclass_indices` must be at least 0 wherever"),
        ({"prompt_ids": torch.tensor([0, 1, 2, 0])}, "`prompt_ids` must be from 0 to 1.*`num_finetune_prompts`"),
        ({"prompt_ids": torch.tensor([0, 1, 0, -1])}, "`prompt_ids` must be from 0 to 1"),
        ({"prompt_ids": torch.zeros(4)}, "`prompt_ids` must hold integers"),
        ({"concept_id": 2}, "`concept_id` must be different concepts from 0 to 1, got 2"),
        ({"concept_id": -1}, "`concept_id` must be different concepts from 0 to 1, got -1"),
        ({"concept_id": (0, 1)}, "`concept_id`"),
    ],
)
@pytest.mark.parametrize("is_key_proj", [True, False])
def test_refused_training_calls_change_nothing(covariance, is_key_proj, change, message):
    layer = make_layer(covariance(16), is_key_proj=is_key_proj, num_concepts=2, num_finetune_prompts=2)
    before = state_of(layer)
    text_enc, superclass, _ = inputs()
    call = {"text_enc": text_enc, "text_enc_with_superclass": superclass, "concept_indices": torch.tensor([0, 5, 2, 3]), **change}
    with pytest.raises(ValueError, match=message):
        layer(**call)
    assert_same_state(layer, before)
    assert not layer._recent_calls


@pytest.mark.parametrize("concept_id", [3, -1, (0, 0), (0, 3)])
def test_refused_inference_calls(covariance, concept_id):
    layer = trained(covariance(16), 3)
    with pytest.raises(ValueError, match="`concept_id` must be different concepts from 0 to 2"):
        layer(torch.randn(1, 2, 16), concept_id=concept_id)


def test_the_length_of_text_encodings_is_checked_where_it_is_given(covariance):
    layer = make_layer(covariance(16), text_seq_len=6)
    layer(*inputs())
    with pytest.raises(ValueError, match=r"`text_enc` must have shape \(b, 6, 16\).*got \(4, 5, 16\)"):
        layer(*inputs(n=5))


def test_training_without_a_covariance_is_an_error():
    layer = make_layer(None)
    before = state_of(layer)
    with pytest.raises(RuntimeError, match="C=None"):
        layer(*inputs())
    assert_same_state(layer, before)
    assert layer.eval()(*inputs()).shape == (4, 6, 12)


def test_a_wrong_type_is_an_error(covariance):
    from beartype.roar import BeartypeCallHintParamViolation

    with pytest.raises(BeartypeCallHintParamViolation, match="num_concepts"):
        make_layer(covariance(16), num_concepts="2")
