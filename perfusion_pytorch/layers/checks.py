"""Checks of what a layer gets: a projection, a covariance, text encodings, concepts to apply together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perfusion_pytorch.arguments import plain
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.functional import mean_of_seen_slots, overlap_condition
from perfusion_pytorch.layers.precision import is_autocast
from perfusion_pytorch.user_warnings import warn_user

if TYPE_CHECKING:
    from perfusion_pytorch.layers.loaded import LoadedProjection
    from perfusion_pytorch.layers.rank1_edit import Rank1EditModule

LARGE_OVERLAP = 1e4  # above this condition number, float32 loses half of its digits in the joint removal


def check_weight(name: str, proj: nn.Linear) -> None:
    """Check that a projection's weight is plain floating point numbers, which a quantised layer's is not.

    Raises:
        ValueError: it is not; the message holds `name`.
    """
    if type(proj.weight) is not nn.Parameter or not proj.weight.is_floating_point():
        raise ValueError(
            f"`{name}` must have a floating point nn.Parameter as its weight, "
            f"got {type(proj.weight).__name__} of {proj.weight.dtype}. Quantised layers are not supported."
        )


def check_projection(name: str, proj: nn.Module) -> None:
    """Check that a layer of a model can be wrapped.

    Raises:
        ValueError: it cannot; the message holds `name`.
    """
    if type(proj) is not nn.Linear:
        raise ValueError(
            f"'{name}' must be a plain nn.Linear to be wrapped, got {type(proj).__name__}. "
            "Wrap a model only once."
        )
    check_weight(name, proj)


def checked_covariance(C: Tensor | InputCovariance, in_features: int) -> InputCovariance:
    """Return a covariance as an object that a projection can be trained with.

    Raises:
        ValueError: its width is not the projection's, or it cannot be inverted.
    """
    covariance = C if isinstance(C, InputCovariance) else InputCovariance(C)
    if covariance.dim != in_features:
        raise ValueError(
            f"`C` must have shape ({in_features}, {in_features}) to match the wrapped projection, "
            f"got ({covariance.dim}, {covariance.dim})."
        )
    covariance.inverse()  # an error now, not in the first training step
    return covariance


def plain_concept_id(given: Any) -> tuple[int, ...] | int:
    """Return a layer's `concept_id` that is neither an int nor a tuple as one of them.

    Raises:
        ValueError: it is not whole numbers.
    """
    value = plain(given)
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(one, int) for one in value)):
        return value
    raise ValueError(f"`concept_id` must be a whole number, several in a tuple, or None, got {given!r}.")


def trained_concept(concept_id: int | tuple[int, ...] | None) -> int:
    """Return the concept that a training call trains, by default 0.

    Raises:
        ValueError: several are given.
    """
    if concept_id is None:
        return 0
    if not isinstance(concept_id, int):
        raise ValueError(f"`concept_id` must be one concept in a training call, got {concept_id}.")
    return concept_id


def check_text_enc(layer: Rank1EditModule | LoadedProjection, text_enc: Tensor) -> None:
    """Check the shape and the dtype of text encodings that reach a layer.

    Raises:
        ValueError: they do not fit.
    """
    if (
        text_enc.ndim not in (2, 3)
        or text_enc.shape[-1] != layer.in_features
        or layer.text_seq_len not in (None, text_enc.shape[-2])
    ):
        tokens = "n" if layer.text_seq_len is None else layer.text_seq_len
        raise ValueError(
            f"`text_enc` must have shape (b, {tokens}, {layer.in_features}) to match the wrapped projection, "
            f"got {tuple(text_enc.shape)}."
        )
    dtype = layer.weight.dtype
    if text_enc.dtype != dtype and (text_enc.dtype == torch.float64 or not is_autocast(text_enc)):
        raise ValueError(
            f"`text_enc` must be of {dtype}, as the wrapped projection is, got {text_enc.dtype}."
        )


def warn_if_parallel(layer: Rank1EditModule, *_: Any) -> None:
    """Warn if a layer's concepts are so nearly parallel that applying them together is inexact.

    Args:
        layer: its concepts are compared.
        _: what torch passes to a hook on a loaded state dict.
    """
    seen = layer.initialized.any(dim=1)
    if seen.is_meta or seen.sum() < 2:
        return
    concept_input = mean_of_seen_slots(layer.concept_input, layer.initialized)
    condition = overlap_condition(concept_input[seen], layer.concept_dual[seen])
    if not condition < LARGE_OVERLAP:
        warn_user(  # without the figure, so that Python shows it once
            f"The layer's concepts are nearly parallel (condition number above {LARGE_OVERLAP:.0e}), "
            "so applying them together is inexact. Apply them one at a time with `concept_id`, "
            "or train one of them with another superclass."
        )
