"""The moving averages i* and s of a layer, and how one training call moves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from perfusion_pytorch.layers.checks import warn_if_parallel
from perfusion_pytorch.layers.metric import concept_dual, dual_and_norm
from perfusion_pytorch.layers.slot_means import SlotMeans
from perfusion_pytorch.layers.training_call import TrainingCall

if TYPE_CHECKING:
    from perfusion_pytorch.layers.rank1_edit import Rank1EditModule


@torch.no_grad()
def advance_(layer: Rank1EditModule, means: SlotMeans, concept_id: int) -> TrainingCall:
    """Move a layer's averages by one training call, in place, and return the call's constants.

        i* ← δ i* + (1 − δ) mean   for each slot of the call; in its first call, i* is set to the mean

    The same holds for s. The first call of a value layer also sets o* to W s.

    Args:
        layer: its buffers are replaced; the parameter `concept_output` is written.
        means: per-slot means of the call.
        concept_id: the concept that is trained.

    Raises:
        RuntimeError: the layer has no covariance.
        ValueError: a slot is seen for the first time, and the call has no superclass encodings.
    """
    if layer.covariance is None:
        raise RuntimeError(
            "Training needs the input covariance, but this layer was made with C=None. "
            "Pass `C` when you wrap the projection."
        )
    if not means.count:
        nothing = means.concept
        return TrainingCall(means, layer.covariance, concept_id, nothing, nothing, nothing[:, :1], nothing)
    seen = layer.initialized[concept_id, means.slots]
    if means.superclass is None and not seen.all():
        raise ValueError(
            "`text_enc_with_superclass` must be given in the first training call of a slot, got None. "
            "Encode the same prompts with the superclass word in the concept's place."
        )
    is_first_call = not layer.recent_calls.have_marked(layer.initialized, concept_id) and not bool(
        layer.initialized[concept_id].any()
    )
    decay = layer.input_decay * seen.unsqueeze(-1).to(means.concept.dtype)  # 0 in a slot's first call
    inverse = layer.covariance.inverse(means.concept.device, means.concept.dtype)
    layer.concept_input, new_input = _moved(
        layer.concept_input, concept_id, means.slots, decay, means.concept
    )
    dual, norm = dual_and_norm(new_input, inverse)
    if means.superclass is None:
        new_superclass = layer.superclass_input[concept_id, means.slots].to(new_input.dtype)
    else:
        layer.superclass_input, new_superclass = _moved(
            layer.superclass_input, concept_id, means.slots, decay, means.superclass
        )
    if is_first_call and not layer.is_key_proj and means.superclass_of_rows is not None:
        start = F.linear(means.superclass_of_rows.to(layer.weight.dtype), layer.weight)
        # Through `.data`: graphs that hold this parameter for other concepts stay valid.
        layer.concept_output.data[concept_id] = start.to(means.superclass_of_rows.dtype)
    _mark_seen(layer, concept_id, means.slots, dual, inverse)
    if layer.num_concepts > 1:
        warn_if_parallel(layer)
    return TrainingCall(means, layer.covariance, concept_id, new_input, dual, norm, new_superclass)


def _moved(
    average: Tensor, concept_id: int, slots: Tensor | slice, decay: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a buffer (c, p, d) with its average moved at a call's slots, and the new values (s, d) there.

    The buffer is a new tensor: a graph that still holds the old one stays valid.
    """
    buffer = average.clone()
    new = torch.lerp(mean, buffer[concept_id, slots].to(mean.dtype), decay)
    buffer[concept_id, slots] = new.to(buffer.dtype)
    return buffer, new


def _mark_seen(
    layer: Rank1EditModule, concept_id: int, slots: Tensor | slice, dual: Tensor, inverse: Tensor
) -> None:
    """Mark the slots as seen, and store the dual of the concept's mean input over its seen slots."""
    layer.initialized = layer.initialized.clone()
    layer.initialized[concept_id, slots] = True
    layer.recent_calls.mark(layer.initialized, concept_id)
    layer.concept_dual = layer.concept_dual.clone()
    if layer.num_finetune_prompts == 1:
        layer.concept_dual[concept_id] = dual[0]
    else:
        seen_inputs = layer.concept_input[concept_id][layer.initialized[concept_id]]
        layer.concept_dual[concept_id] = concept_dual(seen_inputs.mean(dim=0).to(inverse.dtype), inverse)
