"""What the tab that trains does: from its components' values to their new values."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion_pytorch.app import look
from perfusion_pytorch.app.catalogue import Offer
from perfusion_pytorch.app.run_actions import RunActions, Seen, Update
from perfusion_pytorch.app.run_kinds import TRAINING
from perfusion_pytorch.app.runs import Progress
from perfusion_pytorch.app.shared import EXPLAINED
from perfusion_pytorch.app.training_request import TrainingRequest, preview, start
from perfusion_pytorch.concept_file import RUN_FILE
from perfusion_pytorch.extras import required

MOST_POINTS = 250  # of the loss that are drawn
WINDOW = 20  # steps that the loss is averaged over


@dataclass(frozen=True, eq=False)
class TrainActions(RunActions):
    """The actions, on what the tabs share."""

    kind = TRAINING

    def show_squares(self, *values: Any) -> list[Update]:
        """Return the sheet of squares and masks, and notes."""
        gradio = required("gradio")
        if not values[1]:
            return [gradio.Image(visible=False), ""]
        try:
            sheet, notes = preview(self.page, _request(values))
        except EXPLAINED as error:
            return [gradio.Image(visible=False), self.explained(error)]
        return [gradio.Image(value=sheet, visible=True), look.note(*notes)]

    def start(self, values: Sequence[Any]) -> str:
        """Check a training, start it, and return its run's name."""
        return start(self.page, _request(values))

    def shown(self, run: str, now: Progress | None, before: Seen) -> list[Update]:
        """Return the loss and the newest validation pictures, as far as they have changed."""
        gradio = required("gradio")
        if now is None:
            return [gradio.LinePlot(visible=False), gradio.Image(visible=False)]
        loss = gradio.skip() if before[1] == now.step else _loss(now)
        picture = gradio.skip() if before[2] == str(now.picture) else _picture(now.picture)
        return [loss, picture]

    def result(self, run: str, now: Progress) -> tuple[str | None, bool]:
        """Return the concept file, named after its run."""
        return self.sent_copy(self.page.runs.folder / run / RUN_FILE, f"{run}.safetensors"), True

    def try_out(self, run: str | None, uploads: dict) -> list[Update]:
        """Open the other tab with a run's concept chosen and a first prompt."""
        generate = self.page.generate
        if run not in self.names():
            return [required("gradio").skip()] * len(generate.opened)
        return generate.actions.opened_on(Offer.of(self.page.runs.folder / str(run) / RUN_FILE), uploads)


def _request(values: Sequence[Any]) -> TrainingRequest:
    """Return a training from the tab's values."""
    model, pictures, masks, makes_masks, token, superclass, prompt, *settings = values
    steps, batch, accumulation, precision, checkpointing, seed = settings
    return TrainingRequest(
        model=model,
        pictures=list(pictures or ()),
        masks=list(masks or ()),
        makes_masks=bool(makes_masks),
        token=(token or "").strip(),
        superclass=(superclass or "").strip(),
        validation_prompt=prompt or "",
        steps=int(steps or 0),
        batch=int(batch or 0),
        accumulation=int(accumulation or 0),
        precision=precision,
        checkpointing=bool(checkpointing),
        seed=int(seed or 0),
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
