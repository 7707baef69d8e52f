"""Bring separately trained concepts together."""

import torch
from beartype import beartype
from torch import nn

from perfusion_pytorch.layers.checks import warn_if_parallel
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule

OPTIONS = ("text_seq_len", "input_decay", "train_beta", "train_temperature", "frac_gradient_concept_embed")


@beartype
def merge_rank1_edit_modules(*modules: Rank1EditModule) -> Rank1EditModule:
    """Return one layer with the concepts of several, in their order, for the same projection (Perfusion, appendix B).

    The new layer shares the first one's weight, covariance and options, and each concept keeps its own gate and form. The layers themselves are not
    changed.

    Args:
        *modules: trained layers over equal projections: copies of one layer, or the same layer of copies of one model.

    Returns:
        A layer of as many concepts as the modules have together; put it where the first one is.

    Raises:
        ValueError: the layers do not belong together (widths, keys and values, weights, covariances), or a concept is not trained.

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
    slots = max(module.num_finetune_prompts for module in modules)
    original = first.original.module
    flags = [p.requires_grad for p in original.parameters()]
    plain = nn.Linear(
        first.in_features, first.out_features, bias=first.bias is not None, device="meta"
    )  # draws no random numbers
    plain.weight, plain.bias = first.weight, first.bias
    merged = Rank1EditModule(
        plain,
        C=first.covariance,
        is_key_proj=first.is_key_proj,
        num_finetune_prompts=slots,
        num_concepts=sum(module.num_concepts for module in modules),
        gates_removal=tuple(gated for module in modules for gated in module.gates_removal),
        **{name: getattr(first, name) for name in OPTIONS},
    )
    merged.original = first.original
    for parameter, flag in zip(original.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    for name in ("concept_input", "superclass_input", "initialized"):
        rows = []
        for module in modules:
            values = getattr(module, name)
            missing = slots - module.num_finetune_prompts
            rows.append(
                torch.cat([values, values.new_zeros(values.shape[0], missing, *values.shape[2:])], dim=1)
            )
        setattr(merged, name, torch.cat(rows))
    for name in ("concept_dual", "eval_beta", "eval_temperature"):
        setattr(merged, name, torch.cat([getattr(module, name) for module in modules]))
    if not first.is_key_proj:
        merged.concept_output.data = torch.cat([module.concept_output.detach() for module in modules])
    merged.train(first.training)
    warn_if_parallel(merged)
    return merged


def _check_mergeable(first, module, position):
    def refuse(required, got):
        raise ValueError(f"Layers to be merged must {required}, but number {position} {got}.")

    if module.is_key_proj != first.is_key_proj:
        refuse("be all of keys or all of values", "is of the other kind")
    if module.weight.shape != first.weight.shape:
        refuse(f"have weights of shape {tuple(first.weight.shape)}", f"has {tuple(module.weight.shape)}")
    same_bias = module.bias is first.bias or (
        module.bias is not None and first.bias is not None and torch.equal(module.bias, first.bias)
    )
    if not torch.equal(module.weight, first.weight) or not same_bias:
        refuse("wrap equal projections", "has another weight or bias. Train all concepts on one base model")
    untrained = (~module.initialized.any(dim=1)).nonzero().flatten().tolist()
    if untrained:
        refuse("be trained", f"has never seen its concepts {untrained}")
    if (
        module.covariance is not None
        and first.covariance is not None
        and module.covariance is not first.covariance
    ):
        # The scale of C does not matter, so compare C / tr(C).
        ours, theirs = (c.matrix / c.matrix.trace() for c in (first.covariance, module.covariance))
        if first.covariance.ridge != module.covariance.ridge or not torch.allclose(
            ours, theirs, rtol=1e-4, atol=1e-6 * ours.abs().max()
        ):
            refuse("be trained with one input covariance", "has another")
