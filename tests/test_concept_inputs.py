"""The context that gives every wrapped layer of a model what its training call needs."""

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.models import (
    NAMES,
    Attention,
    assert_same_state,
    inputs,
    layers_of,
    make_unet,
    run,
    state_of,
    wrap,
)
from torch.utils.checkpoint import checkpoint

import perfusion_pytorch
from perfusion_pytorch import (
    InputCovariance,
    Rank1EditModule,
    concept_inputs,
    wrap_cross_attentions_,
)
from perfusion_pytorch.concept_inputs import batch_given
from perfusion_pytorch.layers.recomputation import NUM_RECENT_CALLS
from perfusion_pytorch.layers.training_batch import TrainingBatch
from perfusion_pytorch.layers.training_call import TrainingSplit


@pytest.fixture
def unet():
    return make_unet()


@pytest.mark.parametrize("first", ["perfusion_pytorch", "perfusion_pytorch.concept_inputs"])
def test_the_public_name_is_the_function_whatever_was_imported_first(first):
    """A module of the package has the same name."""
    program = f"""
import {first}
import perfusion_pytorch
from perfusion_pytorch import concept_inputs
from perfusion_pytorch.concept_inputs import batch_given
import perfusion_pytorch.concept_inputs
assert perfusion_pytorch.concept_inputs is concept_inputs
assert concept_inputs.__module__ == batch_given.__module__ == "perfusion_pytorch.concept_inputs"
"""
    root = Path(perfusion_pytorch.__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True, timeout=100)


def test_the_context_equals_direct_calls():
    model = Attention()
    wrap(model, num_finetune_prompts=3, num_concepts=2)
    direct = copy.deepcopy(model)
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
    with concept_inputs(
        unet, text_enc_with_superclass=torch.randn(2, 5, 12), concept_indices=torch.tensor([1, 2])
    ):
        run(unet, text_enc).square().sum().backward()
    trained = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {f"{name}.concept_output" for name in NAMES if name.endswith("to_v")}
    assert text_enc.grad.abs().sum() > 0


def test_a_unets_gradient_checkpointing_advances_the_averages_once(unet, assert_near):
    """Backward recomputes every layer, inside the context or after it; state moves only once."""
    wrap_cross_attentions_(unet, C=torch.eye(12), input_decay=0.5)
    recomputed = copy.deepcopy(unet)
    late = copy.deepcopy(unet)
    for model in (recomputed, late):
        model.enable_gradient_checkpointing()
    for _ in range(2):
        text_enc, rest = inputs(d=12)
        gradients = []
        for model in (unet, recomputed, late):
            leaf = text_enc.clone().requires_grad_()
            with concept_inputs(model, **rest):
                loss = run(model, leaf * 1.0).square().sum()
                if model is not late:
                    loss.backward()
            if model is late:
                loss.backward()
            gradients.append(
                [leaf.grad]
                + [layer.concept_output.grad.clone() for layer in layers_of(model) if not layer.is_key_proj]
            )
        for others in gradients[1:]:
            for actual, expected in zip(others, gradients[0], strict=True):
                assert_near(actual, expected)
        assert_same_state(recomputed, state_of(unet))
        assert_same_state(late, state_of(unet))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_through_the_means_can_be_taken_apart(unet, assert_near, checkpointing):
    """Given back to the rows of each slot, it is what they would have had. Data parallelism needs this."""
    wrap_cross_attentions_(unet, C=torch.eye(12), num_finetune_prompts=3, frac_gradient_concept_embed=0.5)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    twin = copy.deepcopy(unet)
    slots = torch.tensor([0, 2, 0])
    where = torch.tensor([1, 3, 4])
    text_enc, rest = inputs(b=3, d=12)
    rest |= {"concept_indices": where, "prompt_ids": slots}
    expected = text_enc.clone().requires_grad_()
    leaf = text_enc.clone().requires_grad_()
    gradient = torch.zeros(3, 12, requires_grad=True)
    with concept_inputs(unet, **rest):
        run(unet, expected).square().sum().backward()
    with concept_inputs(twin, **rest, concept_gradient=gradient):
        run(twin, leaf).square().sum().backward()
    assert not torch.allclose(leaf.grad, expected.grad, rtol=1e-2)
    assert gradient.grad[[0, 2]].abs().sum(dim=1).all() and not gradient.grad[1].any()
    leaf.grad[range(3), where] += gradient.grad[slots] / torch.tensor([2, 1, 2])[:, None]
    assert_near(leaf.grad, expected.grad)
    with (
        pytest.raises(ValueError, match=r"`concept_gradient` must have shape \(3, 12\), got \(12,\)"),
        concept_inputs(twin, **rest, concept_gradient=torch.zeros(12)),
    ):
        pass


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
            layer.recent_calls.clear()
        before = state_of(model)
        with pytest.raises(RuntimeError, match="recomputed in backward, but its inputs are no longer known"):
            output.sum().backward()
    assert_same_state(model, before)


def test_a_recomputation_after_the_context_that_lost_its_inputs_raises():
    """A plain output in place of the edited one would give a wrong gradient without a word.

    Non-reentrant checkpointing may notice it too, since torch counts the tensors that it saves.
    """
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
    """Prior preservation: ordinary prompts in training mode, some with the encodings of a training call."""
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
    assert all(layer.batch_cache is None and not layer.recent_calls for layer in layers_of(model))
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


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"text_enc_with_superclass": torch.zeros(2, 5, 7)},
            r"`text_enc_with_superclass` must have shape \(b, n, 8\)",
        ),
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
    assert all(layer.batch_cache is None for layer in layers_of(model))


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
        assert all(layer.batch_cache is not None for layer in layers_of(model))


def test_a_model_without_wrapped_layers_is_an_error():
    with (
        pytest.raises(ValueError, match="Attention has no wrapped layer"),
        concept_inputs(Attention(), **inputs()[1]),
    ):
        raise AssertionError("the block was entered")


def test_encodings_changed_in_place_are_other_encodings():
    layer = Rank1EditModule(torch.nn.Linear(4, 6), C=torch.eye(4), input_decay=0.0)
    text_enc, superclass = torch.randn(2, 2, 3, 4)
    with concept_inputs(layer, text_enc_with_superclass=superclass, concept_indices=torch.tensor([0, 2])):
        layer(text_enc)
        first = layer.concept_input.clone()
        layer(text_enc.mul_(3))
    assert torch.allclose(layer.concept_input, 3 * first)


def test_a_copy_made_inside_the_context_is_outside_of_it():
    model = Attention()
    wrap(model)
    text_enc, rest = inputs()
    with concept_inputs(model, **rest):
        twin = copy.deepcopy(model)
    with concept_inputs(twin, **rest):  # would raise if the copy believed to be in a block
        twin(text_enc)


def of_one_layer(name, value):
    def change(layers):
        setattr(layers[1], name, value(getattr(layers[1], name)))

    return change


@pytest.mark.parametrize("indices", [(1, 3), (-1, 2)])
@pytest.mark.parametrize("takes_gradient", [True, False])
@pytest.mark.parametrize(
    ("change", "num_splits"),
    [
        (lambda layers: None, 1),
        (of_one_layer("concept_input", lambda i: i + 0.5), 3),
        (of_one_layer("train_beta", lambda beta: 0.3), 3),
        (of_one_layer("train_temperature", lambda temperature: 0.4), 3),
        (of_one_layer("frac_gradient_concept_embed", lambda fraction: 1.0), 3),
        (
            of_one_layer(
                "covariance", lambda covariance: InputCovariance(torch.diag(torch.arange(1.0, 9.0)))
            ),
            3,
        ),
    ],
    ids=["alike", "average", "beta", "temperature", "fraction", "covariance"],
)
def test_layers_that_agree_share_a_split(
    change, num_splits, takes_gradient, indices, assert_near, monkeypatch
):
    """Others have their own; outputs, state and gradients are those of layers that share nothing."""
    text_enc, rest = inputs()
    rest["concept_indices"] = torch.tensor(indices)
    results = []
    model = Attention()
    wrap(model, input_decay=0.5)
    with concept_inputs(model, **inputs()[1]):
        model(torch.randn(2, 5, 8))  # so that averages count
    change(layers_of(model))
    calls = []
    apply = TrainingSplit.apply
    monkeypatch.setattr(TrainingSplit, "apply", lambda *args: calls.append(args) or apply(*args))
    for is_split_once in (False, True):
        copied = copy.deepcopy(model)
        leaf = text_enc.clone().requires_grad_()
        given = rest | ({"concept_gradient": torch.zeros(1, 8, requires_grad=True)} if takes_gradient else {})
        calls.clear()
        with batch_given(layers_of(copied), TrainingBatch(**given, is_split_once=is_split_once)):
            output = copied(leaf)
            output.square().sum().backward()
        grads = [
            p.grad
            for p in (leaf, given.get("concept_gradient"), *copied.parameters())
            if p is not None and p.grad is not None
        ]
        results.append((output, grads, state_of(copied)))
        assert len(calls) == (num_splits if is_split_once else 4)
    (output, grads, _), (shared_output, shared_grads, shared_state) = results
    assert torch.equal(output, shared_output) and len(grads) == len(shared_grads) == 3 + takes_gradient
    for grad, shared in zip(grads, shared_grads, strict=True):
        assert grad.any()
        assert_near(shared, grad)
    assert results[0][2].keys() == shared_state.keys()
    assert all(torch.equal(results[0][2][name], tensor) for name, tensor in shared_state.items())


def test_a_shared_split_without_gradients_is_not_taken_for_one_with():
    model = Attention()
    wrap(model)
    text_enc, rest = inputs()
    text_enc.requires_grad_()
    key, value, *_ = layers_of(model)
    with batch_given(layers_of(model), TrainingBatch(**rest, is_split_once=True)):
        with torch.no_grad():
            key(text_enc)
        assert value(text_enc).requires_grad
        torch.autograd.grad(value(text_enc).sum(), text_enc)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_share_no_split_through_checkpoints(use_reentrant, assert_near):
    """A part of the model that is recomputed by itself cannot take over what another part made."""
    model = Attention()
    wrap(model)
    text_enc, rest = inputs()
    results = []
    for is_split_once in (False, True):
        copied = copy.deepcopy(model)
        leaf = text_enc.clone().requires_grad_()
        with batch_given(layers_of(copied), TrainingBatch(**rest, is_split_once=is_split_once)):
            keys, values, *others = (
                checkpoint(layer, leaf, use_reentrant=use_reentrant) for layer in layers_of(copied)
            )
            (torch.tanh(keys + others[0]) * (values + others[1])).sum().backward()
        results.append(
            (leaf.grad, [layer.concept_output.grad for layer in layers_of(copied) if not layer.is_key_proj])
        )
    (grad, outputs), (shared_grad, shared_outputs) = results
    assert_near(shared_grad, grad)
    assert all(torch.equal(a, b) for a, b in zip(outputs, shared_outputs, strict=True)) and len(outputs) == 2
