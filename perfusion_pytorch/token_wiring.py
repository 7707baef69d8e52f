"""Concept tokens of a text encoder and its tokenizer: they are added and removed together."""

from typing import Any, cast

from torch import nn

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.concept_tokenizer import (
    added_tokens,
    concept_tokens,
    keeping_removed,
    learn_token_,
    unlearn_token_,
)
from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.module_hooks import take_over_hooks_
from perfusion_pytorch.protocols import Tokenizer
from perfusion_pytorch.tokens import superclass_token_ids


@beartype
def add_concept_token_(
    text_encoder: nn.Module, tokenizer: Tokenizer, token: str, superclass: str
) -> EmbeddingWrapper:
    """Teach a tokenizer and its text encoder a concept's token, in place.

    The text encoder is frozen but for the rows of its concepts. A further concept gets a new embedding layer
    with the rows of those before it: make the optimizer after the last.

    Args:
        text_encoder: a transformers text encoder, with `get_input_embeddings` and `set_input_embeddings`.
        tokenizer: its tokenizer.
        token: the new token, lower case, such as "<teddy-1>".
        superclass: one or more known words, such as "teddy bear".

    Returns:
        The new embedding layer.

    Raises:
        ValueError: the token has upper case or white space or is known already, or the superclass has no
            known word.
    """
    with keeping_removed(tokenizer, token, superclass):
        return _add_concept_token_(text_encoder, tokenizer, token, superclass)


def _add_concept_token_(
    text_encoder: nn.Module, tokenizer: Tokenizer, token: str, superclass: str
) -> EmbeddingWrapper:
    superclass_ids = superclass_token_ids(tokenizer, token, superclass)
    concept_id = len(tokenizer)
    present = input_embedding(text_encoder)
    if isinstance(present, EmbeddingWrapper):
        wrapper = present.with_concept(concept_id, superclass_ids)
    else:
        wrapper = EmbeddingWrapper(present, [concept_id], [superclass_ids])
    learn_token_(tokenizer, token)
    text_encoder.requires_grad_(False)
    wrapper.concept_embedding.requires_grad_(True)
    _put_in_place(text_encoder, present, wrapper)
    return wrapper


def input_embedding(text_encoder: nn.Module) -> nn.Module:
    """Return a text encoder's token embedding: wrapped, where it has concepts."""
    embedding: nn.Module = cast(Any, text_encoder).get_input_embeddings()  # of transformers, not of nn.Module
    return embedding


def _put_in_place(text_encoder: nn.Module, present: nn.Module, wrapper: EmbeddingWrapper) -> None:
    """Put a wrapper where the text encoder has its embedding: in T5 at two places, as two modules."""
    take_over_hooks_(wrapper, present)
    if isinstance(present, EmbeddingWrapper):
        wrapper.places = present.places
    else:
        wrapper.places = [
            (parent, attribute, child)
            for parent in text_encoder.modules()
            for attribute, child in parent._modules.items()
            if type(child) is nn.Embedding and child.weight is present.weight
        ]
    for parent, attribute, _ in wrapper.places:
        setattr(parent, attribute, wrapper)


def wrap_again_(text_encoder: nn.Module, tokenizer: Tokenizer, before: EmbeddingWrapper) -> list[str]:
    """Put concepts on the new embedding that a text encoder was given in the place of the wrapped one.

    Textual inversion is unloaded so: all tokens are counted anew, and those of concepts may be gone.

    Args:
        text_encoder: it has a plain embedding now.
        tokenizer: its tokenizer.
        before: the embedding with concepts that it had.

    Returns:
        The tokens that the tokenizer had lost, and has been given again.
    """
    present = input_embedding(text_encoder)
    tokens = concept_tokens(tokenizer)
    lost = [token for token in tokens if token not in tokenizer.get_added_vocab()]
    for token in lost:
        tokenizer.add_tokens([token])
    known = tokenizer.get_added_vocab()
    ids = [known[token] for token in tokens]
    wrapper = EmbeddingWrapper.with_rows(
        cast(nn.Embedding, present), ids, before.superclass_ids, before.concept_embedding
    )
    wrapper.concept_embedding.requires_grad_(before.concept_embedding.requires_grad)
    _put_in_place(text_encoder, present, wrapper)
    return lost


@beartype
def remove_concept_token_(text_encoder: nn.Module, tokenizer: Tokenizer, token: str) -> None:
    """Take a concept's token out of a tokenizer and its text encoder, in place.

    With the last concept, the embedding that was there before the first is back: the very same module.
    Tokens that others added keep their ids: where some were added after this one, its id stays taken, by a
    text that nobody writes.

    Raises:
        ValueError: the token is not one of the text encoder's concepts.

    Example:
        remove_concept_token_(pipe.text_encoder, pipe.tokenizer, "<teddy-1>")
    """
    embedding = input_embedding(text_encoder)
    token_id = added_tokens(tokenizer).get(token)
    if not isinstance(embedding, EmbeddingWrapper) or token_id not in embedding.concept_ids:
        raise ValueError(f"`token` must be one of the text encoder's concepts, got {token!r}.")
    if len(embedding.concept_ids) > 1:
        wrapper = embedding.without_concept(token_id)
        wrapper.concept_embedding.requires_grad_(embedding.concept_embedding.requires_grad)
        _put_in_place(text_encoder, embedding, wrapper)
    else:
        restored = embedding.original()
        for parent, attribute, child in embedding.places:
            child.weight = restored.weight
            child.num_embeddings = restored.num_embeddings
            take_over_hooks_(child, embedding)
            setattr(parent, attribute, child)
    unlearn_token_(tokenizer, token)
