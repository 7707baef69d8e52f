"""What the tab that makes pictures does: from its components' values to their new values.

Everything that decides a picture is sent with each call, so that browser tabs do not mix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfusion_pytorch.app import look
from perfusion_pytorch.app.catalogue import Offer, upload_label
from perfusion_pytorch.app.shared import EXPLAINED, Page
from perfusion_pytorch.app.studio import MOST_CONCEPTS, Chosen, Drawn, Request
from perfusion_pytorch.app.words import coloured_words
from perfusion_pytorch.extras import required

BETAS = "0.3 0.5 0.7 0.9 1.2"
MOST_UPLOADS = 20  # concept files of one tab
Update = Any  # of a gradio component


@dataclass(frozen=True, eq=False)
class GenerateActions:
    """The actions, on what the tabs share."""

    page: Page

    def first(self) -> tuple[Request, list[str]]:
        """Return the request that the page opens on, and the labels of its concepts: the first, or none."""
        offers, filled = self.page.catalogue.offers(), self.page.defaults
        labels = list(offers)[:1]
        chosen = tuple(Chosen(offers[label].path, *offers[label].gate) for label in labels)
        prompt = filled.prompt.format(offers[labels[0]].token if labels else "dog")
        sampling: dict[str, Any] = {"steps": filled.steps, "guidance": filled.guidance, "size": filled.edge}
        return Request(self.page.models[0], prompt, chosen, **sampling), labels

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
        held = zip(gates[:MOST_CONCEPTS], gates[MOST_CONCEPTS:], strict=True)
        known = dict(zip(before, held, strict=False))
        message, tokens, offers, labels = "", [], [], list(labels)
        try:
            offers = self._offers_of(labels, uploads)
            tokens = self.page.studio.tokens(model, [offer.path for offer in offers])
        except EXPLAINED as error:
            message, labels, offers = look.note(str(error), is_wrong=True), [], []
        values = [known.get(label, offer.gate) for label, offer in zip(labels, offers, strict=True)]
        spare = MOST_CONCEPTS - len(labels)
        rows = [gradio.Row(visible=True)] * len(labels) + [gradio.Row(visible=False)] * spare
        buttons = [gradio.Button(token) for token in tokens] + [gradio.skip()] * spare
        betas = [value[0] for value in values] + [gradio.skip()] * spare
        temperatures = [value[1] for value in values] + [gradio.skip()] * spare
        return [labels, *rows, *buttons, *betas, *temperatures, message]

    def _offers_of(self, labels: Sequence[str], uploads: Mapping[str, Offer]) -> list[Offer]:
        """Return the concepts of some labels; a ValueError where one is not offered, or too many are."""
        offers = self.page.catalogue.chosen(labels, uploads)
        if len(offers) > MOST_CONCEPTS:
            raise ValueError(f"At most {MOST_CONCEPTS} concepts fit into a picture, got {len(offers)}.")
        return offers

    def opened_on(self, offer: Offer, uploads: Mapping[str, Offer]) -> list[Update]:
        """Return the updates that open the tab on one concept, with a first prompt, at the offer's gate."""
        gradio, uploads = required("gradio"), dict(uploads)
        offers = self.page.catalogue.offers(uploads)
        same = [label for label, other in offers.items() if other.path.resolve() == offer.path.resolve()]
        label = same[0] if same else upload_label(offer, offers)
        if not same:
            uploads[label] = offer
        prompt = self.page.defaults.prompt.format(offer.token)
        chosen = self.offer(uploads, [label])
        return [gradio.Tabs(selected="generate"), uploads, chosen, [label], prompt, *offer.gate]

    def _request(self, values: Sequence[Any]) -> tuple[Request, bool]:
        """Return a request from the tab's values, and whether the base model's picture is wanted."""
        model, labels, uploads, prompt, seed, steps, guidance, size, with_base, *gates = values
        offers = self._offers_of(labels, uploads)
        chosen = tuple(
            Chosen(offer.path, gates[i], gates[MOST_CONCEPTS + i]) for i, offer in enumerate(offers)
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
        words, image, base, caption, notes = shown(request, drawn)
        return [words, image, gradio.Column(visible=with_base), base, caption, notes]

    def draw_grid(self, betas: str, *values: Any) -> list[Update]:
        """Return a grid over β, and notes."""
        gradio = required("gradio")
        try:
            request, with_base = self._request(values)
            image = self.page.studio.grid(request, numbers(betas), with_base=with_base)
        except EXPLAINED as error:
            return [gradio.Image(visible=False), look.note(str(error), is_wrong=True)]
        return [gradio.Image(value=image, visible=True), ""]

    def upload(self, paths: Sequence[str] | None, uploads: dict, labels: Sequence[str]) -> list[Update]:
        """Take concept files that a browser sent, for this tab alone, and choose them."""
        uploads, labels, message = dict(uploads), list(labels), ""
        for path in map(Path, paths or ()):
            try:
                if len(uploads) >= MOST_UPLOADS:
                    raise ValueError(f"A tab takes at most {MOST_UPLOADS} concept files.")
                offer = Offer.of(path)
            except EXPLAINED as error:  # it says where the upload is, which its user does not know
                message += look.note(str(error).replace(f"{path.parent}/", ""), is_wrong=True)
                continue
            label = upload_label(offer, self.page.catalogue.offers(uploads))
            uploads[label] = offer
            labels.append(label)
        return [uploads, self.offer(uploads, labels[-MOST_CONCEPTS:]), message]


def shown(request: Request, drawn: Drawn) -> tuple[str, Any, Any, str, str]:
    """Return what shows a picture: words, it, the base model's, its caption, and notes."""
    gates = [(chosen.beta, chosen.temperature) for chosen in request.concepts]
    words = coloured_words(request.prompt, drawn.words, drawn.tokens, gates) if drawn.words else ""
    caption = look.caption(f"Base model, same noise: “{drawn.base_prompt}”")
    return words, drawn.image, drawn.base, caption, look.note(*drawn.notes)


def appended(prompt: str, token: str) -> str:
    """Return a prompt with a token at its end.

    Example:
        >>> appended("a photo of a ", "<car-1>")
        'a photo of a <car-1>'
    """
    return f"{prompt.rstrip()} {token}".strip()


def numbers(text: str) -> list[float]:
    """Return the numbers in a text.

    Raises:
        ValueError: it holds something else.

    Example:
        >>> numbers("0.3, 0.5 1")
        [0.3, 0.5, 1.0]
    """
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"β must be numbers, such as {BETAS!r}, got {text!r}.") from None
