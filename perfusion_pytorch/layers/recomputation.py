"""Activation checkpointing calls a layer again in backward: is this such a call, and of which call?

docs/design.md explains why, which invariants hold, and what breaks without each part.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perfusion_pytorch.layers.training_batch import TrainingBatch
from perfusion_pytorch.layers.training_call import TrainingCall

NUM_RECENT_CALLS = 8  # calls in training mode that a layer can recompute in backward


def is_recomputation() -> bool:
    """Return whether this is a backward pass, in which only activation checkpointing calls a layer."""
    return torch._C._current_graph_task_id() != -1


def has_saved_tensor_hooks() -> bool:
    """Return whether hooks on saved tensors are set, as in a part of a model that is recomputed by itself."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@dataclass(eq=False)
class RecentCall:
    """A call of a layer in training mode; an inference call has neither request nor constants."""

    text_enc: Tensor  # (b, n, d), detached
    request: TrainingBatch | None  # its batch without the encodings
    call: TrainingCall | None  # its constants
    is_recomputed: bool = False


class RecentCalls(deque[RecentCall]):
    """The last calls of a layer in training mode, in which a recomputed call finds itself by its inputs.

    Deep copies and pickles start empty.
    """

    def __init__(self) -> None:
        super().__init__(maxlen=NUM_RECENT_CALLS)
        self._marked: tuple[Tensor, int, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def mark(self, initialized: Tensor, concept_id: int) -> None:
        """Remember that a concept was just marked as seen, so that no later call has to read it."""
        self._marked = initialized, initialized._version, concept_id

    def have_marked(self, initialized: Tensor, concept_id: int) -> bool:
        """Report whether a concept is known to be seen, without a wait for the device.

        Args:
            initialized: the layer's buffer.
            concept_id: the concept.
        """
        if self._marked is None:
            return False
        marked, version, known_id = self._marked
        return marked is initialized and version == initialized._version and known_id == concept_id

    def recomputed(self, text_enc: Tensor, batch: TrainingBatch | None) -> TrainingCall | None:
        """Return the constants of the call that is recomputed, or None if that was an inference call.

        The same encodings may come back after the averages have moved, so the latest call that still waits
        for its backward is taken.

        Args:
            text_enc: encodings of the recomputed call.
            batch: what it was given beside them, if that came as arguments.

        Raises:
            RuntimeError: no such call is known, or several different calls had these encodings and wait for
                their backward pass.
        """
        same = [recent for recent in self if _is_call_of(recent, text_enc, batch)]
        waiting = [recent for recent in same if not recent.is_recomputed] or same[-1:]
        if not waiting:
            raise RuntimeError(
                "A call is recomputed in backward, but its inputs are no longer known: they must be the "
                f"same text encodings as in one of this layer's last {NUM_RECENT_CALLS} calls. "
                "Call backward before further forward passes, and do not leave `concept_inputs` by an "
                "exception."
            )
        latest = waiting[-1]
        others = [recent.call for recent in waiting[:-1] if recent.call is not None]
        if latest.call is not None and not all(latest.call.is_same_as(other) for other in others):
            raise RuntimeError(
                "A call is recomputed in backward, but several calls with the same text encodings wait for "
                "theirs, and the averages or the concept differ between them. Call backward after each "
                "forward pass, or switch checkpointing off."
            )
        latest.is_recomputed = True
        return latest.call


def _is_call_of(recent: RecentCall, text_enc: Tensor, batch: TrainingBatch | None) -> bool:
    """Return whether a call had these text encodings, and this batch if one is given."""
    known = recent.text_enc
    if (known.shape, known.dtype) != (text_enc.shape, text_enc.dtype) or not torch.equal(known, text_enc):
        return False
    return batch is None or (recent.request is not None and batch.trains_same_tokens_as(recent.request))
