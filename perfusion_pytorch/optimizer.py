"""What is trained: the value outputs and the concept embeddings, each at its own learning rate."""

import torch
from beartype import beartype
from torch import nn

from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule


def _trainables(models):
    """Return the value outputs and the concept embeddings of all models, each parameter once."""
    outputs, embeddings = {}, {}
    for model in models:
        for module in model.modules():
            if isinstance(module, Rank1EditModule) and not module.is_key_proj:
                outputs[id(module.concept_output)] = module.concept_output
            elif isinstance(module, EmbeddingWrapper):
                embeddings[id(module.concept_embedding)] = module.concept_embedding
    if not outputs and not embeddings:
        raise ValueError(
            "The models must hold a `Rank1EditModule` over a value projection or an `EmbeddingWrapper`, but have neither. "
            "Call `wrap_cross_attentions_` or `add_concept_token_` first."
        )
    for parameter in [*outputs.values(), *embeddings.values()]:
        parameter.requires_grad_(True)  # freezing a whole model, or adding a LoRA to it, freezes them too
    return list(outputs.values()), list(embeddings.values())


@beartype
def get_finetune_parameters(*models: nn.Module) -> list[nn.Parameter]:
    """Return all that Perfusion trains in these models: each value layer's `concept_output`, each embedding's `concept_embedding`.

    They are marked as requiring gradients, whatever froze them meanwhile.

    Raises:
        ValueError: there is nothing to train in them.

    Example:
        >>> from perfusion_pytorch import Rank1EditModule
        >>> values = Rank1EditModule(nn.Linear(4, 6), C=torch.eye(4))
        >>> [p.shape for p in get_finetune_parameters(values)]
        [torch.Size([1, 6])]
    """
    outputs, embeddings = _trainables(models)
    return outputs + embeddings


@beartype
def get_finetune_optimizer(
    *models: nn.Module,
    lr_output: float = 0.03,
    lr_embedding: float = 0.006,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """Return AdamW over what Perfusion trains, with the paper's learning rates.

    Under Adam a constant scale on a gradient cancels out, so these two rates, and not the layer's fractional gradient, decide how fast the
    embedding moves against the outputs.

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
    outputs, embeddings = _trainables(models)
    groups = [{"params": outputs, "lr": lr_output}, {"params": embeddings, "lr": lr_embedding}]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, weight_decay=weight_decay)
