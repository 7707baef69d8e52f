"""Which concepts the prompts hold that were just encoded: the layers are told, and find their rows by it.

A pipeline's `encode_prompt` tells it of all prompts, however their encodings are made. The text encoders tell
it too, which serves whoever shares them: pipelines of the same parts (`from_pipe`), and a user's own loops.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perfusion_pytorch.concept_tokenizer import concepts_by_id, concepts_in
from perfusion_pytorch.layers.prompt_rows import Held, fingerprints
from perfusion_pytorch.pipelines.loaded_concepts import GateByName, StoredConcepts, gate_for
from perfusion_pytorch.pipelines.parts import denoiser_of, text_encoders_of
from perfusion_pytorch.protocols import Pipeline, Tokenizer
from perfusion_pytorch.token_wiring import input_embedding

PROMPTS = ("prompt", "prompt_2", "prompt_3")
AS_SET = (None, None)  # no β and τ for a prompt alone
NEGATIVE_PROMPTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")


@torch.no_grad()
def remember_prompts(
    pipe: Pipeline, stored: StoredConcepts, given: Mapping[str, Any], encoded: Sequence[Any]
) -> None:
    """Tell the layers of a denoiser which concepts the prompts hold that `encode_prompt` encoded.

    Args:
        pipe: the pipeline.
        stored: the concepts of its denoiser.
        given: the arguments of its `encode_prompt`, by name.
        encoded: what that returned: the prompts' encodings, and among the rest the negative prompts'.

    Raises:
        ValueError: a prompt holds concepts that cannot be in one, or gates were given for other prompts.
    """
    positive = encoded[0]
    others = (t for t in encoded[1:] if isinstance(t, Tensor) and t.ndim == 3)
    negative = next((t for t in others if t.shape[1:] == positive.shape[1:]), None)
    prompts, negatives = _texts_by_row(given, PROMPTS), _texts_by_row(given, NEGATIVE_PROMPTS)
    if not negatives and given.get("negative_prompt_embeds") is None:
        negatives = [("",)]
    tokenizers = [tokenizer for _, tokenizer in text_encoders_of(pipe).values()]
    dtype = next(denoiser_of(pipe).parameters()).dtype
    gates = stored.gates_by_prompt(len(prompts)) if prompts else []
    for rows, texts, of_texts in (
        (positive, prompts, gates),
        (negative, negatives, [AS_SET] * len(negatives)),
    ):
        if rows is None or not texts or len(rows) % len(texts):
            continue
        names = [[name for text in row for t in tokenizers for name in concepts_in(t, text)] for row in texts]
        held = held_by(stored, names, of_texts)
        repeats = len(rows) // len(texts)  # several pictures of a prompt are neighbours
        by_row = [held[row // repeats] for row in range(len(rows))]
        for version in dict.fromkeys((rows.dtype, dtype)):
            stored.edits.remember(fingerprints(rows.to(version)), by_row)


def held_by(
    stored: StoredConcepts, names: Sequence[Sequence[str]], gates: Sequence[tuple[GateByName, GateByName]]
) -> list[list[Held]]:
    """Return the concepts that prompts hold, each once, with the gates that are given for these prompts.

    Args:
        stored: the concepts.
        names: tokens of concepts in each prompt; those that are not stored are left out.
        gates: β and τ that are given for each prompt.
    """
    found = [[name for name in dict.fromkeys(row) if name in stored] for row in names]
    for row in found:
        stored.check_apart(row)
    return [
        [stored.held(name, (gate_for(name, beta), gate_for(name, temperature))) for name in row]
        for row, (beta, temperature) in zip(found, gates, strict=True)
    ]


def _texts_by_row(given: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Return, for each prompt, its text for each text encoder that has one of its own."""
    columns = [texts_in(given[key]) for key in keys if given.get(key) is not None]
    return list(zip(*columns, strict=False))


def texts_in(prompt: str | list[str] | None) -> list[str]:
    """Return the texts of a prompt argument: one, several or none."""
    if prompt is None:
        return []
    return [prompt] if isinstance(prompt, str) else list(prompt)


def watch_encoders(pipe: Pipeline, stored: StoredConcepts) -> list[RemovableHandle]:
    """Let a pipeline's text encoders tell its denoiser's layers what they encode; return the handles."""
    encoders = text_encoders_of(pipe)
    embeddings: list[Any] = [input_embedding(encoder) for encoder, _ in encoders.values()]
    widths: list[int] = [embedding.embedding_dim for embedding in embeddings]
    dtype = next(denoiser_of(pipe).parameters()).dtype
    parts: list[Any] = []
    return [
        encoder.register_forward_hook(
            EncoderHook(stored, tokenizer, dtype, parts, sum(widths[:n]), sum(widths), n == len(widths) - 1),
            with_kwargs=True,
        )
        for n, (encoder, tokenizer) in enumerate(encoders.values())
    ]


class EncoderHook:
    """A hook on a text encoder, which tells the layers of one denoiser which concepts its prompts hold.

    An object and not a closure, so that a copy of the pipeline has one of its own.

    Args:
        stored: the concepts of the denoiser.
        tokenizer: the encoder's.
        dtype: of the denoiser, which encodings may be converted to.
        parts: fingerprints of what the encoders before this one returned for the same prompts.
        offset, width: where the encoder's features begin among all, and how many these are.
        is_last: whether no encoder comes after this one.
    """

    def __init__(
        self,
        stored: StoredConcepts,
        tokenizer: Tokenizer,
        dtype: torch.dtype,
        parts: list[dict[torch.dtype, Tensor]],
        offset: int,
        width: int,
        is_last: bool,
    ) -> None:
        self.stored = stored
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.parts = parts
        self.place = (offset, width)
        self.is_last = is_last

    @torch.no_grad()
    def __call__(self, module: nn.Module, arguments: Any, keywords: Mapping[str, Any], output: Any) -> None:
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        encodings = self._encodings(output)
        if torch.compiler.is_compiling() or not isinstance(ids, Tensor) or encodings is None:
            return
        offset, width = self.place
        new = {
            dtype: fingerprints(encodings.to(dtype), offset=offset, width=width)
            for dtype in dict.fromkeys((encodings.dtype, self.dtype))
        }
        if offset == 0:
            self.parts.clear()
        self.parts.append(new)
        if not self.is_last or any(part.keys() != new.keys() for part in self.parts):
            return
        known = concepts_by_id(self.tokenizer)
        names = [[known[i] for i in row if i in known] for row in ids.tolist()]
        held = held_by(self.stored, names, self._gates(len(names)))
        for dtype in new:
            columns = [part[dtype] for part in self.parts]
            if all(column.shape == columns[0].shape for column in columns):
                self.stored.edits.remember(torch.stack(columns).sum(dim=0), held)

    def _gates(self, count: int) -> list[tuple[GateByName, GateByName]]:
        """Return the gates that are given for prompts, where they are for as many as there are."""
        try:
            return self.stored.gates_by_prompt(count)
        except ValueError:  # `encode_prompt` says so of prompts
            return [AS_SET] * count

    def _encodings(self, output: Any) -> Tensor | None:
        """Return what reaches the denoiser: of one encoder its output, of several the last but one states."""
        if self.is_last and self.place[0] == 0:
            return getattr(output, "last_hidden_state", None)
        states = getattr(output, "hidden_states", None)
        return None if states is None else states[-2]
