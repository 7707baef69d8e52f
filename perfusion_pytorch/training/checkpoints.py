"""The folder of a training run, and the checkpoints in it: folders `checkpoint-N`, written atomically.

A checkpoint holds what is trained, the moving averages, and the optimizer's state: never the model.
`state.safetensors` has the tensors, `state.json` the rest, with a SHA-256 of both. A resumed run ends as if
uninterrupted.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from beartype import beartype
from safetensors.torch import load, save
from torch import Tensor

from perfusion_pytorch.concept_file import library_version
from perfusion_pytorch.files import sha256_of, write_atomically
from perfusion_pytorch.user_warnings import warn_user

NAME = re.compile(r"checkpoint-(\d+)")
TENSORS = "state.safetensors"
ABOUT = "state.json"
REPLACED = ".replaced"  # ending of a checkpoint's folder while a new one takes its place
FORMAT_VERSION = 1


@beartype
def check_output_dir(output_dir: str | os.PathLike, needed: int) -> Path:
    """Make the folder, and check that files can be written there before hours of training are spent.

    Args:
        output_dir: the folder.
        needed: how many bytes will be written.

    Raises:
        OSError: the folder cannot be written to, or its disk has no room.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".probe-{os.getpid()}"  # the other processes of the run write theirs
        write_atomically(probe, bytes(2**16))
        probe.unlink()
        free = shutil.disk_usage(output_dir).free
    except OSError as error:
        raise OSError(
            f"`output_dir` must be a folder that can be written to, but {output_dir} cannot: {error}"
        ) from error
    if free < needed:
        raise OSError(
            f"`output_dir` must be on a disk with at least {needed:,} bytes free, got {free:,} "
            f"at {output_dir}. Make room first."
        )
    return output_dir


@beartype
def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    limit: int | None = None,
) -> Path:
    """Write the folder `checkpoint-step`, in the place of an earlier one of that name.

    Args:
        output_dir: the run's folder.
        step: how many steps are done.
        tensors, about: what `load_checkpoint` returns; `about` is what JSON can hold.
        limit: how many checkpoints to keep, including this one; the oldest are removed.

    Returns:
        The folder.

    Raises:
        OSError: the checkpoint cannot be written; all earlier ones are kept.
    """
    output_dir = Path(output_dir)
    folder = output_dir / f"checkpoint-{step}"
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}{REPLACED}")
    _put_back(output_dir)
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        facts = {
            "format_version": FORMAT_VERSION,
            "library_version": library_version(),
            "step": step,
            **about,
        }
        facts["sha256"] = _checksum(facts, data)
        write_atomically(partial / TENSORS, data)
        write_atomically(partial / ABOUT, json.dumps(facts, indent=1).encode())
        _sync(partial)
        if folder.exists():
            # A folder cannot be replaced in one go. After a kill between the two calls, `_put_back` helps.
            os.replace(folder, replaced)
        os.replace(partial, folder)
        _sync(output_dir)
    finally:
        _put_back(output_dir)
        _remove(partial)
    if limit is not None:
        others = [other for other in checkpoints_in(output_dir) if other != folder]
        for other in others[: 1 - limit or None]:
            _remove(other)
    for leftover in output_dir.glob(".checkpoint-*"):  # of a run that was killed while it wrote
        _remove(leftover)
    return folder


def _checksum(facts: Mapping[str, Any], data: bytes) -> str:
    """Return the SHA-256 of the facts, as they are read back from JSON, and of the tensors' file."""
    read = json.loads(json.dumps({name: value for name, value in facts.items() if name != "sha256"}))
    return sha256_of([json.dumps(read, sort_keys=True), data])


def _put_back(output_dir: Path) -> None:
    """Restore a checkpoint that was moved aside for a new one that never arrived.

    All processes of a run may do this at once.
    """
    for replaced in output_dir.glob(f".checkpoint-*{REPLACED}"):
        folder = replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED))
        with suppress(FileNotFoundError):
            if folder.exists():
                _remove(replaced)
            else:
                os.replace(replaced, folder)


@beartype
def load_checkpoint(folder: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check a checkpoint.

    Returns:
        The tensors, and everything else, including "step".

    Raises:
        FileNotFoundError: the folder or a file in it does not exist.
        ValueError: the checkpoint is damaged, or of a newer version.
    """
    folder = Path(folder)
    missing = [name for name in (TENSORS, ABOUT) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} must be a checkpoint with {TENSORS} and {ABOUT}, but {missing} are missing."
        )
    try:
        about = json.loads((folder / ABOUT).read_text())
        data = (folder / TENSORS).read_bytes()
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"its `format_version` must be {FORMAT_VERSION}, got {about['format_version']!r}"
            )
        # Older checkpoints have a checksum of the tensors alone.
        if about["sha256"] not in (_checksum(about, data), sha256_of([data])):
            raise ValueError("its checksum does not match its content")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} cannot be used as a checkpoint: {error}. Resume from an earlier one."
        ) from error
    return load(data), about


@beartype
def find_checkpoint(output_dir: str | os.PathLike, wanted: str | os.PathLike | None) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run.

    A checkpoint that a kill left moved aside is restored first.

    Args:
        output_dir: the run's folder.
        wanted: a checkpoint's folder, or its name in `output_dir`; "latest" for the newest there, if any;
            None for a new run.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a new run is wanted, but the folder holds checkpoints of another, which would be mixed
            with its own.

    Warns:
        UserWarning: the latest is wanted, but the folder holds none.
    """
    _put_back(Path(output_dir))
    found = _checkpoints(Path(output_dir))
    names = [folder.name for folder in checkpoints_in(output_dir)]
    if wanted is None:
        if found:
            raise ValueError(
                f"`output_dir` must hold no checkpoints of another run, but {output_dir} has {names}. "
                "Resume from 'latest' (`resume_from_checkpoint`), choose another folder, or delete them."
            )
        return None
    if str(wanted) == "latest":
        if not found:
            warn_user(f"There is no checkpoint in {output_dir} to resume from; training starts anew.")
            return None
        return found[max(found)]
    if str(wanted):  # an empty path would be the current folder
        _put_back(Path(wanted).parent)
        for folder in (Path(wanted), Path(output_dir) / wanted):
            if folder.is_dir():
                return folder
    raise FileNotFoundError(
        f"`resume_from_checkpoint` must be a checkpoint's folder or 'latest', got {str(wanted)!r}. "
        f"There are {names}."
    )


def checkpoints_in(output_dir: str | os.PathLike, *, after: int = -1) -> list[Path]:
    """Return the folders of a run's checkpoints, or of those after a step, the oldest first."""
    return [folder for step, folder in sorted(_checkpoints(Path(output_dir)).items()) if step > after]


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    """Return the folders of checkpoints by their steps."""
    paths = [path for path in output_dir.iterdir() if path.is_dir()] if output_dir.is_dir() else []
    return {int(match[1]): path for path in paths if (match := NAME.fullmatch(path.name))}


def _remove(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.name.startswith("."):  # hidden first, so that a kill leaves no half of a checkpoint
        folder = folder.rename(folder.with_name(f".{folder.name}.old"))
    shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """Make sure that renamed files are on the disk, where the system lets folders be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
