"""What the tab that trains does: from its components' values to their new values."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion_pytorch.app import look
from perfusion_pytorch.app.catalogue import run_label
from perfusion_pytorch.app.runs import FAILED, FINISHED, RUNNING, Progress
from perfusion_pytorch.app.shared import EXPLAINED, Page
from perfusion_pytorch.app.training_request import TrainingRequest, preview, start
from perfusion_pytorch.extras import required

MOST_POINTS = 250  # of the loss that are drawn
WINDOW = 20  # steps that the loss is averaged over
Update = Any  # of a gradio component
Seen = Sequence[Any]  # what of a run is shown: its name, step, picture and state


@dataclass(frozen=True, eq=False)
class TrainActions:
    """The actions, on what the tabs share."""

    page: Page

    def show_squares(self, *values: Any) -> list[Update]:
        """Return the sheet of squares and masks, and notes."""
        gradio = required("gradio")
        if not values[1]:
            return [gradio.Image(visible=False), ""]
        try:
            sheet, notes = preview(self.page, _request(values))
        except EXPLAINED as error:
            return [gradio.Image(visible=False), look.note(str(error), is_wrong=True)]
        return [gradio.Image(value=sheet, visible=True), look.note(*notes)]

    def begin(self, *values: Any) -> list[Update]:
        """Start a training, and return the list of runs with it chosen, and notes."""
        try:
            run = start(self.page, _request(values))
        except EXPLAINED as error:
            return [required("gradio").skip(), look.note(str(error), is_wrong=True)]
        return [self.runs(run), ""]

    def runs(self, run: str | None) -> Update:
        """Return the update that lists all runs, with one chosen."""
        names = self.page.runs.names()
        return required("gradio").Dropdown(choices=names, value=run if run in names else None)

    def go_on(self, run: str | None) -> str:
        """Start a run again, and return a note."""
        try:
            self.page.runs.start(run or "")
        except EXPLAINED as error:
            return look.note(str(error), is_wrong=True)
        return ""

    def end(self, run: str | None) -> None:
        """Ask a run to stop."""
        if run in self.page.runs.names():
            self.page.runs.stop(str(run))

    def look_at(self, run: str | None, seen: Seen) -> list[Update]:
        """Return how far a run is: what was seen, status, loss, picture, four buttons, and the timer.

        What has not changed since the last look is left as it is.
        """
        gradio = required("gradio")
        if run not in self.page.runs.names():
            hidden = [gradio.LinePlot(visible=False), gradio.Image(visible=False)]
            return [[], "", *hidden, *_buttons(None, None), gradio.Timer(active=False)]
        run = str(run)
        now = self.page.runs.progress(run)
        shown = [run, now.step, str(now.picture), now.state]
        before = list(seen) if seen and seen[0] == run else [None] * len(shown)
        loss = gradio.skip() if before[1] == now.step else _loss(now)
        picture = gradio.skip() if before[2] == str(now.picture) else _picture(now.picture)
        buttons = [gradio.skip()] * 4
        if before[3] != now.state:
            buttons = _buttons(now, self._copy(now.concept, run))
        return [shown, _status(run, now), loss, picture, *buttons, gradio.Timer(active=now.state == RUNNING)]

    def _copy(self, concept: Path | None, run: str) -> str | None:
        """Return a copy of a concept file, under its run's name, where the server may send it from."""
        if concept is None:
            return None
        folder = self.page.folder / "concepts"
        folder.mkdir(exist_ok=True)
        return str(shutil.copyfile(concept, folder / f"{run}.safetensors"))

    def try_out(self, run: str | None, uploads: dict) -> list[Update]:
        """Open the other tab with a run's concept chosen and a first prompt."""
        gradio = required("gradio")
        if run not in self.page.runs.names():
            return [gradio.skip()] * 3
        token = self.page.runs.about(str(run))["token"]
        prompt = self.page.defaults.prompt.format(token)
        chosen = self.page.generate.actions.offer(uploads, [run_label(token, str(run))])
        return [gradio.Tabs(selected="generate"), chosen, prompt]


def _request(values: Sequence[Any]) -> TrainingRequest:
    """Return a training from the tab's values."""
    model, pictures, masks, makes_masks, token, superclass, prompt, *settings = values
    steps, batch, accumulation, precision, checkpointing, seed = settings
    return TrainingRequest(
        model=model,
        pictures=list(pictures or ()),
        masks=list(masks or ()),
        makes_masks=bool(makes_masks),
        token=token.strip(),
        superclass=superclass.strip(),
        validation_prompt=prompt,
        steps=int(steps or 0),
        batch=int(batch or 0),
        accumulation=int(accumulation or 0),
        precision=precision,
        checkpointing=bool(checkpointing),
        seed=int(seed or 0),
    )


def _buttons(now: Progress | None, concept: str | None) -> list[Update]:
    """Return the updates of stop, resume, download and use."""
    gradio = required("gradio")
    is_running, is_there = now is not None and now.state == RUNNING, concept is not None
    return [
        gradio.Button(interactive=is_running),
        gradio.Button(interactive=now is not None and not is_running and not is_there),
        gradio.DownloadButton(value=concept, interactive=is_there),
        gradio.Button(interactive=is_there),
    ]


def _status(run: str, now: Progress) -> str:
    """Return, as HTML, how far a run is."""
    title = f"{run}: {now.state}, step {now.step} of {now.last}"
    message = look.note(now.message, is_wrong=now.state == FAILED)
    return (
        look.note(title)
        + look.progress_bar(now.last if now.state == FINISHED else now.step, now.last)
        + message
    )


def _loss(now: Progress) -> Update:
    """Return the plot of the loss, each point as it is and averaged."""
    gradio, pandas = required("gradio"), required("pandas")
    if not now.losses:
        return gradio.LinePlot(visible=False)
    table = pandas.DataFrame(now.losses, columns=["step", "loss"])
    mean = table.assign(loss=table["loss"].rolling(WINDOW, min_periods=1).mean(), line=f"mean of {WINDOW}")
    lines = [part.iloc[:: -(-len(part) // MOST_POINTS)] for part in (table.assign(line="each step"), mean)]
    return gradio.LinePlot(value=pandas.concat(lines), visible=True)


def _picture(path: Path | None) -> Update:
    """Return the newest validation pictures."""
    gradio = required("gradio")
    if path is None:
        return gradio.Image(visible=False)
    with required("PIL.Image").open(path) as image:
        return gradio.Image(value=image.copy(), visible=True, label=f"After step {int(path.stem[-6:])}")
