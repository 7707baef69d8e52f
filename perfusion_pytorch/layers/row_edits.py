"""The edits of loaded concepts on the rows of a batch whose prompts hold them.

All layers of a denoiser read the same text encodings, and a loaded concept has the same i*, dual and s in all
of them. So what eq. 3 does to the encodings is computed once for all layers:

    rest(e) = e − Σⱼ gateⱼ iⱼ r̃ⱼ(e)        a value layer returns  W rest(e) + Σⱼ gateⱼ oⱼ*
    keys(e) = rest(e) + Σⱼ gateⱼ sⱼ          a key layer returns    W keys(e), because oⱼ* = W sⱼ

where j runs over the concepts of the row's own prompt. Without one, both are e to the bit.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perfusion_pytorch.layers.functional import add_product, joint_duals, split_concepts
from perfusion_pytorch.layers.precision import without_autocast
from perfusion_pytorch.layers.prompt_rows import NO_CONCEPT, Held, HeldConcepts, PromptRows
from perfusion_pytorch.layers.row_table import RowTable

OUTPUT = "output."  # + a value layer's name: a column of the table of concepts
# A row whose prompt is not known holds a concept where a token is at least so similar to it.
HOLDS_CONCEPT = 0.5


@dataclass(frozen=True, eq=False)
class RowSplit:
    """Text encodings as the layers need them. Axes: b batch, n tokens, m concepts in one row, d features.

    Attributes:
        keys: what key layers project, shape (b, n, d), with the dtype of the encodings.
        rest: what value layers project, likewise.
        gate: shape (b, n, m).
        slots: rows of the table of concepts, shape (b, m); any where a row holds fewer, since the gate is 0.
        prepared: gates and outputs as the value layers need them, by layer and dtype; filled as they ask.
    """

    keys: Tensor
    rest: Tensor
    gate: Tensor
    slots: Tensor
    prepared: dict[Any, Tensor] = field(default_factory=dict)


class RowEdits:
    """The concepts that are loaded on a denoiser, as its layers read them.

    Attributes:
        table: one row for each concept, with i*, dual, s, gate, form, whether it is active, and o* of each
            value layer.
        prompts: which concepts the prompts hold.
        active: rows of the active concepts, in the order that they were made active.
        projected: what the rows of the present call hold by their prompts, where the denoiser projects text
            encodings before its layers read them.
    """

    def __init__(self) -> None:
        self.table = RowTable()
        self.prompts = PromptRows()
        self.active: list[int] = []
        self.projected: HeldConcepts | None = None
        # By the id of the encodings: they themselves, how often they had been changed, and their split.
        self._splits: dict[int, tuple[weakref.ref[Tensor], int | None, RowSplit]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle has: nothing of a call."""
        return vars(self) | {"projected": None, "_splits": {}}

    def changed(self) -> None:
        """Forget what was computed, since concepts, gates or prompts have changed."""
        self._splits.clear()

    def remember(self, new: Tensor, held: Sequence[Sequence[Held]]) -> None:
        """Remember prompts that were encoded together; see `PromptRows.remember`."""
        self.prompts.remember(new, held)
        self.table.on(new.device)  # now, so that no later call waits for the copy
        self.changed()

    def active_duals(self, device: torch.device) -> Tensor:
        """Return the duals of the active concepts, shape (c, d), in their order."""
        return self.table.on(device)["concept_dual"][self.active]

    def begin_call(self) -> None:
        """Forget, before a call of the denoiser, what may be out of date without a trace."""
        self.projected = None
        for key in [key for key, (_, version, _) in self._splits.items() if version is None]:
            del self._splits[key]

    def project(self, text_enc: Tensor) -> None:
        """Find what rows hold, by their encodings before the denoiser's own projection."""
        self.projected = self.prompts.find(text_enc)

    def split(self, text_enc: Tensor) -> RowSplit:
        """Return encodings as the layers need them, computed once for all layers and steps that share them.

        Args:
            text_enc: e, shape (b, n, d).
        """
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and text_enc.requires_grad):
            return self._split(text_enc)
        # Tensors of inference mode count no changes; `begin_call` lets these hold for one call only.
        version = None if text_enc.is_inference() else text_enc._version
        key = id(text_enc)
        if key in self._splits:
            source, before, split = self._splits[key]
            if source() is text_enc and before == version:
                return split
        split, splits = self._split(text_enc), self._splits
        splits[key] = (weakref.ref(text_enc, lambda _: splits.pop(key, None)), version, split)
        return split

    def _split(self, text_enc: Tensor) -> RowSplit:
        columns = self.table.on(text_enc.device)
        held = self._held(text_enc)
        slots = held.slots.clamp_min(0)
        present = (held.slots != NO_CONCEPT) & columns["active"][slots]
        dtype = torch.promote_types(text_enc.dtype, torch.float32)
        concept_input, dual, superclass_input = (
            columns[name][slots].to(dtype) for name in ("concept_input", "concept_dual", "superclass_input")
        )
        beta, temperature = (
            torch.where(given.isnan(), columns[name][slots], given).to(dtype)
            for given, name in ((held.beta, "beta"), (held.temperature, "temperature"))
        )
        with without_autocast(text_enc):
            rest, gate = split_concepts(
                text_enc.to(dtype),
                concept_input,
                dual,
                beta,
                temperature.masked_fill(~present, 1.0).unsqueeze(1),
                present,
                columns["gates_removal"][slots].unsqueeze(1),
                joint_duals(concept_input, dual, present, check=False),
            )
            keys = add_product(rest, gate, superclass_input)
        return RowSplit(keys.to(text_enc.dtype), rest.to(text_enc.dtype), gate, slots)

    def _held(self, text_enc: Tensor) -> HeldConcepts:
        """Return what the rows hold: as remembered, and otherwise by similarity."""
        known = self.prompts.find(text_enc) if self.projected is None else self.projected
        similar = self._similar(text_enc, known.slots.shape[1])
        slots = torch.where(known.is_known.unsqueeze(1), known.slots, similar)
        return HeldConcepts(slots, known.beta, known.temperature, known.is_known)

    def _similar(self, text_enc: Tensor, most: int) -> Tensor:
        """Return, for each row, the concepts that some token is most similar to, and similar enough.

        Args:
            text_enc: shape (b, n, d).
            most: m, how many of them at most.

        Returns:
            Slots, shape (b, m); −1 where there are fewer.
        """
        columns = self.table.on(text_enc.device)
        similarity = text_enc.to(columns["concept_dual"].dtype) @ columns["concept_dual"].mT  # (b, n, c)
        similarity = similarity.masked_fill(~columns["active"], 0.0)
        highest, which = similarity.max(dim=-1)
        scores = similarity.new_zeros(len(text_enc), similarity.shape[-1])
        scores = scores.scatter_reduce(1, which, highest, "amax")  # (b, c)
        best, slots = scores.topk(min(most, scores.shape[1]), dim=1)
        slots = slots.masked_fill(best < HOLDS_CONCEPT, NO_CONCEPT)
        return torch.nn.functional.pad(slots, (0, most - slots.shape[1]), value=NO_CONCEPT)

    def add_outputs(self, projected: Tensor, split: RowSplit, name: str) -> Tensor:
        """Return a value layer's projection of the rest, with the gated outputs added.

        Args:
            projected: W rest(e), shape (b, n, o).
            split: of the encodings.
            name: the layer's.
        """
        column, dtype = OUTPUT + name, projected.dtype
        if torch.compiler.is_compiling():
            outputs = self.table.on(projected.device)[column][split.slots]
            return add_product(projected, split.gate.to(dtype), outputs.to(dtype))
        prepared = split.prepared
        if (name, dtype) not in prepared:
            prepared[name, dtype] = self.table.on(projected.device)[column][split.slots].to(dtype)
        if dtype not in prepared:
            prepared[dtype] = split.gate.to(dtype)
        return add_product(projected, prepared[dtype], prepared[name, dtype])


def row_of(
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    gate: Sequence[float],
    gates_removal: bool,
) -> dict[str, Tensor]:
    """Return a concept as a row of the table: inactive at first.

    Args:
        inputs: i*, dual and s, shape (d,).
        outputs: o* of each value layer, shape (o,), by the layer's name.
        gate: β and τ.
        gates_removal: whether the concept has the gated form.
    """
    beta, temperature = gate
    return {
        **inputs,
        **{OUTPUT + name: output for name, output in outputs.items()},
        "beta": torch.tensor(float(beta)),
        "temperature": torch.tensor(float(temperature)),
        "gates_removal": torch.tensor(gates_removal),
        "active": torch.tensor(False),
    }
