"""Checks that a concept fits a pipeline, before anything of it changes."""

from typing import Any

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.concept_tokenizer import keeping_removed
from perfusion_pytorch.layers.checks import check_projection
from perfusion_pytorch.layers.wrapped import WrappedProjection
from perfusion_pytorch.pipelines.parts import (
    check_embedding,
    denoiser_of,
    find_loaded,
    projections_of,
    text_encoders_of,
)
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.token_wiring import input_embedding
from perfusion_pytorch.tokens import superclass_token_ids

# By the class of a denoiser that is made of another one: that one, whose layers it has under the same names.
SAME_LAYERS = {"UNetMotionModel": "UNet2DConditionModel"}


def check_fits(concept: Concept, pipe: Pipeline) -> None:
    """Check that a concept can be put on a pipeline, beside those that it has.

    Raises:
        ValueError: it does not fit the denoiser or the text encoders; the message says why.
    """
    loaded = find_loaded(pipe)
    _check_fits_denoiser(concept, pipe, is_first=loaded is None)
    _check_fits_text_encoders(concept, pipe)


def _check_fits_denoiser(concept: Concept, pipe: Pipeline, *, is_first: bool) -> None:
    denoiser = denoiser_of(pipe)
    name = concept.token
    model = type(denoiser).__name__
    if is_first and any(isinstance(module, WrappedProjection) for module in denoiser.modules()):
        raise ValueError(
            f"{model} has layers wrapped for training. Save their concept, and call "
            "`unwrap_cross_attentions_` on it first."
        )
    if concept.base_model not in (model, SAME_LAYERS.get(model)):
        raise ValueError(f"{name} is for a {concept.base_model}, but the pipeline has a {model}.")
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"`pipe` must have `encode_prompt`, where prompts are checked, but {type(pipe).__name__} has "
            "none."
        )
    layers = projections_of(denoiser)
    for key, (layer, _) in layers.items():
        if not isinstance(layer, WrappedProjection):
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
    if not encoders:
        raise ValueError(
            f"{type(pipe).__name__} must have its text encoders with their tokenizers while a concept is "
            "loaded, got none. Load the concept first, encode the prompts, and free the text encoders then."
        )
    for encoder, _ in encoders.values():
        check_embedding(encoder)
    embeddings: dict[str, Any] = {key: input_embedding(encoder) for key, (encoder, _) in encoders.items()}
    widths = {key: embedding.embedding_dim for key, embedding in embeddings.items()}
    found = {key: len(row) for key, row in concept.embeddings.items()}
    if found != widths:
        raise ValueError(
            f"{concept.token} has embeddings of {found} features, but the pipeline's text encoders are "
            f"{widths}. It was trained on another base model, or text encoders were freed: load first, and "
            "free them then."
        )
    for _, tokenizer in encoders.values():
        with keeping_removed(tokenizer, concept.token, concept.superclass):
            superclass_token_ids(tokenizer, concept.token, concept.superclass)
