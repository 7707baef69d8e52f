"""An evaluation after all checks: the pictures, their figures, and the files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perfusion_pytorch.evaluation.candidates import PERFUSION, Candidate
from perfusion_pytorch.evaluation.checkers import IDENTITY, PROMPT, CheckedConcept
from perfusion_pytorch.evaluation.drawings import draw_evaluation, draw_grid
from perfusion_pytorch.evaluation.figures import Figures
from perfusion_pytorch.evaluation.measures import CLIP_IMAGE, CLIP_TEXT, DINO
from perfusion_pytorch.evaluation.pictures import Groups, Maker, Plan, settle
from perfusion_pytorch.evaluation.recommendation import Point, least_prompt, recommend
from perfusion_pytorch.evaluation.result import Evaluation, FileFigures, StrengthFigures
from perfusion_pytorch.evaluation.scoring import Scorer, chosen
from perfusion_pytorch.evaluation.writing import write_beta, write_json
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.hub import FIGURES_FILE
from perfusion_pytorch.training.run_folder import lock, unlock

TABLE, PLOT, GRID = "evaluation.txt", "pareto.png", "grid.png"


@dataclass(frozen=True)
class Run:
    """An evaluation, after all checks."""

    plan: Plan
    candidates: list[Candidate]
    strengths: Mapping[str, tuple[float, ...]]
    training: list[Any]
    settings: Mapping[str, Any]
    scorer: Scorer
    maker: Maker

    def run(self, *, write: bool, progress: bool) -> Evaluation:
        """Make the pictures, measure them, and write everything."""
        ceiling = self.scorer.training(self.training)  # calls the checkers: their errors come before the work
        folder = self.plan.folder
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
        try:
            settle(folder, self.settings)
            groups = {
                candidate: [(s, self.plan.group(candidate, s)) for s in self._strengths_of(candidate)]
                for candidate in self.candidates
            }
            kept = self.maker.make_all(self.scorer.base, groups, progress=progress)
            evaluation = self._evaluated(groups, ceiling, kept)
            self._write(evaluation, groups, write=write)
        finally:
            if held is not None:
                unlock(folder, held)
        return evaluation

    def _strengths_of(self, candidate: Candidate) -> tuple[float | None, ...]:
        return (None,) if candidate.knob is None else self.strengths[candidate.knob]

    def _evaluated(
        self,
        groups: Groups,
        ceiling: Mapping[str, Any],
        kept: int,
    ) -> Evaluation:
        for measure in self.scorer.measures:
            measure.to(self.maker.pipe.device)
        superclass = self.plan.superclass
        base = self.scorer.shown(self.scorer.base, CheckedConcept("base model", superclass, superclass))
        identity, prompt = chosen(base, (IDENTITY, DINO, CLIP_IMAGE)), chosen(base, (PROMPT, CLIP_TEXT))
        files = []
        for candidate, rows in groups.items():
            strengths = tuple(
                StrengthFigures(
                    strength,
                    self.scorer.shown(
                        group, CheckedConcept(candidate.name, superclass, candidate.words, strength)
                    )
                    | self.scorer.changes(group),
                )
                for strength, group in rows
            )
            files.append(with_recommendation(candidate, strengths, base, identity, prompt))
        return Evaluation(
            tuple(files),
            base,
            ceiling,
            identity,
            prompt,
            superclass,
            len(self.plan.prompts.templates),
            len(self.plan.seeds),
            len(self.training),
            self.maker.num_made,
            kept,
            self.settings,
            self.plan.folder,
        )

    def _write(
        self,
        evaluation: Evaluation,
        groups: Groups,
        *,
        write: bool,
    ) -> None:
        folder = evaluation.output_dir
        write_json(folder / FIGURES_FILE, evaluation.as_json())
        write_atomically(folder / TABLE, f"{evaluation}\n".encode())
        if evaluation.identity is not None and evaluation.prompt is not None:
            draw_evaluation(evaluation, folder / PLOT)
        templates = self.plan.prompts.templates
        draw_grid(folder / GRID, evaluation, self.training, templates, self.scorer.base, groups)
        for file in evaluation.files if write else ():
            if file.candidate.kind == PERFUSION and file.recommended is not None:
                write_beta(file.candidate.path, file.recommended)
                write_json(file.candidate.path.with_name(FIGURES_FILE), evaluation.as_json(file))


def with_recommendation(
    candidate: Candidate,
    strengths: tuple[StrengthFigures, ...],
    base: Figures,
    identity: str | None,
    prompt: str | None,
) -> FileFigures:
    """Return a file's figures with the recommended strength, and why it is that one.

    Args:
        candidate: the file.
        strengths: its figures at each strength.
        base: the base model's.
        identity, prompt: the names of the figures that are compared, as far as there are such ones.
    """
    if candidate.knob is None:
        return FileFigures(candidate, strengths, None, "it has no strength to choose.")
    if identity is None or prompt is None:
        missing = "of following prompts" if prompt is None else "of likeness"
        reason = f"no strength is recommended, since there is no figure {missing}."
        return FileFigures(candidate, strengths, None, reason)
    points = [
        Point(row.strength, row.figures[identity].mean, row.figures[prompt].mean)
        for row in strengths
        if row.strength is not None
    ]
    point, is_enough = recommend(points, base[prompt].mean, higher_is_weaker=candidate.knob == "beta")
    enough = f"95 % of the base model's {prompt} (at least {least_prompt(base[prompt].mean):.3f})"
    if is_enough:
        reason = f"of those that keep {enough}, it has the highest {identity} ({point.identity:.3f})."
        low = next(row for row in strengths if row.strength == point.strength).figures[identity].low
        least = least_prompt(base[prompt].mean)
        others = [p for p in points if p is not point and p.prompt >= least]
        close = [candidate.label(p.strength) for p in others if p.identity >= low]
        if close:
            reason += f" {', '.join(close)} may be as good: within its interval. More prompts would tell."
    else:
        reason = (
            f"none keeps {enough}, and this one comes nearest ({point.prompt:.3f}). Look at its pictures."
        )
    return FileFigures(candidate, strengths, point.strength, reason, is_enough)
