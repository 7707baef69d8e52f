"""The concepts that are loaded on a denoiser: their tensors in a table, what else a file has beside it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perfusion_pytorch.concept import Concept, check_gate
from perfusion_pytorch.concept_file import INPUTS
from perfusion_pytorch.layers.checks import LARGE_OVERLAP
from perfusion_pytorch.layers.functional import overlap_condition
from perfusion_pytorch.layers.prompt_rows import AS_SET, Held
from perfusion_pytorch.layers.row_edits import OUTPUT, RowEdits, row_of
from perfusion_pytorch.user_warnings import warn_user

Gate = tuple[float, float]  # β and τ
GateByName = float | int | Mapping[str, float | int] | None  # for all concepts, or by name; None is as set
PromptGates = GateByName | Sequence[GateByName]  # for all prompts, or one for each
CPU = torch.device("cpu")
MAX_OVERLAP = 1e6  # above this condition number, concepts are the same up to rounding


class StoredConcepts(Mapping[str, Concept]):
    """Concepts by token, in the order that they came, kept as rows of the table that the layers read.

    A concept that is looked up shares its tensors with the table, so that they exist once.

    Attributes:
        edits: the table, and the prompts that hold the concepts.
        prompt_gates: β and τ that are given for the prompts of the present calls alone.
    """

    def __init__(self) -> None:
        self.edits = RowEdits()
        self.prompt_gates: tuple[PromptGates, PromptGates] = (None, None)
        self._slots: dict[str, int] = {}
        self._facts: dict[str, Concept] = {}  # without their tensors, but for the embeddings

    def __getitem__(self, name: str) -> Concept:
        columns, slot = self.edits.table.on(CPU), self._slots[name]
        outputs = {key: columns[OUTPUT + key][slot] for key in self._facts[name].outputs}
        inputs: dict[str, Any] = {key: columns[key][slot] for key in INPUTS}
        return replace(self._facts[name], outputs=outputs, eval_gate=self.gate_of(name), **inputs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, concept: Concept) -> None:
        """Add a concept; it is inactive at first."""
        inputs: dict[str, Tensor] = {key: getattr(concept, key) for key in INPUTS}
        row = row_of(inputs, concept.outputs, concept.eval_gate, concept.gates_removal)
        facts = copy.copy(concept)
        empty = torch.empty(0)
        object.__setattr__(facts, "outputs", dict.fromkeys(concept.outputs, empty))
        for key in INPUTS:
            object.__setattr__(facts, key, empty)
        self._slots[concept.token] = self.edits.table.add(row)
        self._facts[concept.token] = facts
        self.edits.changed()

    def remove(self, name: str) -> None:
        """Remove a concept."""
        slot = self._slots.pop(name)
        del self._facts[name]
        self.edits.prompts.forget_concept(slot)
        self.edits.table.remove(slot)
        self.edits.changed()

    def superclass_of(self, name: str) -> str:
        """Return a concept's superclass."""
        return self._facts[name].superclass

    def gate_of(self, name: str) -> Gate:
        """Return a concept's β and τ, as they are set."""
        return self._facts[name].eval_gate

    def set_gate(self, name: str, gate: Gate) -> None:
        """Set a concept's β and τ, which must be in their ranges."""
        object.__setattr__(self._facts[name], "eval_gate", gate)
        beta, temperature = map(torch.tensor, gate)
        self.edits.table.write(self._slots[name], {"beta": beta, "temperature": temperature})
        self.edits.changed()

    def set_active(self, names: Sequence[str]) -> None:
        """Let these concepts act, and no others."""
        self.edits.active = [self._slots[name] for name in names]
        active = torch.zeros(self.edits.table.capacity, dtype=torch.bool)
        active[self.edits.active] = True
        self.edits.table.write_column("active", active)
        self.edits.changed()

    def equal_to(self, concept: Concept) -> list[str]:
        """Return the names of the concepts that have the same tensors as another."""
        stored = self.edits.table.on(CPU)["concept_input"] if self._slots else torch.empty(0, 0)
        if stored.shape[-1] != concept.dim:
            return []
        same = set((stored == concept.concept_input).all(dim=-1).nonzero().flatten().tolist())
        alike = [name for name, slot in self._slots.items() if slot in same] if same else []
        return [name for name in alike if self[name].has_equal_tensors(concept)]

    def inputs_of(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return i* and the duals of some concepts, each of shape (c, d)."""
        columns, slots = self.edits.table.on(CPU), [self._slots[name] for name in names]
        return columns["concept_input"][slots], columns["concept_dual"][slots]

    def held(self, name: str, gate: tuple[float | None, float | None] = (None, None)) -> Held:
        """Return a concept as a prompt holds it: with its own β and τ, or with others for this prompt."""
        return Held(self._slots[name], *(AS_SET if value is None else value for value in gate))

    def gates_by_prompt(self, count: int) -> list[tuple[GateByName, GateByName]]:
        """Return the β and τ that are given for each of some prompts.

        Raises:
            ValueError: they are given for another number of prompts.
        """
        columns = []
        for name, given in zip(("beta", "temperature"), self.prompt_gates, strict=True):
            column = list(given) if isinstance(given, Sequence) else [given] * count
            if len(column) != count:
                raise ValueError(
                    f"`{name}` must be one for all prompts, or one for each of {count}, got {len(column)}."
                )
            columns.append(column)
        return list(zip(*columns, strict=True))

    def check_apart(self, names: Sequence[str]) -> None:
        """Check that concepts can be in one prompt; those that are not active do not count.

        Raises:
            ValueError: one is a combination of the others, such as the same file twice.

        Warns:
            UserWarning: they are so nearly parallel that their joint removal is inexact.
        """
        acting = [name for name in names if self._slots[name] in self.edits.active]
        condition = overlap_condition(*self.inputs_of(acting)) if len(acting) > 1 else 1.0
        if not condition < MAX_OVERLAP:
            raise ValueError(f"The concepts {acting} cannot be in one prompt, since some are the same.")
        if condition >= LARGE_OVERLAP:
            warn_user(
                f"The concepts {acting} are nearly parallel (condition number above {LARGE_OVERLAP:.0e}), so "
                "that they are inexact together. Use each in a prompt of its own, or train one of them with "
                "another superclass."
            )


@dataclass
class LoadedConcepts:
    """What is loaded on a denoiser.

    Attributes:
        concepts: by token; the `eval_gate` of each is the gate that is set.
        active: tokens of the active ones.
        is_enabled: False between `disable_concepts` and `enable_concepts`.
        attentions: the denoiser's attentions with wrapped layers: name, module, and width of the text.
        guards: of the hooks on the denoiser and the text encoders.
    """

    concepts: StoredConcepts = field(default_factory=StoredConcepts)
    active: list[str] = field(default_factory=list)
    is_enabled: bool = True
    attentions: list[tuple[str, nn.Module, int]] = field(default_factory=list)
    guards: list[RemovableHandle] = field(default_factory=list)

    def checked_gates(
        self,
        names: Sequence[str],
        beta: GateByName,
        temperature: GateByName,
    ) -> dict[str, Gate]:
        """Return the new gates of concepts, of which some were given.

        Args:
            names: the concepts that a number is for; a mapping may name others.
            beta, temperature: one for all of `names`, or by name; None leaves it as it is.

        Raises:
            ValueError: a concept is not loaded, or a gate is out of its range.
        """
        changed = dict.fromkeys(names)
        for given in (beta, temperature):
            if isinstance(given, Mapping):
                changed |= dict.fromkeys(given)
        self.check_known(changed)
        gates = {}
        for name in changed if (beta, temperature) != (None, None) else ():
            before = self.concepts.gate_of(name)
            new = gate_for(name, beta, before[0]), gate_for(name, temperature, before[1])
            gates[name] = check_gate("eval_gate", new)
        return gates

    def check_known(self, names: Mapping[str, object] | Sequence[str]) -> None:
        """Raise a ValueError where a concept is not loaded."""
        unknown = [name for name in names if name not in self.concepts]
        if unknown:
            raise ValueError(f"The concepts {unknown} are not loaded. Loaded are {list(self.concepts)}.")


def gate_for(name: str, given: GateByName, before: float | None = None) -> float | None:
    """Return the beta or temperature that is given for a concept, or else the one of before."""
    value = given.get(name) if isinstance(given, Mapping) else given
    return before if value is None else float(value)
