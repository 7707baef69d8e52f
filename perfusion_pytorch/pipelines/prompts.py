"""Prompts with concepts: checked before they are encoded, and their keys locked to the superclass prompt's where that is wanted."""

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

import torch
import torch.nn.functional as F
from beartype import beartype

from perfusion_pytorch.pipelines.parts import CONCEPTS, denoiser_of, loaded_on, text_encoders_of
from perfusion_pytorch.wiring import base_layer, cross_attention_projections

KEY_LOCK = "_perfusion_key_lock"  # attribute of the denoiser


@contextmanager
@beartype
def global_key_lock(pipe) -> Iterator[None]:
    """Lock all keys of a prompt, and not the concept's alone: they are those of the prompt with the superclass in the concept's place.

    Values are edited as usual (Perfusion, "global key-locking"). More of the base model's composition stays, and β is lower, 0.4 to 0.6.
    Call the pipeline within the block. Rows of the batch whose encodings are not those of a prompt with a concept, such as the empty
    prompt's, keep their keys.

    Raises:
        ValueError: no concept is loaded.
        RuntimeError: the pipeline is in such a block already.

    Example:
        with global_key_lock(pipe):
            pipe("a <teddy-1> in a boat")
    """
    denoiser = denoiser_of(pipe)
    if getattr(denoiser, KEY_LOCK, None) is not None:
        raise RuntimeError("`global_key_lock` cannot be nested on one pipeline. Leave the outer block first.")
    loaded_on(pipe)
    watch_prompts(pipe)
    lock = _KeyLock(denoiser)
    lock.hook()
    setattr(denoiser, KEY_LOCK, lock)
    try:
        yield
    finally:
        delattr(denoiser, KEY_LOCK)
        lock.unhook()


class _KeyLock:
    """What a `global_key_lock` does to the layers of a denoiser.

    A pair is of a prompt with a concept: its encodings (n, d), and those that its keys are made of (n, d).
    """

    def __init__(self, denoiser):
        self.denoiser, self.pairs, self.at_layers, self.handles = denoiser, [], [], []

    def hook(self):
        """Put hooks on the key layers that the denoiser has now: around a LoRA, so that it too sees the superclass, and within."""
        self.unhook()
        keys = [name for name, is_key in cross_attention_projections(self.denoiser) if is_key]
        for outer, inner in {
            self.denoiser.get_submodule(name): base_layer(self.denoiser, name)[2] for name in keys
        }.items():
            self.handles += [
                outer.register_forward_pre_hook(self._take_other),
                inner.register_forward_hook(self._without_edit),
            ]

    def unhook(self):
        while self.handles:
            self.handles.pop().remove()

    def add(self, one, other):
        if not any(torch.equal(one, known) for known, _ in self.pairs if known.shape == one.shape):
            self.pairs.append((one, other))

    @torch.no_grad()
    def _take_other(self, layer, arguments):
        text_enc, *rest = arguments
        project = getattr(self.denoiser, "caption_projection", None) or (
            lambda e: e
        )  # PixArt's layers stand behind one
        for pair in self.pairs[
            len(self.at_layers) :
        ]:  # within the denoiser's call, when its weights are in place
            self.at_layers.append(tuple(project(encodings[None])[0] for encodings in pair))
        self.locked = torch.zeros(len(text_enc), 1, 1, dtype=torch.bool, device=text_enc.device)
        for one, other in self.at_layers:
            if one.shape == text_enc.shape[1:]:
                # Up to rounding, since a prompt may have been encoded in another batch; other prompts differ by far more.
                here = (text_enc - one.to(text_enc)).abs().amax(
                    dim=(1, 2), keepdim=True
                ) <= 1e-2 * one.abs().max().to(text_enc)
                text_enc, self.locked = torch.where(here, other.to(text_enc), text_enc), self.locked | here
        return text_enc, *rest

    def _without_edit(self, layer, arguments, keys):
        if not self.at_layers:
            return keys
        if layer.weight.is_meta:
            raise RuntimeError(
                "`global_key_lock` needs the weights in place, but they are offloaded piece by piece. "
                "Use `enable_model_cpu_offload` instead of `enable_sequential_cpu_offload`."
            )
        return torch.where(self.locked, F.linear(arguments[0], layer.weight, layer.bias), keys)


def watch_prompts(pipe):
    """Let the pipeline check its prompts before it encodes them; `vars(pipe).pop("encode_prompt")` takes that back."""
    if "encode_prompt" in vars(pipe):
        return
    encode = pipe.encode_prompt
    signature = inspect.signature(encode)

    @wraps(encode)
    def encode_prompt(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if (
            getattr(denoiser_of(pipe), CONCEPTS, None) is None
        ):  # unloaded from another pipeline that shares the denoiser
            return encode(*args, **kwargs)
        _check_prompts(pipe, bound.arguments)
        encoded, lock = encode(*args, **kwargs), getattr(denoiser_of(pipe), KEY_LOCK, None)
        if lock is not None and bound.arguments.get("prompt") is not None:
            for one, other in _key_locks(pipe, encode, bound, encoded[0]):
                lock.add(one, other)
        return encoded

    pipe.encode_prompt = encode_prompt


def _texts(value):
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _check_prompts(pipe, given):
    """Look at what the tokenizers will make of the concepts in prompts.

    Args:
        pipe: the pipeline.
        given: the arguments of its `encode_prompt`, by name.

    Raises:
        ValueError: a concept's token has upper case, or is lost: cut off by the length limit, or cleaned away.

    Warns:
        UserWarning: a word looks like a concept's token, but none of this name is loaded.
    """
    names = list(loaded_on(pipe).concepts)
    for number, (_, tokenizer) in zip(("", "_2", "_3"), text_encoders_of(pipe).values(), strict=False):
        limit = given.get("max_sequence_length", min(tokenizer.model_max_length, 10_000))
        known = tokenizer.get_vocab()
        values = [given.get(f"{kind}{number}") or given.get(kind) for kind in ("prompt", "negative_prompt")]
        for text in [text for value in values for text in _texts(value)]:
            for word in re.findall(r"<[^<>\s]+>", text):
                if word.lower() not in known:
                    warnings.warn(
                        f"No concept named {word} is loaded, so the prompt's word means nothing. Loaded are {names}.",
                        stacklevel=4,
                    )
            ids = tokenizer(text, truncation=True, max_length=limit).input_ids
            cleaned = (
                pipe._text_preprocessing(text, clean_caption=True)[0] if given.get("clean_caption") else text
            )
            for name in names:
                if text.lower().count(name) != text.count(name):
                    raise ValueError(
                        f"The concept's token must be written {name}, in lower case, got the prompt {text!r}."
                    )
                if text.count(name) > ids.count(known[name]):
                    raise ValueError(
                        f"{name} must stand within the prompt's first {limit - 2} tokens, but was cut off from {text!r}."
                    )
                if text.count(name) > cleaned.count(name):
                    raise ValueError(
                        f"{name} is cleaned away from {text!r}. Call the pipeline with `clean_caption=False`."
                    )


@torch.no_grad()
def _key_locks(pipe, encode, bound, encodings):
    """Yield, for each row of a prompt with a concept, its encodings and those of its superclass prompt, aligned.

    Args:
        pipe, encode: the pipeline, and its own `encode_prompt`.
        bound: the arguments of the call.
        encodings: what it returned, shape (b, n, d).

    Raises:
        ValueError: the text encoders get different prompts, so that a concept has no one position.
    """
    loaded, given = loaded_on(pipe), bound.arguments
    for key in ("prompt_2", "prompt_3"):
        if given.get(key) is not None and _texts(given[key]) != _texts(given["prompt"]):
            raise ValueError(
                f"`global_key_lock` needs one prompt for all text encoders, got {given['prompt']!r} and {given[key]!r}."
            )
    _, tokenizer = next(iter(text_encoders_of(pipe).values()))
    texts = {
        key: [_with_superclass(text, loaded) for text in _texts(given.get(key))]
        for key in ("prompt", "prompt_2", "prompt_3")
    }
    changed = inspect.BoundArguments(
        bound.signature, given | {key: value for key, value in texts.items() if value}
    )
    plain, prompts = encode(*changed.args, **changed.kwargs)[0], _texts(given["prompt"])
    repeats, n = len(encodings) // len(prompts), encodings.shape[1]
    lengths = {
        tokenizer.convert_tokens_to_ids(name): len(
            tokenizer(concept.superclass, add_special_tokens=False).input_ids
        )
        for name, concept in loaded.concepts.items()
    }
    for row, (one, other) in enumerate(zip(encodings, plain, strict=True)):
        text = prompts[row // repeats]
        if not any(name in text for name in loaded.concepts):
            continue
        if hasattr(pipe, "maybe_convert_prompt"):
            text = pipe.maybe_convert_prompt(
                text, tokenizer
            )  # a textual inversion of several vectors is written out
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=n).input_ids
        # Of a superclass of several tokens all but the last are left out; past the end the last row stands in.
        shift, where = 0, []
        for position, token_id in enumerate(ids):
            shift += lengths.get(token_id, 1) - 1
            where.append(min(position + shift, n - 1))
        yield one, other[where]


def _with_superclass(text, loaded):
    for name, concept in loaded.concepts.items():
        text = text.replace(name, concept.superclass)
    return text
