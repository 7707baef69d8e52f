"""Concept files that are made up instead of trained: their values cost what trained ones cost."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

SUPERCLASS = "car"


def token_of(number: int) -> str:
    """Return the token of a concept, counted from 0."""
    return f"<concept-{number}>"


def prompt_of(count: int) -> str:
    """Return a prompt that holds the first `count` concepts, or for 0 the superclass."""
    words = [token_of(number) for number in range(count)] or [SUPERCLASS]
    return f"{' and '.join(f'a {word}' for word in words)} on a green background"


def write_concepts(pipe: Any, folder: Path, count: int) -> Iterator[Path]:
    """Write concept files for a pipeline one by one, and yield their paths."""
    from perfusion_pytorch import Concept
    from perfusion_pytorch.pipelines.parts import projections_of, text_encoders_of

    widths = {
        name: encoder.get_input_embeddings().embedding_dim
        for name, (encoder, _) in text_encoders_of(pipe).items()
    }
    projections = projections_of(pipe.unet)
    values = {name: layer.out_features for name, (layer, is_key) in projections.items() if not is_key}
    d = next(layer.in_features for layer, _ in projections.values())
    generator = torch.Generator().manual_seed(0)

    def random(width: int) -> torch.Tensor:
        return torch.randn(width, generator=generator)

    for number in range(count):
        i = random(d)
        concept = Concept(
            token=token_of(number),
            superclass=SUPERCLASS,
            base_model=type(pipe.unet).__name__,
            embeddings={name: 0.02 * random(width) for name, width in widths.items()},
            concept_input=i,
            concept_dual=i / (i @ i),  # as for a covariance of I
            superclass_input=random(d),
            concept_norm=(i @ i).item(),
            outputs={name: random(width) for name, width in values.items()},
            eval_gate=(0.5, 0.05),
            gates_removal=True,
        )
        path = folder / f"{number}.safetensors"
        concept.save(path)
        yield path


def load_all(pipe: Any, paths: Sequence[Path], deadline: float) -> list[float]:
    """Load concept files on a pipeline, and return the seconds that each took.

    Raises:
        TimeoutError: the deadline, on `time.perf_counter`, came first.
    """
    from perfusion_pytorch import load_concept

    seconds = []
    for number, path in enumerate(paths):
        start = time.perf_counter()
        if start > deadline:
            raise TimeoutError(f"only {number} of {len(paths)} concepts were loaded before the deadline")
        load_concept(pipe, path)
        seconds.append(time.perf_counter() - start)
    return seconds
