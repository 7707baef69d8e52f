"""Writing figures as JSON, and a recommended β into its concept file."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.files import write_atomically


def write_beta(path: Path, beta: float) -> None:
    """Write a gate bias into a concept file as its default, atomically; all else stays.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be written; its old content is still there.
    """
    concept = Concept.load(path)
    changed = replace(concept, eval_gate=(beta, concept.eval_gate[1]))
    changed.save(path, dtype=_widest_dtype(concept))


def _widest_dtype(concept: Concept) -> torch.dtype:
    """Return the dtype of a concept's rows; of several the one that holds them all."""
    dtypes = {row.dtype for row in (*concept.embeddings.values(), *concept.outputs.values())}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write what JSON can hold as a file, atomically."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
