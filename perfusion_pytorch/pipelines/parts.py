"""The parts of a pipeline that concepts attach to, and what is loaded there."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from perfusion_pytorch.concept_tokenizer import concept_tokens, unlearn_token_
from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.module_hooks import uncompiled
from perfusion_pytorch.pipelines.loaded_concepts import LoadedConcepts
from perfusion_pytorch.protocols import Pipeline, TextEncoder, Tokenizer
from perfusion_pytorch.token_wiring import add_concept_token_, input_embedding, remove_concept_token_
from perfusion_pytorch.wiring import base_layer, cross_attention_projections, plain_name

if TYPE_CHECKING:
    from perfusion_pytorch.pipelines.key_lock import KeyLock

CONCEPTS = "_perfusion_concepts"  # attribute of the denoiser
KEY_LOCK = "_perfusion_key_lock"  # attribute of the denoiser
# The end token's id in shipped CLIP configurations. It makes CLIP pool at the largest id, which may be a
# concept's.
POOLS_AT_LARGEST_ID = 2


def denoiser_of(pipe: Pipeline) -> nn.Module:
    """Return the pipeline's UNet or transformer; of a compiled one, the module that was compiled."""
    denoiser = getattr(pipe, "unet", None)
    if denoiser is None:
        denoiser = getattr(pipe, "transformer", None)
    if not isinstance(denoiser, nn.Module):
        raise ValueError(
            "`pipe` must be a diffusers pipeline with a `unet` or a `transformer`, got "
            f"{type(pipe).__name__}."
        )
    return uncompiled(denoiser)


def text_encoders_of(pipe: Pipeline) -> dict[str, tuple[TextEncoder, Tokenizer]]:
    """Return the pipeline's text encoders with their tokenizers, by the encoder's name.

    Of a compiled encoder, the module that was compiled is returned.
    """
    pairs = {
        f"text_encoder{n}": (getattr(pipe, f"text_encoder{n}", None), getattr(pipe, f"tokenizer{n}", None))
        for n in ("", "_2", "_3")
    }
    return {
        name: (cast(TextEncoder, uncompiled(encoder)), tokenizer)
        for name, (encoder, tokenizer) in pairs.items()
        if encoder is not None and tokenizer is not None
    }


def projections_of(denoiser: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Return a denoiser's text projections by name: the module, and whether it makes keys.

    Where a LoRA layer has a projection's place, its base layer is returned.

    Raises:
        ValueError: projections are not used, so that edits would be bypassed.
    """
    return {
        plain_name(name): (base_layer(denoiser, name)[2], is_key)
        for name, is_key in cross_attention_projections(denoiser)
    }


def find_loaded(pipe: Pipeline) -> LoadedConcepts | None:
    """Return what is loaded on a pipeline's denoiser, or None."""
    loaded: LoadedConcepts | None = getattr(denoiser_of(pipe), CONCEPTS, None)
    return loaded


def find_key_lock(pipe: Pipeline) -> "KeyLock | None":
    """Return the `global_key_lock` that a pipeline's denoiser is in, or None."""
    lock: KeyLock | None = getattr(denoiser_of(pipe), KEY_LOCK, None)
    return lock if lock is not None and lock.is_open else None


def loaded_on(pipe: Pipeline) -> LoadedConcepts:
    """Return what is loaded on a pipeline's denoiser.

    Raises:
        ValueError: nothing is loaded, projections are not used, so that edits would be bypassed, or
            something stands around a text encoder's embedding.
    """
    loaded = find_loaded(pipe)
    if loaded is None:
        raise ValueError("The pipeline has no loaded concept. Call `load_concept` first.")
    projections_of(denoiser_of(pipe))
    for encoder, _ in text_encoders_of(pipe).values():
        check_embedding(encoder)
    return loaded


def check_embedding(encoder: nn.Module) -> None:
    """Raise a ValueError where a text encoder's embedding is not a plain one, with or without concepts."""
    embedding = input_embedding(encoder)
    if type(embedding) in (nn.Embedding, EmbeddingWrapper):
        return
    kind = type(encoder).__name__
    if hasattr(embedding, "base_layer"):
        raise ValueError(
            f"{kind} must have a plain nn.Embedding, but an adapter ({type(embedding).__module__}) is on it, "
            "which knows no concept's token. Unload the adapter, or train it without the embedding as target."
        )
    raise ValueError(f"{kind} must have a plain nn.Embedding, got {type(embedding).__name__}.")


def pool_at_end_token_(encoder: nn.Module, tokenizer: Tokenizer) -> list[nn.Module]:
    """Let a CLIP pool at the tokenizer's end token instead of the largest id, which may be a concept's.

    Returns:
        The changed modules, for `pool_at_largest_id_`.
    """
    changed = [
        module for module in encoder.modules() if getattr(module, "eos_token_id", None) == POOLS_AT_LARGEST_ID
    ]
    for module in changed:
        module.eos_token_id = tokenizer.eos_token_id
    return changed


def pool_at_largest_id_(modules: Iterable[nn.Module]) -> None:
    """Undo `pool_at_end_token_`."""
    for module in modules:
        cast(Any, module).eos_token_id = POOLS_AT_LARGEST_ID


@dataclass(frozen=True, eq=False)
class AddedToken:
    """What `add_token_` did to a pipeline.

    Attributes:
        embeddings: the new embedding of each text encoder, by the encoder's name.
        pooling: modules that pool at the end token now, for `pool_at_largest_id_`.
    """

    embeddings: dict[str, EmbeddingWrapper]
    pooling: list[nn.Module]


def add_token_(pipe: Pipeline, token: str, superclass: str) -> AddedToken:
    """Add a concept's token to all text encoders of a pipeline, in place, and let a CLIP pool at its end
    token.

    The text encoders are frozen but for the rows of concepts.

    Raises:
        ValueError: a tokenizer cannot take the token; the pipeline is left without it.
    """
    added = AddedToken({}, [])
    try:
        for name, (encoder, tokenizer) in text_encoders_of(pipe).items():
            added.embeddings[name] = add_concept_token_(encoder, tokenizer, token, superclass)
            added.pooling.extend(pool_at_end_token_(encoder, tokenizer))
    except BaseException:
        _remove_token(pipe, token, list(added.embeddings))
        pool_at_largest_id_(added.pooling)
        raise
    return added


def remove_token_(pipe: Pipeline, token: str) -> None:
    """Take a concept's token out of all text encoders of a pipeline, in place; pooling stays."""
    _remove_token(pipe, token, list(text_encoders_of(pipe)))


def _remove_token(pipe: Pipeline, token: str, names: list[str]) -> None:
    encoders = text_encoders_of(pipe)
    for name in reversed(names):
        encoder, tokenizer = encoders[name]
        if token not in concept_tokens(tokenizer):  # the user's, in the place of the one that had it
            continue
        if isinstance(input_embedding(encoder), EmbeddingWrapper):
            remove_concept_token_(encoder, tokenizer, token)
        else:
            unlearn_token_(tokenizer, token)


@contextmanager
def requires_grad_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the `requires_grad` of the modules' present parameters back after the block."""
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
