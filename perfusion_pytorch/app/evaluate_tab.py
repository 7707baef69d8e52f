"""The tab that evaluates concepts: files, training pictures, prompts and judges, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perfusion_pytorch.app.evaluate_actions import EvaluateActions
from perfusion_pytorch.app.evaluation_request import MOST_IMAGES, MOST_LETTERS, MOST_PROMPTS, OWN
from perfusion_pytorch.app.run_part import QUIETLY, add_run_part
from perfusion_pytorch.app.shared import Page
from perfusion_pytorch.app.studio import MOST_SEEDS, MOST_STEPS
from perfusion_pytorch.evaluation.evaluate import BETAS, SCALES
from perfusion_pytorch.extras import required
from perfusion_pytorch.training.picture_files import SUFFIXES


@dataclass(eq=False)
class EvaluateTab:
    """The tab's components."""

    page: Page
    actions: EvaluateActions
    tab: Any = None
    labels: Any = None
    files: Any = None
    words: Any = None
    pictures: Any = None
    known: Any = None  # says which pictures are taken where none are added
    superclass: Any = None
    prompts: Any = None
    lines: Any = None
    judges: Any = None
    settings: Sequence[Any] = ()
    go: Any = None
    notes: Any = None
    run: Any = None  # the part that shows a run
    number: Any = None  # which of the files a β is used of
    write: Any = None
    shown: Sequence[Any] = ()  # what `EvaluateActions.shown` returns

    @property
    def inputs(self) -> list[Any]:
        """What describes an evaluation, in the order that the actions take it."""
        what = [self.page.model, self.labels, self.page.generate.uploads, self.files, self.words]
        pictures = [self.pictures, self.superclass, self.prompts, self.lines, self.judges]
        return [*what, *pictures, *self.settings]


def add_tab(page: Page) -> None:
    """Add the tab to the page that is being built, after the one that makes pictures."""
    gradio = required("gradio")
    tab = EvaluateTab(page, EvaluateActions(page))
    with gradio.Tab("Evaluate", id="evaluate") as tab.tab, gradio.Row():
        with gradio.Column(scale=5, min_width=380):
            _add_subject(tab)
            _add_measures(tab)
        with gradio.Column(scale=6, min_width=380):
            _add_results(tab)
    _connect(tab)


def _add_subject(tab: EvaluateTab) -> None:
    """Add what is evaluated, and the pictures that it is compared with."""
    gradio, page = required("gradio"), tab.page
    offers = list(page.catalogue.offers())
    several: dict[str, Any] = {"file_count": "multiple", "height": 150}
    tab.labels = gradio.CheckboxGroup(
        offers, value=offers[:1], label="Concepts of one thing", elem_id="evaluated"
    )
    with gradio.Accordion("Compare with LoRAs, textual inversions, other concepts", open=False):
        tab.files = gradio.File(
            file_types=[".safetensors", ".json"], show_label=False, elem_id="weights", **several
        )
        tab.words = gradio.Textbox(
            label="Words",
            info="that stand for the thing in prompts of a LoRA; for one of several: file=words",
            placeholder="sks car",
            lines=2,
            max_length=500,
            elem_id="words-of-files",
        )
        tab.superclass = gradio.Textbox(
            label="Superclass",
            info="what kind of thing it is, if no concept says it",
            max_length=60,
            elem_id="evaluated-superclass",
        )
    tab.pictures = gradio.File(
        label="Training pictures", file_types=list(SUFFIXES), elem_id="evaluated-pictures", **several
    )
    first = tab.actions.say_pictures(page.models[0], offers[:1], {})
    tab.known = gradio.HTML(first, elem_id="known-pictures")


def _add_measures(tab: EvaluateTab) -> None:
    """Add prompts, judges and numbers."""
    gradio, page, actions = required("gradio"), tab.page, tab.actions
    lists, first = actions.prompts(page.models[0])
    tab.prompts = gradio.Radio(lists, value=first, label="Prompts", elem_id="evaluated-prompts")
    tab.lines = gradio.Textbox(
        label="Your prompts, one a line",
        info="{} stands for the thing; lines without it are unrelated prompts",
        placeholder="a photo of a {} on a beach",
        lines=4,
        max_length=MOST_PROMPTS * MOST_LETTERS,
        visible=False,
        elem_id="own-prompts",
    )
    judges, chosen = actions.judges(page.models[0])
    tab.judges = gradio.CheckboxGroup(judges, value=chosen, label="Judges", elem_id="judges")
    with gradio.Row():
        betas = _strengths("Values of β", BETAS, "evaluated-betas")
        images = _number(1, "Pictures a prompt", 1, MOST_IMAGES, "evaluated-images")
    with gradio.Accordion("Steps, guidance, seed, scales of LoRAs", open=False, elem_id="evaluated-more"):
        with gradio.Row():
            steps = _number(page.defaults.steps, "Steps", 1, MOST_STEPS, "evaluated-steps")
            guidance = gradio.Number(page.defaults.guidance, label="Guidance", minimum=0, min_width=100)
            seed = _number(0, "First seed", 0, MOST_SEEDS, "evaluated-seed")
        scales = _strengths("Scales of LoRAs", SCALES, "evaluated-scales")
    tab.settings = [betas, scales, images, steps, guidance, seed]
    tab.go = gradio.Button("Evaluate", variant="primary", elem_id="evaluate-go")
    tab.notes = gradio.HTML(elem_id="evaluate-notes")


def _strengths(label: str, values: Sequence[float], name: str) -> Any:
    text = " ".join(f"{value:g}" for value in values)
    return required("gradio").Textbox(text, label=label, max_length=100, min_width=150, elem_id=name)


def _number(value: int, label: str, low: int, high: int, name: str) -> Any:
    return required("gradio").Number(
        value, label=label, precision=0, minimum=low, maximum=high, min_width=100, elem_id=name
    )


def _add_results(tab: EvaluateTab) -> None:
    gradio = required("gradio")
    tab.run = add_run_part(tab.actions, "Evaluation", prefix="evaluation-")
    with gradio.Row():
        tab.number = gradio.Dropdown(
            [], label="Concept", visible=False, min_width=160, elem_id="evaluation-concept"
        )
        tab.write = gradio.Button("Write β into its file", visible=False, elem_id="evaluation-write")
    said = gradio.HTML(elem_id="evaluation-table")
    image: dict[str, Any] = {"format": "png", "interactive": False, "visible": False, "show_label": False}
    image |= {"buttons": ["download", "fullscreen"], "elem_classes": "below-buttons"}
    plot = gradio.Image(label="Likeness over prompts followed", elem_id="evaluation-plot", **image)
    grid = gradio.Image(label="Pictures at each β", elem_id="evaluation-grid", **image)
    tab.shown = [said, plot, grid, tab.number, tab.write]


def _connect(tab: EvaluateTab) -> None:
    """Say what happens when."""
    gradio, page, actions, part = required("gradio"), tab.page, tab.actions, tab.run
    generate = page.generate
    part.connect(tab.go, tab.inputs, tab.notes, tab.shown)
    offered = tab.tab.select(generate.actions.offer, [generate.uploads, tab.labels], tab.labels, **QUIETLY)
    fitted = page.model.input(actions.fit, page.model, [tab.judges, tab.prompts, tab.lines], **QUIETLY)
    for event in (offered.then, fitted.then, tab.labels.input):
        known = [page.model, tab.labels, generate.uploads]
        event(actions.say_pictures, known, tab.known, **QUIETLY)
    tab.prompts.input(
        lambda prompts: gradio.Textbox(visible=prompts == OWN), tab.prompts, tab.lines, **QUIETLY
    )
    tab.number.input(actions.can_write, [part.run, tab.number], tab.write, **QUIETLY)
    tab.write.click(actions.write, [part.run, tab.number], tab.notes, **QUIETLY)
    used = part.use.click(
        actions.try_out,
        [part.run, tab.number, generate.uploads],
        [*generate.opened, tab.notes],
        **QUIETLY,
    )
    generate.choose_and_draw(used.then)
