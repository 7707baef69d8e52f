"""What the gate sees: the similarity of each token of a prompt to the concepts."""

from collections.abc import Callable

import torch
from beartype import beartype
from torch import Tensor, nn

from perfusion_pytorch.layers.functional import concept_similarity
from perfusion_pytorch.layers.loaded import LoadedProjection
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.protocols import Tokenizer


@beartype
def token_similarities(
    model: nn.Module,
    tokenizer: Tokenizer,
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    prompts: list[str],
) -> list[list[tuple[str, tuple[float, ...]]]]:
    """Return r(e) for every token of some prompts: the first thing to look at when a concept misbehaves.

    A concept's own token should be near 1, every other word near 0. The gate is half open at r = β.

    Args:
        model: a model with wrapped layers that have seen a concept. They share its input, so the first one
            is read.
        tokenizer: the tokenizer, for the tokens' texts.
        encode: `texts -> (encodings (b, n, d), mask (b, n))`, as for `calculate_input_covariance`. Tokens
            outside the mask are left out.
        prompts: the prompts to look at.

    Returns:
        For each prompt a list of (token, r of each trained concept).

    Raises:
        ValueError: no layer of the model has seen a concept.
    """
    duals = next(filter(len, map(_duals_of, model.modules())), None)
    if duals is None:
        raise ValueError(
            f"No wrapped layer of {type(model).__name__} has seen a concept. "
            "Train a concept, or load a trained one."
        )
    with torch.no_grad():
        encodings, mask = encode(prompts)
        similarity = concept_similarity(encodings.to(duals.device, duals.dtype), duals)
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=encodings.shape[1]).input_ids
    return [
        [
            (token.removesuffix("</w>"), tuple(r.tolist()))
            for token, r, counts in zip(tokenizer.convert_ids_to_tokens(row), rows, where, strict=True)
            if counts
        ]
        for row, rows, where in zip(ids, similarity, mask, strict=True)
    ]


def _duals_of(module: nn.Module) -> Tensor:
    """Return the duals of a layer's concepts that can be applied, shape (c, d); of other modules, none."""
    if isinstance(module, LoadedProjection):
        return module.edits.active_duals(module.weight.device)
    if isinstance(module, Rank1EditModule):
        return module.concept_dual[module.initialized.any(dim=1)]
    return torch.empty(0, 0)
