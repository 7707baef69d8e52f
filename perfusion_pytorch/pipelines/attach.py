"""Put concepts on a pipeline and take them off: its text encoders and layers."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

from torch import nn

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.layers.loaded import LoadedProjection
from perfusion_pytorch.layers.row_edits import RowEdits
from perfusion_pytorch.layers.wrapped import WrappedProjection
from perfusion_pytorch.pipelines.encoded_prompts import watch_encoders
from perfusion_pytorch.pipelines.loaded_concepts import LoadedConcepts
from perfusion_pytorch.pipelines.parts import (
    CONCEPTS,
    add_token_,
    denoiser_of,
    find_key_lock,
    find_loaded,
    loaded_on,
    remove_token_,
    requires_grad_kept,
    text_encoders_of,
)
from perfusion_pytorch.pipelines.prompts import watch_prompts
from perfusion_pytorch.pipelines.replacements import Replacements
from perfusion_pytorch.pipelines.shared_parts import attentions_of, guards_on, keep_concepts_
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.wiring import cross_attention_projections, unwrap_cross_attentions_, wrap_projections_


def attach(pipe: Pipeline, concept: Concept) -> None:
    """Put a concept that fits on a pipeline, active; after an exception the pipeline is what it was."""
    loaded = find_loaded(pipe) or LoadedConcepts()
    encoders = text_encoders_of(pipe)
    with requires_grad_kept(encoder for encoder, _ in encoders.values()):
        added = add_token_(pipe, concept.token, concept.superclass)
    try:
        for key, embedding in added.embeddings.items():
            embedding.concept_embedding.data[-1] = concept.embeddings[key]
        for pair in encoders.values():
            keep_concepts_(*pair)
        loaded.concepts.add(concept)
        activate(pipe, loaded, [*loaded.active, concept.token], is_enabled=True)
    except BaseException:
        if concept.token in loaded.concepts:
            loaded.concepts.remove(concept.token)
        _remove_tokens(pipe, [concept.token])
        raise


def detach(pipe: Pipeline, names: Iterable[str]) -> None:
    """Take concepts off a pipeline; with the last one it is what it was before the first."""
    loaded = loaded_on(pipe)
    removed = list(names)
    active = [name for name in loaded.active if name not in removed]
    activate(pipe, loaded, active, is_enabled=loaded.is_enabled)
    for name in removed:
        loaded.concepts.remove(name)
    if not loaded.concepts:
        denoiser = denoiser_of(pipe)
        delattr(denoiser, CONCEPTS)
        while loaded.guards:
            loaded.guards.pop().remove()
        Replacements.on(pipe).take_back()
    _remove_tokens(pipe, reversed(removed))


def _remove_tokens(pipe: Pipeline, names: Iterable[str]) -> None:
    for name in names:
        remove_token_(pipe, name)
    for pair in text_encoders_of(pipe).values():
        keep_concepts_(*pair)


def activate(pipe: Pipeline, loaded: LoadedConcepts, active: Sequence[str], *, is_enabled: bool) -> None:
    """Let some of a denoiser's loaded concepts act, and no others.

    Without an active concept its layers are the plain ones. After an exception all is as before.

    Args:
        pipe: the pipeline.
        loaded: what is loaded on its denoiser; it is brought up to date.
        active: the concepts that act, or would if `is_enabled`.
        is_enabled: whether they do.
    """
    denoiser = denoiser_of(pipe)
    with _kept_on_error(denoiser, loaded):
        loaded.active, loaded.is_enabled = list(active), is_enabled
        chosen = loaded.active if is_enabled else []
        if not chosen:
            unwrap_cross_attentions_(denoiser)
            loaded.attentions = []
        elif not _is_wrapped(loaded):
            unwrap_cross_attentions_(denoiser)
            loaded.attentions = attentions_of(_wrap(denoiser, loaded.concepts.edits), denoiser)
        setattr(denoiser, CONCEPTS, loaded)
        if not loaded.guards:
            loaded.guards = [
                *guards_on(denoiser, loaded.concepts.edits),
                *watch_encoders(pipe, loaded.concepts),
            ]
        watch_prompts(pipe)
        lock = find_key_lock(pipe)
        if lock is not None:
            lock.hook()
        loaded.concepts.set_active(chosen)


@contextmanager
def _kept_on_error(denoiser: nn.Module, loaded: LoadedConcepts) -> Iterator[None]:
    """Put a denoiser's wrapped layers back after an exception, and what is set of loaded concepts."""
    before = {field.name: getattr(loaded, field.name) for field in fields(loaded)}
    layers = [
        (parent, name, layer)
        for parent in denoiser.modules()
        for name, layer in parent._modules.items()
        if isinstance(layer, WrappedProjection)
    ]
    try:
        yield
    except BaseException:
        unwrap_cross_attentions_(denoiser)
        for parent, name, layer in layers:
            setattr(parent, name, layer)
            layer.original.module.requires_grad_(False)
        for handle in loaded.guards:
            if handle not in before["guards"]:
                handle.remove()
        for name, value in before.items():
            setattr(loaded, name, value)
        if not before["guards"] and hasattr(denoiser, CONCEPTS):
            delattr(denoiser, CONCEPTS)
        raise


def _is_wrapped(loaded: LoadedConcepts) -> bool:
    """Report whether the denoiser's layers are in place, which others may have replaced."""
    return bool(loaded.attentions) and all(
        sum(isinstance(part, LoadedProjection) for part in attention.modules()) == 2
        for _, attention, _ in loaded.attentions
    )


def _wrap(denoiser: nn.Module, edits: RowEdits) -> dict[str, LoadedProjection]:
    """Wrap a denoiser's projections in layers that apply loaded concepts, and return them by name."""

    def layer(name: str, projection: nn.Linear, is_key: bool) -> LoadedProjection:
        return LoadedProjection(projection, is_key_proj=is_key, edits=edits, name=name)

    return wrap_projections_(denoiser, dict(cross_attention_projections(denoiser)), layer)
