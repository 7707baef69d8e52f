"""A trained concept apart from any model; see `concept_file.py` for its file."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.concept_file import (
    EMBEDDING,
    INPUTS,
    OUTPUT,
    by_prefix,
    checked_facts,
    naming_the_file,
    read_concept_file,
    write_concept_file,
)
from perfusion_pytorch.layers.options import LAYER_DEFAULTS
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.module_hooks import uncompiled
from perfusion_pytorch.tokens import check_token_form
from perfusion_pytorch.wiring import plain_name

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Concept:
    """What training learned, and what applying it needs: no covariance, no keys.

    Axes: d input features, o output features.

    Attributes:
        token: the concept's word in prompts, lower case, such as "<teddy-1>".
        superclass: the word or words that it was trained with, such as "teddy bear".
        base_model: class of the denoiser that it was trained on, such as "UNet2DConditionModel".
        embeddings: for each text encoder, by its name in the pipeline, the token's embedding row, shape
            (features,).
        concept_input: i*, shape (d,); also the next two, float32.
        concept_dual: C⁻¹ i* / ⟨i*, i*⟩.
        superclass_input: s.
        concept_norm: ⟨i*, i*⟩ = i*ᵀ C⁻¹ i*, above 0.
        outputs: o* of each value layer, shape (o,), by the layer's name in the model.
        train_gate, eval_gate: (β, τ) of training, and the recommended one for inference.
        gates_removal: whether it was trained in the gated form; see `Rank1EditModule`.
        origin: where it comes from, in what JSON can hold; empty in older files. `train_concept` writes
            "base_model_name", "base_model_revision" and "training", the settings of the run.

    Raises:
        ValueError: something is missing, misshapen, not finite, or was never trained; the message names it.
    """

    token: str
    superclass: str
    base_model: str
    embeddings: Mapping[str, Tensor]
    concept_input: Tensor = field(repr=False)
    concept_dual: Tensor = field(repr=False)
    superclass_input: Tensor = field(repr=False)
    concept_norm: float
    outputs: Mapping[str, Tensor] = field(repr=False)
    train_gate: tuple[float, float] = (LAYER_DEFAULTS.train_beta, LAYER_DEFAULTS.train_temperature)
    eval_gate: tuple[float, float] = (LAYER_DEFAULTS.eval_beta, LAYER_DEFAULTS.eval_temperature)
    gates_removal: bool = False
    origin: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("token", "superclass", "base_model"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"`{name}` must be a text that is not empty, got {text!r}.")
        check_token_form(self.token)
        for name in ("embeddings", "outputs"):
            tensors = getattr(self, name)
            if not tensors or not all(tensors):
                raise ValueError(
                    f"`{name}` must hold at least one tensor, each under a name, got {list(tensors)}."
                )
        for name, tensor in self.tensors().items():
            _check_tensor(name, tensor, tuple(self.concept_input.shape))
        check_gate("train_gate", self.train_gate)
        check_gate("eval_gate", self.eval_gate)
        if not _is_number(self.concept_norm) or self.concept_norm <= 0:
            raise ValueError(
                f"`concept_norm` must be finite and above 0, got {self.concept_norm!r}. "
                "An untrained concept has none."
            )
        if not isinstance(self.gates_removal, bool):
            raise ValueError(f"`gates_removal` must be true or false, got {self.gates_removal!r}.")
        _check_origin(self.origin)
        one = (self.concept_input.double() @ self.concept_dual.double()).item()
        if abs(one - 1) > 1e-2:
            raise ValueError(
                f"'concept_dual' must be the dual of 'concept_input', their product 1, got {one:.4g}. "
                "Was the concept trained?"
            )

    @property
    def dim(self) -> int:
        """d, the width of the text encodings."""
        return len(self.concept_input)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by the names that they have in a file."""
        embeddings = {EMBEDDING + name: row for name, row in self.embeddings.items()}
        inputs: dict[str, Tensor] = {name: getattr(self, name) for name in INPUTS}
        outputs = {OUTPUT + name: row for name, row in self.outputs.items()}
        return embeddings | inputs | outputs

    @classmethod
    @beartype
    def of_model(
        cls,
        model: nn.Module,
        *,
        token: str,
        superclass: str,
        embeddings: Mapping[str, Tensor],
        concept_id: int = 0,
    ) -> "Concept":
        """Take a trained concept out of a model with wrapped layers; its tensors are copies on the CPU.

        Args:
            model: the denoiser, trained with a covariance.
            token, superclass, embeddings: as the attributes.
            concept_id: which of the layers' concepts.

        Raises:
            ValueError: no layer is wrapped, one was never trained, or inputs differ between layers.
        """
        layers = _wrapped_layers(model)
        inputs: dict[str, Any] = dict(_common_inputs(layers, concept_id))
        first = next(iter(layers.values()))
        if first.covariance is None:
            raise ValueError(
                "A concept is saved from layers that it was trained in, with their covariance, but these "
                "were made with C=None."
            )
        inverse = first.covariance.inverse(torch.device("cpu"), torch.float64)
        i = inputs["concept_input"].double()
        return cls(
            token=token,
            superclass=superclass,
            base_model=type(uncompiled(model)).__name__,
            embeddings={name: _copied(row) for name, row in embeddings.items()},
            concept_norm=(i @ inverse @ i).item(),
            outputs={
                name: _copied(layer.concept_output[concept_id])
                for name, layer in layers.items()
                if not layer.is_key_proj
            },
            train_gate=(float(first.train_beta), float(first.train_temperature)),
            eval_gate=(
                round(first.eval_beta[concept_id].item(), 6),
                round(first.eval_temperature[concept_id].item(), 6),
            ),
            gates_removal=first.gates_removal[concept_id],
            **inputs,
        )

    @beartype
    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16) -> None:
        """Write the concept as one safetensors file, atomically.

        Args:
            path: where to.
            dtype: of the embedding rows and the outputs; the inputs stay float32.

        Raises:
            ValueError: a number is too large for the dtype.
            OSError: the file cannot be written; its old content is still there.
        """
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
        tensors = {}
        for name, tensor in self.tensors().items():
            tensors[name] = tensor.to(torch.float32 if name in INPUTS else dtype).cpu().contiguous()
            if not tensors[name].isfinite().all():
                raise ValueError(
                    f"'{name}' must fit into {dtype}, but a number is too large. Save with "
                    "`dtype=torch.float32`."
                )
        facts = {
            "token": self.token,
            "superclass": self.superclass,
            "base_model": self.base_model,
            "dim": self.dim,
            "concept_norm": self.concept_norm,
            "train_gate": self.train_gate,
            "eval_gate": self.eval_gate,
            "gates_removal": self.gates_removal,
        }
        if self.origin:
            facts["origin"] = dict(self.origin)
        write_concept_file(path, tensors, facts)

    @classmethod
    @beartype
    def load(cls, path: str | os.PathLike[str]) -> "Concept":
        """Read and check a concept file; nothing of it is ever executed.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not a concept file, is damaged, or is of a newer version; the message says what
                was found.
        """
        path = Path(path)
        tensors, metadata = read_concept_file(path)
        with naming_the_file(path):
            facts = checked_facts(tensors, metadata)
            fields: dict[str, Any] = {name: tensors[name] for name in INPUTS}
            fields |= {
                name: facts.get(name) for name in ("token", "superclass", "base_model", "concept_norm")
            }
            fields |= {name: tuple(facts.get(name) or ()) for name in ("train_gate", "eval_gate")}
            fields["gates_removal"] = facts.get("gates_removal", False)
            fields["origin"] = facts.get("origin", {})
            fields |= {"embeddings": by_prefix(tensors, EMBEDDING), "outputs": by_prefix(tensors, OUTPUT)}
            concept = cls(**fields)
            if facts.get("dim") != concept.dim:
                raise ValueError(
                    f"`dim` must be {concept.dim}, the width of its inputs, got {facts.get('dim')!r}."
                )
        return concept

    def has_equal_tensors(self, other: "Concept") -> bool:
        """Report whether another concept has the same tensors, whatever its token and gates."""
        ours, theirs = self.tensors(), other.tensors()
        return ours.keys() == theirs.keys() and all(
            torch.equal(tensor.float(), theirs[name].float()) for name, tensor in ours.items()
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_origin(origin: object) -> None:
    try:
        is_json = isinstance(origin, Mapping) and bool(json.dumps(dict(origin), allow_nan=False))
    except (TypeError, ValueError):
        is_json = False
    if not is_json:
        raise ValueError(f"`origin` must be a mapping that JSON can hold, got {origin!r}.")


def check_gate(name: str, gate: Any) -> tuple[float, float]:
    """Return a gate, (β, τ); a ValueError where they are not finite, or τ is not above 0."""
    if len(gate) != 2 or not all(_is_number(value) for value in gate) or gate[1] <= 0:
        raise ValueError(f"`{name}` must be (β, τ), finite and τ above 0, got {gate}.")
    return gate


def _check_tensor(name: str, tensor: Tensor, input_shape: tuple[int, ...]) -> None:
    """Raise a ValueError where a tensor of a concept has a wrong shape or dtype, or is not finite.

    Args:
        name: its name in a file.
        tensor: the tensor.
        input_shape: shape of the concept's i*, which the other inputs share.
    """
    is_input = name in INPUTS
    shape = tuple(tensor.shape)
    if len(shape) != 1 or not tensor.numel() or (is_input and shape != input_shape):
        wanted = "(features,)"
        if is_input and len(input_shape) == 1:
            wanted = f"({input_shape[0]},), as concept_input has"
        raise ValueError(f"'{name}' must have shape {wanted}, got {shape}.")
    if tensor.dtype not in ((torch.float32,) if is_input else DTYPES):
        needed = "float32" if is_input else "float16, bfloat16 or float32"
        raise ValueError(f"'{name}' must be {needed}, got {tensor.dtype}.")
    if not tensor.isfinite().all():
        raise ValueError(f"'{name}' must be finite, got infinity or NaN.")


def _wrapped_layers(model: nn.Module) -> dict[str, Rank1EditModule]:
    """Return the wrapped layers by the names of their places in the model as it was built."""
    layers = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, Rank1EditModule)
    }
    if all(layer.is_key_proj for layer in layers.values()):
        raise ValueError(
            f"{type(model).__name__} has no wrapped value layer. Call `wrap_cross_attentions_` and train the "
            "concept."
        )
    return layers


def _common_inputs(layers: Mapping[str, Rank1EditModule], concept_id: int) -> dict[str, Tensor]:
    """Return i*, its dual and s of a concept, which must be the same in all layers.

    i* and s are the means of their seen slots.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for name, layer in layers.items():
        layer.check_concept_id(concept_id)
        seen = layer.initialized[concept_id]
        if not seen.any():
            raise ValueError(
                f"The concept must be trained before it is saved, but '{name}' has never seen concept "
                f"{concept_id}."
            )
        inputs = {
            "concept_input": layer.concept_input[concept_id][seen].mean(dim=0),
            "concept_dual": layer.concept_dual[concept_id],
            "superclass_input": layer.superclass_input[concept_id][seen].mean(dim=0),
        }
        for key, tensor in inputs.items():
            first_name, first = found.setdefault(key, (name, tensor))
            scale = first.abs().max().item()
            if first.shape != tensor.shape or not torch.allclose(first, tensor, rtol=1e-4, atol=1e-5 * scale):
                raise ValueError(
                    f"`{key}` must be the same in all layers, but differs between '{first_name}' and "
                    f"'{name}'."
                )
    return {key: _copied(tensor) for key, (_, tensor) in found.items()}


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
