"""What a model's folder says about the words that its text encoder understands.

A model that was trained on captions of one kind is best asked in such captions. Its folder may hold a file
`perfusion_pytorch.json`, which names a file of captions, for the input covariance, and prompt templates, for
training:

    {"captions": "captions.txt", "templates": ["a {}", "a photo of a {}"]}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion_pytorch.protocols import Pipeline

NOTES_FILE = "perfusion_pytorch.json"


@dataclass(frozen=True)
class ModelNotes:
    """What a model's folder says.

    Attributes:
        captions: file of captions, one a line; None where the folder names none.
        templates: prompts with {} for a concept, likewise.
    """

    captions: Path | None = None
    templates: tuple[str, ...] | None = None


def notes_of(pipe: Pipeline) -> ModelNotes:
    """Return the notes in the folder that a pipeline was loaded from; empty ones where it has none.

    Raises:
        ValueError: the notes are not as described, or the file of captions is missing.
    """
    name = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    path = Path(name or "", NOTES_FILE)
    if not name or not path.is_file():
        return ModelNotes()
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, but {error}. Mend it, or remove it.") from error
    if not isinstance(said, dict) or not said.keys() <= {"captions", "templates"}:
        raise ValueError(f'{path} must be an object with "captions" and "templates", got {said!r}.')
    captions, templates = said.get("captions"), said.get("templates")
    if captions is not None and not (isinstance(captions, str) and path.with_name(captions).is_file()):
        raise ValueError(f'{path} must name a file beside it as "captions", got {captions!r}.')
    if templates is not None and not _are_templates(templates):
        raise ValueError(
            f'{path} must have a list of texts with one {{}} each as "templates", got {templates!r}.'
        )
    return ModelNotes(
        captions=None if captions is None else path.with_name(captions),
        templates=None if templates is None else tuple(templates),
    )


def _are_templates(found: Any) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(t, str) and t.count("{}") == 1 for t in found)
    )
