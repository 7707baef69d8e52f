"""Checkpoints of a training run: folders `checkpoint-N`, whole or not there, from which it ends as if it had never stopped.

A checkpoint holds what is trained, the moving averages, and the optimizer: never the model. `state.safetensors` has the tensors,
`state.json` the rest, with a SHA-256 of the tensors.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from beartype import beartype
from safetensors.torch import load, save
from torch import Tensor, nn

from perfusion_pytorch.concept_file import library_version
from perfusion_pytorch.files import write_atomically

NAME = re.compile(r"checkpoint-(\d+)")
TENSORS, ABOUT = "state.safetensors", "state.json"
AVERAGES = ("concept_input", "superclass_input", "initialized", "concept_dual")
OPTIMIZER = "optimizer"
REPLACED = ".replaced"  # ending of a checkpoint's folder while another of its name is put into its place
FORMAT_VERSION = 1


@beartype
def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    tensors: Mapping[str, Tensor],
    about: Mapping,
    *,
    limit: int | None = None,
) -> Path:
    """Write the folder `checkpoint-step`; one that is there already is replaced.

    Args:
        output_dir: the run's folder.
        step: how many steps are done.
        tensors, about: what `load_checkpoint` gives back; `about` is what JSON can hold.
        limit: how many checkpoints to keep, this one among them; the oldest go.

    Returns:
        The folder.

    Raises:
        OSError: it cannot be written; the checkpoints of before are all there.
    """
    output_dir = Path(output_dir)
    folder = output_dir / f"checkpoint-{step}"
    partial, replaced = (folder.with_name(f".{folder.name}{ending}") for ending in (".partial", REPLACED))
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
        facts["sha256"] = hashlib.sha256(data).hexdigest()
        write_atomically(partial / TENSORS, data)
        write_atomically(partial / ABOUT, json.dumps(facts, indent=1).encode())
        _sync(partial)
        if folder.exists():  # a folder in use cannot be replaced in one go; after a kill between these two lines it is put back
            os.replace(folder, replaced)
        os.replace(partial, folder)
        _sync(output_dir)
    finally:
        _put_back(output_dir)
        _remove(partial)
    if limit is not None:
        for other in [other for other in checkpoints_in(output_dir) if other != folder][: 1 - limit or None]:
            _remove(other)
    for leftover in output_dir.glob(".checkpoint-*"):  # of a run that was killed while it wrote
        _remove(leftover)
    return folder


def _put_back(output_dir):
    """Put a checkpoint that was to be replaced back where the new one did not get into its place; processes of a run may all do it."""
    for replaced in output_dir.glob(f".checkpoint-*{REPLACED}"):
        folder = replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED))
        with suppress(FileNotFoundError):
            _remove(replaced) if folder.exists() else os.replace(replaced, folder)


@beartype
def load_checkpoint(folder: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Read and check a checkpoint.

    Returns:
        The tensors, and what else is known, with "step" among it.

    Raises:
        FileNotFoundError: the folder or a file of it is not there.
        ValueError: it is damaged, or of a newer version.
    """
    folder = Path(folder)
    missing = [name for name in (TENSORS, ABOUT) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} must be a checkpoint with {TENSORS} and {ABOUT}, but {missing} are missing."
        )
    try:
        about, data = json.loads((folder / ABOUT).read_text()), (folder / TENSORS).read_bytes()
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"its `format_version` must be {FORMAT_VERSION}, got {about['format_version']!r}"
            )
        if about["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError("its checksum does not fit its tensors")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} cannot be used as a checkpoint: {error}. Resume from an earlier one."
        ) from error
    return load(data), about


@beartype
def find_checkpoint(output_dir: str | os.PathLike, wanted: str | os.PathLike | None) -> Path | None:
    """Return the checkpoint to resume from, or None to start anew; one that a kill left out of its place is put back.

    Args:
        output_dir: the run's folder.
        wanted: a checkpoint's folder, or its name in `output_dir`; "latest" for the newest there, if there is any; None for none.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: none is wanted, but there are some of an earlier run, whose files would be mixed with this run's.

    Warns:
        UserWarning: the latest is wanted, but there is none.
    """
    _put_back(Path(output_dir))
    there = _checkpoints(Path(output_dir))
    names = [folder.name for folder in checkpoints_in(output_dir)]
    if wanted is None:
        if there:
            raise ValueError(
                f"`output_dir` must hold no checkpoints of another run, but {output_dir} has {names}. "
                "Resume from 'latest', take another folder, or delete them."
            )
        return None
    if str(wanted) == "latest":
        if not there:
            warnings.warn(
                f"There is no checkpoint in {output_dir} to resume from; training starts anew.", stacklevel=3
            )
            return None
        return there[max(there)]
    _put_back(Path(wanted).parent)
    for folder in (Path(wanted), Path(output_dir) / wanted):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"`resume_from_checkpoint` must be a checkpoint's folder or 'latest', got {str(wanted)!r}. There are {names}."
    )


def checkpoints_in(output_dir: str | os.PathLike, *, after: int = -1) -> list[Path]:
    """Return the folders of a run's checkpoints, or of those after a step, the oldest first."""
    return [folder for step, folder in sorted(_checkpoints(Path(output_dir)).items()) if step > after]


def _checkpoints(output_dir):
    """Return the folders of checkpoints by their steps."""
    found = {
        path: NAME.fullmatch(path.name) for path in (output_dir.iterdir() if output_dir.is_dir() else ())
    }
    return {int(match[1]): path for path, match in found.items() if match and path.is_dir()}


def _remove(folder):
    if folder.exists():
        if not folder.name.startswith(
            "."
        ):  # first out of sight, so that a kill leaves no half of a checkpoint
            folder = folder.rename(folder.with_name(f".{folder.name}.old"))
        shutil.rmtree(folder)


def _sync(folder):
    """Make sure that renamed files are on the disk, where the system lets folders be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def training_tensors(
    layers: Mapping[str, nn.Module], embeddings: Mapping[str, nn.Module], optimizer
) -> dict[str, Tensor]:
    """Return all tensors that a run changes, by name."""
    tensors = {}
    for name, layer in layers.items():
        names = AVERAGES if layer.is_key_proj else (*AVERAGES, "concept_output")
        tensors |= {f"{name}.{key}": getattr(layer, key) for key in names}
    tensors |= {
        f"{name}.concept_embedding": embedding.concept_embedding for name, embedding in embeddings.items()
    }
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}.{number}.{key}": value for key, value in values.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def restore_training_tensors(tensors: Mapping[str, Tensor], layers, embeddings, optimizer) -> None:
    """Put what `training_tensors` returned back.

    Raises:
        ValueError: the tensors are of another model; nothing is changed.
    """
    state = optimizer.state_dict()
    state["state"] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{OPTIMIZER}."):
            _, number, key = name.split(".")
            state["state"].setdefault(int(number), {})[key] = tensor
    wanted = {
        name: tuple(t.shape)
        for name, t in training_tensors(layers, embeddings, optimizer).items()
        if not name.startswith(f"{OPTIMIZER}.")
    }
    found = {name: tuple(t.shape) for name, t in tensors.items() if not name.startswith(f"{OPTIMIZER}.")}
    if wanted != found:
        name = next(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise ValueError(
            f"The checkpoint must be of this model, but '{name}' must have the shape {wanted.get(name, 'of nothing')}, "
            f"got {found.get(name, 'none')}."
        )
    holders = {**layers, **embeddings}
    for name in wanted:
        holder, _, key = name.rpartition(".")
        getattr(holders[holder], key).data.copy_(tensors[name])
    optimizer.load_state_dict(state)
