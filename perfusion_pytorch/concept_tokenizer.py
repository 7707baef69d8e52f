"""A tokenizer that knows concepts: it checks the prompts it is given, and leaves concepts out of its files.

Pipelines that share a text encoder share its tokenizer, so what the tokenizer does holds for all of them.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from perfusion_pytorch.protocols import Tokenizer
from perfusion_pytorch.tokens import check_token_arrived, check_token_case, forget_tokens_, tokens_in
from perfusion_pytorch.user_warnings import warn_user

ATTRIBUTE = "_perfusion_tokens"  # of the tokenizer: the concepts' tokens
ADDED = "_perfusion_added"  # of the tokenizer: how many tokens it had, and the ids of those that were added
REMOVED = "_perfusion_removed"  # of the tokenizer: tokens of removed concepts that it still has
KEEPS = "_perfusion_keeps"  # of the tokenizer: whether it may keep them for now
MOST_REMOVED = 64  # tokens that are kept at most, or as many as there are concepts


def concept_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the tokens of the concepts that a tokenizer knows, in the order that they were added."""
    return list(vars(tokenizer).get(ATTRIBUTE, ()))


def concepts_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the tokens of concepts in a text as the tokenizer finds them, from the left."""
    known: dict[str, None] = vars(tokenizer).get(ATTRIBUTE, {})
    return [token for token in tokens_in(text, added_tokens(tokenizer)) if token in known]


def concepts_by_id(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens of a tokenizer's concepts by their ids."""
    added = added_tokens(tokenizer)
    return {added[token]: token for token in concept_tokens(tokenizer)}


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of all added tokens by text; kept until tokens come or go."""
    state = vars(tokenizer)
    with keeping_removed(tokenizer):
        count = len(tokenizer)
        kept: tuple[int, dict[str, int]] | None = state.get(ADDED)
        if kept is None or kept[0] != count:
            added = tokenizer.get_added_vocab()
            for token in state.get(REMOVED, ()):
                added.pop(token, None)
            kept = state[ADDED] = (count, added)
    return kept[1]


def learn_token_(tokenizer: Any, token: str) -> None:
    """Add a concept's token to a tokenizer, which from now on checks its prompts, in place."""
    tokenizer.add_tokens([token])
    state = vars(tokenizer)
    if ATTRIBUTE not in state:
        base: Any = type(tokenizer)
        tokenizer.__class__ = _with_concepts(base)
        state[ATTRIBUTE], state[REMOVED] = {}, []
    state[ATTRIBUTE][token] = None
    state.pop(ADDED, None)


def unlearn_token_(tokenizer: Any, token: str) -> None:
    """Undo `learn_token_`; after the last concept the tokenizer is what it was.

    Until then, the tokenizer is not written anew for each token, which takes long if there are many. That
    waits until somebody looks for the token, or writes it in a prompt.
    """
    state = vars(tokenizer)
    state.pop(ADDED, None)
    tokens, removed = state[ATTRIBUTE], state[REMOVED]
    tokens.pop(token, None)
    removed.append(token)
    if not tokens:
        forget_tokens_(tokenizer, removed)
        for name in (ATTRIBUTE, REMOVED, ADDED):
            state.pop(name, None)
        tokenizer.__class__ = type(tokenizer).__mro__[1]
    elif len(removed) > max(MOST_REMOVED, len(tokens)):
        _forget_removed(tokenizer)


def _forget_removed(tokenizer: Any) -> None:
    """Take the tokens of removed concepts out of a tokenizer, in place."""
    state = vars(tokenizer)
    removed, state[REMOVED] = state[REMOVED], []
    state.pop(ADDED, None)
    forget_tokens_(tokenizer, removed)


@contextmanager
def keeping_removed(tokenizer: Any, *texts: str) -> Iterator[None]:
    """Let a tokenizer keep tokens of removed concepts in the block, unless a text holds one.

    Args:
        tokenizer: with or without concepts.
        texts: what it will be asked for; `added_tokens` leaves removed ones out in any case.
    """
    state = vars(tokenizer)
    if any(token in text for token in state.get(REMOVED, ()) for text in texts):
        _forget_removed(tokenizer)
    if not state.get(REMOVED) or KEEPS in state:
        yield
        return
    state[KEEPS] = True
    try:
        yield
    finally:
        del state[KEEPS]


@cache
def _with_concepts(base: Any) -> Any:
    """Return a subclass of a tokenizer's class, with its name, because files hold that name."""

    def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        texts = _texts_in(text)
        if texts is None:  # pairs, or words: whoever asks for these may see removed tokens gone
            return base.__call__(self, text, *args, **kwargs)
        with keeping_removed(self, *texts):
            encoded = base.__call__(self, text, *args, **kwargs)
            _check_texts(self, text, texts, encoded["input_ids"], kwargs)
        return encoded

    def tokenize(self: Any, text: str, *args: Any, **kwargs: Any) -> Any:
        with keeping_removed(self, text):
            return base.tokenize(self, text, *args, **kwargs)

    def backend(self: Any) -> Any:
        """Return the tokenizer of the Rust library that all methods use."""
        state = vars(self)
        if state.get(REMOVED) and KEEPS not in state:
            _forget_removed(self)
        return state["_tokenizer"]

    def set_backend(self: Any, value: Any) -> None:
        vars(self)["_tokenizer"] = value

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _without_concepts(self).save_pretrained(*args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Let pickle and deepcopy find this class, which no module holds."""
        reduced: Any = base.__reduce_ex__(self, protocol)
        _, (_, *arguments), *state = reduced
        return _new, (base, *arguments), *state

    members = {
        "__call__": call,
        "tokenize": tokenize,
        "_tokenizer": property(backend, set_backend),
        # diffusers asks for it once for each word of a prompt
        "added_tokens_encoder": property(added_tokens),
        "save_pretrained": save_pretrained,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (base,), members)


def _new(base: Any, *arguments: Any) -> Any:
    """Return a new tokenizer with concepts, whose state pickle sets next."""
    return base.__new__(_with_concepts(base), *arguments)


def _without_concepts(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer that knows no concept."""
    plain = copy.deepcopy(tokenizer)
    for token in concept_tokens(tokenizer):
        unlearn_token_(plain, token)
    return plain


def _texts_in(given: Any) -> list[str] | None:
    """Return the text or texts that a tokenizer was called with, or None where it was something else."""
    texts = [given] if isinstance(given, str) else given
    is_texts = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
    return list(texts) if is_texts else None


def _check_texts(tokenizer: Any, given: Any, texts: list[str], ids: Any, options: dict[str, Any]) -> None:
    """Check what a tokenizer made of the concepts in its texts.

    Args:
        tokenizer: with concepts.
        given: what it was called with.
        texts: the same as a list.
        ids: the token ids that it returned.
        options: of its call.

    Raises:
        ValueError: a concept's token has upper case, or is lost.

    Warns:
        UserWarning: a word looks like a concept's token, but no concept of this name is known.
    """
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(given, str) and (not rows or not isinstance(rows[0], list)):
        rows = [rows]
    if len(rows) != len(texts):  # a long text may be returned in several rows, so that nothing of it is lost
        return
    added = added_tokens(tokenizer)
    limit = options.get("max_length") or tokenizer.model_max_length
    for text, row in zip(texts, rows, strict=True):
        if options.get("truncation"):  # pipelines tokenize twice, with and without it: one warning will do
            _warn_of_unknown_words(tokenizer, text, added)
        found = concepts_in(tokenizer, text)
        for name in dict.fromkeys([*found, *concepts_in(tokenizer, text.lower())]):
            check_token_case(text, name, added)
            check_token_arrived(text, name, found.count(name), row.count(added[name]), limit)


def _warn_of_unknown_words(tokenizer: Any, text: str, added: dict[str, int]) -> None:
    words = [word for word in re.findall(r"<[^<>\s]+>", text) if word.lower() not in added]
    if words and (known := tokenizer.get_vocab()):
        for word in words:
            if word.lower() not in known:
                warn_user(
                    f"No concept named {word} is loaded, so the prompt's word means nothing. "
                    f"Loaded are {concept_tokens(tokenizer)}."
                )
