"""A tokenizer that knows concepts: it checks the prompts it is given, and leaves concepts out of its files.

Pipelines that share a text encoder share its tokenizer, so what the tokenizer does holds for all of them.
"""

import copy
import re
from functools import cache
from typing import Any

from perfusion_pytorch.protocols import Tokenizer
from perfusion_pytorch.tokens import check_token_arrived, check_token_case, forget_token_, tokens_in
from perfusion_pytorch.user_warnings import warn_user

ATTRIBUTE = "_perfusion_tokens"  # of the tokenizer: the concepts' tokens
ADDED = "_perfusion_added"  # of the tokenizer: how many tokens it had, and the ids of those that were added


def concept_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the tokens of the concepts that a tokenizer knows, in the order that they were added."""
    return list(vars(tokenizer).get(ATTRIBUTE, ()))


def concepts_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the tokens of concepts in a text as the tokenizer finds them, from the left."""
    known: dict[str, None] = vars(tokenizer).get(ATTRIBUTE, {})
    return [token for token in tokens_in(text, _added_tokens(tokenizer)) if token in known]


def concepts_by_id(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens of a tokenizer's concepts by their ids."""
    added = _added_tokens(tokenizer)
    return {added[token]: token for token in concept_tokens(tokenizer)}


def _added_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of all added tokens by text; kept until tokens come or go."""
    count = len(tokenizer)
    kept: tuple[int, dict[str, int]] | None = vars(tokenizer).get(ADDED)
    if kept is None or kept[0] != count:
        kept = vars(tokenizer)[ADDED] = (count, tokenizer.get_added_vocab())
    return kept[1]


def learn_token_(tokenizer: Any, token: str) -> None:
    """Add a concept's token to a tokenizer, which from now on checks its prompts, in place."""
    tokenizer.add_tokens([token])
    if ATTRIBUTE not in vars(tokenizer):
        base: Any = type(tokenizer)
        tokenizer.__class__ = _with_concepts(base)
        vars(tokenizer)[ATTRIBUTE] = {}
    vars(tokenizer)[ATTRIBUTE][token] = None
    vars(tokenizer).pop(ADDED, None)


def unlearn_token_(tokenizer: Any, token: str) -> None:
    """Undo `learn_token_`; after the last concept the tokenizer is what it was."""
    forget_token_(tokenizer, token)
    vars(tokenizer).pop(ADDED, None)
    tokens = vars(tokenizer)[ATTRIBUTE]
    tokens.pop(token, None)
    if not tokens:
        del vars(tokenizer)[ATTRIBUTE]
        tokenizer.__class__ = type(tokenizer).__mro__[1]


@cache
def _with_concepts(base: Any) -> Any:
    """Return a subclass of a tokenizer's class, with its name, because files hold that name."""

    def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        encoded = base.__call__(self, text, *args, **kwargs)
        _check_texts(self, text, encoded["input_ids"], kwargs)
        return encoded

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _without_concepts(self).save_pretrained(*args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Let pickle and deepcopy find this class, which no module holds."""
        reduced: Any = base.__reduce_ex__(self, protocol)
        _, (_, *arguments), *state = reduced
        return _new, (base, *arguments), *state

    members = {
        "__call__": call,
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
    for token in reversed(concept_tokens(tokenizer)):
        unlearn_token_(plain, token)
    return plain


def _check_texts(tokenizer: Any, given: Any, ids: Any, options: dict[str, Any]) -> None:
    """Check what a tokenizer made of the concepts in its texts; what is no text or texts is left alone.

    Args:
        tokenizer: with concepts.
        given: what it was called with.
        ids: the token ids that it returned.
        options: of its call.

    Raises:
        ValueError: a concept's token has upper case, or is lost.

    Warns:
        UserWarning: a word looks like a concept's token, but no concept of this name is known.
    """
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        return
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(given, str) and (not rows or not isinstance(rows[0], list)):
        rows = [rows]
    if len(rows) != len(texts):  # a long text may be returned in several rows, so that nothing of it is lost
        return
    added = _added_tokens(tokenizer)
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
