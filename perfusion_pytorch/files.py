"""Files that are written whole or not at all."""

import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write a file so that a kill or a full disk at any moment leaves the old file or the new one, and nothing half written in its place.

    Args:
        path: where to; its folder must exist.
        data: the whole content.

    Raises:
        OSError: it cannot be written; what was there before is still there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_atomically(path, b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    path = Path(path)
    # In the same folder, since only within one file system is a renaming atomic.
    partial = path.with_name(
        f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    )  # other machines have such ids too
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
