"""What a training call needs beside the text encodings, and whether it fits a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from perfusion_pytorch.layers.rank1_edit import Rank1EditModule

TOKEN_REMEDY = "It counts tokens; -1 means none."
SLOT_REMEDY = "Raise `num_finetune_prompts` for more slots."


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """What a training call needs beside the text encodings.

    Axes: b batch, n tokens, p prompt slots, d input features.

    Attributes:
        text_enc_with_superclass: shape (b, n, d), the same prompts with the superclass word in the
            concept's place. It may be None once every slot has been seen.
        concept_indices: integers, shape (b,): the position of the concept's token in each row; −1 in rows
            without it.
        superclass_indices: integers, shape (b,): the position of the superclass's last token in each row.
            The default is `concept_indices`.
        prompt_ids: integers, shape (b,): the slot of each row's prompt. By default all rows share slot 0.
        concept_id: the concept that is trained.
        concept_gradient: zeros that require a gradient, shape (p, d). If given, it receives the gradient
            that reaches i*, summed over layers, and the text encodings receive none of it.
        joint: whether the means are taken over the rows of all ranks of `torch.distributed`. This costs one
            collective for each step.
        is_split_once: whether a layer may reuse the split of the layer before it if both are the same, so
            that its backward runs once for all of them. This holds for one forward pass and its backward; a
            second forward pass needs a new batch.
    """

    text_enc_with_superclass: Tensor | None
    concept_indices: Tensor
    superclass_indices: Tensor | None = None
    prompt_ids: Tensor | None = None
    concept_id: int = 0
    concept_gradient: Tensor | None = None
    joint: bool = False
    is_split_once: bool = False

    def without_encodings(self) -> TrainingBatch:
        """Return this batch without its encodings, which would keep a text encoder's graph alive."""
        return replace(self, text_enc_with_superclass=None)

    def trains_same_tokens_as(self, other: TrainingBatch) -> bool:
        """Return whether another batch trains the same concept, at the same positions and slots."""
        return (
            self.concept_id == other.concept_id
            and _are_equal(self.concept_indices, other.concept_indices)
            and _are_equal(self.superclass_indices, other.superclass_indices)
            and _are_equal(self.prompt_ids, other.prompt_ids)
        )

    def check_fits(self, layer: Rank1EditModule, num_tokens: int | None = None) -> None:
        """Check this batch against a layer.

        Args:
            layer: the layer that will be called.
            num_tokens: n of the text encodings; by default that of the superclass encodings.

        Raises:
            ValueError: something does not fit; the message names it.
        """
        for name in ("concept_indices", "superclass_indices", "prompt_ids"):
            values = getattr(self, name)
            if not isinstance(values, Tensor) and (values is not None or name == "concept_indices"):
                raise ValueError(
                    f"`{name}` must be a tensor of integers, one a row, got {type(values).__name__}."
                )
        superclass = self.text_enc_with_superclass
        if superclass is not None:
            _check_superclass_encodings(superclass, layer.in_features)
            num_tokens = superclass.shape[1] if num_tokens is None else num_tokens
        self._check_indices(num_tokens, layer.num_finetune_prompts)
        wanted = (layer.num_finetune_prompts, layer.in_features)
        if self.concept_gradient is not None and self.concept_gradient.shape != wanted:
            raise ValueError(
                f"`concept_gradient` must have shape {wanted}, got {tuple(self.concept_gradient.shape)}."
            )
        layer.check_concept_id(self.concept_id)

    def _check_indices(self, num_tokens: int | None, num_slots: int) -> None:
        rows = self.concept_indices.shape
        superclass = self.text_enc_with_superclass
        if len(rows) != 1 or (superclass is not None and rows[0] != superclass.shape[0]):
            batch = "b" if superclass is None else superclass.shape[0]
            raise ValueError(
                f"`concept_indices` must have shape ({batch},), one position a row, got {tuple(rows)}. "
                "Use -1 for rows without it."
            )
        _check_integers("concept_indices", self.concept_indices, rows, -1, num_tokens, TOKEN_REMEDY)
        if self.superclass_indices is not None:
            _check_integers("superclass_indices", self.superclass_indices, rows, -1, num_tokens, TOKEN_REMEDY)
        if self.prompt_ids is not None:
            _check_integers("prompt_ids", self.prompt_ids, rows, 0, num_slots, SLOT_REMEDY)
        if (
            self.superclass_indices is not None
            and ((self.superclass_indices < 0) & (self.concept_indices >= 0)).any()
        ):
            raise ValueError(
                "`superclass_indices` must be at least 0 wherever `concept_indices` is, "
                "but a row with the concept has -1."
            )


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one, other)


def _check_superclass_encodings(superclass: Tensor, in_features: int) -> None:
    if superclass.ndim != 3 or superclass.shape[-1] != in_features:
        raise ValueError(
            "`text_enc_with_superclass` must have shape (b, n, "
            f"{in_features}) to match the wrapped projection, "
            f"got {tuple(superclass.shape)}. Encode the superclass prompts with the same text encoder."
        )


def _check_integers(
    name: str, values: Tensor, shape: torch.Size, low: int, end: int | None, remedy: str
) -> None:
    """Check that values are integers of a shape, from `low` to before `end`."""
    if values.shape != shape:
        raise ValueError(
            f"`{name}` must have shape {tuple(shape)}, as `concept_indices` has, got {tuple(values.shape)}."
        )
    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {values.dtype}.")
    numbers = values.tolist()
    if numbers and (min(numbers) < low or (end is not None and max(numbers) >= end)):
        wanted = f"at least {low}" if end is None else f"from {low} to {end - 1}"
        raise ValueError(
            f"`{name}` must be {wanted}, got values from {min(numbers)} to {max(numbers)}. {remedy}"
        )
