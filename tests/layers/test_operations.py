"""What a call costs in operations, and that it never waits for the device: the measure where no GPU is."""

import pytest
import torch
from helpers.tiny_concepts import tiny_concept
from helpers.tiny_pipes import tiny_pipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perfusion_pytorch import Rank1EditModule, concept_inputs
from perfusion_pytorch.layers.loaded import LoadedProjection
from perfusion_pytorch.pipelines.attach import attach

# On a GPU, each of these waits until the device has computed a number or a size.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "linalg_solve.")


class Operations(TorchDispatchMode):
    """Collects the names of the operations that are dispatched within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        return [name for name in self.names if any(name.startswith(wait) for wait in WAITS)]


def operations_of(call):
    """The operations of a call after the first, which prepares what depends on state alone."""
    with torch.no_grad():
        call()
        with Operations() as seen:
            call()
    return seen


def seen_layer(concepts, *, is_key_proj, gates_removal):
    layer = Rank1EditModule(
        nn.Linear(8, 6, bias=False),
        C=torch.eye(8),
        is_key_proj=is_key_proj,
        num_concepts=concepts,
        gates_removal=gates_removal,
    )
    for concept_id in range(concepts):
        layer(*torch.randn(2, 2, 5, 8), torch.tensor([1, 2]), concept_id=concept_id)
    return layer.eval()


@pytest.mark.parametrize("is_key_proj", [True, False])
@pytest.mark.parametrize("gates_removal", [True, False])
@pytest.mark.parametrize("concepts, most", [(1, 12), (3, 16), (8, 16)])
def test_an_inference_call_has_few_operations_and_never_waits(concepts, most, is_key_proj, gates_removal):
    """The plain layer has four. What many concepts add does not grow with their number."""
    layer, text_enc = (
        seen_layer(concepts, is_key_proj=is_key_proj, gates_removal=gates_removal),
        torch.randn(2, 5, 8),
    )
    seen = operations_of(lambda: layer(text_enc))
    assert len(seen.names) <= most and seen.waits == []


def test_a_changed_state_is_prepared_anew_once():
    layer, text_enc = seen_layer(3, is_key_proj=False, gates_removal=True), torch.randn(2, 5, 8)
    few = len(operations_of(lambda: layer(text_enc)).names)
    with torch.no_grad():
        layer.concept_dual.mul_(1.1)
        with Operations() as seen:
            layer(text_enc)
        assert len(seen.names) > few
        with Operations() as seen:
            layer(text_enc)
    assert len(seen.names) == few


def test_layers_with_loaded_concepts_are_nearly_plain():
    """What the edit does to encodings is computed once for all layers and steps."""
    pipe = tiny_pipe()
    for seed in range(3):
        attach(pipe, tiny_concept(pipe, token=f"<car-{seed}>", seed=seed))
    encoded, _ = pipe.encode_prompt(["a <car-0> and a <car-1>", "a house"], "cpu", 1, False)
    layers = [m for m in pipe.unet.modules() if isinstance(m, LoadedProjection)]
    assert operations_of(lambda: layers[0].edits._split(encoded)).waits == []
    for layer in layers:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        cost, base = (len(operations_of(lambda one=one: one(encoded)).names) for one in (layer, plain))
        assert cost - base == (0 if layer.is_key_proj else 1)


def test_a_denoisers_call_never_waits():
    pipe = tiny_pipe()
    attach(pipe, tiny_concept(pipe))
    encoded, _ = pipe.encode_prompt(["a <car-1> on red", "a house"], "cpu", 1, False)
    latents, time = torch.randn(2, 4, 8, 8), torch.tensor([1, 1])
    with torch.no_grad(), Operations() as seen:
        pipe.unet(latents, time, encoded)
    assert seen.waits == []


def test_training_layers_never_wait_after_the_first_step():
    """One read of the device in a step, outside the layers: whether encodings are finite, and the slots."""
    layers = nn.ModuleList(Rank1EditModule(nn.Linear(8, 6), C=torch.eye(8)) for _ in range(3))
    text_enc, superclass = torch.randn(2, 2, 5, 8)

    def step():
        with concept_inputs(
            layers, text_enc_with_superclass=superclass, concept_indices=torch.tensor([1, 2])
        ):
            return [layer(text_enc) for layer in layers]

    assert operations_of(step).waits == []
