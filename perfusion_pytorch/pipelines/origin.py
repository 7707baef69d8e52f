"""Which base model a pipeline is: what a concept file says of where it comes from."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perfusion_pytorch.hub import cached_snapshot
from perfusion_pytorch.protocols import Pipeline


def base_model_facts(pipe: Pipeline) -> dict[str, str]:
    """Return the base model's name and revision, for a concept's `origin`, as far as the pipeline knows them.

    diffusers keeps where a pipeline and its parts were loaded from. In the hub's cache the path holds the
    name on the hub and the commit. Of another folder only its own name is kept, since files are shown to
    others.

    Returns:
        "base_model_name", and "base_model_revision", the commit on the hub; either may be missing.
    """
    places = list(_places(pipe))
    found = next(filter(None, map(cached_snapshot, places)), None)
    if found is not None:
        return {"base_model_name": found[0], "base_model_revision": found[1]}
    name = _place(getattr(pipe, "config", None))
    if name is None:
        return {}
    return {"base_model_name": Path(name).resolve().name if os.path.exists(name) else name}


def _places(pipe: Pipeline) -> Iterator[str]:
    """Yield where the pipeline and then its parts were loaded from."""
    parts = [pipe, *(pipe.components[name] for name in ("unet", "transformer") if name in pipe.components)]
    for part in parts:
        place = _place(getattr(part, "config", None))
        if place is not None:
            yield place


def _place(config: Any) -> str | None:
    place = config.get("_name_or_path") if hasattr(config, "get") else None
    return str(place) if place else None
