"""The figures of the pictures that were made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfusion_pytorch.evaluation.checkers import IDENTITY, CheckedConcept, Checker, checked
from perfusion_pytorch.evaluation.figures import Figure, figure_of, means_in_groups
from perfusion_pytorch.evaluation.measures import Measure, picture_change
from perfusion_pytorch.evaluation.pictures import Group, Job, Plan, pictures_of
from perfusion_pytorch.evaluation.result import PLAIN_CHANGE, UNRELATED_CHANGE

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Scorer:
    """Turns pictures into figures.

    Attributes:
        plan: what they are made of.
        measures: CLIP and DINO, as far as they are used.
        checkers: the user's own.
        base: the base model's pictures, which others are compared with.
    """

    plan: Plan
    measures: Sequence[Measure]
    checkers: Sequence[Checker]
    base: Group

    def shown(self, group: Group, concept: CheckedConcept) -> dict[str, Figure]:
        """Return the figures of a group's pictures of the thing."""
        pictures, texts = pictures_of(group.shown), self.plan.texts()
        scores: dict[str, list[float]] = {}
        for measure in self.measures:
            scores |= measure.scores(pictures, texts)
        for checker in self.checkers:
            scores |= checked(checker, pictures, texts, concept)
        size = len(self.plan.seeds)
        return {name: figure_of(means_in_groups(values, size)) for name, values in scores.items()}

    def changes(self, group: Group) -> dict[str, Figure]:
        """Return how far the pictures without the thing differ from the base model's."""
        return {
            PLAIN_CHANGE: figure_of(_changes(group.plain, self.base.plain)),
            UNRELATED_CHANGE: figure_of(_changes(group.unrelated, self.base.unrelated)),
        }

    def training(self, pictures: Sequence["Image"]) -> dict[str, Figure]:
        """Return the figures of the training pictures among themselves, which is the most there can be."""
        scores: dict[str, list[float]] = {}
        for measure in self.measures:
            scores |= measure.ceiling()
        superclass = self.plan.superclass
        concept = CheckedConcept("training pictures", superclass, superclass)
        for checker in self.checkers:
            found = checked(checker, pictures, [f"a photo of a {superclass}"] * len(pictures), concept)
            scores |= {name: values for name, values in found.items() if name == IDENTITY}
        return {name: figure_of(values) for name, values in scores.items() if values}


def _changes(jobs: Sequence[Job], base: Sequence[Job]) -> list[float]:
    return [
        picture_change(one, other) for one, other in zip(pictures_of(jobs), pictures_of(base), strict=True)
    ]


def chosen(names: Mapping[str, object], candidates: Sequence[str]) -> str | None:
    """Return the first of several names that is there."""
    return next((name for name in candidates if name in names), None)
