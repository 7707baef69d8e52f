"""What an evaluation found, as Python and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion_pytorch.concept_file import library_version
from perfusion_pytorch.evaluation.candidates import Candidate
from perfusion_pytorch.evaluation.figures import Figures
from perfusion_pytorch.evaluation.measures import CLIP_IMAGE, CLIP_TEXT, DINO
from perfusion_pytorch.evaluation.recommendation import RULE

PLAIN_CHANGE, UNRELATED_CHANGE = "plain change", "unrelated change"
MEANINGS = {
    DINO: "likeness to the training pictures: mean cosine of DINO's embeddings; higher is better",
    CLIP_IMAGE: "likeness to the training pictures: mean cosine of CLIP's embeddings; higher is better",
    CLIP_TEXT: "how well pictures fit their prompts: cosine of CLIP's embeddings; higher is better",
    PLAIN_CHANGE: "how far pictures of the plain superclass are from the base model's of the same noise: "
    "mean absolute difference of the numbers, of 255; lower is better",
    UNRELATED_CHANGE: "the same of unrelated prompts",
}


@dataclass(frozen=True)
class StrengthFigures:
    """The figures of one strength: β, or a LoRA's scale; None for what has none."""

    strength: float | None
    figures: Figures


@dataclass(frozen=True)
class FileFigures:
    """The figures of one file.

    Attributes:
        candidate: what the file is.
        strengths: at each strength.
        recommended: the strength that is recommended, None where none is or there are no strengths.
        reason: why, in a sentence; where nothing is recommended, why not.
        is_enough: whether it keeps so much of the base model's prompt figure as the rule asks.
    """

    candidate: Candidate
    strengths: tuple[StrengthFigures, ...]
    recommended: float | None
    reason: str
    is_enough: bool = True

    @property
    def summary(self) -> Figures:
        """The figures of the recommended strength, or of the only one; else empty."""
        if len(self.strengths) == 1:
            return self.strengths[0].figures
        found = [row.figures for row in self.strengths if row.strength == self.recommended]
        return found[0] if found else {}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_concepts` returns; `print(evaluation)` shows its table.

    Attributes:
        files: the figures of each file, in the order that they were given.
        base: those of the base model, which does not know the thing: the floor of likeness, and what is
            possible in following prompts.
        training: those of the training pictures among themselves: the ceiling of likeness.
        identity, prompt: which figures the recommendation compares; None where there is no such one.
        superclass: the thing's kind, in words.
        num_prompts, num_images_per_prompt, num_training: how much was looked at.
        num_made, num_kept: pictures made in this run, and those that an earlier run had made.
        settings: what the pictures were made with.
        output_dir: where `evaluation.json`, `evaluation.txt`, `pareto.png`, `grid.png` and the pictures are.
    """

    files: tuple[FileFigures, ...]
    base: Figures
    training: Figures
    identity: str | None
    prompt: str | None
    superclass: str
    num_prompts: int
    num_images_per_prompt: int
    num_training: int
    num_made: int
    num_kept: int
    settings: Mapping[str, Any]
    output_dir: Path

    @property
    def summary(self) -> Figures:
        """The figures of the first file at its recommended strength."""
        return self.files[0].summary

    def __str__(self) -> str:
        from perfusion_pytorch.evaluation.table import table_of

        return table_of(self)

    def as_json(self, only: FileFigures | None = None) -> dict[str, Any]:
        """Return all figures as JSON can hold them.

        Args:
            only: leave the other files out, for a file that lies beside this one.
        """
        files = self.files if only is None else (only,)
        names = dict.fromkeys(name for file in files for row in file.strengths for name in row.figures)
        return {
            "summary": as_json(files[0].summary),
            "recommended": files[0].recommended,
            "files": [_file_as_json(file) for file in files],
            "base_model": as_json(self.base),
            "training_pictures": as_json(self.training),
            "meanings": {name: MEANINGS.get(name, "a checker's own figure") for name in names},
            "intervals": "95 % bootstrap over prompts, over training pictures for those",
            "rule": {"text": RULE, "identity": self.identity, "prompt": self.prompt},
            "superclass": self.superclass,
            "num_prompts": self.num_prompts,
            "num_images_per_prompt": self.num_images_per_prompt,
            "num_training_pictures": self.num_training,
            "settings": dict(self.settings),
            "library_version": library_version(),
        }


def as_json(figures: Figures) -> dict[str, dict[str, float]]:
    """Return figures as JSON can hold them."""
    return {name: figure.as_json() for name, figure in figures.items()}


def _file_as_json(file: FileFigures) -> dict[str, Any]:
    candidate = file.candidate
    return {
        "name": candidate.name,
        "file": candidate.path.name,
        "kind": candidate.kind,
        "words": candidate.words,
        "knob": candidate.knob,
        "recommended": file.recommended,
        "reason": file.reason,
        "strengths": [{"strength": row.strength, "figures": as_json(row.figures)} for row in file.strengths],
    }
