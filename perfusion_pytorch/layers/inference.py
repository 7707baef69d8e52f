"""An inference call of a layer: which concepts it applies, and how their edit splits the encodings.

What depends on the layer's state alone is prepared when that state changes, and not in each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perfusion_pytorch.layers.functional import joint_duals, mean_of_seen_slots, split_concepts
from perfusion_pytorch.layers.precision import without_autocast

if TYPE_CHECKING:
    from perfusion_pytorch.layers.rank1_edit import Rank1EditModule

ConceptId = int | tuple[int, ...] | None  # one concept, several, or all of a layer
STATE = (
    "concept_input",
    "superclass_input",
    "initialized",
    "concept_dual",
    "removal_is_gated",
)


@dataclass(frozen=True, eq=False)
class PreparedEdit:
    """What an inference call needs of some concepts beside their gates; see `split_concepts`.

    Axes: c concepts, d input features.

    Attributes:
        concept_input, concept_dual: shape (c, d).
        joint: what `joint_duals` returns, shape (c, d); None of one concept.
        superclass_input: s of a key layer, shape (c, d); None of a value layer.
        seen: which concepts were seen, shape (c,); None if all were.
        gates_removal: bool, shape (c,), or one bool for all.
    """

    concept_input: Tensor
    concept_dual: Tensor
    joint: Tensor | None
    superclass_input: Tensor | None
    seen: Tensor | None
    gates_removal: Tensor | bool

    def split(self, text_enc: Tensor, beta: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `split_concepts` does of encodings (n, d), with gates of shape (c,)."""
        return split_concepts(
            text_enc,
            self.concept_input,
            self.concept_dual,
            beta,
            temperature,
            self.seen,
            self.gates_removal,
            self.joint,
        )


class PreparedEdits:
    """The latest edit that a layer prepared, and the state that it was prepared from.

    Deep copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.state: tuple[Tensor, ...] = ()
        self.edit: PreparedEdit | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def of(self, layer: Rank1EditModule, concept_id: ConceptId, dtype: torch.dtype) -> PreparedEdit:
        """Return the edit of some concepts of a layer, prepared anew if its state has changed.

        Args:
            layer: the layer.
            concept_id: the concepts; None means all.
            dtype: of the call's numbers.
        """
        state = tuple(getattr(layer, name) for name in STATE)
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in state):
            return prepared_edit(layer, concept_id, dtype)
        key = (concept_id, dtype, *(tensor._version for tensor in state))
        same = key == self.key and all(map(_is, state, self.state))
        if self.edit is None or not same:
            self.edit = prepared_edit(layer, concept_id, dtype)
            self.key, self.state = key, state
        return self.edit


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other


@torch.no_grad()
def prepared_edit(layer: Rank1EditModule, concept_id: ConceptId, dtype: torch.dtype) -> PreparedEdit:
    """Return what an inference call needs of a layer's state.

    A concept's i* and s are its means over the prompt slots that it was seen in; a concept that was never
    seen is left out: it removes nothing, and its gate is 0.

    Raises:
        ValueError: there is no such concept, or some of them are parallel.
    """
    layer.check_concept_id(concept_id)
    ids = [concept_id] if isinstance(concept_id, int) else concept_id

    def of_chosen(values: Tensor) -> Tensor:
        return values if ids is None else values[list(ids)]

    forms = set(layer.gates_removal if ids is None else (layer.gates_removal[i] for i in ids))
    slots = of_chosen(layer.initialized)
    seen = slots.any(dim=1)
    concept_input = mean_of_seen_slots(of_chosen(layer.concept_input), slots).to(dtype)
    dual, joint = of_chosen(layer.concept_dual).to(dtype), None
    if len(dual) > 1:
        try:
            joint = joint_duals(concept_input, dual, seen, check=True)
        except torch.linalg.LinAlgError as error:
            named = "of this layer" if concept_id is None else concept_id
            raise ValueError(
                f"Concepts that are applied together must differ, but some of concepts {named} are parallel. "
                "Apply them one at a time with `concept_id`."
            ) from error
    superclass_input = None
    if layer.is_key_proj:
        superclass_input = mean_of_seen_slots(of_chosen(layer.superclass_input), slots).to(dtype)
    all_seen = not torch.compiler.is_compiling() and not seen.is_meta and bool(seen.all())
    return PreparedEdit(
        concept_input,
        dual,
        joint,
        superclass_input,
        None if all_seen else seen,
        forms == {True} if len(forms) < 2 else of_chosen(layer.removal_is_gated),
    )


def inference_split(
    layer: Rank1EditModule, text_enc: Tensor, concept_id: ConceptId
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an inference call adds up, in float32 at least. It changes nothing.

    Args:
        layer: its state is read.
        text_enc: e of all tokens, shape (n, d).
        concept_id: the concepts to apply; None means all.

    Returns:
        The rest of the encodings, shape (n, d); the gates, shape (n, c); and each concept's output:
        for a value layer o*, shape (c, o), and for a key layer s, shape (c, d).

    Raises:
        ValueError: there is no such concept, or some of them are parallel.
    """
    dtype = torch.float64 if text_enc.dtype == torch.float64 else torch.float32
    ids = [concept_id] if isinstance(concept_id, int) else concept_id

    def of_chosen(values: Tensor) -> Tensor:
        return (values if ids is None else values[list(ids)]).to(dtype)

    with without_autocast(text_enc):
        edit = layer.prepared.of(layer, concept_id, dtype)
        beta, temperature = of_chosen(layer.eval_beta), of_chosen(layer.eval_temperature)
        rest, gate = edit.split(text_enc.to(dtype), beta, temperature)
    if edit.superclass_input is not None:
        return rest, gate, edit.superclass_input
    return rest, gate, of_chosen(layer.concept_output)
