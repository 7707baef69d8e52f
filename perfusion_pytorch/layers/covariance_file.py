"""The bytes of a covariance's file: one float matrix, with facts about it and a checksum of both."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from perfusion_pytorch.files import (
    CHECKSUM,
    bytes_of,
    check_signed,
    facts_under,
    is_number,
    naming_the_file,
    signed,
    tensors_in,
)

TENSOR = "covariance"
ABOUT = "input_covariance"  # the metadata's key
CACHED = "perfusion_covariance"  # likewise, of files in a cache: what they are the covariance of
CACHE_FORMAT = 1
LARGEST_ASYMMETRY = 1e-4  # of a file without a checksum, as a part of the features' own sizes


def covariance_bytes(covariance: Tensor, facts: Mapping[str, Any], *, key: str | None = None) -> bytes:
    """Return the bytes of a file.

    Args:
        covariance: shape (d, d), on the CPU.
        facts: "num_tokens" and "ridge".
        key: of what it is the covariance, for a file in a cache.
    """
    tensors = {TENSOR: covariance.contiguous()}
    plain = {"format": "pt"}
    if key is None:
        return save(tensors, signed(tensors, facts, plain, ABOUT))
    about = plain | {ABOUT: json.dumps(facts)}
    return save(tensors, signed(tensors, {"key": key, "version": CACHE_FORMAT}, about, CACHED))


def read_covariance_file(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Return what `read_covariance` finds in a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or holds no covariance; the message names it.
        OSError: the file cannot be read.
    """
    data = bytes_of(path, "covariance")
    with naming_the_file(path, "covariance"):
        return read_covariance(data)


def read_covariance(data: bytes, *, key: str | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Return the matrix in a file's bytes, and "num_tokens" and "ridge" where the file holds them.

    Files that were written before there were checksums are checked as far as can be.

    Args:
        data: the whole file.
        key: of what it must be the covariance, for a file in a cache.

    Raises:
        ValueError: the bytes are damaged, or hold no covariance, or that of something else.
    """
    tensors, metadata = tensors_in(data)
    if list(tensors) != [TENSOR]:
        raise ValueError(f"it must hold a tensor named '{TENSOR}' alone, but it holds {sorted(tensors)}.")
    covariance = tensors[TENSOR]
    facts = facts_under(metadata, ABOUT) if ABOUT in metadata else {}
    if CACHED in metadata or key is not None:
        found = check_signed(tensors, metadata, CACHED).get("key")
        if key not in (None, found):
            raise ValueError("it is the covariance of another text encoder or of other captions.")
    elif CHECKSUM in json.dumps(metadata):  # under whatever name: damage may have changed that too
        facts = check_signed(tensors, metadata, ABOUT)
    else:
        _check_symmetry(covariance)
    if unknown := facts.keys() - {"num_tokens", "ridge"}:
        raise ValueError(f"its metadata must say 'num_tokens' and 'ridge' alone, got {sorted(unknown)} too.")
    num_tokens, ridge = facts.get("num_tokens", 1), facts.get("ridge", 0.0)
    if not is_number(num_tokens, int) or num_tokens < 1 or not is_number(ridge, int, float) or ridge < 0:
        raise ValueError(f"its 'num_tokens' must be at least 1, and its 'ridge' at least 0, got {facts}.")
    return covariance, facts


def _check_symmetry(covariance: Tensor) -> None:
    """Raise a ValueError where a matrix, of a file without a checksum, cannot be a covariance."""
    if not covariance.is_floating_point() or covariance.ndim != 2 or len(covariance) != covariance.shape[1]:
        raise ValueError(
            f"'{TENSOR}' must be floating point numbers of shape (d, d), got {covariance.dtype} of shape "
            f"{tuple(covariance.shape)}."
        )
    matrix = covariance.double()
    scale = matrix.diagonal().abs().sqrt()
    difference = (matrix - matrix.mT).abs()
    if not matrix.isfinite().all() or (difference > LARGEST_ASYMMETRY * scale * scale[:, None]).any():
        raise ValueError(
            f"'{TENSOR}' must be finite and symmetric, but it is not, so the file was damaged. Get it or "
            "save it again. If it is whole, save `InputCovariance(C)` of its matrix."
        )
