"""Put concepts on a pipeline and take them off: its text encoders and layers."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import nn

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.layers.checks import warn_if_parallel
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.pipelines.parts import (
    CONCEPTS,
    LoadedConcepts,
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
from perfusion_pytorch.pipelines.shared_parts import (
    attentions_of,
    check_edits_are_used,
    keep_concepts_,
    keep_out_of_state_dict_,
)
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.wiring import unwrap_cross_attentions_, wrap_cross_attentions_


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
        concepts = loaded.concepts | {concept.token: concept}
        apply_(pipe, loaded, concepts, [*loaded.active, concept.token], is_enabled=True)
    except BaseException:
        _remove_tokens(pipe, [concept.token])
        raise


def detach(pipe: Pipeline, names: Iterable[str]) -> None:
    """Take concepts off a pipeline; with the last one it is what it was before the first."""
    loaded = loaded_on(pipe)
    removed = list(names)
    concepts = {name: concept for name, concept in loaded.concepts.items() if name not in removed}
    active = [name for name in loaded.active if name in concepts]
    apply_(pipe, loaded, concepts, active, is_enabled=loaded.is_enabled)
    _remove_tokens(pipe, reversed(removed))


def _remove_tokens(pipe: Pipeline, names: Iterable[str]) -> None:
    for name in names:
        remove_token_(pipe, name)
    for pair in text_encoders_of(pipe).values():
        keep_concepts_(*pair)


def apply_(
    pipe: Pipeline,
    loaded: LoadedConcepts,
    concepts: dict[str, Concept],
    active: list[str],
    *,
    is_enabled: bool,
) -> None:
    """Make a pipeline's denoiser hold the active ones of some concepts, and no others.

    Without an active concept its layers are the plain ones; without a concept, the methods are too. After an
    exception all is as before.

    Args:
        pipe: the pipeline.
        loaded: what is loaded on its denoiser; it is brought up to date.
        concepts, active, is_enabled: what `loaded` is to hold.
    """
    denoiser = denoiser_of(pipe)
    with _kept_on_error(denoiser, loaded):
        loaded.concepts, loaded.active, loaded.is_enabled = concepts, active, is_enabled
        unwrap_cross_attentions_(denoiser)
        chosen = [concepts[name] for name in active if is_enabled]
        layers = _wrap(denoiser, chosen) if chosen else {}
        loaded.attentions = attentions_of(layers, denoiser)
        if concepts:
            setattr(denoiser, CONCEPTS, loaded)
            loaded.guard = loaded.guard or denoiser.register_forward_pre_hook(check_edits_are_used)
            watch_prompts(pipe)
        elif hasattr(denoiser, CONCEPTS):
            delattr(denoiser, CONCEPTS)
            if loaded.guard is not None:
                loaded.guard.remove()
            Replacements.on(pipe).take_back()
        lock = find_key_lock(pipe)
        if lock is not None:
            lock.hook()


@contextmanager
def _kept_on_error(denoiser: nn.Module, loaded: LoadedConcepts) -> Iterator[None]:
    """Put a denoiser's wrapped layers back after an exception, and what is loaded."""
    before = {field.name: getattr(loaded, field.name) for field in fields(loaded)}
    layers = [
        (parent, name, layer)
        for parent in denoiser.modules()
        for name, layer in parent._modules.items()
        if isinstance(layer, Rank1EditModule)
    ]
    try:
        yield
    except BaseException:
        unwrap_cross_attentions_(denoiser)
        for parent, name, layer in layers:
            setattr(parent, name, layer)
            layer.original.module.requires_grad_(False)
        if loaded.guard is not None and before["guard"] is None:
            loaded.guard.remove()
        for name, value in before.items():
            setattr(loaded, name, value)
        if not loaded.concepts and hasattr(denoiser, CONCEPTS):
            delattr(denoiser, CONCEPTS)
        raise


def _wrap(denoiser: nn.Module, concepts: Sequence[Concept]) -> dict[str, Rank1EditModule]:
    """Wrap a denoiser's projections in layers that hold these concepts, and return them by name."""
    forms = tuple(concept.gates_removal for concept in concepts)
    layers = wrap_cross_attentions_(denoiser, C=None, num_concepts=len(concepts), gates_removal=forms)
    for name, layer in layers.items():
        _fill(layer, concepts, name)
        keep_out_of_state_dict_(layer)
    warn_if_parallel(layer)
    return layers


@torch.no_grad()
def _fill(layer: Rank1EditModule, concepts: Sequence[Concept], name: str) -> None:
    """Write concepts into a new layer; `name` is the layer's in the concepts' outputs."""
    layer.concept_input[:, 0] = torch.stack([concept.concept_input for concept in concepts])
    layer.superclass_input[:, 0] = torch.stack([concept.superclass_input for concept in concepts])
    layer.concept_dual.copy_(torch.stack([concept.concept_dual for concept in concepts]))
    layer.initialized.fill_(True)
    gates = torch.tensor([concept.eval_gate for concept in concepts], device=layer.eval_beta.device)
    beta, temperature = gates.T
    layer.eval_beta.copy_(beta)
    layer.eval_temperature.copy_(temperature)
    if not layer.is_key_proj:
        layer.concept_output.copy_(torch.stack([concept.outputs[name].float() for concept in concepts]))
