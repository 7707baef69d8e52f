"""Global key-locking: all keys of a prompt are those of its superclass prompt."""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perfusion_pytorch.layers.functional import concept_similarity
from perfusion_pytorch.layers.loaded import LoadedProjection
from perfusion_pytorch.pipelines.encoded_prompts import texts_in
from perfusion_pytorch.pipelines.loaded_concepts import StoredConcepts
from perfusion_pytorch.pipelines.parts import (
    KEY_LOCK,
    denoiser_of,
    find_key_lock,
    loaded_on,
    text_encoders_of,
)
from perfusion_pytorch.pipelines.prompts import watch_prompts
from perfusion_pytorch.protocols import Pipeline, Tokenizer
from perfusion_pytorch.tokens import tokens_in, with_tokens_replaced
from perfusion_pytorch.user_warnings import warn_user
from perfusion_pytorch.wiring import base_layer, cross_attention_projections

# Encodings are the same up to rounding, since a prompt may have been encoded in another batch; those of other
# prompts differ by far more. Relative to the largest number.
SAME_ENCODINGS = 1e-2
# A token of a concept has a similarity near 1, and every other one is far below this.
IS_CONCEPT = 0.75


@contextmanager
@beartype
def global_key_lock(pipe: Pipeline) -> Iterator[None]:
    """Lock all keys of a prompt, and not only the concept's: take the superclass prompt's.

    Values are edited as usual (Perfusion, "global key-locking"). More of the base model's composition stays,
    and β is lower, 0.4 to 0.6. Call the pipeline within the block. Rows of the batch whose encodings are not
    those of a prompt with a concept, such as the empty prompt's, keep their keys.

    Args:
        pipe: a pipeline with loaded concepts.

    Raises:
        ValueError: no concept is loaded.
        RuntimeError: the pipeline is in such a block already.

    Warns:
        UserWarning: encodings hold a concept, but were not made in the block, so that their keys stay as
            they are.

    Example:
        with global_key_lock(pipe):
            pipe("a <teddy-1> in a boat")
    """
    denoiser = denoiser_of(pipe)
    if find_key_lock(pipe) is not None:
        raise RuntimeError("`global_key_lock` cannot be nested on one pipeline. Leave the outer block first.")
    loaded_on(pipe)
    watch_prompts(pipe)
    lock = KeyLock(denoiser)
    lock.hook()
    setattr(denoiser, KEY_LOCK, lock)
    try:
        with _uncompiled():
            yield
    finally:
        delattr(denoiser, KEY_LOCK)
        lock.unhook()


def _uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which nothing runs compiled; torch before version 2.6 has none.

    Compiled code leaves out hooks that came after it, and keeps those that were there.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


class KeyLock:
    """What a `global_key_lock` does to the layers of a denoiser. Axes: b batch, n tokens, d input features.

    Attributes:
        denoiser: the denoiser.
        pairs: for each prompt with a concept, its encodings (n, d) and those that its keys are made of (n,
            d).
        at_layers: the same as they reach the layers, behind the denoiser's own projection of text encodings.
        locked: which rows of the present batch have locked keys, shape (b, 1, 1).
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.at_layers: list[tuple[Tensor, Tensor]] = []
        self.locked = torch.zeros(0, 1, 1, dtype=torch.bool)
        self.handles: list[RemovableHandle] = []
        self.last_seen: Tensor | None = None
        self.has_warned = False
        self.is_open = True

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle has: it was not made by a block, and locks nothing."""
        emptied = KeyLock(self.denoiser)
        emptied.is_open = False
        return vars(emptied)

    def hook(self) -> None:
        """Put hooks on the key layers that the denoiser has now.

        The outer hook is around a LoRA, so that it too sees the superclass; the inner one is within it.
        """
        self.unhook()
        names = [name for name, is_key in cross_attention_projections(self.denoiser) if is_key]
        layers = {self.denoiser.get_submodule(name): base_layer(self.denoiser, name)[2] for name in names}
        for outer, inner in layers.items():
            self.handles.append(outer.register_forward_pre_hook(self._take_other))
            self.handles.append(inner.register_forward_hook(self._without_edit))

    def unhook(self) -> None:
        """Take the hooks off."""
        while self.handles:
            self.handles.pop().remove()

    def add(self, one: Tensor, other: Tensor) -> None:
        """Let encodings `one` have the keys of encodings `other`, both of shape (n, d)."""
        if not any(torch.equal(one, known) for known, _ in self.pairs if known.shape == one.shape):
            self.pairs.append((one, other))

    @torch.no_grad()
    def add_prompts(
        self,
        pipe: Pipeline,
        encode: Callable[..., Any],
        bound: inspect.BoundArguments,
        encodings: Tensor,
    ) -> None:
        """Lock the keys of prompts that were just encoded.

        Args:
            pipe: the pipeline.
            encode: its own `encode_prompt`.
            bound: the arguments of the call.
            encodings: what it returned, shape (b, n, d).

        Raises:
            ValueError: the text encoders get different prompts, so that a concept has no one position.
        """
        given = bound.arguments
        prompts = texts_in(given["prompt"])
        for key in ("prompt_2", "prompt_3"):
            if given.get(key) is not None and texts_in(given[key]) != prompts:
                raise ValueError(
                    f"`global_key_lock` needs one prompt for all text encoders, got {given['prompt']!r} and "
                    f"{given[key]!r}."
                )
        concepts = loaded_on(pipe).concepts
        changed = _arguments_with_superclass(bound, concepts, _added_tokens(pipe))
        plain = encode(*changed.args, **changed.kwargs)[0]
        repeats = len(encodings) // len(prompts)
        added = _added_tokens(pipe)
        for row, (one, other) in enumerate(zip(encodings, plain, strict=True)):
            text = prompts[row // repeats]
            if any(name in concepts for name in tokens_in(text, added)):
                self.add(one, other[_superclass_positions(pipe, text, concepts, len(one))])

    @torch.no_grad()
    def _take_other(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace, before a key layer, the rows with a concept by those of its superclass prompt."""
        if not self.is_open:
            return arguments
        text_enc, *rest = arguments
        self._project_new_pairs()
        self.locked = torch.zeros(len(text_enc), 1, 1, dtype=torch.bool, device=text_enc.device)
        for one, other in self.at_layers:
            if one.shape == text_enc.shape[1:]:
                distance = (text_enc - one.to(text_enc)).abs().amax(dim=(1, 2), keepdim=True)
                here = distance <= SAME_ENCODINGS * one.abs().max().to(text_enc)
                text_enc = torch.where(here, other.to(text_enc), text_enc)
                self.locked = self.locked | here
        if not torch.compiler.is_compiling():
            self._warn_of_unlocked(layer, arguments[0])
        return text_enc, *rest

    def _warn_of_unlocked(self, layer: nn.Module, text_enc: Tensor) -> None:
        """Warn, once in a block, of rows that hold a concept and were not encoded in the block."""
        edited = getattr(layer, "base_layer", layer)
        if self.has_warned or text_enc is self.last_seen or not isinstance(edited, LoadedProjection):
            return
        self.last_seen = text_enc  # all layers get the same tensor, in all steps
        duals = edited.edits.active_duals(text_enc.device)
        similarity = concept_similarity(text_enc.to(duals), duals)
        holds_concept = similarity.amax(dim=(1, 2)) > IS_CONCEPT
        if (holds_concept & ~self.locked.flatten()).any():
            self.has_warned = True
            warn_user(
                "`global_key_lock` leaves the keys of some encodings as they are, because they were not made "
                "in its block by its pipeline. Encode prompts with `encode_prompt` of that pipeline within "
                "the block, or pass the prompts themselves."
            )

    def _project_new_pairs(self) -> None:
        """Compute `at_layers` of new pairs; within the denoiser's call, when its weights are in place."""
        project: Any = getattr(self.denoiser, "caption_projection", None)  # PixArt's layers are behind one
        for pair in self.pairs[len(self.at_layers) :]:
            one, other = pair
            if project is not None:  # not by a call, whose hook would take these for rows of the batch
                one, other = (project.forward(encodings[None])[0] for encodings in pair)
            self.at_layers.append((one, other))

    def _without_edit(self, layer: nn.Linear, arguments: tuple[Any, ...], keys: Tensor) -> Tensor:
        """Replace the keys of locked rows by the plain projection."""
        if not self.at_layers:
            return keys
        if layer.weight.is_meta:
            raise RuntimeError(
                "`global_key_lock` needs the weights in place, but they are offloaded piece by piece. "
                "Use `enable_model_cpu_offload` instead of `enable_sequential_cpu_offload`."
            )
        return torch.where(self.locked, F.linear(arguments[0], layer.weight, layer.bias), keys)


def _arguments_with_superclass(
    bound: inspect.BoundArguments, concepts: StoredConcepts, added: Collection[str]
) -> inspect.BoundArguments:
    """Return the arguments of an `encode_prompt` with the superclass in each concept's place."""

    def superclass_of(token: str) -> str:
        return concepts.superclass_of(token) if token in concepts else token

    changed = dict(bound.arguments)
    for key in ("prompt", "prompt_2", "prompt_3"):
        texts = texts_in(changed.get(key))
        if texts:
            changed[key] = [with_tokens_replaced(text, added, superclass_of) for text in texts]
    return inspect.BoundArguments(bound.signature, changed)


def _added_tokens(pipe: Pipeline) -> Collection[str]:
    """Return the texts of all tokens that were added to the first tokenizer."""
    _, tokenizer = next(iter(text_encoders_of(pipe).values()))
    return tokenizer.get_added_vocab()


def _superclass_positions(pipe: Pipeline, text: str, concepts: StoredConcepts, n: int) -> list[int]:
    """Return, for each of a prompt's n tokens, its position in the prompt with the superclass.

    Of a superclass of several tokens all but the last are left out. Positions past the end repeat the last
    one.
    """
    _, tokenizer = next(iter(text_encoders_of(pipe).values()))
    if hasattr(pipe, "maybe_convert_prompt"):  # writes a textual inversion of several vectors out
        text = pipe.maybe_convert_prompt(text, tokenizer)
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=n).input_ids
    lengths = _superclass_lengths(tokenizer, concepts)
    shift = 0
    positions = []
    for position, token_id in enumerate(ids):
        shift += lengths.get(token_id, 1) - 1
        positions.append(min(position + shift, n - 1))
    return positions


def _superclass_lengths(tokenizer: Tokenizer, concepts: StoredConcepts) -> dict[int, int]:
    """Return the number of tokens of each concept's superclass, by the concept's token id."""
    return {
        tokenizer.convert_tokens_to_ids(name): len(
            tokenizer(concepts.superclass_of(name), add_special_tokens=False).input_ids
        )
        for name in concepts
    }
