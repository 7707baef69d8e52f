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

from perfusion_pytorch.pipeline_parts import CONCEPTS, _denoiser, _loaded, _text_encoders
from perfusion_pytorch.rank1_edit import Rank1EditModule

KEY_LOCKS = "_perfusion_key_locks"  # attribute of the pipeline


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
    if getattr(pipe, KEY_LOCKS, None) is not None:
        raise RuntimeError("`global_key_lock` cannot be nested on one pipeline. Leave the outer block first.")
    _loaded(pipe)
    _watch_prompts(pipe)
    pairs = []  # of each prompt with a concept: its encodings at the layers (n, d), and those that its keys are made of (n, d)

    def lock(layer, arguments, keys):
        (text_enc,) = arguments
        for one, other in pairs:
            if layer.weight.is_meta:
                raise RuntimeError(
                    "`global_key_lock` needs the weights in place, but they are offloaded piece by piece. "
                    "Use `enable_model_cpu_offload` instead of `enable_sequential_cpu_offload`."
                )
            if one.shape == text_enc.shape[1:]:
                # Up to rounding, since a prompt may have been encoded in another batch; other prompts differ by far more.
                here = (text_enc - one.to(text_enc)).abs().amax(dim=(1, 2)) <= 1e-2 * one.abs().max().to(text_enc)
                keys = torch.where(here[:, None, None], F.linear(other.to(text_enc), layer.weight, layer.bias), keys)
        return keys

    layers = [m for m in _denoiser(pipe).modules() if isinstance(m, Rank1EditModule) and m.is_key_proj]
    handles = [layer.register_forward_hook(lock) for layer in layers]
    setattr(pipe, KEY_LOCKS, pairs)
    try:
        yield
    finally:
        delattr(pipe, KEY_LOCKS)
        for handle in handles:
            handle.remove()


def _watch_prompts(pipe):
    """Let the pipeline check its prompts before it encodes them; `vars(pipe).pop("encode_prompt")` takes that back."""
    if "encode_prompt" in vars(pipe):
        return
    encode = pipe.encode_prompt
    signature = inspect.signature(encode)

    @wraps(encode)
    def encode_prompt(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if getattr(_denoiser(pipe), CONCEPTS, None) is None:  # unloaded from another pipeline that shares the denoiser
            return encode(*args, **kwargs)
        _check_prompts(list(_loaded(pipe).concepts), _text_encoders(pipe), bound.arguments)
        encoded = encode(*args, **kwargs)
        if getattr(pipe, KEY_LOCKS, None) is not None and bound.arguments.get("prompt") is not None:
            getattr(pipe, KEY_LOCKS).extend(_key_locks(pipe, encode, bound, encoded[0]))
        return encoded

    pipe.encode_prompt = encode_prompt


def _texts(value):
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _check_prompts(names, encoders, given):
    """Look at what the tokenizers will make of the concepts in prompts.

    Raises:
        ValueError: a concept's token has upper case, or is cut off by the length limit.

    Warns:
        UserWarning: a word looks like a concept's token, but none of this name is loaded.
    """
    for number, (_, tokenizer) in zip(("", "_2", "_3"), encoders.values(), strict=False):
        limit = given.get("max_sequence_length", min(tokenizer.model_max_length, 10_000))
        known = tokenizer.get_vocab()
        for text in _texts(given.get(f"prompt{number}") or given.get("prompt")):
            for word in re.findall(r"<[^<>\s]+>", text):
                if word.lower() not in known:
                    warnings.warn(
                        f"No concept named {word} is loaded, so the prompt's word means nothing. Loaded are {names}.", stacklevel=4
                    )
            ids = tokenizer(text, truncation=True, max_length=limit).input_ids
            for name in names:
                if text.lower().count(name) != text.count(name):
                    raise ValueError(f"The concept's token must be written {name}, in lower case, got the prompt {text!r}.")
                if text.count(name) > ids.count(known[name]):
                    raise ValueError(f"{name} must stand within the prompt's first {limit - 2} tokens, but was cut off from {text!r}.")


@torch.no_grad()
def _key_locks(pipe, encode, bound, encodings):
    """Yield, for each row of a prompt with a concept, its encodings and those of its superclass prompt, aligned, as the layers see them.

    Args:
        pipe, encode: the pipeline, and its own `encode_prompt`.
        bound: the arguments of the call.
        encodings: what it returned, shape (b, n, d).
    """
    loaded, given = _loaded(pipe), bound.arguments
    _, tokenizer = next(iter(_text_encoders(pipe).values()))
    texts = {key: [_with_superclass(text, loaded) for text in _texts(given.get(key))] for key in ("prompt", "prompt_2", "prompt_3")}
    changed = inspect.BoundArguments(bound.signature, given | {key: value for key, value in texts.items() if value})
    plain, prompts = encode(*changed.args, **changed.kwargs)[0], _texts(given["prompt"])
    repeats, n = len(encodings) // len(prompts), encodings.shape[1]
    lengths = {
        tokenizer.convert_tokens_to_ids(name): len(tokenizer(concept.superclass, add_special_tokens=False).input_ids)
        for name, concept in loaded.concepts.items()
    }
    project = getattr(_denoiser(pipe), "caption_projection", None) or (lambda e: e)  # PixArt's layers stand behind one
    for row, (one, other) in enumerate(zip(encodings, plain, strict=True)):
        text = prompts[row // repeats]
        if not any(name in text for name in loaded.concepts):
            continue
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=n).input_ids
        # Of a superclass of several tokens all but the last are left out; past the end the last row stands in.
        shift, where = 0, []
        for position, token_id in enumerate(ids):
            shift += lengths.get(token_id, 1) - 1
            where.append(min(position + shift, n - 1))
        yield project(one[None])[0], project(other[where][None])[0]


def _with_superclass(text, loaded):
    for name, concept in loaded.concepts.items():
        text = text.replace(name, concept.superclass)
    return text
