"""Prompts with concepts are checked before they are encoded."""

import inspect
import re
from collections.abc import Mapping
from functools import wraps
from typing import Any

from perfusion_pytorch.pipelines.parts import find_key_lock, find_loaded, loaded_on, text_encoders_of
from perfusion_pytorch.pipelines.replacements import Replacements
from perfusion_pytorch.protocols import Pipeline, Tokenizer
from perfusion_pytorch.tokens import check_token_arrived, check_token_case
from perfusion_pytorch.user_warnings import warn_user

LONGEST = 10_000  # tokens of a prompt, where a tokenizer names no limit


def watch_prompts(pipe: Pipeline) -> None:
    """Let a pipeline check its prompts before it encodes them, and lock their keys in a `global_key_lock`.

    `Replacements.on(pipe).take_back()` undoes it.
    """
    if "encode_prompt" in Replacements.on(pipe):
        return
    encode = pipe.encode_prompt
    signature = inspect.signature(encode)

    @wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if find_loaded(pipe) is None:  # unloaded from another pipeline that shares the denoiser
            return encode(*args, **kwargs)
        check_prompts(pipe, bound.arguments)
        encoded = encode(*args, **kwargs)
        lock = find_key_lock(pipe)
        if lock is not None and bound.arguments.get("prompt") is not None:
            lock.add_prompts(pipe, encode, bound, encoded[0])
        return encoded

    Replacements.on(pipe).put("encode_prompt", encode_prompt)


def texts_in(prompt: str | list[str] | None) -> list[str]:
    """Return the texts of a prompt argument: one, several or none."""
    if prompt is None:
        return []
    return [prompt] if isinstance(prompt, str) else list(prompt)


def check_prompts(pipe: Pipeline, given: Mapping[str, Any]) -> None:
    """Check what the tokenizers will make of the concepts in prompts.

    Args:
        pipe: the pipeline.
        given: the arguments of its `encode_prompt`, by name.

    Raises:
        ValueError: a concept's token has upper case, or is lost: cut off by the length limit, or cleaned
            away.

    Warns:
        UserWarning: a word looks like a concept's token, but no concept of this name is loaded.
    """
    for name, (_, tokenizer) in text_encoders_of(pipe).items():
        number = name.removeprefix("text_encoder")
        limit = given.get("max_sequence_length", min(tokenizer.model_max_length, LONGEST))
        for kind in ("prompt", "negative_prompt"):
            for text in texts_in(given.get(f"{kind}{number}") or given.get(kind)):
                _check_text(pipe, tokenizer, text, limit, is_cleaned=bool(given.get("clean_caption")))


def _check_text(pipe: Any, tokenizer: Tokenizer, text: str, limit: int, *, is_cleaned: bool) -> None:
    """Check one prompt with one tokenizer; `limit` is its largest number of tokens."""
    names = list(loaded_on(pipe).concepts)
    known = tokenizer.get_vocab()
    for word in re.findall(r"<[^<>\s]+>", text):
        if word.lower() not in known:
            warn_user(
                f"No concept named {word} is loaded, so the prompt's word means nothing. Loaded are {names}."
            )
    ids = tokenizer(text, truncation=True, max_length=limit).input_ids
    cleaned = pipe._text_preprocessing(text, clean_caption=True)[0] if is_cleaned else text
    for name in names:
        check_token_case(text, name)
        check_token_arrived(text, name, ids.count(known[name]), limit)
        if text.count(name) > cleaned.count(name):
            raise ValueError(
                f"{name} is cleaned away from {text!r}. Call the pipeline with `clean_caption=False`."
            )
