"""An inference call of a layer: which concepts it applies, and how their edit splits the encodings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perfusion_pytorch.layers.functional import mean_of_seen_slots, split_concepts
from perfusion_pytorch.layers.precision import without_autocast

if TYPE_CHECKING:
    from perfusion_pytorch.layers.rank1_edit import Rank1EditModule

ConceptId = int | tuple[int, ...] | None  # one concept, several, or all of a layer


def inference_split(
    layer: Rank1EditModule, text_enc: Tensor, concept_id: ConceptId
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an inference call adds up, in float32 at least. It changes nothing.

    A concept's i* and s are its means over the prompt slots that it was seen in; a concept that was never
    seen is left out.

    Args:
        layer: its state is read.
        text_enc: e, shape (b, n, d).
        concept_id: the concepts to apply; None means all.

    Returns:
        The rest of the encodings, shape (b, n, d); the gates, shape (b, n, c); and each concept's output:
        for a value layer o*, shape (c, o), and for a key layer s, shape (c, d).

    Raises:
        ValueError: there is no such concept, or some of them are parallel.
    """
    layer.check_concept_id(concept_id)
    ids = [concept_id] if isinstance(concept_id, int) else concept_id

    def of_chosen(values: Tensor) -> Tensor:
        return values if ids is None else values[list(ids)]

    dtype = torch.promote_types(text_enc.dtype, torch.float32)
    seen = of_chosen(layer.initialized)
    concept_input = mean_of_seen_slots(of_chosen(layer.concept_input), seen).to(dtype)
    dual = of_chosen(layer.concept_dual).to(dtype)
    beta = of_chosen(layer.eval_beta).to(dtype)
    temperature = of_chosen(layer.eval_temperature).to(dtype)
    if layer.is_key_proj:
        output = mean_of_seen_slots(of_chosen(layer.superclass_input), seen).to(dtype)
    else:
        output = of_chosen(layer.concept_output).to(dtype)
    try:
        with without_autocast(text_enc):
            rest, gate = split_concepts(
                text_enc.to(dtype), concept_input, dual, beta, temperature, seen.any(dim=1)
            )
    except torch.linalg.LinAlgError as error:
        named = "of this layer" if concept_id is None else concept_id
        raise ValueError(
            f"Concepts that are applied together must differ, but some of concepts {named} are parallel. "
            "Apply them one at a time with `concept_id`."
        ) from error
    return rest, gate, output
