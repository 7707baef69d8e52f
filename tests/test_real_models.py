"""The denoisers that people use, at their real configurations and random weights: wrapping and calls.

They are built on the meta device. Their weights are views of one small random tensor, so SDXL's 2.6 billion
parameters need no memory.
"""

import pytest
import torch
from helpers.real_models import EXPECTED, MODELS, real_model

from perfusion_pytorch import (
    InputCovariance,
    concept_inputs,
    get_finetune_optimizer,
    unwrap_cross_attentions_,
    wrap_cross_attentions_,
)


@pytest.fixture(scope="module", params=MODELS)
def named_model(request):
    return request.param, real_model(request.param)


def call(name, model, encodings):
    """Run the model on two small latents; PixArt's caption projection stands before the wrapped layers."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    if name == "PixArt":
        return model(latents, encodings, torch.tensor([500, 500])).sample
    conditions = (
        {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.zeros(2, 6)} if name == "SDXL" else None
    )
    return model(latents, 500, encodings, added_cond_kwargs=conditions).sample


def test_which_layers_are_wrapped(named_model):
    name, model = named_model
    number, d, o, bias = EXPECTED[name]
    names = [key for key, _ in model.named_parameters()]
    buffers = sum(b.numel() for b in model.buffers())
    modules = list(model.modules())
    wrapped = wrap_cross_attentions_(model, C=None)
    assert len(wrapped) == 2 * number
    assert {key.rpartition(".")[2] for key in wrapped} == {"to_k", "to_v"}
    assert all(".attn2." in key for key in wrapped)
    assert {layer.in_features for layer in wrapped.values()} == {d}
    assert sum(layer.out_features for layer in wrapped.values()) == o
    assert {layer.bias is not None for layer in wrapped.values()} == {bias}
    added = (
        sum(p.numel() for key, p in model.named_parameters() if key not in names)
        + sum(b.numel() for b in model.buffers())
        - buffers
    )
    assert added * 4 <= {"SDXL": 6e6}.get(name, 1e6)  # bytes: everything that wrapping adds
    unwrap_cross_attentions_(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.slow
def test_training_and_inference_calls(named_model):
    name, model = named_model
    _, d, *_ = EXPECTED[name]
    encodings, superclass = torch.randn(
        2, 2, 7, 4096 if name == "PixArt" else d, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        plain = call(name, model, encodings)
    wrapped = wrap_cross_attentions_(model.train(), C=InputCovariance(torch.eye(d)))
    try:
        optimizer = get_finetune_optimizer(model)
        with torch.no_grad():
            assert torch.equal(call(name, model, encodings), plain)
            at_layer = model.caption_projection(superclass) if name == "PixArt" else superclass
        with concept_inputs(model, text_enc_with_superclass=at_layer, concept_indices=torch.tensor([2, 4])):
            call(name, model, encodings).square().mean().backward()
        for key, layer in wrapped.items():
            assert layer.initialized.all(), key
            assert layer.is_key_proj or layer.concept_output.grad.abs().sum() > 0, key
        optimizer.step()
        with torch.no_grad():
            edited = call(name, model.eval(), encodings)
        assert edited.isfinite().all() and not torch.allclose(edited, plain, rtol=1e-3)
    finally:
        unwrap_cross_attentions_(model)
    with torch.no_grad():
        assert torch.equal(call(name, model, encodings), plain)
