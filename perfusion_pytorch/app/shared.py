"""What the tabs of the page share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion_pytorch.app.catalogue import Catalogue
from perfusion_pytorch.app.runs import Runs
from perfusion_pytorch.app.studio import Studio
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


@dataclass(eq=False)
class Page:
    """What the tabs share; each tab adds what others need of it.

    Attributes:
        studio: makes pictures.
        catalogue: the concepts that are offered.
        runs: trainings.
        folder: for what is written beside the runs.
        model_flags: for each model's name, the flags of `perfusion train` that name it.
        defaults: what the page is filled with.
        mask_model: finds the object in training pictures, if the user asks for it.
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
