"""Concepts on diffusers pipelines, in the verbs that users of LoRA know: load, set, disable, delete, unload, save.

A pipeline needs nothing but its usual parts: a `unet` or a `transformer`, and text encoders with their tokenizers. What is loaded is
remembered by the denoiser, so that pipelines that share it (`from_pipe`) share its concepts.
"""

import inspect
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import chain, count

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import nn

from perfusion_pytorch.checks import warn_if_parallel
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.embedding import EmbeddingWrapper, add_concept_token_, check_concept_token, remove_concept_token_
from perfusion_pytorch.functional import overlap_condition
from perfusion_pytorch.rank1_edit import Rank1EditModule
from perfusion_pytorch.wiring import _base_layer, _cross_attention_projections, unwrap_cross_attentions_, wrap_cross_attentions_

CONCEPTS = "_perfusion_concepts"  # attribute of the denoiser
KEY_LOCKS = "_perfusion_key_locks"  # attribute of the pipeline
WATCHED = ("encode_prompt", "save_pretrained")  # methods of the pipeline that are watched while concepts are loaded
MAX_OVERLAP = 1e6  # above this condition number, concepts are the same up to rounding
POOLS_AT_LARGEST_ID = 2  # the end token's id in shipped CLIP configurations, which makes CLIP pool at the largest id, a concept's


@dataclass
class LoadedConcepts:
    """What is loaded on a denoiser, by token."""

    concepts: dict[str, Concept] = field(default_factory=dict)  # with the gate that is set as their `eval_gate`
    active: list[str] = field(default_factory=list)
    is_enabled: bool = True
    pooling: list[nn.Module] = field(default_factory=list)  # modules whose end token was put right


@beartype
def load_concept(pipe, path, *, token: str | None = None) -> str:
    """Load a concept file on a pipeline; the concept is active at once, beside those loaded before.

    Args:
        pipe: a diffusers pipeline of the base model that the concept was trained on.
        path: the concept file.
        token: the concept's word in prompts, lower case; by default the file's own, with another number where that is taken.

    Returns:
        The concept's name: its token.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or does not fit the pipeline or the concepts loaded before. The pipeline is left as it was.

    Example:
        name = load_concept(pipe, "teddy.safetensors")
        pipe(f"a photo of {name} on the beach")
    """
    concept, encoders = Concept.load(path), _text_encoders(pipe)
    concept = replace(concept, token=token or _free_token(concept.token, encoders))
    _check_fits(concept, pipe)
    _attach(pipe, concept)
    return concept.token


@beartype
def save_concept(pipe, path, *, name: str | None = None, dtype: torch.dtype = torch.float16) -> None:
    """Save a concept that was just trained on a pipeline, or one that is loaded, as a concept file.

    Args:
        pipe: a pipeline whose text encoders know the concept's token and whose denoiser was wrapped and trained with it.
        path: where to; written whole or not at all.
        name: which concept, by its token; not needed where there is but one.
        dtype: see `Concept.save`.

    Raises:
        ValueError: there is no such concept, several where none was named, or it was never trained.
    """
    denoiser, encoders = _denoiser(pipe), _text_encoders(pipe)
    loaded = getattr(denoiser, CONCEPTS, None)
    embeddings = {key: encoder.get_input_embeddings() for key, (encoder, _) in encoders.items()}
    if not all(isinstance(embedding, EmbeddingWrapper) for embedding in embeddings.values()):
        raise ValueError("The pipeline's text encoders know no concept. Call `add_concept_token_` and train, or `load_concept`.")
    first = next(iter(encoders))
    tokenizer = encoders[first][1]
    known = tokenizer.convert_ids_to_tokens(list(embeddings[first].concept_ids))
    if name is None and len(known) == 1:
        name = known[0]
    if name not in known:
        raise ValueError(f"`name` must be one of the pipeline's concepts {known}, got {name!r}.")
    if loaded is not None:
        concept = loaded.concepts[name]
    else:
        concept_id = known.index(name)
        concept = Concept.of_model(
            denoiser,
            token=name,
            superclass=tokenizer.decode(list(embeddings[first].superclass_ids[concept_id])).strip(),
            embeddings={key: embedding.concept_embedding[concept_id] for key, embedding in embeddings.items()},
            concept_id=concept_id,
        )
    concept.save(path, dtype=dtype)


@beartype
def set_concepts(
    pipe,
    names: str | Collection[str],
    *,
    beta: float | int | Mapping[str, float | int] | None = None,
    temperature: float | int | Mapping[str, float | int] | None = None,
) -> None:
    """Choose which of the loaded concepts are active, and how strongly.

    Args:
        pipe: a pipeline with loaded concepts.
        names: the concepts that are active from now on; a token of the others means its embedding alone.
        beta: gate bias, for all named concepts or by name: lower shows more of the concept, higher follows the prompt more closely.
        temperature: gate temperature, above 0, likewise.

    Raises:
        ValueError: a concept is not loaded, or a gate is out of its range; nothing is changed.
    """
    loaded = _loaded(pipe)
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    given = {"beta": beta, "temperature": temperature}
    _check_known(loaded, [*names, *(key for values in given.values() if isinstance(values, Mapping) for key in values)])
    concepts = dict(loaded.concepts)
    for name in names:
        gate = [v.get(name) if isinstance(v, Mapping) else v for v in given.values()]
        gate = tuple(float(old if new is None else new) for new, old in zip(gate, concepts[name].eval_gate, strict=True))
        concepts[name] = replace(concepts[name], eval_gate=gate)
    if names:
        _check_apart([loaded.concepts[name] for name in names])
    loaded.concepts, loaded.active, loaded.is_enabled = concepts, names, True
    _apply(pipe, loaded)


@beartype
def get_list_concepts(pipe) -> list[str]:
    """Return the names of all loaded concepts."""
    return list(getattr(_denoiser(pipe), CONCEPTS, LoadedConcepts()).concepts)


@beartype
def get_active_concepts(pipe) -> list[str]:
    """Return the names of the concepts that are active."""
    loaded = getattr(_denoiser(pipe), CONCEPTS, LoadedConcepts())
    return list(loaded.active) if loaded.is_enabled else []


@beartype
def disable_concepts(pipe) -> None:
    """Switch all concepts off; they stay loaded."""
    loaded = _loaded(pipe)
    loaded.is_enabled = False
    _apply(pipe, loaded)


@beartype
def enable_concepts(pipe) -> None:
    """Switch the concepts on again that were active before `disable_concepts`."""
    loaded = _loaded(pipe)
    loaded.is_enabled = True
    _apply(pipe, loaded)


@beartype
def delete_concepts(pipe, names: str | Collection[str]) -> None:
    """Unload some concepts; with the last one the pipeline is what it was before the first.

    Raises:
        ValueError: a concept is not loaded; nothing is changed.
    """
    loaded = _loaded(pipe)
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    _check_known(loaded, names)
    for name in reversed(names):
        for encoder, tokenizer in _text_encoders(pipe).values():
            remove_concept_token_(encoder, tokenizer, name)
        del loaded.concepts[name]
    loaded.active = [name for name in loaded.active if name in loaded.concepts]
    _apply(pipe, loaded)


@beartype
def unload_concepts(pipe) -> None:
    """Unload all concepts: the pipeline is what it was, with the very same modules."""
    names = get_list_concepts(pipe)
    if names:
        delete_concepts(pipe, names)


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
    _watch(pipe)
    pairs = []  # of each prompt with a concept: its encodings at the layers (n, d), and those that its keys are made of (n, d)

    def lock(layer, arguments, keys):
        (text_enc,) = arguments
        for one, other in pairs:
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


def _denoiser(pipe):
    """Return the pipeline's UNet or transformer."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(denoiser, nn.Module):
        raise ValueError(f"`pipe` must be a diffusers pipeline with a `unet` or a `transformer`, got {type(pipe).__name__}.")
    return denoiser


def _text_encoders(pipe):
    """Return the pipeline's text encoders with their tokenizers, by the encoder's name."""
    pairs = {f"text_encoder{n}": (getattr(pipe, f"text_encoder{n}", None), getattr(pipe, f"tokenizer{n}", None)) for n in ("", "_2", "_3")}
    return {name: pair for name, pair in pairs.items() if None not in pair}


def _loaded(pipe):
    loaded = getattr(_denoiser(pipe), CONCEPTS, None)
    if loaded is None:
        raise ValueError("The pipeline has no loaded concept. Call `load_concept` first.")
    list(_cross_attention_projections(_denoiser(pipe)))  # raises where they are fused, so that the edits would be bypassed
    return loaded


def _check_known(loaded, names):
    unknown = [name for name in names if name not in loaded.concepts]
    if unknown:
        raise ValueError(f"The concepts {unknown} are not loaded. Loaded are {list(loaded.concepts)}.")


def _free_token(token, encoders):
    """Return the token, with the next free number where a tokenizer knows it already."""
    taken = set().union(*(tokenizer.get_vocab() for _, tokenizer in encoders.values()))
    stem = re.sub(r"-\d+$", "", token.strip("<>"))
    return next(t for t in chain([token], (f"<{stem}-{n}>" for n in count(2))) if t not in taken)


def _check_fits(concept, pipe):
    """Raise a ValueError that says what does not fit, where a concept is not for this pipeline or not for its other concepts."""
    denoiser, encoders = _denoiser(pipe), _text_encoders(pipe)
    loaded = getattr(denoiser, CONCEPTS, None)
    name, model = concept.token, type(denoiser).__name__
    if loaded is None and any(isinstance(module, Rank1EditModule) for module in denoiser.modules()):
        raise ValueError(f"{model} has layers wrapped for training. Save their concept, and call `unwrap_cross_attentions_` on it first.")
    if model != concept.base_model:
        raise ValueError(f"{name} is for a {concept.base_model}, but the pipeline has a {model}.")
    layers = {key: (_base_layer(denoiser, key)[2], is_key) for key, is_key in _cross_attention_projections(denoiser)}
    widths = {key: layer.out_features for key, (layer, is_key) in layers.items() if not is_key}
    found = {key: len(output) for key, output in concept.outputs.items()}
    if widths != found:
        key = next(key for key in widths | found if widths.get(key) != found.get(key))
        raise ValueError(
            f"{name} does not fit the pipeline's {model}: for '{key}' an output of {widths.get(key, 'no')} features is expected, "
            f"got {found.get(key, 'none')}. It was trained on another base model."
        )
    if (d := next(layer.in_features for layer, _ in layers.values())) != concept.dim:
        raise ValueError(f"{name} is for text encodings of {concept.dim} features, but the pipeline's have {d}.")
    rows = {key: len(row) for key, row in concept.embeddings.items()}
    wanted = {key: encoder.get_input_embeddings().embedding_dim for key, (encoder, _) in encoders.items()}
    if rows != wanted:
        raise ValueError(f"{name} has embeddings of {rows} features, but the pipeline's text encoders are {wanted}.")
    for _, tokenizer in encoders.values():
        check_concept_token(tokenizer, name, concept.superclass)
    for other in loaded.concepts.values() if loaded is not None else ():
        concept.check_same_covariance(other)
    _check_apart([*(loaded.concepts[token] for token in loaded.active), concept] if loaded is not None else [concept])


def _check_apart(concepts):
    """Raise a ValueError where one of the concepts is a combination of the others, as the same file twice."""
    inputs, duals = (torch.stack([getattr(concept, key) for concept in concepts]) for key in ("concept_input", "concept_dual"))
    if not overlap_condition(inputs, duals) < MAX_OVERLAP:
        names = [concept.token for concept in concepts]
        raise ValueError(f"The concepts {names} cannot be active together, since some are the same. Choose others with `set_concepts`.")


def _attach(pipe, concept):
    """Put a concept that fits on a pipeline."""
    denoiser = _denoiser(pipe)
    loaded = getattr(denoiser, CONCEPTS, None) or LoadedConcepts()
    for key, (encoder, tokenizer) in _text_encoders(pipe).items():
        flags = [(parameter, parameter.requires_grad) for parameter in encoder.parameters()]
        embedding = add_concept_token_(encoder, tokenizer, concept.token, concept.superclass)
        embedding.concept_embedding.data[-1] = concept.embeddings[key]
        embedding.concept_embedding.requires_grad_(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == POOLS_AT_LARGEST_ID:
                module.eos_token_id = tokenizer.eos_token_id
                loaded.pooling.append(module)
    loaded.concepts[concept.token] = concept
    loaded.active.append(concept.token)
    _apply(pipe, loaded)


def _apply(pipe, loaded):
    """Make the denoiser's layers hold the active concepts, and no others; without any they are the plain layers of before."""
    denoiser = _denoiser(pipe)
    unwrap_cross_attentions_(denoiser)
    active = [name for name in loaded.active if loaded.is_enabled]
    for name, layer in wrap_cross_attentions_(denoiser, C=None, num_concepts=len(active)).items() if active else ():
        concepts = [loaded.concepts[token] for token in active]
        for key in ("concept_input", "superclass_input"):
            getattr(layer, key)[:, 0] = torch.stack([getattr(concept, key) for concept in concepts])
        layer.concept_dual.copy_(torch.stack([concept.concept_dual for concept in concepts]))
        layer.initialized.fill_(True)
        beta, temperature = torch.tensor([concept.eval_gate for concept in concepts]).T
        layer.eval_beta.copy_(beta), layer.eval_temperature.copy_(temperature)
        if not layer.is_key_proj:
            layer.concept_output.requires_grad_(False)
            layer.concept_output.copy_(torch.stack([concept.outputs[name].float() for concept in concepts]))
    if active:
        warn_if_parallel(layer)
    if loaded.concepts:
        setattr(denoiser, CONCEPTS, loaded)
        _watch(pipe)
    else:
        for module in loaded.pooling:
            module.eos_token_id = POOLS_AT_LARGEST_ID
        delattr(denoiser, CONCEPTS)
        for method in WATCHED:
            vars(pipe).pop(method, None)


def _watch(pipe):
    """Let the pipeline check its prompts before it encodes them, and leave concepts out of what it saves as the base model."""
    if "encode_prompt" in vars(pipe):
        return
    encode, save_pretrained = pipe.encode_prompt, pipe.save_pretrained
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

    @wraps(save_pretrained)
    def save_base_model(*args, **kwargs):
        if getattr(_denoiser(pipe), CONCEPTS, None) is None:
            return save_pretrained(*args, **kwargs)
        loaded = _loaded(pipe)
        concepts, active, is_enabled = list(loaded.concepts.values()), list(loaded.active), loaded.is_enabled
        unload_concepts(pipe)
        try:
            return save_pretrained(*args, **kwargs)
        finally:
            for concept in concepts:
                _attach(pipe, concept)
            loaded = _loaded(pipe)
            loaded.active, loaded.is_enabled = active, is_enabled
            _apply(pipe, loaded)

    pipe.encode_prompt, pipe.save_pretrained = encode_prompt, save_base_model


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
