"""Files that are written whole or not at all, and checksums of what they hold.

Concept files, covariance files and cached covariances are safetensors whose metadata hold a SHA-256 of all
else in the file. Nothing in them is ever executed.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

CHECKSUM = "sha256"  # its name among the facts


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a kill or a full disk at any moment leaves the old file or the new one.

    Args:
        path: where to; its folder must exist.
        data: the whole content.

    Raises:
        OSError: the file cannot be written; its old content is still there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_atomically(path, b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    path = Path(path)
    # In the same folder, since only within one file system is a renaming atomic. The process id alone would
    # not do: it is unique on one machine only, and several machines may share the folder.
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # it names the partial file, of which nobody knows
        named = type(error)(f"{path} cannot be written: {error.strerror or error}.")
        named.errno = error.errno
        raise named from error
    finally:
        partial.unlink(missing_ok=True)


def check_can_be_written(path: str | os.PathLike[str], *, is_folder: bool = False) -> None:
    """Check, before long work, that its result can be written; nothing is left behind.

    Args:
        path: a file, or a folder for files. It and the folders above it need not exist yet.
        is_folder: which of the two.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    folder = path if is_folder else path.parent
    try:
        if not is_folder and path.is_dir():
            raise OSError(f"{path} must be a file that can be written, but it is a folder. Name a file.")
        there = folder.absolute()
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise OSError(f"{path} cannot be written, because {there} is not a folder. Choose another one.")
        probe = there / f".{secrets.token_hex(8)}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno is None:  # one of ours
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}. Choose another place.") from error


def sha256_of(parts: Iterable[str | bytes | Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of texts (in UTF-8), bytes and the bytes of tensors, one after
    another.

    The parts are joined without a mark between them: where one part could run into the next, the caller
    separates or describes them (see `described`).

    Example:
        >>> sha256_of(["a", b"b"]) == sha256_of(["ab"])
        True
        >>> sha256_of([torch.ones(2)])[:8]
        '80b8fd6d'
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def described(tensors: Mapping[str, Tensor]) -> Iterator[str | Tensor]:
    """Yield, for each tensor, its name, dtype and shape as JSON and then itself, as parts for `sha256_of`.

    Example:
        >>> next(described({"a": torch.ones(2)}))
        '["a", "torch.float32", [2]]'
    """
    for name, tensor in tensors.items():
        yield json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        yield tensor


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
        tensors = dict(sorted(load(data).items()))
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
    if isinstance(value, bool) or not isinstance(value, types):
        return False
    return math.isfinite(value)  # type: ignore[arg-type]
