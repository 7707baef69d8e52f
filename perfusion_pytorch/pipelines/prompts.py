"""A pipeline's `encode_prompt` while concepts are loaded.

It tells the layers which concepts its prompts hold, locks keys, and finds concepts that are cleaned away.

What the tokenizer can check of a prompt, it checks itself; see `concept_tokenizer.py`.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from perfusion_pytorch.concept_tokenizer import concept_tokens
from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.pipelines.encoded_prompts import remember_prompts, texts_in
from perfusion_pytorch.pipelines.parts import find_key_lock, find_loaded, text_encoders_of
from perfusion_pytorch.pipelines.replacements import Replacements
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.token_wiring import input_embedding
from perfusion_pytorch.tokens import tokens_in
from perfusion_pytorch.user_warnings import warn_user


def watch_prompts(pipe: Pipeline) -> None:
    """Let a pipeline check that its prompts keep their concepts, and lock keys in a `global_key_lock`.

    `Replacements.on(pipe).take_back()` undoes it.
    """
    if "encode_prompt" not in Replacements.on(pipe):
        own = vars(pipe).get("encode_prompt")
        Replacements.on(pipe).put("encode_prompt", WatchedPrompts(pipe, own))


class WatchedPrompts:
    """Stands in for a pipeline's `encode_prompt`.

    An object and not a closure, so that a copy of the pipeline, or its pickle, has one of its own.

    Args:
        pipe: the pipeline.
        own: what the pipeline itself had of this name, or None if only its class has it.
    """

    def __init__(self, pipe: Pipeline, own: Any) -> None:
        self.pipe = pipe
        self.own = own

    @property
    def encode(self) -> Any:
        """The pipeline's own method."""
        return self.own or type(self.pipe).encode_prompt.__get__(self.pipe)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.encode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encode = self.encode
        bound = inspect.signature(encode).bind(*args, **kwargs)
        loaded = find_loaded(self.pipe)
        if loaded is None:  # unloaded by another pipeline, or this one's denoiser is another
            _warn_of_missing_edits(self.pipe, bound.arguments)
            return encode(*args, **kwargs)
        _check_same_parts(self.pipe, list(loaded.concepts), bound.arguments)
        _check_cleaned(self.pipe, bound.arguments)
        encoded = encode(*args, **kwargs)
        remember_prompts(self.pipe, loaded.concepts, bound.arguments, encoded)
        lock = find_key_lock(self.pipe)
        if lock is not None and bound.arguments.get("prompt") is not None:
            lock.add_prompts(self.pipe, encode, bound, encoded[0])
        return encoded


def _warn_of_missing_edits(pipe: Pipeline, given: Mapping[str, Any]) -> None:
    """Warn where a prompt holds concepts that a pipeline's denoiser does not have."""
    for _, tokenizer in text_encoders_of(pipe).values():
        names = concept_tokens(tokenizer)
        found = [name for text in texts_in(given.get("prompt")) for name in tokens_in(text, names)]
        if found:
            warn_user(
                f"{found[0]} is loaded on another denoiser than the pipeline has now, so that its embedding "
                "acts alone. Load it on this pipeline."
            )
            return


def _check_same_parts(pipe: Pipeline, names: Collection[str], given: Mapping[str, Any]) -> None:
    """Raise a ValueError where a prompt's concepts are unknown to a text encoder that replaced another."""
    for key, (encoder, tokenizer) in text_encoders_of(pipe).items():
        known = concept_tokens(tokenizer) if isinstance(input_embedding(encoder), EmbeddingWrapper) else []
        for text in (*texts_in(given.get("prompt")), *texts_in(given.get("negative_prompt"))):
            unknown = [name for name in tokens_in(text, names) if name not in known]
            if unknown:
                raise ValueError(
                    f"{unknown[0]} must be known to the pipeline's {key} and its tokenizer, but one of them "
                    "was replaced after it was loaded. Call `unload_concepts`, and load it again."
                )


def _check_cleaned(pipe: Any, given: Mapping[str, Any]) -> None:
    """Raise a ValueError where `clean_caption` takes a concept's token for a tag, and removes it.

    Args:
        pipe: the pipeline.
        given: the arguments of its `encode_prompt`, by name.
    """
    if not given.get("clean_caption"):
        return
    for _, tokenizer in text_encoders_of(pipe).values():
        added = tokenizer.get_added_vocab()
        for text in (*texts_in(given.get("prompt")), *texts_in(given.get("negative_prompt"))):
            left = tokens_in(pipe._text_preprocessing(text, clean_caption=True)[0], added)
            for name in tokens_in(text, added):
                if name not in left:
                    raise ValueError(
                        f"{name} is cleaned away from {text!r}. Call the pipeline with `clean_caption=False`."
                    )
