"""Loading a candidate on a pipeline for as long as its pictures are made."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from perfusion_pytorch.evaluation.candidates import INVERSION, LORA, SDXL_ROWS, Candidate
from perfusion_pytorch.extras import required
from perfusion_pytorch.pipelines.parts import find_loaded, text_encoders_of
from perfusion_pytorch.pipelines.verbs import load_concept, set_concepts, unload_concepts
from perfusion_pytorch.protocols import Pipeline

ADAPTER = "evaluated"  # a LoRA's name while it is loaded
PEFT_PREFIX = "base_model.model."  # of names in files that peft itself writes

SetStrength = Callable[[float | None], None]


def check_is_plain(pipe: Any) -> None:
    """Raise a ValueError where something is loaded on the pipeline that would be evaluated with it."""
    loaded = find_loaded(pipe)
    adapters = pipe.get_list_adapters() if hasattr(pipe, "get_list_adapters") else {}
    found = list(loaded.concepts) if loaded is not None else sorted({a for b in adapters.values() for a in b})
    if found:
        raise ValueError(
            f"`pipe` must be the base model alone, but has {found} loaded. Unload them: what is evaluated is "
            "loaded from its file."
        )


@contextmanager
def loaded(pipe: Pipeline, candidate: Candidate) -> Iterator[SetStrength]:
    """Load a candidate within the block; after it the pipeline is the base model again.

    Yields:
        A function that sets the strength: β, or a LoRA's scale. None leaves it.

    Raises:
        ValueError: it does not fit the pipeline.
    """
    how = {LORA: _lora, INVERSION: _inversion}.get(candidate.kind, _concept)
    with how(pipe, candidate) as set_strength:
        yield set_strength


@contextmanager
def _concept(pipe: Pipeline, candidate: Candidate) -> Iterator[SetStrength]:
    name = load_concept(pipe, candidate.path, token=candidate.words)
    try:
        yield lambda beta: set_concepts(pipe, name, beta=beta)
    finally:
        unload_concepts(pipe)


@contextmanager
def _lora(pipe: Any, candidate: Candidate) -> Iterator[SetStrength]:
    required("peft")
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{candidate.path} is a LoRA, which {type(pipe).__name__} cannot load.")
    given: dict[str, Any] = {"weight_name": candidate.path.name}
    source: Any = str(candidate.path.parent)
    if converted := _converted(candidate):
        source, given = converted, {}
    try:
        try:
            pipe.load_lora_weights(source, adapter_name=ADAPTER, **given)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"{candidate.path} does not fit the base model: {error}") from error
        if not any(ADAPTER in names for names in pipe.get_list_adapters().values()):
            raise ValueError(
                f"{candidate.path} must have weights for the base model's layers, but none of its names is "
                "theirs. Is it of another model?"
            )

        def set_scale(scale: float | None) -> None:
            if scale is not None:
                pipe.set_adapters(ADAPTER, adapter_weights=scale)

        yield set_scale
    finally:
        pipe.unload_lora_weights()


def _converted(candidate: Candidate) -> dict[str, Tensor] | None:
    """Return the tensors of a file that peft itself wrote, as diffusers names and scales them; else None.

    Raises:
        ValueError: layers have ranks or scales of their own.
    """
    tensors = load_file(candidate.path)
    if not all(name.startswith(PEFT_PREFIX) for name in tensors):
        return None
    path = candidate.path.with_name("adapter_config.json")
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("use_dora"):
        raise ValueError(
            f"{path} must have one rank and one scale for all layers, and no DoRA. Write it with diffusers' "
            "`save_lora_weights` instead."
        )
    rank = config.get("r") or 1
    scale = (config.get("lora_alpha") or rank) / (rank**0.5 if config.get("use_rslora") else rank)
    return {
        f"unet.{name.removeprefix(PEFT_PREFIX)}": tensor * scale if ".lora_B" in name else tensor
        for name, tensor in tensors.items()
    }


@contextmanager
def _inversion(pipe: Any, candidate: Candidate) -> Iterator[SetStrength]:
    rows = load_file(candidate.path)
    encoders = text_encoders_of(pipe)
    parts = {SDXL_ROWS.get(name, next(iter(encoders))): tensor for name, tensor in rows.items()}
    widths = {name: _width_of(encoder) for name, (encoder, _) in encoders.items()}
    given = {name: tensor.shape[-1] for name, tensor in parts.items()}
    if given != widths:
        raise ValueError(
            f"{candidate.path} must have an embedding for each text encoder, of these widths: {widths}, got "
            f"{given}. Is it of another model?"
        )
    before = {}
    try:
        with torch.random.fork_rng(devices=[]):  # longer tables begin with random rows, on the CPU
            for name, tensor in parts.items():
                encoder, tokenizer = encoders[name]
                before[name] = _Embedding(encoder)
                pipe.load_textual_inversion(
                    {candidate.words: tensor},
                    token=candidate.words,
                    text_encoder=encoder,
                    tokenizer=tokenizer,
                )
        yield lambda strength: None
    finally:
        with torch.random.fork_rng(devices=[]):
            for name, state in before.items():
                encoder, tokenizer = encoders[name]
                count = max(1, parts[name].numel() // widths[name])
                tokens = [candidate.words, *(f"{candidate.words}_{i}" for i in range(1, count))]
                if candidate.words in tokenizer.get_vocab():
                    pipe.unload_textual_inversion(tokens, tokenizer=tokenizer, text_encoder=encoder)
                state.restore()


def _width_of(encoder: Any) -> int:
    """Return the number of features of a text encoder's embeddings."""
    return int(encoder.get_input_embeddings().weight.shape[-1])


class _Embedding:
    """The embedding of a text encoder as it is now: diffusers leaves another one of the same numbers."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.module = encoder.get_input_embeddings()
        self.weight = self.module.weight.data
        self.vocab_size = encoder.config.vocab_size
        self.attributes = set(vars(encoder))

    def restore(self) -> None:
        """Put it back."""
        self.module.weight.data, self.module.num_embeddings = self.weight, len(self.weight)
        self.encoder.set_input_embeddings(self.module)
        self.encoder.config.vocab_size = self.vocab_size
        if "vocab_size" not in self.attributes:
            vars(self.encoder).pop("vocab_size", None)
