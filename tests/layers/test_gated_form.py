"""The gated form: the gate closes the whole edit, the removal of i* too."""

import copy

import oracle
import pytest
import torch
from helpers.layers import inputs, make_layer, seen_mean, trained

from perfusion_pytorch import merge_rank1_edit_modules


def expected(layer, text_enc, C, chosen):
    chosen = list(chosen)
    i = seen_mean(layer.concept_input, layer.initialized)[chosen]
    if layer.is_key_proj:
        s = seen_mean(layer.superclass_input, layer.initialized)[chosen]
        o = s @ layer.weight.double().T
    else:
        o = layer.concept_output[chosen]
    forms = [layer.gates_removal[j] for j in chosen]
    gates = layer.eval_beta[chosen], layer.eval_temperature[chosen]
    result = oracle.gated_edit_of_many(text_enc, layer.weight, C, i, o, *gates, forms)
    return result if layer.bias is None else result + layer.bias.double()


@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forms", [True, (True,), (True, True), (True, False), (False, True, False)], ids=str)
def test_inference_meets_the_oracle(covariance, assert_near, forms, dtype, is_key_proj):
    C, concepts = covariance(16), 1 if forms is True else len(forms)
    options = {"is_key_proj": is_key_proj, "num_finetune_prompts": 2, "dtype": dtype, "bias": True}
    layer = trained(C, concepts, gates_removal=forms, **options)
    text_enc = torch.randn(2, 5, 16, dtype=dtype)
    text_enc[0, 0] = seen_mean(layer.concept_input, layer.initialized)[0].to(dtype)
    assert_near(layer(text_enc), expected(layer, text_enc, C, range(concepts)))
    for chosen in range(concepts):
        assert_near(layer(text_enc, concept_id=chosen), expected(layer, text_enc, C, [chosen]))


def test_without_it_the_edit_is_eq_3(covariance):
    C, text_enc = covariance(16), torch.randn(2, 5, 16)
    torch.manual_seed(1)
    layer = trained(C, 2)
    torch.manual_seed(1)
    assert torch.equal(layer(text_enc), trained(C, 2, gates_removal=(False, False))(text_enc))


@pytest.mark.parametrize("is_key_proj", [True, False])
def test_a_shut_gate_is_the_plain_layer_and_an_open_one_eq_3(covariance, assert_near, is_key_proj):
    layer = trained(covariance(16), 2, is_key_proj=is_key_proj, gates_removal=True)
    text_enc = torch.randn(2, 5, 16)
    layer.eval_temperature.fill_(1e-3)
    layer.eval_beta.fill_(100.0)
    assert torch.equal(layer(text_enc), layer.original.module(text_enc))
    layer.eval_beta.fill_(-100.0)
    opened = copy.deepcopy(layer)
    opened.gates_removal = (False, False)
    assert_near(layer(text_enc), opened(text_enc))


@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("indices, slots", [([1, 0, 2], None), ([1, -1, 2], None), ([1, 0, 2], [0, 2, 2])])
def test_gradients_of_a_training_call(covariance, is_key_proj, indices, slots):
    """In the first call i* is the mean itself, so finite differences see what the closed form computes."""
    text_enc, superclass, _ = inputs(b=3, n=3, d=4, dtype=torch.float64)
    options = {"num_finetune_prompts": 3, "frac_gradient_concept_embed": 1.0, "gates_removal": True}
    untouched = make_layer(covariance(4), 4, 3, is_key_proj=is_key_proj, dtype=torch.float64, **options)
    slots = None if slots is None else torch.tensor(slots)

    def first_call(text_enc):
        return copy.deepcopy(untouched)(text_enc, superclass, torch.tensor(indices), prompt_ids=slots)

    assert torch.autograd.gradcheck(first_call, [text_enc.requires_grad_()])


def test_a_training_call_has_the_form_of_its_concept(covariance, assert_near):
    C = covariance(16)
    layer = make_layer(C, num_concepts=2, gates_removal=(False, True), dtype=torch.float64)
    for concept in range(2):
        text_enc, superclass, indices = inputs(dtype=torch.float64)
        output = layer(text_enc, superclass, indices, concept_id=concept)
        i, o = layer.concept_input[concept], layer.concept_output[concept][None]
        gates = [layer.train_beta], [layer.train_temperature], [concept == 1]
        assert_near(output, oracle.gated_edit_of_many(text_enc, layer.weight, C, i, o, *gates))


def test_merged_concepts_keep_their_forms(covariance, assert_near):
    C = covariance(16)
    first = trained(C, 2, gates_removal=(True, False))
    second = trained(C, 1)
    second.weight = first.weight
    second.covariance = first.covariance
    merged = merge_rank1_edit_modules(first, second)
    assert merged.gates_removal == (True, False, False)
    text_enc = torch.randn(2, 5, 16)
    assert_near(merged(text_enc), expected(merged, text_enc, C, range(3)))


def test_a_tuple_must_be_of_the_number_of_concepts(covariance):
    message = r"`gates_removal` must be a bool, or one for each of 2 concepts, got \(True,\)"
    with pytest.raises(ValueError, match=message):
        make_layer(covariance(16), num_concepts=2, gates_removal=(True,))


def test_a_layer_of_mixed_forms_compiles_without_a_break(covariance):
    layer = trained(covariance(16), 2, gates_removal=(True, False))
    text_enc = torch.randn(2, 5, 16)
    exported = torch.export.export(layer, (text_enc,)).module()
    torch.testing.assert_close(exported(text_enc), layer(text_enc))
