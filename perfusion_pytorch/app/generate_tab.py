"""The tab that makes pictures: a prompt, concepts with their gates, and what the gate sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perfusion_pytorch.app import look
from perfusion_pytorch.app.catalogue import Offer
from perfusion_pytorch.app.generate_actions import BETAS, GenerateActions, appended, shown
from perfusion_pytorch.app.shared import EXPLAINED, Page
from perfusion_pytorch.app.studio import MOST_CONCEPTS, MOST_LETTERS, MOST_SEEDS, MOST_STEPS
from perfusion_pytorch.extras import required

# Events that make pictures: one at a time; of several that wait in one browser tab only the last one counts.
PICTURES: dict[str, Any] = {
    "concurrency_id": "pictures",
    "concurrency_limit": 1,
    "trigger_mode": "always_last",
    "api_visibility": "private",
    "show_progress": "minimal",
}
QUIETLY: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(eq=False)
class Slot:
    """The row of one chosen concept: its token, which a click puts into the prompt, and its gate."""

    row: Any
    token: Any
    beta: Any
    temperature: Any


@dataclass(eq=False)
class GenerateTab:
    """The tab's components."""

    page: Page
    actions: GenerateActions
    uploads: Any = None  # the tab's own concept files, by label
    chosen: Any = None  # the labels whose gates the slots hold
    labels: Any = None
    file: Any = None
    slots: Sequence[Slot] = ()
    prompt: Any = None
    sampling: Sequence[Any] = ()  # seed, steps, guidance, size
    with_base: Any = None
    go: Any = None
    betas: Any = None
    lay_out: Any = None
    outputs: Sequence[Any] = ()  # what `GenerateActions.draw` returns, the notes last
    grid: Any = None

    @property
    def gates(self) -> list[Any]:
        """The sliders: all β, then all τ."""
        return [slot.beta for slot in self.slots] + [slot.temperature for slot in self.slots]

    @property
    def inputs(self) -> list[Any]:
        """The components that decide a picture, in the order that the actions take them."""
        what = [self.page.model, self.labels, self.uploads, self.prompt]
        return [*what, *self.sampling, self.with_base, *self.gates]

    @property
    def opened(self) -> list[Any]:
        """What `GenerateActions.opened_on` returns."""
        gate = [self.slots[0].beta, self.slots[0].temperature]
        return [self.page.tabs, self.uploads, self.labels, self.chosen, self.prompt, *gate]

    def choose_and_draw(self, event: Any) -> Any:
        """At an event that changes what is chosen, show the gates and make the picture.

        Args:
            event: such as `labels.input`, or `then` of what another event started.
        """
        chosen = event(
            self.actions.choose,
            [self.page.model, self.labels, self.chosen, self.uploads, *self.gates],
            [
                self.chosen,
                *(slot.row for slot in self.slots),
                *(slot.token for slot in self.slots),
                *self.gates,
                self.outputs[-1],
            ],
            trigger_mode="always_last",  # a second click counts also while the first is answered
            **QUIETLY,
        )
        return chosen.success(self.actions.draw, self.inputs, self.outputs, **PICTURES)


def add_tab(page: Page) -> None:
    """Add the tab to the page that is being built."""
    gradio = required("gradio")
    tab = page.generate = GenerateTab(page, GenerateActions(page))
    with gradio.Tab("Generate", id="generate"), gradio.Row():
        with gradio.Column(scale=5, min_width=380):
            _add_controls(tab)
        with gradio.Column(scale=6, min_width=380):
            _add_results(tab)
    _connect(tab)


def _add_controls(tab: GenerateTab) -> None:
    gradio, page = required("gradio"), tab.page
    first, chosen = tab.actions.first()
    offers = page.catalogue.offers()
    tab.uploads, tab.chosen = gradio.State({}), gradio.State(chosen)
    tab.prompt = gradio.Textbox(
        first.prompt, label="Prompt", lines=2, max_length=MOST_LETTERS, elem_id="prompt"
    )
    tab.labels = gradio.CheckboxGroup(list(offers), value=chosen, label="Concepts", elem_id="concepts")
    filled = [offers[label] for label in chosen] + [None] * (MOST_CONCEPTS - len(chosen))
    tab.slots = [_slot(number, offer) for number, offer in enumerate(filled)]
    with gradio.Row():
        tab.go = gradio.Button("Generate", variant="primary", elem_id="go")
        tab.with_base = gradio.Checkbox(
            True, label="beside the base model", container=False, elem_id="with-base"
        )
    with gradio.Accordion("Seed, steps, guidance, size", open=False, elem_id="sampling"):
        tab.sampling = _sampling(page)
    with gradio.Accordion("Grid over β", open=False, elem_id="grid-part"), gradio.Row():
        tab.betas = gradio.Textbox(BETAS, label="Values of β", max_length=100, scale=3, elem_id="betas")
        tab.lay_out = gradio.Button("Make the grid", scale=2, elem_id="lay-out")
    with gradio.Accordion("Add concept files", open=False):
        tab.file = gradio.File(
            file_count="multiple",
            file_types=[".safetensors"],
            show_label=False,
            height=110,
            elem_id="concept-file",
        )


def _slot(number: int, offer: Offer | None) -> Slot:
    """Return the row of one chosen concept, which is hidden while there is none."""
    gradio = required("gradio")
    token, beta, temperature = ("", 0.5, 0.05) if offer is None else (offer.token, *offer.gate)
    with gradio.Row(visible=offer is not None, elem_id=f"slot-{number}", elem_classes="slot") as row:
        button = gradio.Button(token, size="sm", min_width=90, scale=1, elem_id=f"token-{number}")
        sliders = [
            gradio.Slider(
                low, high, value, step=step, label=label, min_width=140, scale=4, elem_id=f"{name}-{number}"
            )
            for low, high, value, step, label, name in (
                (0, 1.5, beta, 0.05, "β", "beta"),
                (0.01, 0.5, temperature, 0.01, "τ", "temperature"),
            )
        ]
    return Slot(row, button, *sliders)


def _sampling(page: Page) -> list[Any]:
    gradio, filled = required("gradio"), page.defaults
    with gradio.Row():
        seed = gradio.Number(
            0, label="Seed", precision=0, minimum=0, maximum=MOST_SEEDS, min_width=100, elem_id="seed"
        )
        steps = gradio.Slider(
            1, MOST_STEPS, filled.steps, step=1, label="Steps", min_width=160, elem_id="steps"
        )
    with gradio.Row():
        guidance = gradio.Slider(0, 20, filled.guidance, step=0.5, label="Guidance", min_width=160)
        edge, step = filled.edge, filled.multiple
        size = gradio.Slider(step, 2 * edge, edge, step=step, label="Size (pixels)", min_width=160)
    return [seed, steps, guidance, size]


def _add_results(tab: GenerateTab) -> None:
    """Add what shows a picture, filled with the first one."""
    gradio, request = required("gradio"), tab.actions.first()[0]
    try:
        words, image, base, caption, notes = shown(request, tab.page.studio.draw(request, with_base=True))
    except EXPLAINED as error:
        words, image, base, caption, notes = "", None, None, "", look.note(str(error), is_wrong=True)
    options = {
        "format": "png",
        "interactive": False,
        "show_label": False,
        "height": 290,
        "elem_classes": look.kinds_of_picture(tab.page.defaults.edge),
        "buttons": ["download", "fullscreen"],
    }
    shown_words = gradio.HTML(words, elem_id="words", min_height=60)
    with gradio.Row():
        with gradio.Column(min_width=200):
            picture = gradio.Image(image, label="With the concepts", elem_id="picture", **options)
            gradio.HTML(look.caption("With the chosen concepts"))
        with gradio.Column(min_width=200) as base_part:
            beside = gradio.Image(base, label="Base model, same noise", elem_id="base", **options)
            shown_caption = gradio.HTML(caption, elem_id="base-caption")
    shown_notes = gradio.HTML(notes, elem_id="notes")
    tab.outputs = [shown_words, picture, base_part, beside, shown_caption, shown_notes]
    of_grid = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
    tab.grid = gradio.Image(label="Over β", visible=False, elem_id="grid", **of_grid)


def _connect(tab: GenerateTab) -> None:
    """Say what happens when."""
    gradio, page, actions = required("gradio"), tab.page, tab.actions
    page.blocks.load(actions.offer, [tab.uploads, tab.labels], tab.labels, **QUIETLY)
    tab.choose_and_draw(tab.labels.input)
    tab.choose_and_draw(page.model.input)
    sent = tab.file.upload(
        actions.upload,
        [tab.file, tab.uploads, tab.labels],
        [tab.uploads, tab.labels, tab.outputs[-1]],
        **QUIETLY,
    )
    tab.choose_and_draw(sent.then)
    gradio.on(
        [tab.go.click, tab.prompt.submit, *(slider.release for slider in tab.gates)],
        actions.draw,
        tab.inputs,
        tab.outputs,
        **PICTURES,
    )
    tab.lay_out.click(actions.draw_grid, [tab.betas, *tab.inputs], [tab.grid, tab.outputs[-1]], **PICTURES)
    for slot in tab.slots:  # a click on a token puts it into the prompt
        slot.token.click(appended, [tab.prompt, slot.token], tab.prompt, **QUIETLY)
