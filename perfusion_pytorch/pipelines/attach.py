"""Put concepts on a pipeline and take them off: its text encoders, layers and replaced methods."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import nn

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.embedding import EmbeddingWrapper, input_embedding
from perfusion_pytorch.layers.checks import check_projection, warn_if_parallel
from perfusion_pytorch.layers.functional import overlap_condition
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.pipelines.parts import (
    CONCEPTS,
    LoadedConcepts,
    add_token_,
    denoiser_of,
    find_key_lock,
    find_loaded,
    loaded_on,
    pool_at_largest_id_,
    projections_of,
    remove_token_,
    requires_grad_kept,
    text_encoders_of,
    without_offloading,
)
from perfusion_pytorch.pipelines.prompts import watch_prompts
from perfusion_pytorch.pipelines.replacements import Replacements
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.tokens import superclass_token_ids
from perfusion_pytorch.wiring import unwrap_cross_attentions_, wrap_cross_attentions_

# Methods of a pipeline that are called with its concepts taken off.
WITHOUT_CONCEPTS = ("save_pretrained", "unload_textual_inversion")
MAX_OVERLAP = 1e6  # above this condition number, concepts are the same up to rounding


# ---------------------------------------------------------------------------------------------------- checks


def check_fits(concept: Concept, pipe: Pipeline) -> None:
    """Check that a concept can be put on a pipeline, beside those that it has.

    Raises:
        ValueError: it does not fit the denoiser, the text encoders or the other concepts; the message says
            why.
    """
    loaded = find_loaded(pipe)
    _check_fits_denoiser(concept, pipe, is_first=loaded is None)
    _check_fits_text_encoders(concept, pipe)
    if loaded is None:
        check_apart([concept])
        return
    for other in loaded.concepts.values():
        concept.check_same_covariance(other)
    check_apart([*(loaded.concepts[token] for token in loaded.active), concept])


def _check_fits_denoiser(concept: Concept, pipe: Pipeline, *, is_first: bool) -> None:
    denoiser = denoiser_of(pipe)
    name = concept.token
    model = type(denoiser).__name__
    if is_first and any(isinstance(module, Rank1EditModule) for module in denoiser.modules()):
        raise ValueError(
            f"{model} has layers wrapped for training. Save their concept, and call "
            "`unwrap_cross_attentions_` on it first."
        )
    if model != concept.base_model:
        raise ValueError(f"{name} is for a {concept.base_model}, but the pipeline has a {model}.")
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"`pipe` must have `encode_prompt`, where prompts are checked, but {type(pipe).__name__} has "
            "none."
        )
    layers = projections_of(denoiser)
    for key, (layer, _) in layers.items():
        if not isinstance(layer, Rank1EditModule):
            check_projection(key, layer)
    widths = {key: layer.out_features for key, (layer, is_key) in layers.items() if not is_key}
    found = {key: len(output) for key, output in concept.outputs.items()}
    if widths != found:
        key = next(key for key in widths | found if widths.get(key) != found.get(key))
        raise ValueError(
            f"{name} does not fit the pipeline's {model}: for '{key}' an output of {widths.get(key, 'no')} "
            f"features is expected, got {found.get(key, 'none')}. It was trained on another base model."
        )
    if (d := next(layer.in_features for layer, _ in layers.values())) != concept.dim:
        raise ValueError(
            f"{name} is for text encodings of {concept.dim} features, but the pipeline's have {d}."
        )


def _check_fits_text_encoders(concept: Concept, pipe: Pipeline) -> None:
    encoders = text_encoders_of(pipe)
    embeddings: dict[str, Any] = {key: input_embedding(encoder) for key, (encoder, _) in encoders.items()}
    widths = {key: embedding.embedding_dim for key, embedding in embeddings.items()}
    found = {key: len(row) for key, row in concept.embeddings.items()}
    if found != widths:
        raise ValueError(
            f"{concept.token} has embeddings of {found} features, but the pipeline's text encoders are "
            f"{widths}."
        )
    for key, (encoder, tokenizer) in encoders.items():
        superclass_token_ids(tokenizer, concept.token, concept.superclass)
        if type(embeddings[key]) not in (nn.Embedding, EmbeddingWrapper):
            raise ValueError(
                f"{type(encoder).__name__} must have a plain nn.Embedding, got "
                f"{type(embeddings[key]).__name__}."
            )


def check_apart(concepts: Sequence[Concept]) -> None:
    """Raise a ValueError where one concept is a combination of the others, such as the same file twice."""
    inputs = torch.stack([concept.concept_input for concept in concepts])
    duals = torch.stack([concept.concept_dual for concept in concepts])
    if not overlap_condition(inputs, duals) < MAX_OVERLAP:
        names = [concept.token for concept in concepts]
        raise ValueError(
            f"The concepts {names} cannot be active together, since some are the same. "
            "Choose others with `set_concepts`."
        )


# ---------------------------------------------------------------------------------------- putting on and off


def attach(pipe: Pipeline, concept: Concept) -> None:
    """Put a concept that fits on a pipeline, active."""
    loaded = find_loaded(pipe) or LoadedConcepts()
    with requires_grad_kept(encoder for encoder, _ in text_encoders_of(pipe).values()):
        added = add_token_(pipe, concept.token, concept.superclass)
    for key, embedding in added.embeddings.items():
        embedding.concept_embedding.data[-1] = concept.embeddings[key]
        embedding.concept_embedding.requires_grad_(False)
    loaded.pooling.extend(added.pooling)
    loaded.concepts[concept.token] = concept
    loaded.active.append(concept.token)
    loaded.is_enabled = True
    apply_loaded(pipe, loaded)


def detach(pipe: Pipeline, names: Iterable[str]) -> None:
    """Take concepts off a pipeline; with the last one it is what it was before the first."""
    loaded = loaded_on(pipe)
    for name in reversed(list(names)):
        remove_token_(pipe, name)
        del loaded.concepts[name]
    loaded.active = [name for name in loaded.active if name in loaded.concepts]
    apply_loaded(pipe, loaded)


def apply_loaded(pipe: Pipeline, loaded: LoadedConcepts) -> None:
    """Make a pipeline's denoiser hold the active ones of the loaded concepts, and no others.

    Without an active concept its layers are the plain ones; without a loaded concept, the methods are too.
    """
    denoiser = denoiser_of(pipe)
    unwrap_cross_attentions_(denoiser)
    active = [loaded.concepts[name] for name in loaded.active if loaded.is_enabled]
    if active:
        forms = tuple(concept.gates_removal for concept in active)
        layers = wrap_cross_attentions_(denoiser, C=None, num_concepts=len(active), gates_removal=forms)
        for name, layer in layers.items():
            _fill(layer, active, name)
        warn_if_parallel(layer)
    if loaded.concepts:
        setattr(denoiser, CONCEPTS, loaded)
        _replace_methods(pipe)
    else:
        pool_at_largest_id_(loaded.pooling)
        delattr(denoiser, CONCEPTS)
        for owner in (pipe, *_modules_with_concepts(pipe)):
            Replacements.on(owner).take_back()
    lock = find_key_lock(pipe)
    if lock is not None:
        lock.hook()


def _fill(layer: Rank1EditModule, concepts: Sequence[Concept], name: str) -> None:
    """Write concepts into a new layer; `name` is the layer's in the concepts' outputs."""
    layer.concept_input[:, 0] = torch.stack([concept.concept_input for concept in concepts])
    layer.superclass_input[:, 0] = torch.stack([concept.superclass_input for concept in concepts])
    layer.concept_dual.copy_(torch.stack([concept.concept_dual for concept in concepts]))
    layer.initialized.fill_(True)
    beta, temperature = torch.tensor([concept.eval_gate for concept in concepts]).T
    layer.eval_beta.copy_(beta)
    layer.eval_temperature.copy_(temperature)
    if not layer.is_key_proj:
        layer.concept_output.requires_grad_(False)
        layer.concept_output.copy_(torch.stack([concept.outputs[name].float() for concept in concepts]))


# --------------------------------------------------------------------------------------------------- methods


def _modules_with_concepts(pipe: Pipeline) -> list[nn.Module]:
    return [denoiser_of(pipe), *(encoder for encoder, _ in text_encoders_of(pipe).values())]


def _replace_methods(pipe: Pipeline) -> None:
    """Replace the methods that concepts concern, where that has not been done."""
    watch_prompts(pipe)
    for name in WITHOUT_CONCEPTS:
        method = getattr(pipe, name, None)
        if method is not None and name not in Replacements.on(pipe):
            Replacements.on(pipe).put(name, _without_concepts(pipe, method))
    for module in _modules_with_concepts(pipe):
        Replacements.on(module).put("save_pretrained", _refuse_to_save)


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for `save_pretrained` of a module with concepts, which are not part of the base model."""
    raise ValueError(
        "A model with loaded concepts must be saved by `save_pretrained` of the pipeline that they were "
        "loaded on, which leaves them out, or after `unload_concepts`."
    )


def _without_concepts(pipe: Pipeline, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a pipeline that is called with the pipeline's concepts taken off."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _concepts_off(pipe):
            return method(*args, **kwargs)

    return call


@contextmanager
def _concepts_off(pipe: Pipeline) -> Iterator[None]:
    """Take all concepts off a pipeline, and put them on again after the block."""
    if find_loaded(pipe) is None:  # unloaded from another pipeline that shares the denoiser
        yield
        return
    loaded = loaded_on(pipe)
    concepts = dict(loaded.concepts)
    active = loaded.active
    is_enabled = loaded.is_enabled
    with without_offloading(pipe):
        detach(pipe, concepts)
        try:
            yield
        finally:
            for concept in concepts.values():
                attach(pipe, concept)
            loaded = loaded_on(pipe)
            loaded.active = active
            loaded.is_enabled = is_enabled
            apply_loaded(pipe, loaded)
