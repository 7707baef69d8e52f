"""Small wrapped layers, their inputs and their expected outputs, for the tests of the layer."""

from pathlib import Path

import oracle
import torch
from torch import nn

from perfusion_pytorch import Rank1EditModule

REAL = Path(__file__).parents[3] / "shared" / "data" / "clip_vit_l14_covariance.safetensors"
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
    """Return a layer in eval mode whose concepts are trained, with gates and outputs of their own."""
    layer = make_layer(C, num_concepts=concepts, **options)
    for concept in range(concepts):
        for _ in range(calls):
            encodings, superclass, indices = inputs(d=layer.in_features, dtype=layer.weight.dtype)
            slots = torch.randint(
                0, max(layer.num_finetune_prompts - 1, 1), (4,)
            )  # of several slots, the last is never seen
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
    result = oracle.edit_of_many(
        text_enc, layer.weight, C, i, o, layer.eval_beta[chosen], layer.eval_temperature[chosen]
    )
    return result if layer.bias is None else result + layer.bias.double()


def slotted_calls(count=4, b=5, n=6, d=16, slots=3, dtype=torch.float32):
    """Return training calls (text_enc, superclass, concept indices, superclass indices, prompt ids).

    Some rows are without the concept.
    """
    calls = []
    for _ in range(count):
        text_enc, superclass, indices = inputs(b, n, d, dtype)
        where = torch.randint(0, n, (b,))
        where[torch.rand(b) < 0.3] = -1
        indices[where < 0] = -1
        calls.append((text_enc, superclass, indices, where, torch.randint(0, slots, (b,))))
    return calls
