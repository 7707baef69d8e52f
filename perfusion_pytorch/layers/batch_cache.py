"""What the layers that are given one training batch compute once for all of them."""

from typing import Any

import torch
from torch import Tensor

from perfusion_pytorch.layers.recomputation import has_saved_tensor_hooks
from perfusion_pytorch.layers.slot_means import SlotMeans, slot_means
from perfusion_pytorch.layers.training_batch import TrainingBatch
from perfusion_pytorch.layers.training_call import SplitOptions, TrainingCall, split_of_call

Split = tuple[Tensor, Tensor]  # the rest (b, n, d) and the gate (b, n, 1)


class BatchCache:
    """A training batch, and the results that layers share while they have it.

    `concept_inputs` makes one for its block, gives it to every layer and takes it away at the end. A call
    with the batch as arguments makes its own. The batch itself never changes.

    Args:
        batch: what the training calls need beside the text encodings.
    """

    def __init__(self, batch: TrainingBatch):
        self.batch = batch
        self.request = batch.without_encodings()  # what is kept of it for recomputation
        self._means: dict[int, tuple[Tensor, int, SlotMeans]] = {}  # the last ones, by their number of slots
        self._split: tuple[tuple, Tensor, Split] | None = (
            None  # the last one, after what it was computed from
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of a layer, or its pickle, is in no training step

    def means(self, text_enc: Tensor, num_slots: int) -> SlotMeans:
        """Return the means of the batch in its slots; computed once for all layers that get the same tensor.

        Args:
            text_enc: text encodings, shape (b, n, d).
            num_slots: p of the layer.

        Raises:
            ValueError: the text encodings do not fit the batch.
        """
        if num_slots in self._means:
            of, version, means = self._means[num_slots]
            if of is text_enc and version == text_enc._version:  # a tensor changed in place is another one
                return means
        means = slot_means(self.batch, text_enc, num_slots)
        self._means[num_slots] = text_enc, text_enc._version, means
        return means

    def split(self, text_enc: Tensor, call: TrainingCall, options: SplitOptions) -> Split:
        """Return the split of a call, or that of the layer before if it is the same and may be shared."""
        # Under such hooks a part of the model may be recomputed by itself, and then needs a split of its own.
        if not self.batch.is_split_once or has_saved_tensor_hooks():
            return split_of_call(text_enc, call, options)
        wanted = call.means, call.covariance, options, torch.is_grad_enabled()
        if self._split is not None:
            made_for, concept_input, split = self._split
            if wanted == made_for and torch.equal(concept_input, call.concept_input):
                return split
        split = split_of_call(text_enc, call, options)
        self._split = wanted, call.concept_input, split
        return split
