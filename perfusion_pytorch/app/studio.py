"""The one pipeline behind all browser tabs: each picture is made with a lock held, from its request alone."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from perfusion_pytorch.app.notes import collected_notes
from perfusion_pytorch.diagnostics import token_similarities
from perfusion_pytorch.grids import FACTS, labelled_grid
from perfusion_pytorch.pipelines.encoding import prompt_encoder
from perfusion_pytorch.pipelines.parts import denoiser_of, loaded_on, text_encoders_of
from perfusion_pytorch.pipelines.picture_facts import picture_facts, warn_of_black_pictures
from perfusion_pytorch.pipelines.verbs import (
    disable_concepts,
    get_active_concepts,
    get_list_concepts,
    load_concept,
    set_concepts,
    unload_concepts,
)
from perfusion_pytorch.tokens import with_tokens_replaced

if TYPE_CHECKING:
    from PIL.Image import Image

LIKE_A_TOKEN = re.compile(r"<[^<>\s]+>")
MOST_CONCEPTS = 4  # in one picture
MOST_BETAS = 8  # in one grid
MOST_STEPS = 150
MOST_SEEDS = 2**32
MOST_LETTERS = 1000  # of a prompt
KEPT = 48  # pictures, so that a gate that is moved back, or the base model's picture, needs no second making

Words = list[tuple[str, tuple[float, ...]]]  # each token of a prompt with its r to each concept


class Chosen(NamedTuple):
    """A concept file, and the gate that it is used with."""

    path: Path
    beta: float
    temperature: float


@dataclass(frozen=True)
class Request:
    """All that decides what a picture shows.

    Attributes:
        model: one of the studio's.
        prompt: with the tokens of the concepts.
        concepts: those that are loaded for it, in this order.
        seed, steps, guidance, size: as in any pipeline; the size is the edge, in pixels.

    Raises:
        ValueError: a value is out of its range.
    """

    model: str
    prompt: str
    concepts: tuple[Chosen, ...] = ()
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5
    size: int = 512

    def __post_init__(self) -> None:
        for what, value, low, high in (
            ("number of concepts", len(self.concepts), 0, MOST_CONCEPTS),
            ("length of the prompt", len(self.prompt.strip()), 1, MOST_LETTERS),
            ("seed", self.seed, 0, MOST_SEEDS),
            ("number of steps", self.steps, 1, MOST_STEPS),
            ("guidance", self.guidance, 0, 50),
            ("size", self.size, 8, 4096),
        ):
            if not low <= value <= high:
                raise ValueError(f"The {what} must be from {low} to {high}, got {value}.")


@dataclass(frozen=True)
class Drawn:
    """What a request gave.

    Attributes:
        image: the picture.
        base: that of the base model from the same noise, if it was asked for.
        base_prompt: its prompt, with the superclass in the place of each token.
        tokens: the concepts' names in prompts, in the order of the request.
        words: what the gate sees, or nothing where no concept is chosen.
        notes: what to know about it, as sentences.
    """

    image: "Image"
    base: "Image | None"
    base_prompt: str
    tokens: list[str]
    words: Words
    notes: list[str]


@dataclass(eq=False)
class Studio:
    """Base models, of which one is loaded at a time, shared by all tabs of all browsers.

    Attributes:
        models: for each model's name a function that loads it.
    """

    models: Mapping[str, Callable[[], Any]]
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _current: tuple[str, Any] | None = None
    _loaded: tuple[tuple[Path, int, int], ...] = ()  # the concept files on the pipeline, as they were then
    _kept: OrderedDict[tuple[Any, ...], "Image"] = field(default_factory=OrderedDict)

    @contextmanager
    def pipeline(self, model: str) -> Iterator[Any]:
        """Give a model's pipeline to this thread alone until the block ends.

        Raises:
            ValueError: there is no such model.
        """
        if model not in self.models:
            raise ValueError(f"The model must be one of {list(self.models)}, got {model!r}.")
        with self._lock:
            if self._current is None or self._current[0] != model:
                self._current, self._loaded = None, ()  # the memory of the other one is freed first
                self._current = (model, self.models[model]())
            yield self._current[1]

    @contextmanager
    def bare_pipeline(self, model: str) -> Iterator[Any]:
        """Give a model's pipeline without concepts, as training finds it."""
        with self.pipeline(model) as pipe:
            self._loaded = ()
            unload_concepts(pipe)
            yield pipe

    def tokens(self, model: str, paths: Sequence[Path]) -> list[str]:
        """Return the names that concepts have in prompts when they are chosen together."""
        with self.pipeline(model) as pipe:
            return self._load(pipe, paths)

    def draw(self, request: Request, *, with_base: bool = False) -> Drawn:
        """Make a picture, and say what the gate sees in its prompt.

        Args:
            request: what it shows.
            with_base: also make the base model's picture from the same noise.

        Raises:
            ValueError: a concept does not fit the model, or the prompt names one that is not chosen.
        """
        with self.pipeline(request.model) as pipe, collected_notes() as notes:
            names = self._use(pipe, request)
            notes += _remarks(pipe, request.prompt, names)
            has_unet = getattr(pipe, "unet", None) is not None  # others encode in ways of their own
            words = _words(pipe, request.prompt) if names and has_unet else []
            image = self._picture(pipe, request, request.prompt)
            base_prompt = _without_tokens(pipe, request.prompt, names)
            base = self._base(pipe, request, base_prompt) if with_base else None
        return Drawn(image, base, base_prompt, names, words, notes)

    def grid(self, request: Request, betas: Sequence[float], *, with_base: bool = False) -> "Image":
        """Lay out a picture for each gate bias, and before them the base model's if it is asked for.

        Raises:
            ValueError: as `draw` does; no concept is chosen; or there are too many betas.
        """
        if not request.concepts or not 1 <= len(betas) <= MOST_BETAS:
            raise ValueError(
                f"A grid needs a concept and 1 to {MOST_BETAS} values of β, got {len(request.concepts)} "
                f"concepts and {len(betas)} values."
            )
        with self.pipeline(request.model) as pipe, collected_notes():
            names = self._use(pipe, request)
            _remarks(pipe, request.prompt, names)
            images, labels = [], []
            for beta in betas:
                set_concepts(pipe, names, beta=beta)
                images.append(self._picture(pipe, request, request.prompt))
                labels.append(f"beta {beta:g}")
            if with_base:
                images.insert(0, self._base(pipe, request, _without_tokens(pipe, request.prompt, names)))
                labels.insert(0, "base model")
            return labelled_grid([("", images)], labels)

    def _use(self, pipe: Any, request: Request) -> list[str]:
        """Load a request's concepts, set their gates, and return their names."""
        names = self._load(pipe, [chosen.path for chosen in request.concepts])
        gates = dict(zip(names, request.concepts, strict=True))
        if names:
            set_concepts(
                pipe,
                names,
                beta={name: float(chosen.beta) for name, chosen in gates.items()},
                temperature={name: float(chosen.temperature) for name, chosen in gates.items()},
            )
        return names

    def _load(self, pipe: Any, paths: Sequence[Path]) -> list[str]:
        """Let these concept files, and no others, be on the pipeline; return their names."""
        stats = [path.stat() for path in paths]
        wanted = tuple((path, at.st_mtime_ns, at.st_size) for path, at in zip(paths, stats, strict=True))
        if wanted != self._loaded:
            self._loaded = ()
            unload_concepts(pipe)
            names = [load_concept(pipe, path) for path in paths]
            if len(set(names)) < len(names):
                unload_concepts(pipe)
                raise ValueError(f"Two of the chosen files hold the same concept, {names}. Choose one.")
            self._loaded = wanted
        return get_list_concepts(pipe)

    def _base(self, pipe: Any, request: Request, prompt: str) -> "Image":
        """Return the base model's picture of a prompt, from the request's noise."""
        if get_list_concepts(pipe):
            disable_concepts(pipe)  # the next request sets them again
        return self._picture(pipe, request, prompt)

    def _picture(self, pipe: Any, request: Request, prompt: str) -> "Image":
        """Return the picture of a prompt with the concepts as they are set, made or kept."""
        gates = [loaded_on(pipe).concepts[name].eval_gate for name in get_active_concepts(pipe)]
        files = self._loaded if gates else ()
        sampling = (request.seed, request.steps, request.guidance, request.size)
        key = (request.model, prompt, *sampling, files, *gates)
        if key not in self._kept:
            names = dict(zip(get_list_concepts(pipe), [path for path, _, _ in files], strict=False))
            image = _made(pipe, request, prompt, names)
            if not image.getbbox():  # black, which is a warning each time
                return image
            self._kept[key] = image
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key].copy()


def _remarks(pipe: Any, prompt: str, names: Sequence[str]) -> list[str]:
    """Return what to know of a prompt; a ValueError where it names a concept that is not chosen."""
    unknown = [word for word in LIKE_A_TOKEN.findall(prompt) if word not in names]
    if unknown:
        offered = f"one of the chosen concepts, {', '.join(names)}" if names else "a chosen concept"
        raise ValueError(f"{unknown[0]} must be {offered}. Choose its file, or write another word.")
    notes = []
    if names and not any(name in prompt for name in names):
        notes.append(f"The prompt names none of the chosen concepts: {', '.join(names)}.")
    for _, tokenizer in text_encoders_of(pipe).values():
        if len(tokenizer(prompt).input_ids) > tokenizer.model_max_length:
            notes.append("The prompt is too long: the model does not read its end.")
            break
    return notes


def _words(pipe: Any, prompt: str) -> Words:
    """Return r of each token of a prompt, without its beginning, its end and padding."""
    (row,) = token_similarities(denoiser_of(pipe), pipe.tokenizer, prompt_encoder(pipe), [prompt])
    tokens = [token for token, _ in row]
    first = 1 if tokens[0] == pipe.tokenizer.bos_token else 0
    end = pipe.tokenizer.eos_token
    return row[first : tokens.index(end, first) if end in tokens[first:] else None]


def _without_tokens(pipe: Any, prompt: str, names: Sequence[str]) -> str:
    """Return a prompt with superclass words in the place of concepts' tokens."""
    if not names:
        return prompt
    return with_tokens_replaced(prompt, names, lambda name: loaded_on(pipe).concepts[name].superclass)


def _made(pipe: Any, request: Request, prompt: str, files: Mapping[str, Path]) -> "Image":
    """Make a picture, which says what it was made with, as those of `perfusion generate` do."""
    options: dict[str, Any] = {
        "num_inference_steps": request.steps,
        "guidance_scale": float(request.guidance),
        "height": request.size,
        "width": request.size,
    }
    result = pipe(prompt, generator=torch.Generator().manual_seed(request.seed), **options)
    warn_of_black_pictures(pipe, [result])
    image: Image = result.images[0]
    facts = picture_facts(pipe, files=files, model=request.model, **options)
    image.info[FACTS] = json.dumps({"prompt": prompt, "seed": request.seed} | facts)
    return image
