"""What the tabs of the page share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfusion_pytorch.app.catalogue import Catalogue
from perfusion_pytorch.app.runs import Runs
from perfusion_pytorch.app.studio import Studio
from perfusion_pytorch.evaluation.measures import CLIP_MODEL, DINO_MODEL
from perfusion_pytorch.pipelines.parts import denoiser_of
from perfusion_pytorch.protocols import Pipeline

# Errors whose message says all, for `look.note`. Any other is a fault of ours: the server logs it.
EXPLAINED = (ValueError, OSError, ImportError, RuntimeError)


@dataclass(frozen=True)
class Defaults:
    """What the page is filled with when it opens.

    Attributes:
        edge: of the pictures that the model was made for, in pixels.
        multiple: sizes are multiples of it.
        steps, guidance: of sampling.
        prompt: a first one, with {} for the token.
        precision: of training.
    """

    edge: int
    multiple: int
    steps: int = 20
    guidance: float = 7.5
    prompt: str = "a photo of a {}"
    precision: str = "no"


@dataclass(frozen=True)
class Examples:
    """What lies beside a model to evaluate concepts with, so that no other model is needed.

    Attributes:
        checker: such as "judge.py:judge", see `perfusion evaluate --checker`. Its code is run.
        prompts: a text file, one a line.
        pictures: for concept files the folder of pictures that each was trained on.
    """

    checker: str
    prompts: Path
    pictures: Mapping[Path, Path]


def examples_in(folder: Path) -> Examples:
    """Return what the repository has for its small model.

    Args:
        folder: `examples/shapes`.
    """
    folder = folder.resolve()
    pictures = {"car": folder / "pictures", "house": folder / "pictures_house"}
    concepts = {folder / "concepts" / f"{name}.safetensors": path for name, path in pictures.items()}
    return Examples(f"{folder / 'judge.py'}:judge", folder / "prompts.txt", concepts)


@dataclass(eq=False)
class Page:
    """What the tabs share; each tab adds what others need of it.

    Attributes:
        studio: makes pictures.
        catalogue: the concepts that are offered.
        runs: trainings and evaluations.
        folder: for what is written beside the runs.
        model_flags: for each model's name, the flags of `perfusion` that name it.
        defaults: what the page is filled with.
        mask_model: finds the object in training pictures, if the user asks for it.
        clip_model, dino_model: measure pictures, likewise: names or folders. The page's users name none,
            since a name can be a folder of this machine.
        examples: of those models that have some, by their names.
        blocks, tabs, model: gradio's components around the tabs.
        generate: the tab that makes pictures.
    """

    studio: Studio
    catalogue: Catalogue
    runs: Runs
    folder: Path
    model_flags: Mapping[str, Sequence[str]]
    defaults: Defaults
    mask_model: str | None = None
    clip_model: str = CLIP_MODEL
    dino_model: str = DINO_MODEL
    examples: Mapping[str, Examples] = field(default_factory=dict)
    blocks: Any = None
    tabs: Any = None
    model: Any = None
    generate: Any = None

    @property
    def models(self) -> list[str]:
        """The names of the base models."""
        return list(self.studio.models)


def defaults_of(pipe: Pipeline, **filled: Any) -> Defaults:
    """Return what the page is filled with for a model.

    Args:
        pipe: the model's pipeline.
        filled: values of `Defaults` that are known already.
    """
    denoiser: Any = denoiser_of(pipe)
    scale = int(getattr(pipe, "vae_scale_factor", 8))
    size = denoiser.config.sample_size or 512 // scale
    edge = int(size if isinstance(size, int) else min(size)) * scale
    return Defaults(edge, 8 * scale, **filled)
