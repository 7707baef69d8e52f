"""The file of a concept: safetensors with metadata and a checksum. Nothing of it is ever executed."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from perfusion_pytorch import files

# Names of the tensors, and the prefixes of those that belong to a text encoder or a layer.
INPUTS = ("concept_input", "concept_dual", "superclass_input")
EMBEDDING = "embedding."
OUTPUT = "output."

# Of new files. Facts that may be missing, as `origin` is in older files, need no new version: readers of
# this one pass over what they do not know, and the checksum is over all of it.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 had no `gates_removal`: every concept was of eq. 3
RUN_FILE = "concept.safetensors"  # in a training run's folder
ABOUT = "perfusion_pytorch"  # the key of our metadata, which is JSON
MAX_BYTES = 64 * 2**20  # many times the largest concept; anything larger is not a concept file
# By the width of the text encodings: what viewers of model files call the models that people use.
ARCHITECTURES = {
    768: "stable-diffusion-v1",
    1024: "stable-diffusion-v2-768-v",
    2048: "stable-diffusion-xl-v1-base",
}


def write_concept_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write a concept file atomically.

    Args:
        path: where to.
        tensors: contiguous, on the CPU.
        facts: what JSON can hold, with "token", "superclass", "base_model" and "dim".

    Raises:
        OSError: the file cannot be written; its old content is still there.
    """
    about = {"format_version": FORMAT_VERSION, "library_version": library_version(), **facts}
    architecture = ARCHITECTURES.get(facts["dim"], facts["base_model"])
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/perfusion",
        "modelspec.implementation": "perfusion_pytorch",
        "modelspec.title": f"{facts['token'].strip('<>')} ({facts['superclass']})",
        "modelspec.trigger_phrase": facts["token"],
    }
    files.write_atomically(path, save(dict(tensors), files.signed(tensors, about, metadata, ABOUT)))


def concept_path(path: str | os.PathLike[str]) -> Path:
    """Return a concept's file: the path itself, or the file in a training run's folder.

    Raises:
        FileNotFoundError: the folder holds no concept.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / RUN_FILE).is_file():
        found = sorted(file.name for file in path.glob("*.safetensors"))
        raise FileNotFoundError(
            f"The folder {path} must hold {RUN_FILE}, as a finished training run's does, but holds {found}. "
            "Pass the path of a concept file."
        )
    return path / RUN_FILE


def read_concept_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file, not checked yet.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is a folder, too large, or not a whole safetensors file.
    """
    if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
        raise ValueError(
            f"{path} must be a concept file of at most {MAX_BYTES // 2**20} MB, got a folder or something "
            "larger."
        )
    data = files.bytes_of(path, "concept")
    with naming_the_file(path):
        return files.tensors_in(data)


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Turn errors about a file's content into ValueErrors that name the file."""
    with files.naming_the_file(path, "concept"):
        yield


def checked_facts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts in a concept file's metadata, after checks of version, checksum and names of tensors.

    Raises:
        ValueError: it is not a concept file, is damaged, or is of a newer version.
    """
    about = json.loads(metadata.get(ABOUT, "null"))
    if not isinstance(about, dict):
        raise ValueError(
            f"its metadata have nothing under '{ABOUT}', which every concept file has. Choose another file."
        )
    found = about.get("format_version")
    if found not in READABLE_VERSIONS:
        raise ValueError(
            f"`format_version` must be at most {FORMAT_VERSION}, got {found!r}. Update perfusion-pytorch for "
            "newer files."
        )
    about = files.check_signed(tensors, metadata, ABOUT)
    missing = [name for name in INPUTS if name not in tensors]
    unknown = [name for name in tensors if name not in INPUTS and not name.startswith((EMBEDDING, OUTPUT))]
    if missing or unknown:
        raise ValueError(
            f"it must hold {', '.join(INPUTS)}, but {missing} are missing and {unknown} are unknown."
        )
    return about


def by_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def library_version() -> str:
    """Return the version of this library, as files say it."""
    return str(sys.modules["perfusion_pytorch"].__version__)  # stated there, once
