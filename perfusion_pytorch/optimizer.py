"""The trained parameters: value outputs and concept embeddings, each with its own learning rate."""

from collections.abc import Sequence

import torch
from torch import nn

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule


def _trained_parameters(models: Sequence[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the value outputs and the concept embeddings of all models, each parameter once."""
    outputs: dict[int, nn.Parameter] = {}
    embeddings: dict[int, nn.Parameter] = {}
    for model in models:
        for module in model.modules():
            if isinstance(module, Rank1EditModule) and not module.is_key_proj:
                outputs[id(module.concept_output)] = module.concept_output
            elif isinstance(module, EmbeddingWrapper):
                embeddings[id(module.concept_embedding)] = module.concept_embedding
    if not outputs and not embeddings:
        raise ValueError(
            "The models must hold a `Rank1EditModule` over a value projection or an `EmbeddingWrapper`, "
            "but have "
            "neither. Call `wrap_cross_attentions_` or `add_concept_token_` first."
        )
    for parameter in [*outputs.values(), *embeddings.values()]:
        parameter.requires_grad_(True)  # freezing a whole model, or adding a LoRA, freezes them too
    return list(outputs.values()), list(embeddings.values())


@beartype
def get_finetune_parameters(*models: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that Perfusion trains in these models.

    They are each value layer's `concept_output` and each embedding's `concept_embedding`. All are set to
    require gradients, even if they have been frozen.

    Raises:
        ValueError: there is nothing to train in them.

    Example:
        >>> from perfusion_pytorch import Rank1EditModule
        >>> values = Rank1EditModule(nn.Linear(4, 6), C=torch.eye(4))
        >>> [p.shape for p in get_finetune_parameters(values)]
        [torch.Size([1, 6])]
    """
    outputs, embeddings = _trained_parameters(models)
    return outputs + embeddings


@beartype
def get_finetune_optimizer(
    *models: nn.Module,
    lr_output: float = 0.03,
    lr_embedding: float = 0.006,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """Return AdamW over the parameters that Perfusion trains, with the paper's learning rates.

    Under Adam a constant scale on a gradient cancels out. So it is these two rates, and not the layer's
    fractional gradient, that decide how fast the embedding moves compared with the outputs.

    Args:
        *models: the denoiser with its wrapped layers and the text encoder with its `EmbeddingWrapper`.
        lr_output: learning rate of the value outputs o*.
        lr_embedding: learning rate of the concept embeddings.
        betas: Adam's decay rates.
        weight_decay: AdamW's decoupled decay.

    Raises:
        ValueError: there is nothing to train in the models.

    Example:
        >>> from perfusion_pytorch import Rank1EditModule
        >>> optimizer = get_finetune_optimizer(Rank1EditModule(nn.Linear(4, 6), C=torch.eye(4)))
        >>> optimizer.param_groups[0]["lr"]
        0.03
    """
    outputs, embeddings = _trained_parameters(models)
    groups = [{"params": outputs, "lr": lr_output}, {"params": embeddings, "lr": lr_embedding}]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, weight_decay=weight_decay)
