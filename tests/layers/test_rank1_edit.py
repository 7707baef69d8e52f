"""The layer at inference: against the oracle, by its properties, and before anything was seen."""

import copy

import pytest
import torch
from helpers.layers import (
    DTYPES,
    REAL,
    assert_same_state,
    expected_at_inference,
    inputs,
    make_layer,
    seen_mean,
    state_of,
    trained,
)
from safetensors.torch import load_file
from torch import nn

from perfusion_pytorch import Rank1EditModule


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("concepts", [1, 2, 3])
@pytest.mark.parametrize("d, o", [(8, 6), (24, 32)])
def test_inference_meets_the_oracle(covariance, assert_near, d, o, concepts, tokens, is_key_proj, dtype):
    C = covariance(d)
    layer = trained(
        C, concepts, d=d, o=o, is_key_proj=is_key_proj, num_finetune_prompts=3, bias=tokens == 7, dtype=dtype
    )
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
    assert torch.equal(layer(text_enc, concept_id=()), layer.original.module(text_enc))


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
        assert torch.equal(layer(text_enc, concept_id=concept), layer.original.module(text_enc))


def test_nearly_parallel_concepts_meet_the_oracle(covariance, assert_near):
    C = covariance(16)
    layer = make_layer(C, num_concepts=2, dtype=torch.float64)
    encodings, superclass, indices = inputs(dtype=torch.float64)
    layer(encodings, superclass, indices, concept_id=0)
    with pytest.warns(UserWarning, match="nearly parallel"):
        layer(encodings + 1e-2 * torch.randn_like(encodings), superclass, indices, concept_id=1)
    layer.eval()
    text_enc = torch.randn(2, 5, 16, dtype=torch.float64)
    assert_near(layer(text_enc), expected_at_inference(layer, text_enc, C))


def test_at_the_concept_the_output_is_its_gated_output(covariance, assert_near):
    layer = trained(covariance(16))
    at_concept = layer(seen_mean(layer.concept_input, layer.initialized).float().unsqueeze(0))
    assert_near(
        at_concept[0],
        torch.sigmoid((1 - layer.eval_beta) / layer.eval_temperature).unsqueeze(1) * layer.concept_output,
    )


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
        for tensor in (
            layer.weight,
            layer.eval_beta,
            layer.eval_temperature,
            *([] if is_key_proj else [layer.concept_output]),
        ):
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
        encodings = (
            torch.randn(2, 3, 768, dtype=torch.float64) @ a.T
        ).float()  # as the text encoder's, by their second moment
        layer(encodings, encodings.roll(1, 0), torch.tensor([1, 2]), concept_id=concept)
    layer.eval()
    text_enc = (torch.randn(1, 3, 768, dtype=torch.float64) @ a.T).float()
    text_enc[0, 0] = layer.concept_input[0, 0]
    assert_near(layer(text_enc), expected_at_inference(layer, text_enc, C))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_before_training_is_the_plain_layer_bit_for_bit(covariance, dtype, is_key_proj, bias):
    plain = nn.Linear(16, 12, bias=bias).to(dtype)
    text_enc = torch.randn(3, 5, 16, dtype=dtype)
    expected = plain(text_enc)
    for C in (covariance(16), None):
        layer = Rank1EditModule(
            copy.deepcopy(plain), C=C, is_key_proj=is_key_proj, num_concepts=2, num_finetune_prompts=3
        )
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
    plain = copy.deepcopy(layer.original.module)
    text_enc = torch.randn(3, 5, 16).to(to if dtype == torch.float64 else dtype)
    with torch.autocast("cpu", to):
        actual = layer(text_enc)
        expected = plain(text_enc)
    assert actual.dtype == expected.dtype == to
    if is_trained:
        assert_near(actual, expected_at_inference(layer, text_enc, C))
        assert not torch.equal(actual, expected)
    else:
        assert torch.equal(actual, expected)


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


@pytest.mark.slow
def test_a_compiled_layer_in_training_mode_still_trains(covariance, assert_near):
    """A training call must not turn into an inference call without a word."""
    direct = make_layer(covariance(16))
    layer, call = copy.deepcopy(direct), inputs()
    torch.compiler.reset()
    output = torch.compile(layer, backend="eager")(*call)
    assert_near(output, direct(*call))
    assert_same_state(layer, state_of(direct))
