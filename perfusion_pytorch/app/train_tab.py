"""The tab that trains a concept: pictures, what will be trained on, progress, and the concept file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perfusion_pytorch.app import look
from perfusion_pytorch.app.run_part import QUIETLY, add_run_part
from perfusion_pytorch.app.shared import Page
from perfusion_pytorch.app.train_actions import TrainActions
from perfusion_pytorch.app.training_request import MOST_ROWS, MOST_STEPS
from perfusion_pytorch.extras import required
from perfusion_pytorch.training.options import PRECISIONS
from perfusion_pytorch.training.picture_files import SUFFIXES


@dataclass(eq=False)
class TrainTab:
    """The tab's components."""

    page: Page
    actions: TrainActions
    inputs: Sequence[Any] = ()  # what describes a training, in the order that the actions take it
    files: Any = None
    masks: Any = None
    makes_masks: Any = None
    train: Any = None
    notes: Any = None
    sheet: Any = None
    run: Any = None  # the part that shows a run
    shown: Sequence[Any] = ()  # what `TrainActions.shown` returns


def add_tab(page: Page) -> None:
    """Add the tab to the page that is being built, after the one that makes pictures."""
    gradio = required("gradio")
    tab = TrainTab(page, TrainActions(page))
    with gradio.Tab("Train", id="train"), gradio.Row():
        with gradio.Column(scale=5, min_width=380):
            _add_controls(tab)
        with gradio.Column(scale=6, min_width=380):
            _add_results(tab)
    _connect(tab)


def _add_controls(tab: TrainTab) -> None:
    gradio, page = required("gradio"), tab.page
    several = {"file_count": "multiple", "file_types": list(SUFFIXES), "height": 150}
    tab.files = gradio.File(label="Pictures: four to ten of one object", elem_id="pictures", **several)
    tab.masks = gradio.File(
        label="Masks, if any: the same names, white is the object", elem_id="masks", **several
    )
    tab.makes_masks = gradio.Checkbox(
        False, label=f"Find the object with {page.mask_model}", visible=page.mask_model is not None
    )
    with gradio.Row():
        words = [
            gradio.Textbox(
                label=label, info=info, placeholder=example, max_length=60, min_width=140, elem_id=name
            )
            for name, label, info, example in (
                ("token", "Token", "a new word for it", "<teddy-1>"),
                ("superclass", "Superclass", "what kind of thing it is", "teddy bear"),
            )
        ]
    watched = gradio.Textbox(
        label="A prompt to watch, with the token",
        placeholder="a <teddy-1> in a boat",
        max_length=300,
        elem_id="watch",
    )
    settings = _settings(page)
    tab.inputs = [page.model, tab.files, tab.masks, tab.makes_masks, *words, watched, *settings]
    tab.train = gradio.Button("Train", variant="primary", elem_id="train-go")
    tab.notes = gradio.HTML(elem_id="train-notes")


def _settings(page: Page) -> list[Any]:
    """Return steps, batch, accumulation, precision, checkpointing and seed."""
    gradio = required("gradio")

    def number(value: int, label: str, low: int, high: int, name: str) -> Any:
        return gradio.Number(
            value, label=label, precision=0, minimum=low, maximum=high, min_width=100, elem_id=name
        )

    steps = number(500, "Steps", 1, MOST_STEPS, "train-steps")
    with gradio.Accordion("Memory, precision, seed", open=False):
        with gradio.Row():
            batch = number(16, "Batch", 1, MOST_ROWS, "batch")
            accumulation = number(1, "Batches of a step", 1, MOST_ROWS, "accumulation")
        with gradio.Row():
            precision = gradio.Dropdown(
                list(PRECISIONS), value=page.defaults.precision, label="Mixed precision", min_width=100
            )
            seed = number(0, "Seed", 0, 2**31, "train-seed")
        checkpointing = gradio.Checkbox(False, label="Gradient checkpointing: less memory, more time")
    return [steps, batch, accumulation, precision, checkpointing, seed]


def _add_results(tab: TrainTab) -> None:
    gradio, page = required("gradio"), tab.page
    image = {"format": "png", "interactive": False, "visible": False, "buttons": ["fullscreen"]}
    tab.sheet = gradio.Image(show_label=False, elem_id="sheet", **image)
    tab.run = add_run_part(tab.actions, "Run")
    with gradio.Row():
        loss = gradio.LinePlot(
            x="step",
            y="loss",
            color="line",
            color_title="loss",
            height=260,
            visible=False,
            min_width=200,
            elem_id="loss",
        )
        picture = gradio.Image(
            height=260,
            min_width=200,
            elem_classes=look.kinds_of_picture(page.defaults.edge),
            elem_id="validation",
            **image,
        )
    tab.shown = [loss, picture]


def _connect(tab: TrainTab) -> None:
    """Say what happens when."""
    gradio, actions, part = required("gradio"), tab.actions, tab.run
    gradio.on(
        [tab.files.change, tab.masks.change, tab.makes_masks.input],
        actions.show_squares,
        tab.inputs,
        [tab.sheet, tab.notes],
        api_visibility="private",
        show_progress="minimal",
        trigger_mode="always_last",
    )
    part.connect(tab.train, tab.inputs, tab.notes, tab.shown)
    generate = tab.page.generate
    used = part.use.click(actions.try_out, [part.run, generate.uploads], generate.opened, **QUIETLY)
    generate.choose_and_draw(used.then)
