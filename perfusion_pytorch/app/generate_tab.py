"""The tab that makes pictures: a prompt, concepts with their gates, and what the gate sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion_pytorch.app import look
from perfusion_pytorch.app.catalogue import Offer, upload_label
from perfusion_pytorch.app.shared import EXPLAINED, Page
from perfusion_pytorch.app.studio import MOST_CONCEPTS, MOST_LETTERS, MOST_SEEDS, MOST_STEPS, Chosen, Request
from perfusion_pytorch.app.words import coloured_words
from perfusion_pytorch.extras import required

BETAS = "0.3 0.5 0.7 0.9 1.2"
MOST_UPLOADS = 20  # concept files of one tab
Update = Any  # of a gradio component


@dataclass(eq=False)
class Slot:
    """The row of one chosen concept: its token, which a click puts into the prompt, and its gate."""

    row: Any
    token: Any
    beta: Any
    temperature: Any


@dataclass(eq=False)
class GenerateTab:
    """The tab's components, and what happens with them.

    Everything that decides a picture is sent with each call, so that browser tabs do not mix.
    """

    page: Page
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
    words: Any = None
    picture: Any = None
    base_part: Any = None
    base: Any = None
    base_caption: Any = None
    notes: Any = None
    grid: Any = None

    @property
    def gates(self) -> list[Any]:
        """The sliders: all β, then all τ."""
        return [slot.beta for slot in self.slots] + [slot.temperature for slot in self.slots]

    @property
    def inputs(self) -> list[Any]:
        """The components that decide a picture, in the order that `_request` takes them."""
        return [
            self.page.model,
            self.labels,
            self.uploads,
            self.prompt,
            *self.sampling,
            self.with_base,
            *self.gates,
        ]

    def offer(self, uploads: Mapping[str, Offer] | None, labels: Sequence[str]) -> Update:
        """Return the update that offers all concepts, with some of them chosen."""
        offers = list(self.page.catalogue.offers(uploads))
        kept = [label for label in labels if label in offers]
        return required("gradio").CheckboxGroup(choices=offers, value=kept)

    def choose(
        self,
        model: str,
        labels: Sequence[str],
        before: Sequence[str],
        uploads: Mapping[str, Offer],
        *gates: float,
    ) -> list[Update]:
        """Return the slots for the chosen concepts: their gates are kept, or are the file's own."""
        gradio = required("gradio")
        known = dict(
            zip(before, zip(gates[:MOST_CONCEPTS], gates[MOST_CONCEPTS:], strict=True), strict=False)
        )
        message, tokens, labels = "", [], list(labels)
        try:
            offers = self._offers_of(labels, uploads)
            tokens = self.page.studio.tokens(model, [offer.path for offer in offers])
        except EXPLAINED as error:
            message, labels, offers = look.note(str(error), is_wrong=True), [], []
        values = [known.get(label, (o.beta, o.temperature)) for label, o in zip(labels, offers, strict=True)]
        spare = MOST_CONCEPTS - len(labels)
        rows = [gradio.Row(visible=True)] * len(labels) + [gradio.Row(visible=False)] * spare
        buttons = [gradio.Button(token) for token in tokens] + [gradio.skip()] * spare
        betas = [value[0] for value in values] + [gradio.skip()] * spare
        temperatures = [value[1] for value in values] + [gradio.skip()] * spare
        return [labels, *rows, *buttons, *betas, *temperatures, message]

    def _offers_of(self, labels: Sequence[str], uploads: Mapping[str, Offer]) -> list[Offer]:
        """Return the concepts of some labels; a ValueError where one is not offered, or there are too many."""
        offers = self.page.catalogue.offers(uploads)
        unknown = [label for label in labels if label not in offers]
        if unknown:
            raise ValueError(f"The concept {unknown[0]!r} is not offered. Reload the page.")
        if len(labels) > MOST_CONCEPTS:
            raise ValueError(f"At most {MOST_CONCEPTS} concepts fit into a picture, got {len(labels)}.")
        return [offers[label] for label in labels]

    def _request(self, values: Sequence[Any]) -> tuple[Request, bool]:
        """Return a request from the values of `inputs`, and whether the base model's picture is wanted."""
        model, labels, uploads, prompt, seed, steps, guidance, size, with_base, *gates = values
        paths = [offer.path for offer in self._offers_of(labels, uploads)]
        chosen = tuple(
            Chosen(path, beta, temperature)
            for path, beta, temperature in zip(
                paths, gates[: len(paths)], gates[MOST_CONCEPTS : MOST_CONCEPTS + len(paths)], strict=True
            )
        )
        request = Request(model, prompt, chosen, int(seed or 0), int(steps), float(guidance), int(size))
        return request, bool(with_base)

    def draw(self, *values: Any) -> list[Update]:
        """Return words, picture, the base model's picture with its caption, and notes."""
        gradio = required("gradio")
        try:
            request, with_base = self._request(values)
            drawn = self.page.studio.draw(request, with_base=with_base)
        except EXPLAINED as error:
            return ["", None, gradio.skip(), None, "", look.note(str(error), is_wrong=True)]
        gates = [(chosen.beta, chosen.temperature) for chosen in request.concepts]
        words = coloured_words(request.prompt, drawn.words, drawn.tokens, gates) if drawn.words else ""
        caption = look.caption(f"Base model, same noise: “{drawn.base_prompt}”")
        base = [gradio.Column(visible=with_base), drawn.base, caption]
        return [words, drawn.image, *base, look.note(*drawn.notes)]

    def draw_grid(self, betas: str, *values: Any) -> list[Update]:
        """Return a grid over β, and notes."""
        gradio = required("gradio")
        try:
            request, with_base = self._request(values)
            image = self.page.studio.grid(request, _numbers(betas), with_base=with_base)
        except EXPLAINED as error:
            return [gradio.Image(visible=False), look.note(str(error), is_wrong=True)]
        return [gradio.Image(value=image, visible=True), ""]

    def upload(self, paths: Sequence[str] | None, uploads: dict, labels: Sequence[str]) -> list[Update]:
        """Take concept files that a browser sent, for this tab alone, and choose them."""
        uploads, labels = dict(uploads), list(labels)
        message = ""
        try:
            for path in paths or ():
                if len(uploads) >= MOST_UPLOADS:
                    raise ValueError(f"A tab takes at most {MOST_UPLOADS} concept files.")
                offer = Offer.of(Path(path))
                label = upload_label(offer, self.page.catalogue.offers(uploads))
                uploads[label] = offer
                labels.append(label)
        except EXPLAINED as error:
            message = look.note(str(error).replace(f"{Path(path).parent}/", ""), is_wrong=True)
        return [uploads, self.offer(uploads, labels[-MOST_CONCEPTS:]), message]

    def then_draw(self, event: Any) -> Any:
        """After an event that chose concepts, show their gates and make the picture."""
        return event.then(
            self.choose,
            [self.page.model, self.labels, self.chosen, self.uploads, *self.gates],
            [
                self.chosen,
                *(slot.row for slot in self.slots),
                *(slot.token for slot in self.slots),
                *self.gates,
                self.notes,
            ],
            show_progress="hidden",
            api_visibility="private",
        ).success(self.draw, self.inputs, self.outputs, **PICTURES)

    @property
    def outputs(self) -> list[Any]:
        """The components that show what `draw` returns."""
        return [self.words, self.picture, self.base_part, self.base, self.base_caption, self.notes]


# Events that make pictures: one at a time; of several that wait in one browser tab only the last one counts.
PICTURES: dict[str, Any] = {
    "concurrency_id": "pictures",
    "concurrency_limit": 1,
    "trigger_mode": "always_last",
    "api_visibility": "private",
    "show_progress": "minimal",
}


def add_tab(page: Page) -> None:
    """Add the tab to the page that is being built."""
    gradio = required("gradio")
    tab = page.generate = GenerateTab(page)
    with gradio.Tab("Generate", id="generate"), gradio.Row():
        with gradio.Column(scale=5, min_width=380):
            _add_controls(tab)
        with gradio.Column(scale=6, min_width=380):
            _add_results(tab)
    _connect(tab)


def _add_controls(tab: GenerateTab) -> None:
    gradio, page = required("gradio"), tab.page
    offers = page.catalogue.offers()
    first = list(offers)[:1]
    token = offers[first[0]].token if first else "dog"
    tab.uploads, tab.chosen = gradio.State({}), gradio.State([])
    tab.prompt = gradio.Textbox(
        page.defaults.prompt.format(token),
        label="Prompt",
        lines=2,
        max_length=MOST_LETTERS,
        elem_id="prompt",
        submit_btn=False,
    )
    tab.labels = gradio.CheckboxGroup(list(offers), value=first, label="Concepts", elem_id="concepts")
    tab.slots = [_slot(number) for number in range(MOST_CONCEPTS)]
    with gradio.Row():
        tab.go = gradio.Button("Generate", variant="primary", elem_id="go")
        tab.with_base = gradio.Checkbox(
            True, label="beside the base model", container=False, elem_id="with-base"
        )
    with gradio.Accordion("Seed, steps, guidance, size", open=False):
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


def _slot(number: int) -> Slot:
    """Return the row of one chosen concept."""
    gradio = required("gradio")
    with gradio.Row(visible=False, elem_id=f"slot-{number}", elem_classes="slot") as row:
        token = gradio.Button("", size="sm", min_width=90, scale=1, elem_id=f"token-{number}")
        beta = gradio.Slider(
            0, 1.5, 0.5, step=0.05, label="β", min_width=140, scale=4, elem_id=f"beta-{number}"
        )
        temperature = gradio.Slider(
            0.01, 0.5, 0.05, step=0.01, label="τ", min_width=140, scale=4, elem_id=f"temperature-{number}"
        )
    return Slot(row, token, beta, temperature)


def _sampling(page: Page) -> list[Any]:
    gradio, defaults = required("gradio"), page.defaults
    with gradio.Row():
        seed = gradio.Number(
            0, label="Seed", precision=0, minimum=0, maximum=MOST_SEEDS, min_width=100, elem_id="seed"
        )
        steps = gradio.Slider(
            1, MOST_STEPS, defaults.steps, step=1, label="Steps", min_width=160, elem_id="steps"
        )
    with gradio.Row():
        guidance = gradio.Slider(0, 20, defaults.guidance, step=0.5, label="Guidance", min_width=160)
        size = gradio.Slider(
            defaults.multiple,
            2 * defaults.edge,
            defaults.edge,
            step=defaults.multiple,
            label="Size (pixels)",
            min_width=160,
        )
    return [seed, steps, guidance, size]


def _add_results(tab: GenerateTab) -> None:
    gradio = required("gradio")
    kinds = ["picture", "small-pixels"] if tab.page.defaults.edge < 256 else ["picture"]
    options = {
        "format": "png",
        "interactive": False,
        "show_label": False,
        "height": 290,
        "elem_classes": kinds,
        "buttons": ["download", "fullscreen"],
    }
    tab.words = gradio.HTML(elem_id="words", min_height=60)
    with gradio.Row():
        with gradio.Column(min_width=200):
            tab.picture = gradio.Image(label="With the concept", elem_id="picture", **options)
            gradio.HTML(look.caption("With the chosen concepts"))
        with gradio.Column(min_width=200) as tab.base_part:
            tab.base = gradio.Image(label="Base model, same noise", elem_id="base", **options)
            tab.base_caption = gradio.HTML(elem_id="base-caption")
    tab.notes = gradio.HTML(elem_id="notes")
    tab.grid = gradio.Image(
        label="Over β",
        visible=False,
        elem_id="grid",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
    )


def _connect(tab: GenerateTab) -> None:
    """Say what happens when."""
    gradio, page = required("gradio"), tab.page
    own = {"api_visibility": "private", "show_progress": "hidden"}
    opened = page.blocks.load(tab.offer, [tab.uploads, tab.labels], tab.labels, **own)
    tab.then_draw(opened)
    tab.then_draw(tab.labels.input(lambda: None, **own))
    tab.then_draw(page.model.input(lambda: None, **own))
    sent = tab.file.upload(
        tab.upload, [tab.file, tab.uploads, tab.labels], [tab.uploads, tab.labels, tab.notes], **own
    )
    tab.then_draw(sent)
    gradio.on(
        [tab.go.click, tab.prompt.submit, *(slider.release for slider in tab.gates)],
        tab.draw,
        tab.inputs,
        tab.outputs,
        **PICTURES,
    )
    tab.lay_out.click(tab.draw_grid, [tab.betas, *tab.inputs], [tab.grid, tab.notes], **PICTURES)
    for slot in tab.slots:  # a click on a token puts it into the prompt
        slot.token.click(_appended, [tab.prompt, slot.token], tab.prompt, **own)


def _appended(prompt: str, token: str) -> str:
    return f"{prompt.rstrip()} {token}".strip()


def _numbers(text: str) -> list[float]:
    """Return the numbers in a text.

    Example:
        >>> _numbers("0.3, 0.5 1")
        [0.3, 0.5, 1.0]
    """
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"β must be numbers, such as {BETAS!r}, got {text!r}.") from None
