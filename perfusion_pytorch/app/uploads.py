"""Files that a browser sends: bounded in number, bytes and pixels, and copied under plain names."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from perfusion_pytorch.extras import required
from perfusion_pytorch.training.picture_files import MASKS, SUFFIXES

MOST_PICTURES = 50
MOST_FILES = 8  # of weights, to be compared
MOST_BYTES = 30 * 2**20  # of a file
MOST_PIXELS = 50_000_000  # of a picture, which is read as a whole
MOST_LETTERS = 60  # of a name
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft writes them


def stage_pictures(pictures: Sequence[str], masks: Sequence[str], folder: Path) -> Path:
    """Copy uploaded pictures and masks into a new folder, as training takes them.

    Args:
        pictures, masks: where the server has put the uploads. A mask has its picture's name.
        folder: to be made.

    Returns:
        The folder.

    Raises:
        ValueError: there are none or too many, one is too large or not a picture, or a mask has no picture.
    """
    if not 1 <= len(pictures) <= MOST_PICTURES or len(masks) > MOST_PICTURES:
        raise ValueError(
            f"There must be 1 to {MOST_PICTURES} pictures and at most as many masks, got {len(pictures)} "
            f"pictures and {len(masks)} masks."
        )
    for path in (*pictures, *masks):
        check_picture(Path(path))
    names = [_plain(path) for path in pictures]
    lost = [_plain(path) for path in masks if Path(_plain(path)).stem not in {Path(n).stem for n in names}]
    if lost:
        raise ValueError(
            f"Each mask must have its picture's name, but {lost} have no picture among {names}. Rename them."
        )
    for paths, target in ((pictures, folder), (masks, folder / MASKS)):
        if len({_plain(path) for path in paths}) < len(paths):
            raise ValueError(f"Files must differ in name, got {sorted(map(_plain, paths))}. Rename some.")
        for path in paths:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / _plain(path))
    return folder


def stage_files(files: Sequence[str], folder: Path) -> list[Path]:
    """Copy uploaded files of weights into a new folder, each into one of its own, as training scripts do.

    Args:
        files: where the server has put the uploads: safetensors files, and the configuration that peft writes
            beside a file of its own.
        folder: to be made.

    Returns:
        The files of weights.

    Raises:
        ValueError: there are too many, one is too large, of another kind, or two have one name.
    """
    if len(files) > MOST_FILES:
        raise ValueError(f"At most {MOST_FILES} files can be added, got {len(files)}.")
    configs = [path for path in files if Path(path).name == PEFT_CONFIG]
    names = {path: _plain(path) for path in files if path not in configs}
    for path, name in [*names.items(), *((path, PEFT_CONFIG) for path in configs)]:
        if name != PEFT_CONFIG and not name.endswith(".safetensors"):
            raise ValueError(f"{Path(path).name} must be a .safetensors file, or peft's {PEFT_CONFIG}.")
        if (size := Path(path).stat().st_size) > MOST_BYTES:
            raise ValueError(f"{name} must be at most {MOST_BYTES // 2**20} MB, got {size / 2**20:.0f} MB.")
    if len({*names.values()}) < len(names) or len(configs) > 1:
        raise ValueError(f"Files must differ in name, got {sorted(names.values())}. Rename some.")
    if configs and PEFT_WEIGHTS not in names.values():
        raise ValueError(f"{PEFT_CONFIG} belongs to {PEFT_WEIGHTS}, which is missing. Add it, or neither.")
    staged = []
    for path, name in names.items():
        target = folder / Path(name).stem / name
        target.parent.mkdir(parents=True)
        staged.append(Path(shutil.copyfile(path, target)))
        if configs and name == PEFT_WEIGHTS:
            shutil.copyfile(configs[0], target.with_name(PEFT_CONFIG))
    return staged


def check_picture(path: Path) -> None:
    """Raise a ValueError where a file is not a picture, or too large; few bytes of it are read."""
    name = path.name
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name} must be a picture ({', '.join(SUFFIXES)}).")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{name} must be at most {MOST_BYTES // 2**20} MB, got {size / 2**20:.0f} MB.")
    Image = required("PIL.Image")
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = MOST_PIXELS  # Pillow says no number
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name} must be a whole picture, but it cannot be read.") from error
    if width * height > MOST_PIXELS:
        raise ValueError(f"{name} must have at most {MOST_PIXELS:,} pixels. Make it smaller.")


def _plain(path: str) -> str:
    """Return a file's name with nothing in it that is more than a name.

    Example:
        >>> _plain("/tmp/x/..my photo (1).PNG")
        'my photo _1_.png'
    """
    stem = re.sub(r"[^\w \-]", "_", Path(path).stem.lstrip("."))[:MOST_LETTERS]
    return f"{stem or 'picture'}{Path(path).suffix.lower()}"
