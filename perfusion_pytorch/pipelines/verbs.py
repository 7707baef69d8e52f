"""Concepts on diffusers pipelines, in the verbs that users of LoRA know: load, set, disable, delete, unload, save.

A pipeline needs nothing but its usual parts: a `unet` or a `transformer`, and text encoders with their tokenizers. What is loaded is
remembered by the denoiser, so that pipelines that share it (`from_pipe`) share its concepts.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import wraps
from itertools import chain, count

import torch
from beartype import beartype
from torch import nn

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.embedding import (
    EmbeddingWrapper,
    add_concept_token_,
    remove_concept_token_,
    superclass_token_ids,
)
from perfusion_pytorch.layers.checks import check_projection, warn_if_parallel
from perfusion_pytorch.layers.functional import overlap_condition
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.pipelines.parts import (
    CONCEPTS,
    POOLS_AT_LARGEST_ID,
    LoadedConcepts,
    denoiser_of,
    loaded_on,
    pool_at_end_token_,
    text_encoders_of,
    without_offloading,
)
from perfusion_pytorch.pipelines.prompts import KEY_LOCK, watch_prompts
from perfusion_pytorch.wiring import (
    base_layer,
    cross_attention_projections,
    unwrap_cross_attentions_,
    wrap_cross_attentions_,
)

WITHOUT_CONCEPTS = (
    "save_pretrained",
    "unload_textual_inversion",
)  # methods of the pipeline that are called with the concepts taken off
MAX_OVERLAP = 1e6  # above this condition number, concepts are the same up to rounding


@beartype
def load_concept(pipe, path, *, token: str | None = None) -> str:
    """Load a concept file on a pipeline; the concept is active at once, and so are those that `disable_concepts` had switched off.

    Pipelines that share the denoiser (`from_pipe`) share the concept; prompts are checked by the pipeline that it was loaded on.

    Args:
        pipe: a diffusers pipeline of the base model that the concept was trained on.
        path: the concept file.
        token: the concept's word in prompts, lower case; by default the file's own, with another number where that is taken.

    Returns:
        The concept's name: its token.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or does not fit the pipeline or the concepts loaded before. The pipeline is left as it was.

    Example:
        name = load_concept(pipe, "teddy.safetensors")
        pipe(f"a photo of {name} on the beach")
    """
    concept, encoders = Concept.load(path), text_encoders_of(pipe)
    concept = replace(concept, token=token or _free_token(concept.token, encoders))
    _check_fits(concept, pipe)
    with without_offloading(pipe):
        _attach(pipe, concept)
    return concept.token


@beartype
def save_concept(pipe, path, *, name: str | None = None, dtype: torch.dtype = torch.float16) -> None:
    """Save a concept that was just trained on a pipeline, or one that is loaded, as a concept file.

    Args:
        pipe: a pipeline whose text encoders know the concept's token and whose denoiser was wrapped and trained with it.
        path: where to; written whole or not at all.
        name: which concept, by its token; not needed where there is but one.
        dtype: see `Concept.save`.

    Raises:
        ValueError: there is no such concept, several where none was named, or it was never trained.
    """
    denoiser, encoders = denoiser_of(pipe), text_encoders_of(pipe)
    loaded = getattr(denoiser, CONCEPTS, None)
    embeddings = {key: encoder.get_input_embeddings() for key, (encoder, _) in encoders.items()}
    if not all(isinstance(embedding, EmbeddingWrapper) for embedding in embeddings.values()):
        raise ValueError(
            "The pipeline's text encoders know no concept. Call `add_concept_token_` and train, or `load_concept`."
        )
    first = next(iter(encoders))
    tokenizer = encoders[first][1]
    known = tokenizer.convert_ids_to_tokens(list(embeddings[first].concept_ids))
    if name is None and len(known) == 1:
        name = known[0]
    if name not in known:
        raise ValueError(f"`name` must be one of the pipeline's concepts {known}, got {name!r}.")
    if loaded is not None:
        concept = loaded.concepts[name]
    else:
        concept_id = known.index(name)
        concept = Concept.of_model(
            denoiser,
            token=name,
            superclass=tokenizer.decode(list(embeddings[first].superclass_ids[concept_id])).strip(),
            embeddings={
                key: embedding.concept_embedding[concept_id] for key, embedding in embeddings.items()
            },
            concept_id=concept_id,
        )
    concept.save(path, dtype=dtype)


@beartype
def set_concepts(
    pipe,
    names: str | Collection[str],
    *,
    beta: float | int | Mapping[str, float | int] | None = None,
    temperature: float | int | Mapping[str, float | int] | None = None,
) -> None:
    """Choose which of the loaded concepts are active, and how strongly.

    Args:
        pipe: a pipeline with loaded concepts.
        names: the concepts that are active from now on; a token of the others means its embedding alone.
        beta: gate bias, for all of `names`, or a mapping by name: lower shows more of the concept, higher follows the prompt more closely.
        temperature: gate temperature, above 0, likewise.

    Raises:
        ValueError: a concept is not loaded, or a gate is out of its range; nothing is changed.
    """
    loaded = loaded_on(pipe)
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    given = {"beta": beta, "temperature": temperature}
    changed = dict.fromkeys(
        [*names, *(key for values in given.values() if isinstance(values, Mapping) for key in values)]
    )
    _check_known(loaded, changed)
    concepts = dict(loaded.concepts)
    for name in changed:
        gate = [v.get(name) if isinstance(v, Mapping) else v for v in given.values()]
        gate = tuple(
            float(old if new is None else new)
            for new, old in zip(gate, concepts[name].eval_gate, strict=True)
        )
        concepts[name] = replace(concepts[name], eval_gate=gate)
    if names:
        _check_apart([loaded.concepts[name] for name in names])
    loaded.concepts, loaded.active, loaded.is_enabled = concepts, names, True
    with without_offloading(pipe):
        _apply(pipe, loaded)


@beartype
def get_list_concepts(pipe) -> list[str]:
    """Return the names of all loaded concepts."""
    return list(getattr(denoiser_of(pipe), CONCEPTS, LoadedConcepts()).concepts)


@beartype
def get_active_concepts(pipe) -> list[str]:
    """Return the names of the concepts that are active."""
    loaded = getattr(denoiser_of(pipe), CONCEPTS, LoadedConcepts())
    return list(loaded.active) if loaded.is_enabled else []


@beartype
def disable_concepts(pipe) -> None:
    """Switch all concepts off; they stay loaded."""
    loaded = loaded_on(pipe)
    loaded.is_enabled = False
    with without_offloading(pipe):
        _apply(pipe, loaded)


@beartype
def enable_concepts(pipe) -> None:
    """Switch the concepts on again that were active before `disable_concepts`."""
    loaded = loaded_on(pipe)
    loaded.is_enabled = True
    with without_offloading(pipe):
        _apply(pipe, loaded)


@beartype
def delete_concepts(pipe, names: str | Collection[str]) -> None:
    """Unload some concepts; with the last one the pipeline is what it was before the first.

    Raises:
        ValueError: a concept is not loaded; nothing is changed.
    """
    loaded = loaded_on(pipe)
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    _check_known(loaded, names)
    with without_offloading(pipe):
        for name in reversed(names):
            for encoder, tokenizer in text_encoders_of(pipe).values():
                remove_concept_token_(encoder, tokenizer, name)
            del loaded.concepts[name]
        loaded.active = [name for name in loaded.active if name in loaded.concepts]
        _apply(pipe, loaded)


@beartype
def unload_concepts(pipe) -> None:
    """Unload all concepts: the pipeline is what it was, with the very same modules."""
    names = get_list_concepts(pipe)
    if names:
        delete_concepts(pipe, names)


def _check_known(loaded, names):
    unknown = [name for name in names if name not in loaded.concepts]
    if unknown:
        raise ValueError(f"The concepts {unknown} are not loaded. Loaded are {list(loaded.concepts)}.")


def _free_token(token, encoders):
    """Return the token, with the next free number where a tokenizer knows it already."""
    taken = set().union(*(tokenizer.get_vocab() for _, tokenizer in encoders.values()))
    stem = re.sub(r"-\d+$", "", token.strip("<>"))
    return next(t for t in chain([token], (f"<{stem}-{n}>" for n in count(2))) if t not in taken)


def _check_fits(concept, pipe):
    """Raise a ValueError that says what does not fit, where a concept is not for this pipeline or not for its other concepts."""
    denoiser, encoders = denoiser_of(pipe), text_encoders_of(pipe)
    loaded = getattr(denoiser, CONCEPTS, None)
    name, model = concept.token, type(denoiser).__name__
    if loaded is None and any(isinstance(module, Rank1EditModule) for module in denoiser.modules()):
        raise ValueError(
            f"{model} has layers wrapped for training. Save their concept, and call `unwrap_cross_attentions_` on it first."
        )
    if model != concept.base_model:
        raise ValueError(f"{name} is for a {concept.base_model}, but the pipeline has a {model}.")
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"`pipe` must have `encode_prompt`, where prompts are checked, but {type(pipe).__name__} has none."
        )
    layers = {
        key: (base_layer(denoiser, key)[2], is_key) for key, is_key in cross_attention_projections(denoiser)
    }
    for key, (layer, _) in layers.items():
        if not isinstance(layer, Rank1EditModule):
            check_projection(key, layer)
    widths = {key: layer.out_features for key, (layer, is_key) in layers.items() if not is_key}
    found = {key: len(output) for key, output in concept.outputs.items()}
    if widths != found:
        key = next(key for key in widths | found if widths.get(key) != found.get(key))
        raise ValueError(
            f"{name} does not fit the pipeline's {model}: for '{key}' an output of {widths.get(key, 'no')} features is expected, "
            f"got {found.get(key, 'none')}. It was trained on another base model."
        )
    if (d := next(layer.in_features for layer, _ in layers.values())) != concept.dim:
        raise ValueError(
            f"{name} is for text encodings of {concept.dim} features, but the pipeline's have {d}."
        )
    rows = {key: len(row) for key, row in concept.embeddings.items()}
    wanted = {key: encoder.get_input_embeddings().embedding_dim for key, (encoder, _) in encoders.items()}
    if rows != wanted:
        raise ValueError(
            f"{name} has embeddings of {rows} features, but the pipeline's text encoders are {wanted}."
        )
    for encoder, tokenizer in encoders.values():
        superclass_token_ids(tokenizer, name, concept.superclass)
        if type(embedding := encoder.get_input_embeddings()) not in (nn.Embedding, EmbeddingWrapper):
            raise ValueError(
                f"{type(encoder).__name__} must have a plain nn.Embedding, got {type(embedding).__name__}."
            )
    for other in loaded.concepts.values() if loaded is not None else ():
        concept.check_same_covariance(other)
    _check_apart(
        [*(loaded.concepts[token] for token in loaded.active), concept] if loaded is not None else [concept]
    )


def _check_apart(concepts):
    """Raise a ValueError where one of the concepts is a combination of the others, as the same file twice."""
    inputs, duals = (
        torch.stack([getattr(concept, key) for concept in concepts])
        for key in ("concept_input", "concept_dual")
    )
    if not overlap_condition(inputs, duals) < MAX_OVERLAP:
        names = [concept.token for concept in concepts]
        raise ValueError(
            f"The concepts {names} cannot be active together, since some are the same. Choose others with `set_concepts`."
        )


def _attach(pipe, concept):
    """Put a concept that fits on a pipeline."""
    denoiser = denoiser_of(pipe)
    loaded = getattr(denoiser, CONCEPTS, None) or LoadedConcepts()
    for key, (encoder, tokenizer) in text_encoders_of(pipe).items():
        flags = [(parameter, parameter.requires_grad) for parameter in encoder.parameters()]
        embedding = add_concept_token_(encoder, tokenizer, concept.token, concept.superclass)
        embedding.concept_embedding.data[-1] = concept.embeddings[key]
        embedding.concept_embedding.requires_grad_(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        loaded.pooling += pool_at_end_token_(encoder, tokenizer)
    loaded.concepts[concept.token] = concept
    loaded.active.append(concept.token)
    loaded.is_enabled = True
    _apply(pipe, loaded)


def _apply(pipe, loaded):
    """Make the denoiser's layers hold the active concepts, and no others; without any they are the plain layers of before."""
    denoiser = denoiser_of(pipe)
    unwrap_cross_attentions_(denoiser)
    active = [name for name in loaded.active if loaded.is_enabled]
    for name, layer in (
        wrap_cross_attentions_(denoiser, C=None, num_concepts=len(active)).items() if active else ()
    ):
        concepts = [loaded.concepts[token] for token in active]
        for key in ("concept_input", "superclass_input"):
            getattr(layer, key)[:, 0] = torch.stack([getattr(concept, key) for concept in concepts])
        layer.concept_dual.copy_(torch.stack([concept.concept_dual for concept in concepts]))
        layer.initialized.fill_(True)
        beta, temperature = torch.tensor([concept.eval_gate for concept in concepts]).T
        layer.eval_beta.copy_(beta), layer.eval_temperature.copy_(temperature)
        if not layer.is_key_proj:
            layer.concept_output.requires_grad_(False)
            layer.concept_output.copy_(torch.stack([concept.outputs[name].float() for concept in concepts]))
    if active:
        warn_if_parallel(layer)
    if loaded.concepts:
        setattr(denoiser, CONCEPTS, loaded)
        watch_prompts(pipe)
        for method in WITHOUT_CONCEPTS:
            _take_concepts_off(pipe, method)
        for module in (denoiser, *(encoder for encoder, _ in text_encoders_of(pipe).values())):
            module.save_pretrained = _refuse_to_save
    else:
        for module in loaded.pooling:
            module.eos_token_id = POOLS_AT_LARGEST_ID
        delattr(denoiser, CONCEPTS)
        for method in ("encode_prompt", *WITHOUT_CONCEPTS):
            vars(pipe).pop(method, None)
        for module in (denoiser, *(encoder for encoder, _ in text_encoders_of(pipe).values())):
            vars(module).pop("save_pretrained", None)
    if (lock := getattr(denoiser, KEY_LOCK, None)) is not None:
        lock.hook()


def _refuse_to_save(*args, **kwargs):
    """Stand in the place of a module's `save_pretrained` while it holds concepts, which are no part of the base model."""
    raise ValueError(
        "A model with loaded concepts must be saved by `save_pretrained` of the pipeline that they were loaded on, which leaves them out, "
        "or after `unload_concepts`."
    )


def _take_concepts_off(pipe, method):
    """Let a method of the pipeline be called without the concepts, which are put back after it."""
    original = getattr(pipe, method, None)
    if original is None or method in vars(pipe):
        return

    @wraps(original)
    def call(*args, **kwargs):
        if getattr(denoiser_of(pipe), CONCEPTS, None) is None:
            return original(*args, **kwargs)
        loaded = loaded_on(pipe)
        concepts, active, is_enabled = list(loaded.concepts.values()), list(loaded.active), loaded.is_enabled
        with without_offloading(pipe):
            unload_concepts(pipe)
            try:
                return original(*args, **kwargs)
            finally:
                for concept in concepts:
                    _attach(pipe, concept)
                loaded = loaded_on(pipe)
                loaded.active, loaded.is_enabled = active, is_enabled
                _apply(pipe, loaded)

    setattr(pipe, method, call)
