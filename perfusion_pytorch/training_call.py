"""What a training call of a wrapped layer needs beside the text encodings, and what is kept of it for recomputation."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ConceptInputs:
    """What a training call needs beside the text encodings. Axes: b batch, n tokens, d input features.

    Attributes:
        text_enc_with_superclass: shape (b, n, d), the same prompts with the superclass word; may be missing once every slot was seen.
        concept_indices: integers, shape (b,): the concept's token in each row, −1 where a row is without the concept.
        superclass_indices: integers, shape (b,): the superclass's last token in each row; by default where the concept's stands.
        prompt_ids: integers, shape (b,): the slot of each row's prompt; by default all rows share slot 0.
        concept_id: the concept that is trained.
    """

    text_enc_with_superclass: Tensor | None
    concept_indices: Tensor
    superclass_indices: Tensor | None = None
    prompt_ids: Tensor | None = None
    concept_id: int = 0

    def validate(self, layer, num_tokens: int | None = None):
        """Raise a ValueError that names what does not fit the layer; `num_tokens` defaults to that of the superclass encodings."""
        superclass = self.text_enc_with_superclass
        if superclass is not None:
            if superclass.ndim != 3 or superclass.shape[-1] != layer.in_features:
                raise ValueError(
                    f"`text_enc_with_superclass` must have shape (b, n, {layer.in_features}) to match the wrapped projection, "
                    f"got {tuple(superclass.shape)}. Encode the superclass prompts with the same text encoder."
                )
            num_tokens = superclass.shape[1] if num_tokens is None else num_tokens
        rows = self.concept_indices.shape
        if len(rows) != 1 or (superclass is not None and rows[0] != superclass.shape[0]):
            batch = "b" if superclass is None else superclass.shape[0]
            raise ValueError(
                f"`concept_indices` must have shape ({batch},), one position a row, got {tuple(rows)}. Use -1 for rows without it."
            )
        for name, values, low, high in (
            ("concept_indices", self.concept_indices, -1, num_tokens),
            ("superclass_indices", self.superclass_indices, -1, num_tokens),
            ("prompt_ids", self.prompt_ids, 0, layer.num_finetune_prompts),
        ):
            if values is None:
                continue
            if values.shape != rows:
                raise ValueError(f"`{name}` must have shape {tuple(rows)}, as `concept_indices` has, got {tuple(values.shape)}.")
            if values.is_floating_point() or values.dtype == torch.bool:
                raise ValueError(f"`{name}` must hold integers, got {values.dtype}.")
            if values.numel() and (values.min().item() < low or (high is not None and values.max().item() >= high)):
                raise ValueError(
                    f"`{name}` must be from {low} to {'' if high is None else high - 1}, got values from {values.min()} to {values.max()}. "
                    + ("Raise `num_finetune_prompts` for more slots." if name == "prompt_ids" else "It counts tokens; -1 means none.")
                )
        if self.superclass_indices is not None and ((self.superclass_indices < 0) & (self.concept_indices >= 0)).any():
            raise ValueError("`superclass_indices` must be at least 0 wherever `concept_indices` is, but a row with the concept has -1.")
        if not isinstance(self.concept_id, int):
            raise ValueError(f"`concept_id` must be one concept in a training call, got {self.concept_id}.")
        layer._check_concept_id(self.concept_id)


@dataclass(frozen=True, eq=False)
class TrainingCall:
    """The constants of one training call, from which its output can be computed any number of times. Axes: s slots of this call."""

    text_enc: Tensor  # (b, n, d), to recognise the call when it is recomputed
    averaging: Tensor  # (s, b), takes the concept's encodings in the rows to their mean in each slot
    positions: Tensor  # (b,), 0 in rows without the concept
    slots: Tensor  # (b,), each row's slot among those of this call
    active: Tensor  # (b,), bool: rows with the concept
    concept_input: Tensor  # (s, d), the moving average with this call in it
    superclass_input: Tensor  # (s, d)
    concept_id: int


class RecentCalls(deque):
    """The last training calls of a layer; copies and pickles start without them."""

    def __reduce__(self):
        return type(self), ((), self.maxlen)
