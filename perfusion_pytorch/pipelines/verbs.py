"""Concepts on diffusers pipelines, with functions named like diffusers' own for LoRA: load, set, disable,
delete.

A pipeline needs nothing but its usual parts: a `unet` or a `transformer`, and text encoders with their
tokenizers. The denoiser remembers what is loaded, so that pipelines that share it (`from_pipe`) share its
concepts.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count

import torch

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.concept_tokenizer import keeping_removed
from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.hub import find_concept
from perfusion_pytorch.pipelines.attach import activate, attach, detach
from perfusion_pytorch.pipelines.fitting import check_fits
from perfusion_pytorch.pipelines.loaded_concepts import GateByName
from perfusion_pytorch.pipelines.offloading import without_offloading
from perfusion_pytorch.pipelines.origin import base_model_facts
from perfusion_pytorch.pipelines.parts import (
    denoiser_of,
    find_loaded,
    loaded_on,
    text_encoders_of,
)
from perfusion_pytorch.protocols import Pipeline, Tokenizer
from perfusion_pytorch.token_wiring import input_embedding
from perfusion_pytorch.tokens import knows


@beartype
def load_concept(
    pipe: Pipeline,
    path: str | os.PathLike[str],
    *,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Load a concept file on a pipeline; the concept is active at once.

    Concepts that `disable_concepts` had switched off are switched on again. Pipelines that share the denoiser
    (`from_pipe`) share the concept. A concept that is loaded already is not loaded again: it is made active.

    Args:
        pipe: a diffusers pipeline of the base model that the concept was trained on.
        path: the concept file, or a training run's folder, which holds it as `concept.safetensors`. A text
            may also be a name on the hub: "user/name", or "user/name/file.safetensors". A file or folder of
            that name wins; "./user/name" is never asked of the hub. Only safetensors files are fetched.
        token: the concept's word in prompts, lower case; by default the file's own, with another number where
            that is taken.
        revision: branch, tag or commit on the hub; "user/name@revision" means the same.

    Returns:
        The concept's name: its token.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the hub does not have it, or cannot be reached and it is not in the hub's cache.
        ValueError: the file is damaged, or does not fit the pipeline or the concepts loaded before. The
            pipeline is left as it was.

    Example:
        name = load_concept(pipe, "teddy.safetensors")
        pipe(f"a photo of {name} on the beach")
    """
    concept = Concept.load(find_concept(path, revision=revision))
    loaded = find_loaded(pipe)
    for name in loaded.concepts.equal_to(concept) if loaded is not None else ():
        if token not in (None, name):
            raise ValueError(
                f"The concept must be another than those loaded, but is that of {name}. Use that token, or "
                "delete it first."
            )
        set_concepts(pipe, [*get_active_concepts(pipe), name])
        return name
    concept = replace(concept, token=token or _free_token(pipe, concept.token))
    with without_offloading(pipe):
        check_fits(concept, pipe)
        attach(pipe, concept)
    return concept.token


def _free_token(pipe: Pipeline, token: str) -> str:
    """Return the token, with the next free number where a tokenizer knows it already."""
    tokenizers = [tokenizer for _, tokenizer in text_encoders_of(pipe).values()]
    stem = re.sub(r"-\d+$", "", token.strip("<>"))
    candidates = chain([token], (f"<{stem}-{n}>" for n in count(2)))
    return next(
        candidate
        for candidate in candidates
        if not any(_is_taken(tokenizer, candidate) for tokenizer in tokenizers)
    )


def _is_taken(tokenizer: Tokenizer, token: str) -> bool:
    with keeping_removed(tokenizer, token):
        return knows(tokenizer, token)


@beartype
def save_concept(
    pipe: Pipeline,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Save a concept that was just trained on a pipeline, or one that is loaded, as a concept file.

    Args:
        pipe: a pipeline whose text encoders know the concept's token and whose denoiser was wrapped and
            trained with it.
        path: where to; written atomically.
        name: which concept, by its token; not needed if there is only one.
        dtype: see `Concept.save`.

    Raises:
        ValueError: there is no such concept, several where none was named, or it was never trained.
    """
    loaded = find_loaded(pipe)
    embeddings: dict[str, EmbeddingWrapper] = {}
    for key, (encoder, _) in text_encoders_of(pipe).items():
        embedding = input_embedding(encoder)
        if not isinstance(embedding, EmbeddingWrapper):
            raise ValueError(
                "The pipeline's text encoders know no concept. Call `add_concept_token_` and train, or "
                "`load_concept`."
            )
        embeddings[key] = embedding
    first = next(iter(embeddings))
    _, tokenizer = text_encoders_of(pipe)[first]
    known = tokenizer.convert_ids_to_tokens(list(embeddings[first].concept_ids))
    if name is None and len(known) == 1:
        name = known[0]
    if name is None or name not in known:
        raise ValueError(f"`name` must be one of the pipeline's concepts {known}, got {name!r}.")
    if loaded is not None:
        concept = loaded.concepts[name]
    else:
        concept_id = known.index(name)
        concept = Concept.of_model(
            denoiser_of(pipe),
            token=name,
            superclass=tokenizer.decode(list(embeddings[first].superclass_ids[concept_id])).strip(),
            embeddings={
                key: embedding.concept_embedding[concept_id] for key, embedding in embeddings.items()
            },
            concept_id=concept_id,
        )
        concept = replace(concept, origin=base_model_facts(pipe))
    concept.save(path, dtype=dtype)


@beartype
def set_concepts(
    pipe: Pipeline,
    names: str | Collection[str],
    *,
    beta: GateByName = None,
    temperature: GateByName = None,
) -> None:
    """Choose which of the loaded concepts are active, and how strongly.

    Args:
        pipe: a pipeline with loaded concepts.
        names: the concepts that are active from now on; a token of the others means its embedding alone.
        beta: gate bias, for all of `names`, or a mapping by name: lower shows more of the concept, higher
            follows the prompt more closely.
        temperature: gate temperature, above 0, likewise.

    Raises:
        ValueError: a concept is not loaded, or a gate is out of its range; nothing is changed.
    """
    loaded = loaded_on(pipe)
    active = _as_list(names)
    gates = loaded.checked_gates(active, beta, temperature)
    with without_offloading(pipe):
        activate(pipe, loaded, active, is_enabled=True)
    for name, gate in gates.items():
        loaded.concepts.set_gate(name, gate)


@contextmanager
@beartype
def concept_gates(
    pipe: Pipeline,
    *,
    beta: GateByName | Sequence[GateByName] = None,
    temperature: GateByName | Sequence[GateByName] = None,
) -> Iterator[None]:
    """Give the concepts other gates in the block's calls, for all prompts or for each prompt of a batch.

    What `set_concepts` set holds again after the block. Encodings that `encode_prompt` made in the block keep
    the block's gates.

    Args:
        pipe: a pipeline with loaded concepts. Call it, or its `encode_prompt`, within the block.
        beta: gate bias, for all concepts or by their names; or a list with one such value for each prompt.
        temperature: gate temperature, above 0, likewise.

    Raises:
        ValueError: a concept is not loaded, a gate is out of its range, or a call has another number of
            prompts.

    Example:
        with concept_gates(pipe, beta=[0.3, 0.5, 0.7]):
            pipe(["a <teddy-1> in a boat"] * 3)
    """
    loaded = loaded_on(pipe)
    for values, is_beta in ((beta, True), (temperature, False)):
        for value in values if isinstance(values, Sequence) else [values]:
            names = list(loaded.concepts) if not isinstance(value, Mapping) else []
            loaded.checked_gates(names, *((value, None) if is_beta else (None, value)))
    concepts = loaded.concepts
    before, concepts.prompt_gates = concepts.prompt_gates, (beta, temperature)
    try:
        yield
    finally:
        concepts.prompt_gates = before


@beartype
def get_list_concepts(pipe: Pipeline) -> list[str]:
    """Return the names of all loaded concepts."""
    loaded = find_loaded(pipe)
    return [] if loaded is None else list(loaded.concepts)


@beartype
def get_active_concepts(pipe: Pipeline) -> list[str]:
    """Return the names of the concepts that are active."""
    loaded = find_loaded(pipe)
    return [] if loaded is None or not loaded.is_enabled else list(loaded.active)


@beartype
def disable_concepts(pipe: Pipeline) -> None:
    """Switch all concepts off; they stay loaded."""
    _set_enabled(pipe, False)


@beartype
def enable_concepts(pipe: Pipeline) -> None:
    """Switch on again the concepts that were active before `disable_concepts`."""
    _set_enabled(pipe, True)


def _set_enabled(pipe: Pipeline, is_enabled: bool) -> None:
    loaded = loaded_on(pipe)
    with without_offloading(pipe):
        activate(pipe, loaded, loaded.active, is_enabled=is_enabled)


@beartype
def delete_concepts(pipe: Pipeline, names: str | Collection[str]) -> None:
    """Unload some concepts; with the last one the pipeline is what it was before the first.

    Raises:
        ValueError: a concept is not loaded; nothing is changed.
    """
    deleted = _as_list(names)
    loaded_on(pipe).check_known(deleted)
    with without_offloading(pipe):
        detach(pipe, deleted)


@beartype
def unload_concepts(pipe: Pipeline) -> None:
    """Unload all concepts: the pipeline is what it was, with the very same modules."""
    names = get_list_concepts(pipe)
    if names:
        delete_concepts(pipe, names)


def _as_list(names: str | Collection[str]) -> list[str]:
    """Return names, each once."""
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))
