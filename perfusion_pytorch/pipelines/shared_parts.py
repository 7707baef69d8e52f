"""What loaded concepts do to the parts that pipelines share, so that it holds for every one of them.

`from_pipe` gives a pipeline's denoiser and text encoders to another one, which knows nothing of the first.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.layers.row_edits import RowEdits
from perfusion_pytorch.layers.wrapped import WrappedProjection
from perfusion_pytorch.pipelines.loaded_concepts import LoadedConcepts
from perfusion_pytorch.pipelines.parts import (
    CONCEPTS,
    POOLS_AT_LARGEST_ID,
    pool_at_largest_id_,
)
from perfusion_pytorch.pipelines.replacements import Replacements
from perfusion_pytorch.protocols import TextEncoder, Tokenizer
from perfusion_pytorch.token_wiring import input_embedding, wrap_again_
from perfusion_pytorch.user_warnings import warn_user
from perfusion_pytorch.wiring import check_not_bypassed, plain_name

Attention = tuple[str, nn.Module, int]


def keep_concepts_(encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    """Let a text encoder keep its concepts, whoever gives it another embedding, and out of its state dict.

    Call it whenever concepts came or went. Without a concept, the encoder is what it was.
    """
    embedding = input_embedding(encoder)
    if isinstance(embedding, EmbeddingWrapper):
        leave_out_of_state_dict_(embedding, "concept_embedding")
        Replacements.on(encoder).put("set_input_embeddings", KeptConcepts(encoder, tokenizer))
        return
    Replacements.on(encoder).take_back()
    pool_at_largest_id_(
        module
        for module in encoder.modules()
        if getattr(module, "eos_token_id", None) == tokenizer.eos_token_id
        and getattr(getattr(module, "config", None), "eos_token_id", None) == POOLS_AT_LARGEST_ID
    )


def leave_out_of_state_dict_(module: nn.Module, name: str) -> None:
    """Make a parameter of a module a buffer that its state dict leaves out, in place.

    A loaded concept is kept in its file, and the base model is what users save, copy into a ControlNet, or
    load other weights into. As a buffer it still moves and copies with the module.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> leave_out_of_state_dict_(layer, "bias")
        >>> list(layer.state_dict()), layer.bias.shape
        (['weight'], torch.Size([2]))
    """
    value: Tensor = getattr(module, name)
    delattr(module, name)
    module.register_buffer(name, value.detach(), persistent=False)


class KeptConcepts:
    """Stands in for a text encoder's `set_input_embeddings`: concepts move to the new embedding.

    `unload_textual_inversion` would otherwise lose them.
    """

    def __init__(self, encoder: TextEncoder, tokenizer: Tokenizer) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer

    def __call__(self, value: nn.Module) -> None:
        encoder: Any = self.encoder
        before = input_embedding(encoder)
        type(encoder).set_input_embeddings(encoder, value)
        if not isinstance(before, EmbeddingWrapper) or isinstance(value, EmbeddingWrapper):
            return
        lost = wrap_again_(encoder, self.tokenizer, before)
        keep_concepts_(encoder, self.tokenizer)
        if lost:
            warn_user(f"The concepts {lost} stay loaded. Take them off with `delete_concepts`.")


def guards_on(denoiser: nn.Module, edits: RowEdits) -> list[RemovableHandle]:
    """Put the hooks on a denoiser that loaded concepts need, and return their handles."""
    handles = [denoiser.register_forward_pre_hook(before_call)]
    projection = getattr(denoiser, "caption_projection", None)  # PixArt's layers are behind one
    if isinstance(projection, nn.Module):
        handles.append(projection.register_forward_pre_hook(ProjectedRows(edits)))
    return handles


class ProjectedRows:
    """A hook before a denoiser's own projection of text encodings: rows are recognised there.

    An object and not a closure, so that a copy of the denoiser has one of its own.
    """

    def __init__(self, edits: RowEdits) -> None:
        self.edits = edits

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.edits.project(arguments[0])


def before_call(denoiser: nn.Module, arguments: Any) -> None:
    """Raise a ValueError, before a denoiser's call, where its attentions bypass the layers with concepts."""
    if not torch.compiler.is_compiling():
        loaded: LoadedConcepts = getattr(denoiser, CONCEPTS)
        for name, attention, text_width in loaded.attentions:
            check_not_bypassed(name, attention, text_width)
        loaded.concepts.edits.begin_call()


def attentions_of(layers: Mapping[str, WrappedProjection], denoiser: nn.Module) -> list[Attention]:
    """Return the attentions that hold wrapped layers, each once: name, module, and width of the text.

    Args:
        layers: by their names in the denoiser as it was built.
        denoiser: the denoiser.
    """
    widths = {name.rpartition(".")[0]: layer.in_features for name, layer in layers.items()}
    modules = {plain_name(name): module for name, module in denoiser.named_modules()}
    return [(name, modules[name], width) for name, width in widths.items()]
