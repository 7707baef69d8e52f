"""Files of tensors with a checksum: safetensors whose metadata hold a SHA-256 of everything else in the file.

Concept files, covariance files and cached covariances are such files. Nothing in them is ever executed.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from perfusion_pytorch.files import described, sha256_of

CHECKSUM = "sha256"  # its name among the facts


def checksum(tensors: Mapping[str, Tensor], about: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256, in hexadecimal, of tensors (names, dtypes, shapes, bytes) and their metadata."""
    head = json.dumps([about, metadata], sort_keys=True)
    return sha256_of(chain([head], described(dict(sorted(tensors.items())))))


def signed(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], metadata: Mapping[str, str], key: str
) -> dict[str, str]:
    """Return metadata with facts under a key, as JSON with a checksum of the whole file.

    Args:
        tensors: of the file, on the CPU.
        facts: what JSON can hold.
        metadata: the other metadata.
        key: see `check_signed`.

    Example:
        >>> tensors = {"a": torch.ones(2)}
        >>> check_signed(tensors, signed(tensors, {"dim": 2}, {"format": "pt"}, "about"), "about")
        {'dim': 2}
    """
    text = json.dumps({**facts, CHECKSUM: checksum(tensors, facts, metadata)}, separators=(",", ":"))
    return {**metadata, key: text}


def check_signed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the facts under a key of a file's metadata, without their checksum, which fits the file.

    Raises:
        ValueError: the checksum is missing or does not fit.
    """
    facts = facts_under(metadata, key)
    stated = facts.pop(CHECKSUM, None)
    others = {name: text for name, text in metadata.items() if name != key}
    if stated is None or checksum(tensors, facts, others) != stated:
        raise ValueError(
            "its checksum does not fit its content, so it was damaged or changed. Get it or save it again."
        )
    return facts


def facts_under(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the facts under a key of a file's metadata.

    Raises:
        ValueError: there are none, or not in the words that `json` writes.
    """
    facts = json.loads(metadata.get(key, "null"))
    if not isinstance(facts, dict):
        raise ValueError(f"its metadata hold no facts under '{key}'. Choose another file.")
    # Damage may leave the meaning as it was, such as 1E-6 for 1e-6.
    if metadata[key] not in (json.dumps(facts), json.dumps(facts, separators=(",", ":"))):
        raise ValueError(
            f"its metadata under '{key}' are not as they were written, so it was damaged or changed. "
            "Get it or save it again."
        )
    return facts


def tensors_in(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata in the bytes of a safetensors file, not checked yet.

    Raises:
        ValueError: they are not those of a whole safetensors file.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"it must be a whole safetensors file, but it cannot be read: {error}. Get it or save it again."
        ) from error
    return tensors, header.get("__metadata__", {})


def bytes_of(path: Path, kind: str) -> bytes:
    """Return the bytes of a file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is a folder.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {kind} file {path}.")
    if not path.is_file():
        raise ValueError(f"{path} must be a {kind} file, got a folder.")
    return path.read_bytes()


@contextmanager
def naming_the_file(path: Path, kind: str) -> Iterator[None]:
    """Turn errors about a file's content into ValueErrors that name the file."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used as a {kind} file: {error}") from error


def is_number(value: object, *types: type) -> bool:
    """Return whether a value from JSON is a finite number of one of the types; a truth value is not."""
    return isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]
