"""What a pipeline's pictures were made with, for their files, and why some of them are black."""

import inspect
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perfusion_pytorch.concept_file import library_version
from perfusion_pytorch.files import sha256_of
from perfusion_pytorch.pipelines.parts import denoiser_of, find_key_lock, find_loaded
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.user_warnings import warn_user

# What a pipeline call decides for itself where it is not told.
DEFAULTS = ("num_inference_steps", "guidance_scale")
PACKAGES = ("torch", "diffusers", "transformers")


def picture_facts(
    pipe: Pipeline, *, files: Mapping[str, str | os.PathLike[str]] | None = None, **settings: Any
) -> dict[str, Any]:
    """Return what pictures of a pipeline are made with, as JSON can hold it, for `write_png`.

    Of files and folders only the names are kept, since pictures are shown to others.

    Args:
        pipe: the pipeline, with its concepts and their gates as they are for the pictures.
        files: the file of each loaded concept by the concept's name, where there is one.
        settings: what the pipeline is called with, beside the prompt; None means its default. "prompt",
            "seed" and others are kept as they are.

    Returns:
        The settings, and the model, the concepts with their gates, the precision, and versions.
    """
    defaults = inspect.signature(type(pipe).__call__).parameters
    facts = {name: value for name, value in settings.items() if value is not None}
    for name in DEFAULTS:
        if name not in facts and name in defaults:
            facts[name] = defaults[name].default
    denoiser = denoiser_of(pipe)
    facts.setdefault("model", _name_of_model(pipe))
    facts["pipeline"] = type(pipe).__name__
    facts["scheduler"] = type(pipe.components.get("scheduler")).__name__
    facts["dtype"] = str(next(denoiser.parameters()).dtype).removeprefix("torch.")
    facts["device"] = str(pipe.device)
    facts.setdefault("concepts", _concepts(pipe, files or {}))
    facts["global_key_lock"] = find_key_lock(pipe) is not None
    facts["versions"] = {"perfusion_pytorch": library_version()} | {name: _version(name) for name in PACKAGES}
    return facts


def _concepts(pipe: Pipeline, files: Mapping[str, str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Return the active concepts with their gates and files."""
    loaded = find_loaded(pipe)
    if loaded is None or not loaded.is_enabled:
        return []
    found = []
    for name in loaded.active:
        concept = loaded.concepts[name]
        about: dict[str, Any] = {"token": name, "superclass": concept.superclass}
        about["beta"], about["temperature"] = concept.eval_gate
        if name in files:
            path = Path(files[name])
            about |= {"file": path.name, "sha256": sha256_of([path.read_bytes()])}
        found.append(about)
    return found


def _name_of_model(pipe: Pipeline) -> str:
    """Return the model's name on the hub, or the name of its folder or file."""
    name = str(getattr(pipe, "name_or_path", None) or getattr(pipe, "_name_or_path", None) or "unknown")
    return Path(name).resolve().name if Path(name).exists() else name


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def warn_of_black_pictures(pipe: Pipeline, results: Iterable[Any]) -> None:
    """Warn of pictures that are black all over, and say why.

    Args:
        pipe: the pipeline.
        results: what its calls returned, with Pillow images.

    Warns:
        UserWarning: the safety checker replaced pictures, or all numbers of some are 0, as after an overflow.
    """
    reasons: Counter[str] = Counter()
    total = 0
    for result in results:
        flagged = getattr(result, "nsfw_content_detected", None) or [False] * len(result.images)
        total += len(result.images)
        for image, is_flagged in zip(result.images, flagged, strict=True):
            if is_flagged:
                reasons["the base model's safety checker flagged them. Try another prompt or seed."] += 1
            elif not image.convert("RGB").getbbox():
                reasons[_why_empty(pipe)] += 1
    for reason, count in reasons.items():
        subject = "1 picture is" if count == 1 else f"{count} pictures are"
        warn_user(f"{subject} black, of {total}, because {reason}")


def _why_empty(pipe: Pipeline) -> str:
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    dtypes = {parameter.dtype for module in modules for parameter in module.parameters()}
    if torch.float16 in dtypes:
        return (
            "the model computes in float16, and its numbers grew too large for it. Make them in another "
            "`dtype`: float32 or bfloat16."
        )
    return (
        "the model returned no finite numbers, or none above 0. Look whether pictures without a concept are "
        "black too: then it is the base model, otherwise train the concept at lower learning rates."
    )
