"""The tensors that a training run changes: collected for a checkpoint, and put back from one."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from perfusion_pytorch.pipelines.parts import projections_of
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.preparation import Trainables

AVERAGES = ("concept_input", "superclass_input", "initialized", "concept_dual")
OPTIMIZER = "optimizer"  # the first part of the names of the optimizer's tensors


def training_tensors(trainables: Trainables, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all tensors that a run changes, by name: averages, trained ones, the optimizer's moments."""
    tensors = _model_tensors(trainables)
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}.{number}.{key}": value for key, value in values.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _model_tensors(trainables: Trainables) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in trainables.layers.items():
        keys = AVERAGES if layer.is_key_proj else (*AVERAGES, "concept_output")
        tensors |= {f"{name}.{key}": getattr(layer, key) for key in keys}
    for name, embedding in trainables.embeddings.items():
        tensors[f"{name}.concept_embedding"] = embedding.concept_embedding
    return tensors


@torch.no_grad()
def restore_training_tensors(
    tensors: Mapping[str, Tensor], trainables: Trainables, optimizer: torch.optim.Optimizer
) -> None:
    """Put back what `training_tensors` returned.

    Raises:
        ValueError: the tensors are of another model; nothing is changed.
    """
    state: dict[str, Any] = optimizer.state_dict()
    state["state"] = {}
    saved = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{OPTIMIZER}."):
            _, number, key = name.split(".")
            state["state"].setdefault(int(number), {})[key] = tensor
        else:
            saved[name] = tensor
    present = _model_tensors(trainables)
    wanted = {name: tuple(tensor.shape) for name, tensor in present.items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if wanted != found:
        name = next(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise ValueError(
            f"The checkpoint must be of this model, but '{name}' must have the shape "
            f"{wanted.get(name, 'of nothing')}, got {found.get(name, 'none')}."
        )
    for name, tensor in saved.items():
        present[name].data.copy_(tensor)
    optimizer.load_state_dict(state)


def num_checkpoint_bytes(pipe: StableDiffusion) -> int:
    """Estimate a checkpoint's size: averages of each layer, what is trained, and two moments of that."""
    total = 2**16
    for module, is_key in projections_of(pipe.unet).values():
        layer = cast(nn.Linear, module)
        total += 4 * 3 * (layer.in_features + (0 if is_key else layer.out_features))
    return total
