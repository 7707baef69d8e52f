"""The tab that trains a concept: pictures, what will be trained on, progress, and the concept file."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion_pytorch.app import look
from perfusion_pytorch.app.catalogue import run_label
from perfusion_pytorch.app.runs import FINISHED, RUNNING, Progress
from perfusion_pytorch.app.shared import EXPLAINED, Page
from perfusion_pytorch.app.training_request import MOST_STEPS, TrainingRequest, preview, start
from perfusion_pytorch.extras import required
from perfusion_pytorch.training.options import PRECISIONS
from perfusion_pytorch.training.picture_files import SUFFIXES

SECONDS = 1.0  # between two looks at a run
MOST_POINTS = 250  # of the loss that are drawn
WINDOW = 20  # steps that the loss is averaged over
Update = Any  # of a gradio component


@dataclass(eq=False)
class TrainTab:
    """The tab's components, and what happens with them."""

    page: Page
    files: Any = None
    masks: Any = None
    makes_masks: Any = None
    token: Any = None
    superclass: Any = None
    validation_prompt: Any = None
    settings: Sequence[Any] = ()  # steps, batch, accumulation, precision, checkpointing, seed
    train: Any = None
    notes: Any = None
    sheet: Any = None
    run: Any = None
    seen: Any = None  # what of the run is shown: its name, step and picture
    status: Any = None
    loss: Any = None
    picture: Any = None
    stop: Any = None
    resume: Any = None
    download: Any = None
    use: Any = None
    timer: Any = None

    @property
    def inputs(self) -> list[Any]:
        """The components that describe a training, in the order that `_request` takes them."""
        described = [self.token, self.superclass, self.validation_prompt]
        return [self.page.model, self.files, self.masks, self.makes_masks, *described, *self.settings]

    @property
    def outputs(self) -> list[Any]:
        """The components that show what `look_at` returns."""
        buttons = [self.stop, self.resume, self.download, self.use]
        return [self.seen, self.status, self.loss, self.picture, *buttons, self.timer]

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

    def begin(self, run: str | None, *values: Any) -> list[Update]:
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

    def look_at(self, run: str | None, seen: Sequence[Any]) -> list[Update]:
        """Return how far a run is; what has not changed since the last look is left as it is."""
        gradio = required("gradio")
        if run is None or run not in self.page.runs.names():
            hidden = gradio.LinePlot(visible=False), gradio.Image(visible=False)
            none = [gradio.Button(interactive=False)] * 2
            return [
                [],
                "",
                *hidden,
                *none,
                gradio.DownloadButton(interactive=False),
                none[0],
                gradio.Timer(active=False),
            ]
        now = self.page.runs.progress(run)
        shown = [run, now.step, str(now.picture), now.state]
        before = list(seen) if len(seen) == len(shown) and seen[0] == run else [None] * len(shown)
        is_running = now.state == RUNNING
        if before[3] == now.state == FINISHED:
            return [shown, *[gradio.skip()] * 7, gradio.Timer(active=False)]
        return [
            shown,
            _status(run, now),
            gradio.skip() if before[1] == now.step else _loss(now),
            gradio.skip() if before[2] == str(now.picture) else _picture(now.picture),
            gradio.Button(interactive=is_running),
            gradio.Button(interactive=not is_running and now.concept is None),
            gradio.DownloadButton(value=self._copy(now.concept, run), interactive=now.concept is not None),
            gradio.Button(interactive=now.concept is not None),
            gradio.Timer(active=is_running),
        ]

    def _copy(self, concept: Path | None, run: str) -> str | None:
        """Return a copy of a concept file, under its run's name, where the server may send it from."""
        if concept is None:
            return None
        folder = tempfile.mkdtemp(dir=self.page.folder)
        return shutil.copyfile(concept, Path(folder) / f"{run}.safetensors").as_posix()

    def try_out(self, run: str | None, uploads: dict) -> list[Update]:
        """Open the other tab with a run's concept chosen and a first prompt."""
        gradio = required("gradio")
        if run not in self.page.runs.names():
            return [gradio.skip()] * 3
        token = self.page.runs.about(str(run))["token"]
        prompt = self.page.defaults.prompt.format(token)
        chosen = self.page.generate.offer(uploads, [run_label(token, str(run))])
        return [gradio.Tabs(selected="generate"), chosen, prompt]


def add_tab(page: Page) -> None:
    """Add the tab to the page that is being built."""
    gradio = required("gradio")
    tab = TrainTab(page)
    with gradio.Tab("Train", id="train"), gradio.Row():
        with gradio.Column(scale=5, min_width=380):
            _add_controls(tab)
        with gradio.Column(scale=6, min_width=380):
            _add_results(tab)
    _connect(tab)


def _add_controls(tab: TrainTab) -> None:
    gradio, page = required("gradio"), tab.page
    kinds = list(SUFFIXES)
    with gradio.Row():
        tab.files = gradio.File(
            file_count="multiple",
            file_types=kinds,
            label="Four to ten pictures of one object",
            height=150,
            elem_id="pictures",
        )
        tab.masks = gradio.File(
            file_count="multiple",
            file_types=kinds,
            label="Masks with the same names, if you have them: white is the object",
            height=150,
            elem_id="masks",
        )
    tab.makes_masks = gradio.Checkbox(
        False, label=f"Find the object with {page.mask_model}", visible=page.mask_model is not None
    )
    with gradio.Row():
        tab.token = gradio.Textbox(
            "",
            label="Token",
            info="a new word for it",
            placeholder="<teddy-1>",
            max_length=60,
            min_width=140,
            elem_id="token",
        )
        tab.superclass = gradio.Textbox(
            "",
            label="Superclass",
            info="what kind of thing it is",
            placeholder="teddy bear",
            max_length=60,
            min_width=140,
            elem_id="superclass",
        )
    tab.validation_prompt = gradio.Textbox(
        "",
        label="A prompt to watch, with the token",
        placeholder="a <teddy-1> in a boat",
        max_length=300,
        elem_id="watch",
    )
    tab.settings = _settings(page)
    tab.train = gradio.Button("Train", variant="primary", elem_id="train-go")
    tab.notes = gradio.HTML(elem_id="train-notes")


def _settings(page: Page) -> list[Any]:
    gradio = required("gradio")
    steps = gradio.Number(
        500, label="Steps", precision=0, minimum=1, maximum=MOST_STEPS, elem_id="train-steps"
    )
    with gradio.Accordion("Memory, precision, seed", open=False):
        with gradio.Row():
            batch = gradio.Number(
                16, label="Batch", precision=0, minimum=1, maximum=64, min_width=100, elem_id="batch"
            )
            accumulation = gradio.Number(
                1, label="Batches of a step", precision=0, minimum=1, maximum=64, min_width=100
            )
        with gradio.Row():
            precision = gradio.Dropdown(
                list(PRECISIONS), value=page.defaults.precision, label="Mixed precision", min_width=100
            )
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=100)
        checkpointing = gradio.Checkbox(False, label="Gradient checkpointing: less memory, more time")
    return [steps, batch, accumulation, precision, checkpointing, seed]


def _add_results(tab: TrainTab) -> None:
    gradio = required("gradio")
    small = ["small-pixels"] if tab.page.defaults.edge < 256 else []
    tab.sheet = gradio.Image(
        label="As training will use them", visible=False, format="png", interactive=False,
        buttons=["fullscreen"], elem_id="sheet",
    )  # fmt: skip
    tab.run = gradio.Dropdown(tab.page.runs.names(), value=None, label="Run", elem_id="run")
    tab.seen = gradio.State([])
    tab.status = gradio.HTML(elem_id="status")
    with gradio.Row():
        tab.stop = gradio.Button("Stop", interactive=False, min_width=80, elem_id="stop")
        tab.resume = gradio.Button("Resume", interactive=False, min_width=80, elem_id="resume")
        tab.download = gradio.DownloadButton("Download", interactive=False, min_width=80, elem_id="download")
        tab.use = gradio.Button(
            "Use in Generate", variant="primary", interactive=False, min_width=80, elem_id="use"
        )
    with gradio.Row():
        tab.loss = gradio.LinePlot(
            x="step", y="loss", color="line", height=240, visible=False, min_width=200, elem_id="loss"
        )
        tab.picture = gradio.Image(
            label="While it is trained", visible=False, format="png", interactive=False, min_width=200,
            buttons=["fullscreen"], elem_classes=small, elem_id="validation",
        )  # fmt: skip
    tab.timer = gradio.Timer(SECONDS, active=False)


def _connect(tab: TrainTab) -> None:
    """Say what happens when."""
    gradio, page = required("gradio"), tab.page
    own: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    looks: dict[str, Any] = {
        "fn": tab.look_at, "inputs": [tab.run, tab.seen], "outputs": tab.outputs, **own, "concurrency_limit": None,
    }  # fmt: skip
    gradio.on(
        [tab.files.change, tab.masks.change, tab.makes_masks.input],
        tab.show_squares,
        tab.inputs,
        [tab.sheet, tab.notes],
        api_visibility="private",
        show_progress="minimal",
        trigger_mode="always_last",
    )
    page.blocks.load(tab.runs, tab.run, tab.run, **own).then(**looks)
    tab.train.click(tab.begin, [tab.run, *tab.inputs], [tab.run, tab.notes], **own).then(**looks)
    tab.run.input(**looks)
    tab.stop.click(tab.end, tab.run, None, **own)
    tab.resume.click(tab.go_on, tab.run, tab.notes, **own).then(**looks)
    tab.timer.tick(**looks)
    generate = page.generate
    used = tab.use.click(
        tab.try_out, [tab.run, generate.uploads], [page.tabs, generate.labels, generate.prompt], **own
    )
    generate.then_draw(used)


def _request(values: Sequence[Any]) -> TrainingRequest:
    """Return a training from the values of `inputs`."""
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


def _status(run: str, now: Progress) -> str:
    """Return, as HTML, how far a run is."""
    title = f"{run}: {now.state}, step {now.step} of {now.last}"
    is_wrong = now.state not in (RUNNING, FINISHED, "stopped")
    return (
        look.note(title) + look.progress_bar(now.step, now.last) + look.note(now.message, is_wrong=is_wrong)
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
