"""The folder of a run while it goes on: made, locked against a second run, and not left behind empty."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from perfusion_pytorch.training.checkpoints import check_output_dir
from perfusion_pytorch.user_warnings import warn_user

if TYPE_CHECKING:
    from accelerate import Accelerator

LOCK = ".lock"
BEYOND = 2**30  # Windows locks bytes and not files: one that is never written, so that all can be read


class InUse(ValueError):
    """Another run has the folder."""


@contextmanager
def run_folder(output_dir: str | os.PathLike, needed: int, accelerator: "Accelerator") -> Iterator[Path]:
    """Make the folder of a run and lock it until the block ends; if it is empty then, it goes again.

    The main process locks it for all processes of the run.

    Args:
        output_dir: the folder.
        needed: how many bytes will be written.
        accelerator: of the run's processes.

    Raises:
        OSError: the folder cannot be written to, or its disk has no room.
        ValueError: another run is in it.
    """
    output_dir = Path(output_dir)
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        with _locked_by_main(check_output_dir(output_dir, needed), accelerator) as folder:
            yield folder
    finally:
        for folder in made:
            with suppress(OSError):  # it holds something, or another process was faster
                folder.rmdir()


@contextmanager
def _locked_by_main(folder: Path, accelerator: "Accelerator") -> Iterator[Path]:
    file, news = None, None
    if accelerator.is_main_process:
        try:
            file = lock(folder)
        except InUse as error:
            news = str(error)
    if accelerator.num_processes > 1:  # the others must not wait for a main process that has ended
        from accelerate.utils import broadcast_object_list

        news = broadcast_object_list([news])[0]
    if news is not None:
        raise InUse(news)
    try:
        yield folder
    finally:
        if file is not None:
            unlock(folder, file)


def lock(folder: Path) -> IO[str] | None:
    """Lock a folder; the system unlocks it when this process ends, however it ends.

    Returns:
        What `unlock` takes; None, with a warning, where the file system has no locks.

    Raises:
        ValueError: another run has locked it.
    """
    path = folder / LOCK
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open, and so locked, while the run goes on)
        try:
            if not _take(file):
                raise InUse(
                    f"`output_dir` must not be in use by another run, but {folder} is, {_holder(file)}. "
                    "Wait for that run, stop it, or choose another folder."
                )
        except OSError as error:
            file.close()
            path.unlink(missing_ok=True)
            warn_user(f"{folder} cannot be locked ({error}), so see that no second run uses it.")
            return None
        except InUse:
            file.close()
            raise
        if _is_still_there(path, file):  # and was not removed by a run that ended meanwhile
            break
        file.close()
    file.truncate(0)
    about = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    file.write(json.dumps(about))
    file.flush()
    return file


def unlock(folder: Path, file: IO[str]) -> None:
    """Unlock a folder that `lock` locked, and remove the file."""
    if os.name == "posix":  # removed while it is locked, so that nobody else's file is
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        return
    file.close()
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)


def _take(file: IO[str]) -> bool:
    """Lock a file if nobody else has; an OSError where the file system has no locks."""
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            file.seek(BEYOND)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_still_there(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> str:
    """Return which process has locked a file, in words."""
    file.seek(0)
    try:
        about = json.loads(file.read())
        return f"by process {about['process']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError, OSError):  # it is just writing them
        return "by another process"
