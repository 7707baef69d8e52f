"""Bring separately trained concepts together."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from beartype import beartype
from torch import Tensor, nn

from perfusion_pytorch.layers.checks import warn_if_parallel
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule

OPTIONS = ("text_seq_len", "input_decay", "train_beta", "train_temperature", "frac_gradient_concept_embed")


@beartype
def merge_rank1_edit_modules(*modules: Rank1EditModule) -> Rank1EditModule:
    """Return one layer with the concepts of several, in their order (Perfusion, appendix B).

    The new layer shares the first one's weight, covariance and options, and each concept keeps its own
    gate and form. Concepts of different covariances mix; their layer has none, so that it cannot be trained
    further. The layers themselves are not changed.

    Args:
        *modules: trained layers over equal projections: copies of one layer, or the same layer in copies of
            one model.

    Returns:
        A layer with as many concepts as the modules have together; put it where the first one is.

    Raises:
        ValueError: the layers do not belong together (widths, keys and values, weights), or a concept is
            not trained.

    Warns:
        UserWarning: concepts are nearly parallel.

    Example:
        >>> to_values = nn.Linear(4, 6)
        >>> def trained():
        ...     layer = Rank1EditModule(nn.Linear(4, 6), C=torch.eye(4))
        ...     layer.weight, layer.bias = to_values.weight, to_values.bias
        ...     _ = layer(torch.randn(1, 3, 4), torch.randn(1, 3, 4), torch.tensor([1]))
        ...     return layer
        >>> merge_rank1_edit_modules(trained(), trained()).num_concepts
        2
    """
    if not modules:
        raise ValueError("`modules` must be one or more wrapped layers, got none.")
    first = modules[0]
    for position, module in enumerate(modules):
        _check_mergeable(first, module, position)
    merged = _empty_layer(modules)
    _take_state_(merged, modules)
    merged.train(first.training)
    warn_if_parallel(merged)
    return merged


def _empty_layer(modules: Sequence[Rank1EditModule]) -> Rank1EditModule:
    """Return a layer over the first one's projection, with room for the concepts of all."""
    first = modules[0]
    # Built over a stand-in with the same parameters; on the meta device it draws no random numbers.
    stand_in = nn.Linear(first.in_features, first.out_features, bias=first.bias is not None, device="meta")
    stand_in.weight = first.weight
    stand_in.bias = first.bias
    parameters = list(first.original.module.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    merged = Rank1EditModule(
        stand_in,
        C=_common_covariance(modules),
        is_key_proj=first.is_key_proj,
        num_finetune_prompts=max(module.num_finetune_prompts for module in modules),
        num_concepts=sum(module.num_concepts for module in modules),
        gates_removal=tuple(gated for module in modules for gated in module.gates_removal),
        **{name: getattr(first, name) for name in OPTIONS},
    )
    for parameter, flag in zip(parameters, flags, strict=True):  # the new layer froze them
        parameter.requires_grad_(flag)
    merged.original = first.original  # unwrapping puts back this module
    return merged


@torch.no_grad()
def _take_state_(merged: Rank1EditModule, modules: Sequence[Rank1EditModule]) -> None:
    """Copy the concepts of all layers, in their order, into the merged one."""
    slots = merged.num_finetune_prompts
    for name in ("concept_input", "superclass_input", "initialized"):
        setattr(merged, name, torch.cat([_with_slots(getattr(module, name), slots) for module in modules]))
    for name in ("concept_dual", "eval_beta", "eval_temperature"):
        setattr(merged, name, torch.cat([getattr(module, name) for module in modules]))
    if not merged.is_key_proj:
        merged.concept_output.data = torch.cat([module.concept_output.detach() for module in modules])


def _with_slots(values: Tensor, slots: int) -> Tensor:
    """Return statistics (c, p, ...) with zeros in slots added at the end, up to this many."""
    missing = slots - values.shape[1]
    return torch.cat([values, values.new_zeros(values.shape[0], missing, *values.shape[2:])], dim=1)


def _check_mergeable(first: Rank1EditModule, module: Rank1EditModule, position: int) -> None:
    """Raise a ValueError if a layer cannot be merged with the first one."""

    def refuse(required: str, got: str) -> NoReturn:
        raise ValueError(f"Layers to be merged must {required}, but number {position} {got}.")

    if module.is_key_proj != first.is_key_proj:
        refuse("be all of keys or all of values", "is of the other kind")
    if module.weight.shape != first.weight.shape:
        refuse(f"have weights of shape {tuple(first.weight.shape)}", f"has {tuple(module.weight.shape)}")
    if not torch.equal(module.weight, first.weight) or not _have_equal_biases(first, module):
        refuse("wrap equal projections", "has another weight or bias. Train all concepts on one base model")
    untrained = (~module.initialized.any(dim=1)).nonzero().flatten().tolist()
    if untrained:
        refuse("be trained", f"has never seen its concepts {untrained}")


def _common_covariance(modules: Sequence[Rank1EditModule]) -> InputCovariance | None:
    """Return the first layer's covariance, or None where another layer was trained with a different one."""
    first = modules[0].covariance
    others = [module.covariance for module in modules[1:] if module.covariance is not None]
    if first is None or all(first.is_proportional_to(other) for other in others):
        return first
    return None


def _have_equal_biases(first: Rank1EditModule, module: Rank1EditModule) -> bool:
    if module.bias is None or first.bias is None:
        return module.bias is first.bias
    return torch.equal(module.bias, first.bias)
