"""What this library needs of other libraries' objects, as types: a tokenizer and a diffusers pipeline."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn


class Tokenizer(Protocol):
    """A tokenizer of transformers (one of the fast ones)."""

    model_max_length: Any
    eos_token_id: Any
    unk_token_id: Any

    @property
    def __call__(self) -> Any: ...

    def __len__(self) -> int: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def add_tokens(self, new_tokens: Any, /) -> int: ...

    def convert_ids_to_tokens(self, ids: Any, /) -> Any: ...

    def convert_tokens_to_ids(self, tokens: Any, /) -> Any: ...

    def decode(self, token_ids: Any, /) -> Any: ...


class TextEncoder(nn.Module):
    """A text encoder of transformers: what a module of this library may ask of it beyond `nn.Module`."""

    config: Any
    device: torch.device

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


class Pipeline(Protocol):
    """A diffusers pipeline with a `unet` or a `transformer`, and text encoders with their tokenizers."""

    @property
    def components(self) -> Mapping[str, Any]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def encode_prompt(self) -> Any: ...

    @property
    def __call__(self) -> Any: ...


class StableDiffusion(Pipeline, Protocol):
    """A pipeline of Stable Diffusion 1.x, 2.x or XL, which a concept can be trained on."""

    unet: Any
    vae: Any
    scheduler: Any
    vae_scale_factor: int

    def to(self, device: Any, /) -> Any: ...

    def set_progress_bar_config(self, **options: Any) -> None: ...


if not TYPE_CHECKING:
    # At run time any object will do. beartype would call isinstance, which plain protocols refuse; what a
    # pipeline lacks is reported, in words, by the functions that take it.
    Tokenizer = TextEncoder = Pipeline = StableDiffusion = Any
