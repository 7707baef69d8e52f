"""Give the wrapped layers of a model what their training calls need beside the text encodings."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.layers.batch_cache import BatchCache
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.layers.training_batch import TrainingBatch
from perfusion_pytorch.wiring import layers_to_train


@contextmanager
@beartype
def concept_inputs(
    model: nn.Module,
    *,
    text_enc_with_superclass: Tensor | None,
    concept_indices: Tensor,
    superclass_indices: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    concept_id: int = 0,
    concept_gradient: Tensor | None = None,
) -> Iterator[None]:
    """Give every wrapped layer of a model what its training call needs beside the text encodings.

    It serves models whose attention calls `to_k(x)` with one argument. Run the forward pass inside the
    block; backward may run inside or after it, also with activation checkpointing. What the block gives is
    kept on the layers themselves, because a backward pass recomputes in threads of its own. It is taken
    away when the block is left, also by an exception.

    If `torch.distributed` runs several ranks, enter the block on every rank: the averages move by the means
    over all ranks' rows, with one small collective for each step, so every rank has the averages that one
    process with the joint batch would have. The gradient that reaches the embedding through i* is that of
    the rank's own rows. For the joint one, take it in `concept_gradient`, average it over ranks and pass it
    on.

    Args:
        model: a model with wrapped layers, in training mode.
        text_enc_with_superclass: see `TrainingBatch`, as for the others.
        concept_indices: shape (b,).
        superclass_indices: shape (b,).
        prompt_ids: shape (b,).
        concept_id: the concept that is trained.
        concept_gradient: shape (p, d).

    Raises:
        ValueError: a shape, position or id does not fit, or the model has no wrapped layer.
        RuntimeError: the model is in such a block already.

    Example:
        >>> from perfusion_pytorch import wrap_cross_attentions_
        >>> model = nn.ModuleDict({"to_v": nn.Linear(8, 16)})
        >>> _ = wrap_cross_attentions_(model, C=torch.eye(8), value_names=["to_v"])
        >>> superclass, where = torch.randn(2, 5, 8), torch.tensor([1, -1])
        >>> with concept_inputs(model, text_enc_with_superclass=superclass, concept_indices=where):
        ...     values = model["to_v"](torch.randn(2, 5, 8))
    """
    batch = TrainingBatch(
        text_enc_with_superclass,
        concept_indices,
        superclass_indices,
        prompt_ids,
        concept_id,
        concept_gradient,
        joint=True,
    )
    with batch_given(layers_to_train(model), batch):
        yield


@contextmanager
def batch_given(layers: Collection[Rank1EditModule], batch: TrainingBatch) -> Iterator[None]:
    """Do what `concept_inputs` does, for layers that are known.

    Args:
        layers: all of them get the batch.
        batch: what their training calls need.

    Raises:
        ValueError: the batch does not fit a layer.
        RuntimeError: a layer has a batch already.
    """
    if any(layer.batch_cache is not None for layer in layers):
        raise RuntimeError("`concept_inputs` cannot be nested on one model. Leave the outer block first.")
    kinds = {(layer.in_features, layer.num_finetune_prompts, layer.num_concepts): layer for layer in layers}
    for layer in kinds.values():
        batch.check_fits(layer)
    cache = BatchCache(batch)
    for layer in layers:
        layer.batch_cache = cache
    try:
        yield
    except BaseException:
        for layer in layers:
            layer.recent_calls.clear()
        raise
    finally:
        for layer in layers:
            layer.batch_cache = None
