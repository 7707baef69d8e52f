"""A concept's token in a tokenizer: what it must look like, and whether it arrives in prompts."""

import json
import re
from collections.abc import Callable, Collection
from typing import Any

from beartype import beartype
from torch import Tensor

from perfusion_pytorch.protocols import Tokenizer

# Text of a removed token while later ones stay: of Unicode's private use, so that nobody writes it.
UNWRITTEN = "\ue000{}\ue000"


def check_token_form(token: str) -> None:
    """Raise a ValueError where a concept's token is not one lower-case word."""
    if not token or token != token.lower() or len(token.split()) != 1:
        raise ValueError(
            "`token` must be one lower-case word without white space, since tokenizers lower-case prompts, "
            f"got {token!r}."
        )


def superclass_token_ids(tokenizer: Tokenizer, token: str, superclass: str) -> list[int]:
    """Check that a tokenizer can take a concept's token, and return the token ids of its superclass.

    Nothing is changed. The token must be one lower-case word, new to the tokenizer, with a character that is
    not a letter or a digit (or it would be found within other words); the tokenizer must know the superclass.

    Raises:
        ValueError: the token or the superclass does not fit; the message names a token that does.
    """
    check_token_form(token)
    ids = tokenizer(token, add_special_tokens=False).input_ids
    if knows(tokenizer, token) or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id):
        raise ValueError(
            f"`token` must be new to the tokenizer, but it knows {token!r} already. "
            f"Choose another, such as '<{token.strip('<>')}-2>'."
        )
    if token.isalnum():
        raise ValueError(
            "`token` must not be of letters and digits alone, or it would be found within words. "
            f"Take '<{token}>', got {token!r}."
        )
    superclass_ids: list[int] = tokenizer(superclass, add_special_tokens=False).input_ids
    if not superclass_ids or tokenizer.unk_token_id in superclass_ids:
        raise ValueError(
            f"`superclass` must be one or more words that the tokenizer knows, got {superclass!r}."
        )
    return superclass_ids


def knows(tokenizer: Any, token: str) -> bool:
    """Report whether a tokenizer has a token of this text, in the same time however many it has."""
    found = tokenizer.convert_tokens_to_ids(token)
    return token == tokenizer.unk_token or found not in (None, tokenizer.unk_token_id)


def forget_tokens_(tokenizer: Any, tokens: Collection[str]) -> None:
    """Take added tokens out of a fast tokenizer.

    Ids of added tokens are consecutive, so only the last ones can be freed; an earlier one keeps its id under
    a text that nobody writes, until those after it are gone too.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = backend["added_tokens"]
    for entry in added:
        if entry["content"] in tokens:
            entry["content"] = UNWRITTEN.format(entry["id"])
    while added and not added[-1]["special"] and added[-1]["content"] == UNWRITTEN.format(added[-1]["id"]):
        del added[-1]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))


@beartype
def tokenize_with_concept(tokenizer: Tokenizer, prompts: list[str], token: str) -> Tensor:
    """Tokenize prompts to the tokenizer's full length, and make sure that the concept's token arrives.

    Args:
        tokenizer: a tokenizer that knows the token.
        prompts: b prompts, with or without the token.
        token: the concept's token.

    Returns:
        Token ids, shape (b, n), padded.

    Raises:
        ValueError: the token is unknown, is written with upper case in a prompt, or was cut off by the length
            limit.
    """
    token_id = tokenizer.get_added_vocab().get(token)
    if token_id is None:
        raise ValueError(
            f"The tokenizer does not know {token!r}; its added tokens are "
            f"{sorted(tokenizer.get_added_vocab())}."
        )
    n = tokenizer.model_max_length
    added = tokenizer.get_added_vocab()
    for prompt in prompts:
        check_token_case(prompt, token, added)
    ids: Tensor = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=n, return_tensors="pt"
    ).input_ids
    for prompt, row in zip(prompts, ids.tolist(), strict=True):
        check_token_arrived(prompt, token, tokens_in(prompt, added).count(token), row.count(token_id), n)
    return ids


def tokens_in(text: str, added: Collection[str]) -> list[str]:
    """Return the added tokens in a text as a tokenizer finds them: from the left, the longest one first.

    Args:
        text: a prompt.
        added: the texts of all added tokens.

    Example:
        >>> tokens_in("my-car2 and my-car", ["my-car", "my-car2"])
        ['my-car2', 'my-car']
    """
    return _pattern(text, added).findall(text)


def with_tokens_replaced(text: str, added: Collection[str], replacement: Callable[[str], str]) -> str:
    """Return a text with each of its added tokens replaced.

    Example:
        >>> with_tokens_replaced("my-car2 and my-car", ["my-car", "my-car2"], str.upper)
        'MY-CAR2 and MY-CAR'
    """
    return _pattern(text, added).sub(lambda found: replacement(found.group()), text)


def _pattern(text: str, added: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that finds added tokens in a text, the longest one first; without any, nothing.

    It is of those that are in the text at all: a pattern of a thousand takes long to compile.
    """
    present = sorted((token for token in added if token in text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, present)) or r"(?!)")


def check_token_case(prompt: str, token: str, added: Collection[str]) -> None:
    """Raise a ValueError where a prompt writes a concept's token with upper case.

    Args:
        prompt: the prompt.
        token: the concept's token.
        added: the texts of all tokens that were added to the tokenizer.
    """
    if tokens_in(prompt.lower(), added).count(token) != tokens_in(prompt, added).count(token):
        raise ValueError(
            f"The concept's token must be written {token!r}, in lower case, got the prompt {prompt!r}."
        )


def check_token_arrived(prompt: str, token: str, expected: int, count: int, max_length: int) -> None:
    """Raise a ValueError where a tokenizer lost a concept's token from a prompt.

    Args:
        prompt: the prompt.
        token: the concept's token.
        expected: how often the prompt holds it.
        count: how often the token is among the prompt's token ids.
        max_length: to how many tokens the prompt was cut, with those at its start and end.
    """
    if expected > count:
        raise ValueError(
            f"{token!r} must stand within the prompt's first {max_length - 2} tokens, apart from other "
            f"words, but was lost from the prompt {prompt!r}."
        )
