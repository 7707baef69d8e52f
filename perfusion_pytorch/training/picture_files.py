"""Find pictures in a folder, and what belongs to them by name: masks and captions."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from perfusion_pytorch.user_warnings import warn_user

SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)
MOST_NAMES = 20  # in a message
MASKS = "masks"  # the folder of masks within a folder of pictures


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder, in the order of their names.

    Raises:
        ValueError: it is not a folder, holds no pictures, or two that differ in suffix alone.

    Warns:
        UserWarning: it holds something else too: other files, folders, links that lead nowhere.
    """
    if not folder.is_dir():
        raise ValueError(
            f"`images` must be a folder of pictures or a list of them, got {folder}, which is not a folder. "
            "Give a single picture as a list of one."
        )
    entries = _entries(folder)
    paths = [path for path in entries if path.suffix.lower() in SUFFIXES and path.is_file()]
    refuse_twins(paths, "Pictures")
    stems = {_stem(path) for path in paths}
    others = defaultdict(list)
    for path in entries:
        is_caption = path.suffix == ".txt" and _stem(path) in stems and path.is_file()
        if path not in paths and not is_caption and not (path.name == MASKS and path.is_dir()):
            others[_kind(path)].append(path.name)
    left_out = "; ".join(f"{kind}: {_some(names)}" for kind, names in sorted(others.items()))
    if not paths:
        seen = f" It holds {left_out}." if left_out else ""
        raise ValueError(f"{folder} must hold pictures ({', '.join(SUFFIXES)}), but none was found.{seen}")
    if left_out:
        warn_user(f"{folder} holds what is not trained on; it is left out: {left_out}.")
    return paths


def masks_in(folder: Path, names: Sequence[str], *, tell_unused: bool) -> list[Path | None]:
    """Return the mask of each picture: the file of the same name, but for the suffix.

    Args:
        folder: where they are.
        names: the pictures' file names.
        tell_unused: warn of masks without a picture.

    Returns:
        A path for each name; None where the folder has no mask of it.

    Raises:
        ValueError: it is not a folder, two masks of a picture differ in suffix alone, or one mask would
            belong to several pictures.

    Warns:
        UserWarning: masks without a picture.
    """
    if not folder.is_dir():
        raise ValueError(f"`masks` must be a folder or a list of masks, got {folder}, which is not a folder.")
    stems = [_stem(Path(name)) for name in names]
    shared = sorted({name for name, stem in zip(names, stems, strict=True) if stems.count(stem) > 1})
    if shared:
        raise ValueError(
            "Pictures must have names of their own where a folder of masks is given, since a mask has its "
            f"picture's name, got {shared} several times. Rename them, or give the masks as a list."
        )
    entries = [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES]
    lost = [path.name for path in entries if _stem(path) in stems and not path.is_file()]
    if lost:
        raise ValueError(
            f"{folder} must hold masks that can be read, but these are folders or lead nowhere: {lost}."
        )
    refuse_twins([path for path in entries if _stem(path) in stems], "Masks")
    found = {_stem(path): path for path in entries}
    unused = [path.name for path in entries if _stem(path) not in stems]
    if unused and tell_unused:
        warn_user(
            f"{folder} holds masks without a picture of the same name; they are left out: {_some(unused)}."
        )
    return [found.get(stem) for stem in stems]


def masks_missing(folder: Path, names: Sequence[str]) -> ValueError:
    """Return the error about pictures without a mask, which lists what the folder of masks holds."""
    held = [path.name for path in _entries(folder)]
    return ValueError(
        f"Every picture must have a mask of the same name in {folder}, or an alpha channel, "
        f"but {_some(names)} have none. The folder holds {_some(held)}."
    )


def captions_beside(path: Path) -> list[str]:
    """Return the lines of the text file beside a picture, if it exists.

    Raises:
        ValueError: it is not text in UTF-8.
    """
    names = [unicodedata.normalize(form, path.with_suffix(".txt").name) for form in ("NFC", "NFD")]
    found = [beside for beside in map(path.with_name, dict.fromkeys(names)) if beside.is_file()]
    if not found:
        return []
    path = found[0]
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The caption {path} must be text in UTF-8, but it cannot be read: {error}."
        ) from error


def refuse_twins(paths: Sequence[Path], what: str) -> None:
    """Raise a ValueError where files of one folder differ in suffix alone."""
    paths = list(dict.fromkeys(paths))
    places = [(path.parent, _stem(path)) for path in paths]
    twins = sorted({path.name for path, place in zip(paths, places, strict=True) if places.count(place) > 1})
    if twins:
        raise ValueError(
            f"{what} in one folder must differ in name, not in suffix alone, since captions and masks have "
            f"the same names: {twins}. Rename or remove one of each."
        )


def _some(names: Sequence[str]) -> str:
    """Return names as a message shows them."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{list(names[:MOST_NAMES])}{more}"


def _entries(folder: Path) -> list[Path]:
    """Return what a folder holds, without hidden files, in the order of names."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder} must be a folder that can be read, but it cannot: {error}.") from error


def _stem(path: Path) -> str:
    """Return a file's name without its suffix; letters with marks are written in one way of several."""
    return unicodedata.normalize("NFC", path.stem)


def _kind(path: Path) -> str:
    """Return what is not a picture, in words."""
    if path.is_symlink() and not os.path.exists(path):
        return "links that lead nowhere"
    return "folders" if path.is_dir() else "files that are not pictures"
