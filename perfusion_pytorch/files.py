"""Files that are written whole or not at all, and checksums of what they hold."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor


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
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
