"""A trained concept apart from any model, and the one file that holds it."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from perfusion_pytorch.files import described, sha256_of, write_atomically
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20  # many times the largest concept; more is no concept file
INPUTS = ("concept_input", "concept_dual", "superclass_input")
EMBEDDING, OUTPUT = "embedding.", "output."  # prefixes of the names of tensors
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# By the width of the text encodings: what viewers of model files call the models that people use.
ARCHITECTURES = {
    768: "stable-diffusion-v1",
    1024: "stable-diffusion-v2-768-v",
    2048: "stable-diffusion-xl-v1-base",
}


@dataclass(frozen=True, eq=False)
class Concept:
    """What training learned, and what applying it needs: no covariance, no keys. Axes: d input features, o output features.

    Attributes:
        token: the concept's word in prompts, lower case, such as "<teddy-1>".
        superclass: the word or words that it was trained with, such as "teddy bear".
        base_model: class of the denoiser that it was trained on, such as "UNet2DConditionModel".
        embeddings: for each text encoder, by its name in the pipeline, the token's embedding row, shape (features,).
        concept_input: i*, shape (d,); also the next two, float32.
        concept_dual: C⁻¹ i* / ⟨i*, i*⟩.
        superclass_input: s.
        concept_norm: ⟨i*, i*⟩ = i*ᵀ C⁻¹ i*, above 0; with it, two concepts tell whether they were trained with one covariance.
        outputs: o* of each value layer, shape (o,), by the layer's name in the model.
        train_gate, eval_gate: (β, τ) of training, and what is recommended for inference.

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
    train_gate: tuple[float, float] = (0.75, 0.1)
    eval_gate: tuple[float, float] = (0.70, 0.15)

    def __post_init__(self):
        for name in ("token", "superclass", "base_model"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"`{name}` must be a text that is not empty, got {getattr(self, name)!r}.")
        if self.token != self.token.lower() or len(self.token.split()) != 1:
            raise ValueError(f"`token` must be one lower-case word without white space, got {self.token!r}.")
        for name in ("embeddings", "outputs"):
            if not getattr(self, name) or not all(getattr(self, name)):
                raise ValueError(
                    f"`{name}` must hold at least one tensor, each under a name, got {list(getattr(self, name))}."
                )
        d = tuple(self.concept_input.shape)
        for name, tensor in self.tensors().items():
            wanted = d if name in INPUTS else tuple(tensor.shape)
            if tensor.ndim != 1 or not tensor.numel() or tuple(tensor.shape) != wanted:
                shape = (
                    f"({d[0]},), as concept_input has" if name in INPUTS and len(d) == 1 else "(features,)"
                )
                raise ValueError(f"'{name}' must have shape {shape}, got {tuple(tensor.shape)}.")
            if tensor.dtype not in (DTYPES if name not in INPUTS else (torch.float32,)):
                needed = "float32" if name in INPUTS else "float16, bfloat16 or float32"
                raise ValueError(f"'{name}' must be {needed}, got {tensor.dtype}.")
            if not tensor.isfinite().all():
                raise ValueError(f"'{name}' must be finite, got infinity or NaN.")
        for name in ("train_gate", "eval_gate"):
            gate = getattr(self, name)
            numbers = len(gate) == 2 and all(
                isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in gate
            )
            if not numbers or gate[1] <= 0:
                raise ValueError(f"`{name}` must be (β, τ), finite and τ above 0, got {gate}.")
        if not (
            isinstance(self.concept_norm, (int, float))
            and math.isfinite(self.concept_norm)
            and self.concept_norm > 0
        ):
            raise ValueError(
                f"`concept_norm` must be finite and above 0, got {self.concept_norm!r}. An untrained concept has none."
            )
        one = (self.concept_input.double() @ self.concept_dual.double()).item()
        if abs(one - 1) > 1e-2:
            raise ValueError(
                f"'concept_dual' must be the dual of 'concept_input', their product 1, got {one:.4g}. Was the concept trained?"
            )

    @property
    def dim(self) -> int:
        """d, the width of the text encodings."""
        return len(self.concept_input)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by the names that they have in a file."""
        embeddings = {EMBEDDING + name: row for name, row in self.embeddings.items()}
        outputs = {OUTPUT + name: row for name, row in self.outputs.items()}
        return embeddings | {name: getattr(self, name) for name in INPUTS} | outputs

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
        # Within a LoRA layer, the name is that of the projection whose place it has.
        layers = {
            name.replace(".base_layer", ""): module
            for name, module in model.named_modules()
            if isinstance(module, Rank1EditModule)
        }
        if not any(not layer.is_key_proj for layer in layers.values()):
            raise ValueError(
                f"{type(model).__name__} has no wrapped value layer. Call `wrap_cross_attentions_` and train the concept."
            )
        found = {}
        for name, layer in layers.items():
            layer.check_concept_id(concept_id)
            seen = layer.initialized[concept_id]
            if not seen.any():
                raise ValueError(
                    f"The concept must be trained before it is saved, but '{name}' has never seen concept {concept_id}."
                )
            inputs = {
                "concept_input": layer.concept_input[concept_id][seen].mean(dim=0),
                "concept_dual": layer.concept_dual[concept_id],
                "superclass_input": layer.superclass_input[concept_id][seen].mean(dim=0),
            }
            for key, tensor in inputs.items():
                first_name, first = found.setdefault(key, (name, tensor))
                if first.shape != tensor.shape or not torch.allclose(
                    first, tensor, rtol=1e-4, atol=1e-5 * first.abs().max().item()
                ):
                    raise ValueError(
                        f"`{key}` must be the same in all layers, but differs between '{first_name}' and '{name}'."
                    )
        first = next(iter(layers.values()))
        inputs = {key: tensor.detach().float().cpu().clone() for key, (_, tensor) in found.items()}
        if first.covariance is None:
            raise ValueError(
                "A concept is saved from layers that it was trained in, with their covariance, but these were made with C=None."
            )
        i = inputs["concept_input"].double()
        return cls(
            token=token,
            superclass=superclass,
            base_model=type(model).__name__,
            embeddings={name: row.detach().float().cpu().clone() for name, row in embeddings.items()},
            concept_norm=(i @ first.covariance.inverse(torch.device("cpu"), torch.float64) @ i).item(),
            outputs={
                n: m.concept_output[concept_id].detach().float().cpu().clone()
                for n, m in layers.items()
                if not m.is_key_proj
            },
            train_gate=(float(first.train_beta), float(first.train_temperature)),
            eval_gate=(
                round(first.eval_beta[concept_id].item(), 6),
                round(first.eval_temperature[concept_id].item(), 6),
            ),
            **inputs,
        )

    @beartype
    def save(self, path: str | os.PathLike, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the concept as one safetensors file, atomically.

        Args:
            path: where to.
            dtype: of the embedding rows and the outputs; the inputs stay float32.

        Raises:
            ValueError: a number is too large for the dtype.
            OSError: the file cannot be written; what was there before is still there.
        """
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
        tensors = {
            name: t.to(torch.float32 if name in INPUTS else dtype).cpu().contiguous()
            for name, t in self.tensors().items()
        }
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"'{name}' must fit into {dtype}, but a number is too large. Save with `dtype=torch.float32`."
                )
        about = {
            "format_version": FORMAT_VERSION,
            "library_version": library_version(),
            "token": self.token,
            "superclass": self.superclass,
            "base_model": self.base_model,
            "dim": self.dim,
            "concept_norm": self.concept_norm,
            "train_gate": self.train_gate,
            "eval_gate": self.eval_gate,
        }
        metadata = {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{ARCHITECTURES.get(self.dim, self.base_model)}/perfusion",
            "modelspec.implementation": "perfusion_pytorch",
            "modelspec.title": f"{self.token.strip('<>')} ({self.superclass})",
            "modelspec.trigger_phrase": self.token,
        }
        about["sha256"] = checksum(tensors, about, metadata)
        write_atomically(
            path, save(tensors, metadata | {"perfusion_pytorch": json.dumps(about, separators=(",", ":"))})
        )

    @classmethod
    @beartype
    def load(cls, path: str | os.PathLike) -> "Concept":
        """Read and check a concept file; nothing of it is ever executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no concept file, a damaged one, or one of a newer version; the message says what was found.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"There is no concept file {path}.")
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ValueError(
                f"{path} must be a concept file of at most {MAX_BYTES // 2**20} MB, got a folder or something larger."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
        except SafetensorError as error:
            raise ValueError(
                f"{path} must be a whole safetensors file, but it cannot be read: {error}. Get it or save it again."
            ) from error
        try:
            about = json.loads(metadata.pop("perfusion_pytorch", "null"))
            if not isinstance(about, dict):
                raise ValueError(
                    "it says nothing under 'perfusion_pytorch' in its metadata, so that it is no concept file."
                )
            if about.get("format_version") != FORMAT_VERSION:
                found = about.get("format_version")
                raise ValueError(
                    f"`format_version` must be {FORMAT_VERSION}, got {found!r}. Update perfusion-pytorch for newer files."
                )
            wanted = about.pop("sha256", None)
            if checksum(tensors, about, metadata) != wanted:
                raise ValueError(
                    "its checksum does not fit its content, so it was damaged or changed. Get it or save it again."
                )
            missing = [key for key in (*INPUTS,) if key not in tensors]
            unknown = [
                key for key in tensors if key not in INPUTS and not key.startswith((EMBEDDING, OUTPUT))
            ]
            if missing or unknown:
                raise ValueError(
                    f"it must hold {', '.join(INPUTS)}, but {missing} are missing and {unknown} are unknown."
                )
            concept = cls(
                embeddings=_by_prefix(tensors, EMBEDDING),
                outputs=_by_prefix(tensors, OUTPUT),
                **{name: tensors[name] for name in INPUTS},
                **{name: about.get(name) for name in ("token", "superclass", "base_model", "concept_norm")},
                **{name: tuple(about.get(name) or ()) for name in ("train_gate", "eval_gate")},
            )
            if about.get("dim") != concept.dim:
                raise ValueError(
                    f"`dim` must be {concept.dim}, the width of its inputs, got {about.get('dim')!r}."
                )
            return concept
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} cannot be used as a concept file: {error}") from error

    def check_same_covariance(self, other: "Concept") -> None:
        """Raise a ValueError where two concepts were trained with different covariances: ⟨i, j⟩ then differs from one side to the other."""
        if self.dim != other.dim:
            raise ValueError(
                f"{self.token} is for text encodings of {self.dim} features, but {other.token} for {other.dim}."
            )
        ours = self.concept_norm * (self.concept_dual.double() @ other.concept_input.double())
        theirs = other.concept_norm * (other.concept_dual.double() @ self.concept_input.double())
        if abs(ours - theirs) > 1e-3 * math.sqrt(self.concept_norm * other.concept_norm):
            raise ValueError(
                f"{self.token} and {other.token} were trained with different input covariances ({ours:.4g} against {theirs:.4g}), so they "
                "cannot be applied together. Train one of them again with the other's covariance."
            )


def _by_prefix(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def library_version() -> str:
    """Return the installed version of this library, or "unknown"."""
    try:
        return version("perfusion-pytorch")
    except PackageNotFoundError:
        return "unknown"


def checksum(tensors: Mapping[str, Tensor], about: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256, in hexadecimal, of tensors (names, dtypes, shapes, bytes) and their metadata."""
    head = json.dumps([about, metadata], sort_keys=True)
    return sha256_of(chain([head], described(dict(sorted(tensors.items())))))
