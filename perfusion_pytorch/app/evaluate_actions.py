"""What the tab that evaluates does: from its components' values to their new values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perfusion_pytorch.app import look
from perfusion_pytorch.app.catalogue import Offer
from perfusion_pytorch.app.evaluation_request import (
    CHECKER,
    CLIP,
    DINO,
    EXAMPLES,
    OWN,
    TEMPLATES,
    EvaluationRequest,
    known_pictures,
    start,
    templates_of,
)
from perfusion_pytorch.app.evaluation_view import only, table
from perfusion_pytorch.app.generate_actions import numbers
from perfusion_pytorch.app.run_actions import RunActions, Seen, Update
from perfusion_pytorch.app.run_kinds import EVALUATION
from perfusion_pytorch.app.runs import Progress
from perfusion_pytorch.app.shared import EXPLAINED
from perfusion_pytorch.evaluation.candidates import PERFUSION
from perfusion_pytorch.evaluation.run import PLOT
from perfusion_pytorch.evaluation.writing import write_beta, write_json
from perfusion_pytorch.extras import required
from perfusion_pytorch.hub import FIGURES_FILE

Choices = list[tuple[str, str]]  # (what is shown, value)


@dataclass(frozen=True, eq=False)
class EvaluateActions(RunActions):
    """The actions, on what the tabs share."""

    kind = EVALUATION

    def judges(self, model: str) -> tuple[Choices, list[str]]:
        """Return a model's judges, and which are chosen at first: those that need no model from the hub."""
        page = self.page
        names = {CLIP: f"CLIP ({Path(page.clip_model).name})", DINO: f"DINO ({Path(page.dino_model).name})"}
        models = [(names[judge], judge) for judge in (DINO, CLIP)]
        if model in page.examples:
            return [("the small world's own checker", CHECKER), *models], [CHECKER]
        return models, [DINO, CLIP]

    def prompts(self, model: str) -> tuple[Choices, str]:
        """Return a model's lists of prompts, and which is chosen at first."""
        choices = [("objects", "objects"), ("living things", "living")]
        if templates_of(self.page, model):
            choices.insert(0, ("the model's templates", TEMPLATES))
        if model in self.page.examples:
            choices.insert(0, ("the small world's", EXAMPLES))
        return [*choices, ("your own", OWN)], choices[0][1]

    def fit(self, model: str) -> list[Update]:
        """Return the updates that offer the judges and prompts of another model."""
        gradio = required("gradio")
        judges, chosen = self.judges(model)
        prompts, first = self.prompts(model)
        shown = [
            gradio.CheckboxGroup(choices=judges, value=chosen),
            gradio.Radio(choices=prompts, value=first),
        ]
        return [*shown, gradio.Textbox(visible=False)]

    def say_pictures(self, model: str, labels: Sequence[str], uploads: Mapping[str, Offer]) -> str:
        """Return, as HTML, which pictures are taken where none are added."""
        try:
            said, _ = known_pictures(self.page, model, self.page.catalogue.chosen(labels, uploads))
        except EXPLAINED as error:
            return self.explained(error)
        known = f"Without any, the {said} are taken."
        return look.caption(known if said else "The page does not know them: add them.")

    def start(self, values: Sequence[Any]) -> str:
        """Check an evaluation, start it, and return its run's name."""
        model, labels, uploads, files, words, pictures, superclass, prompts, lines, *others = values
        judges, betas, scales, images, steps, guidance, seed = others
        request = EvaluationRequest(
            model=model,
            concepts=self.page.catalogue.chosen(labels, uploads),
            files=list(files or ()),
            words=words or "",
            pictures=list(pictures or ()),
            superclass=superclass or "",
            prompts=prompts,
            lines=lines or "",
            judges=judges,
            betas=numbers(betas),
            scales=numbers(scales),
            images=int(images or 0),
            steps=int(steps or 0),
            guidance=float(guidance),
            seed=int(seed or 0),
        )
        return start(self.page, request)

    def shown(self, run: str, now: Progress | None, before: Seen) -> list[Update]:
        """Return table, plot, grid, the choice of a concept, and the button that writes its β."""
        gradio = required("gradio")
        if now is not None and now.state == before[3]:
            return [gradio.skip()] * 5
        if now is None or now.result is None:
            hidden = [gradio.Image(visible=False)] * 2
            return ["", *hidden, gradio.Dropdown(visible=False), gradio.Button(visible=False)]
        found, folder = self._found(run), now.result.parent
        choices = self._choices(found)
        first = choices[0][1] if choices else None
        return [
            table(found),
            _picture(folder / PLOT),
            _picture(now.result),
            gradio.Dropdown(choices=choices, value=first, visible=len(choices) > 1),
            self.can_write(run, first),
        ]

    def result(self, run: str, now: Progress) -> tuple[str | None, bool]:
        """Return the figures' file, and whether a β is recommended."""
        path = self._folder(run) / FIGURES_FILE
        return self.sent_copy(path, f"{run}.json"), bool(self._choices(self._found(run)))

    def can_write(self, run: str | None, number: str | None) -> Update:
        """Return the button that writes a concept's β: for the page's own trainings alone."""
        is_own = number is not None and self._trained(self._offer(run, number)) is not None
        return required("gradio").Button(visible=is_own)

    def write(self, run: str | None, number: str | None) -> str:
        """Write the recommended β into a concept that the page trained, and return a note."""
        try:
            offer = self._offer(run, number)
            trained = self._trained(offer)
            if trained is None:
                raise ValueError(
                    f"β is written into concepts that this page has trained, and {offer.path.name} is none. "
                    "Download the figures, or use `perfusion evaluate --write`."
                )
            write_beta(offer.path, offer.beta)
            write_json(offer.path.with_name(FIGURES_FILE), only(self._found(str(run)), int(number or 0)))
        except EXPLAINED as error:
            return self.explained(error)
        return look.note(f"β {offer.beta:g} is now the default of {offer.token}, trained in {trained}.")

    def try_out(self, run: str | None, number: str | None, uploads: Mapping[str, Offer]) -> list[Update]:
        """Open the other tab with a concept at its recommended β; and return notes."""
        generate = self.page.generate
        try:
            return [*generate.actions.opened_on(self._offer(run, number), uploads), ""]
        except EXPLAINED as error:
            return [*[required("gradio").skip()] * len(generate.opened), self.explained(error)]

    def _folder(self, run: str) -> Path:
        return self.page.runs.path(run) / self.kind.output

    def _found(self, run: str) -> dict[str, Any]:
        """Return the figures of a finished run."""
        found: dict[str, Any] = json.loads((self._folder(run) / FIGURES_FILE).read_text(encoding="utf-8"))
        return found

    def _choices(self, found: Mapping[str, Any]) -> Choices:
        """Return the concepts with a recommended β, by their number among the files."""
        return [
            (f"{file['name']}: β {file['recommended']:g}", str(number))
            for number, file in enumerate(found["files"])
            if file["kind"] == PERFUSION and file["recommended"] is not None
        ]

    def _offer(self, run: str | None, number: str | None) -> Offer:
        """Return a concept at its recommended β.

        Raises:
            ValueError: the run has no such concept.
            FileNotFoundError: its file is gone.
        """
        if run not in self.names():
            raise ValueError("An evaluation must be chosen.")
        found = self._found(str(run))
        if number not in [value for _, value in self._choices(found)]:
            raise ValueError(f"{run} recommends no β of a concept.")
        file = found["files"][int(str(number))]
        path = Path(self.page.runs.about(str(run))["files"][int(str(number))]["path"])
        return replace(Offer.of(path), beta=file["recommended"])

    def _trained(self, offer: Offer) -> str | None:
        """Return the training of the page that a concept is from, if it is."""
        return self.page.catalogue.run_of(offer.path)


def _picture(path: Path) -> Update:
    """Return the update that shows a picture, or hides it where there is none."""
    gradio = required("gradio")
    if not path.exists():
        return gradio.Image(visible=False)
    with required("PIL.Image").open(path) as image:
        return gradio.Image(value=image.convert("RGB"), visible=True)
