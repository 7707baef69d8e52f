"""Models and concepts on the hub, through huggingface_hub alone: its cache, its tokens, its offline mode.

What can go wrong is said in one line, within seconds, before a library tries for minutes.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from perfusion_pytorch.concept_file import MAX_BYTES, RUN_FILE, concept_path, library_version
from perfusion_pytorch.extras import required

SECONDS = 10  # to wait for the hub's answer
SUFFIX = ".safetensors"  # of all that is fetched of a concept, but for its figures where they are asked for
FIGURES_FILE = "evaluation.json"  # beside a concept's file: what `perfusion evaluate` found
MAX_FIGURES = 2**20  # bytes

# "user/name", "user/name/file.safetensors", and either with "@revision".
_NAME = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>\w[\w./ -]*\.safetensors))?(?:@(?P<revision>[^\s@]+))?",
    re.ASCII,
)
# A file in the hub's cache: the model's name, with -- for the slash, and the commit.
_SNAPSHOT = re.compile(
    r"(?:^|[/\\])models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})(?:[/\\]|$)"
)


class HubName(NamedTuple):
    """A concept on the hub.

    Attributes:
        repo: "user/name".
        file: its file there; None for the only one, or `concept.safetensors`.
        revision: branch, tag or commit; None for the newest.
    """

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file = "" if self.file is None else f"/{self.file}"
        return self.repo + file + ("" if self.revision is None else f"@{self.revision}")


def hub_name(path: str | os.PathLike[str], revision: str | None = None) -> HubName | None:
    """Return which concept on the hub is meant; None if a local file or folder is.

    What exists here wins: "user/name" is the folder of that name if there is one. A path object, a text that
    begins with ".", "/" or "~", and "folder/file.safetensors" are always local.

    Args:
        path: what a user wrote.
        revision: branch, tag or commit, where it is not in the text.

    Raises:
        ValueError: a revision is given twice, or of something local.

    Example:
        >>> hub_name("someone/teddy/concept.safetensors@v2")
        HubName(repo='someone/teddy', file='concept.safetensors', revision='v2')
        >>> hub_name("teddy/concept.safetensors") is None
        True
    """
    found = _NAME.fullmatch(path) if isinstance(path, str) and not Path(path).exists() else None
    if found is None or (found["file"] is None and found["repo"].endswith(SUFFIX)):
        if revision is not None:
            raise ValueError(f"`revision` chooses among files on the hub, but {path} is local. Leave it out.")
        return None
    if revision is not None and found["revision"] is not None:
        raise ValueError(f"`revision` must be given once, got {revision!r} beside {path!r}.")
    return HubName(found["repo"], found["file"], found["revision"] or revision)


def find_concept(
    path: str | os.PathLike[str], *, revision: str | None = None, with_figures: bool = False
) -> Path:
    """Return a concept's file: a local one, or one of the hub, which is fetched into the hub's cache.

    Args:
        path: a file, a training run's folder, or a name on the hub; see `hub_name` for which of them wins.
        revision: see `hub_name`.
        with_figures: also fetch the evaluation's figures, so that they lie beside the file.

    Raises:
        FileNotFoundError: there is no such file, and the path is no name on the hub.
        OSError: the hub does not have it, or cannot be reached and the cache does not have it either.
        ValueError: the model on the hub holds no concept, or several.
    """
    name = hub_name(path, revision)
    if name is None:
        return concept_path(path)
    hub, info = required("huggingface_hub"), None
    try:
        with explained("concept", name.repo, name.revision), quiet():
            info = api().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=SECONDS)
    except Unreachable:
        cached = _cached(hub, name)
        if cached is None:
            raise
        return cached
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    chosen = _chosen(name, sizes)
    with explained("concept", name.repo, name.revision), quiet():
        fetched = Path(_fetch(name, chosen))
        figures = _beside(chosen)
        if with_figures and (sizes.get(figures) or MAX_FIGURES) < MAX_FIGURES:
            _fetch(name, figures)
    return fetched


def _chosen(name: HubName, sizes: dict[str, int | None]) -> str:
    """Return which file of a model on the hub is the concept."""
    files = sorted(file for file in sizes if file.endswith(SUFFIX))
    wanted = name.file or (RUN_FILE if RUN_FILE in files else files[0] if len(files) == 1 else None)
    if wanted not in files:
        needed = name.file or f"{RUN_FILE}, or one {SUFFIX} file,"
        shown = ", ".join(files[:10]) or f"no {SUFFIX} file"
        remedy = f' Name one of them, as "{name.repo}/{files[0]}".' if files else " Choose another name."
        raise ValueError(f"{name.repo} on the hub must hold {needed} but holds {shown}.{remedy}")
    size = sizes[wanted]
    if size is not None and size > MAX_BYTES:
        raise ValueError(
            f"{name.repo}/{wanted} on the hub must be a concept file of at most {MAX_BYTES // 2**20} MB, "
            f"but has {size / 2**20:,.0f} MB. Is it a base model?"
        )
    return wanted


def _fetch(name: HubName, file: str) -> str:
    return api().hf_hub_download(name.repo, file, revision=name.revision, etag_timeout=SECONDS)


def _cached(hub: Any, name: HubName) -> Path | None:
    """Return what the hub's cache holds of a concept, without asking the hub."""
    known = hub.try_to_load_from_cache(name.repo, name.file or RUN_FILE, revision=name.revision)
    if isinstance(known, str):
        return Path(known)
    if name.file is not None:
        return None
    try:
        folder = hub.snapshot_download(name.repo, revision=name.revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    files = sorted(Path(folder).rglob(f"*{SUFFIX}"))
    return files[0] if len(files) == 1 else None


def _beside(file: str) -> str:
    folder, slash, _ = file.rpartition("/")
    return f"{folder}{slash}{FIGURES_FILE}"


def cached_snapshot(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return the model's name on the hub and the commit that a path in the hub's cache is of; else None.

    Example:
        >>> cached_snapshot("hub/models--someone--teddy/snapshots/" + 40 * "a" + "/unet")[0]
        'someone/teddy'
    """
    found = _SNAPSHOT.search(os.fspath(path))
    return None if found is None else (found["repo"].replace("--", "/", 1), found["commit"])


def check_is_available(name: str, *, filename: str, revision: str | None = None) -> None:
    """Check that a model is in the local cache, or that the hub can be reached and has it.

    Args:
        name: a model's name on the hub, such as "CIDAS/clipseg-rd64-refined", or a folder, which is not
            checked.
        filename: a file that each such model has; where the cache holds it, the hub is not asked.
        revision: branch, tag or commit.

    Raises:
        OSError: the model is not in the cache, and the hub cannot be reached or does not have it.
    """
    if Path(name).expanduser().exists():
        return
    hub = required("huggingface_hub")
    with explained("model", name, revision):
        if isinstance(hub.try_to_load_from_cache(name, filename, revision=revision), str):
            return
        api().model_info(name, revision=revision, timeout=SECONDS)


class Unreachable(OSError):
    """The hub gave no answer, or none of use."""


@contextmanager
def explained(kind: str, name: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of asking the hub for something into OSErrors of one line that say what helps.

    Args:
        kind: what is asked for, "model" or "concept".
        name: its name.
        revision: branch, tag or commit.

    Raises:
        Unreachable: the hub gave no answer of use; what the cache holds may do.
        OSError: the hub does not have it, or not for everybody.
    """
    errors = required("huggingface_hub.errors")
    here = "a folder" if kind == "model" else "a file or folder here"
    try:
        yield
    except errors.GatedRepoError as error:
        raise OSError(
            f"The {kind} {name} is behind an agreement on the hub. Accept it there, and log in by "
            "`hf auth login`."
        ) from error
    except (
        errors.HFValidationError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    ) as error:
        which = f" in revision {revision!r}" if revision else ""
        raise OSError(
            f"There is no {kind} {name}{which}: neither {here}, nor on the hub. Check its name; a private "
            "one needs `hf auth login`."
        ) from error
    except Exception as error:  # of whichever network library the hub's client uses, in this version
        raise _no_answer(kind, name, error) from error


def _no_answer(kind: str, name: str, error: Exception) -> OSError:
    """Return the error where the hub is not to be had, or the disk refuses its files."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return OSError(
            f"The {kind} {name} cannot be kept in the hub's cache: {error.strerror}, {error.filename}. Set "
            "HF_HOME to another folder."
        )
    return Unreachable(
        f"The {kind} {name} is not in the local cache, and the model hub {reason(error)}, or give a "
        f"{kind}'s {'folder' if kind == 'model' else 'file'}."
    )


def reason(error: Exception) -> str:
    """Say in words why the hub did not do what it was asked to, and what helps, after "the model hub"."""
    cause = error.__cause__ if isinstance(error, (FileNotFoundError, RuntimeError)) else None
    source = cause if isinstance(cause, Exception) else error
    status = getattr(getattr(source, "response", None), "status_code", None)
    if status == 401:
        return "refuses the token (401). Log in by `hf auth login`"
    if status == 403:
        return "does not allow it to this token (403). Log in by `hf auth login` with one that may"
    if status is not None:
        return f"answered {status}. Try again later"
    return f"cannot be reached ({type(source).__name__}). Connect to the network"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and the warnings of huggingface_hub: files are small, and errors are ours."""
    utils = required("huggingface_hub.utils")
    logger = logging.getLogger("huggingface_hub")
    level, has_bars = logger.level, not utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if has_bars:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if has_bars:
            utils.enable_progress_bars()


def api() -> Any:
    """Return a client of the hub."""
    return required("huggingface_hub").HfApi(
        library_name="perfusion_pytorch", library_version=library_version()
    )
