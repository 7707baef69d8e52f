"""The pictures of an evaluation, each a file, so that a second run makes only those that are missing."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perfusion_pytorch.evaluation.candidates import Candidate
from perfusion_pytorch.evaluation.loading import loaded
from perfusion_pytorch.evaluation.prompts import Prompts
from perfusion_pytorch.extras import required
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.grids import write_png
from perfusion_pytorch.pipelines.picture_facts import picture_facts, warn_of_black_pictures
from perfusion_pytorch.training.progress import INTERVAL, can_show_bars

if TYPE_CHECKING:
    from PIL.Image import Image

SETTINGS_FILE = "settings.json"
FOLDER = "pictures"
LOG_INTERVAL = 30  # seconds between two lines of the bar in a log, where each stays


@dataclass(frozen=True)
class Job:
    """A picture to make: its prompt, the seed of the noise that it starts from, and its file."""

    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Group:
    """The pictures of one file at one strength, or those of the base model.

    Attributes:
        label: what the progress bar shows.
        shown: of the prompts with the thing: all seeds of a prompt, then those of the next. For the base
            model the superclass's word is in the thing's place.
        plain: of the same prompts with the superclass's word, first seed only; for the base model those are
            among `shown`.
        unrelated: of the unrelated prompts, first seed only.
    """

    label: str
    shown: tuple[Job, ...]
    plain: tuple[Job, ...]
    unrelated: tuple[Job, ...]

    @property
    def jobs(self) -> list[Job]:
        """All pictures, each once."""
        return list(dict.fromkeys((*self.shown, *self.plain, *self.unrelated)))


Groups = Mapping[Candidate, Sequence[tuple[float | None, Group]]]  # of each file: strengths and pictures


@dataclass(frozen=True)
class Plan:
    """What pictures are made of.

    Attributes:
        folder: where the evaluation is written to.
        prompts: the prompts.
        superclass: the thing's kind, in words.
        seeds: of each prompt's pictures.
    """

    folder: Path
    prompts: Prompts
    superclass: str
    seeds: tuple[int, ...]

    def base_group(self) -> Group:
        """Return the base model's pictures."""
        shown = self._jobs("base", self._filled(self.superclass), self.seeds)
        unrelated = self._jobs("base", self.prompts.unrelated, self.seeds[:1])
        return Group("base model", shown, shown[:: len(self.seeds)], unrelated)

    def group(self, candidate: Candidate, strength: float | None) -> Group:
        """Return the pictures of a file at a strength."""
        name = f"{_slug(candidate.name)}-{candidate.digest[:8]}"
        knob = "" if strength is None else f"{candidate.knob}{strength:g}"
        where = str(Path(name, knob))
        return Group(
            f"{candidate.name} {candidate.label(strength)}".strip(),
            self._jobs(f"{where}/shown", self._filled(candidate.words), self.seeds),
            self._jobs(f"{where}/plain", self._filled(self.superclass), self.seeds[:1]),
            self._jobs(f"{where}/unrelated", self.prompts.unrelated, self.seeds[:1]),
        )

    def _filled(self, words: str) -> list[str]:
        return [template.replace("{}", words) for template in self.prompts.templates]

    def texts(self) -> list[str]:
        """Return, for each picture of `shown`, its prompt with the superclass's word for the thing."""
        return [text for text in self._filled(self.superclass) for _ in self.seeds]

    def _jobs(self, where: str, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Job, ...]:
        folder = self.folder / FOLDER / where
        return tuple(
            Job(prompt, seed, folder / f"{_slug(prompt)}-{_short_digest(prompt)}-seed{seed}.png")
            for prompt in prompts
            for seed in seeds
        )


@dataclass
class Maker:
    """Makes pictures that are not there yet.

    Attributes:
        pipe: the base model.
        options: what the pipeline is called with beside prompts and noise.
        batch_size: pictures made at a time.
        num_made: how many were made so far.
    """

    pipe: Any
    options: Mapping[str, Any]
    batch_size: int
    num_made: int = 0

    def make(self, jobs: Sequence[Job], done: Callable[[int], object]) -> None:
        """Make pictures and write each as a file; `done` is told how many after each batch."""
        for first in range(0, len(jobs), self.batch_size):
            batch = jobs[first : first + self.batch_size]
            generators = [torch.Generator().manual_seed(job.seed) for job in batch]
            result = self.pipe([job.prompt for job in batch], generator=generators, **self.options)
            facts = picture_facts(self.pipe, **self.options)
            for job, image in zip(batch, result.images, strict=True):
                about = {"prompt": job.prompt, "seed": job.seed} | facts
                write_png(job.path, image.convert("RGB"), job.prompt, facts=about)
            self.num_made += len(batch)
            warn_of_black_pictures(self.pipe, [result])
            done(len(batch))

    def make_all(
        self,
        base: Group,
        others: Groups,
        *,
        progress: bool,
    ) -> int:
        """Make all pictures that are missing, and return how many were there."""
        groups = [base, *(group for rows in others.values() for _, group in rows)]
        missing = {group: _missing(group.jobs) for group in groups}
        total = sum(len(group.jobs) for group in groups)
        kept = total - sum(map(len, missing.values()))
        tqdm = required("tqdm").tqdm
        with (
            _quiet(self.pipe),
            tqdm(
                total=total,
                initial=kept,
                desc="pictures",
                unit="picture",
                mininterval=0.1 if can_show_bars() else min(LOG_INTERVAL, INTERVAL),
                disable=not progress,
            ) as bar,
        ):
            bar.set_postfix_str(base.label)
            self.make(missing[base], bar.update)
            for candidate, rows in others.items():
                if not any(missing[group] for _, group in rows):
                    continue
                with loaded(self.pipe, candidate) as set_strength:
                    for strength, group in rows:
                        bar.set_postfix_str(group.label)
                        set_strength(strength)
                        self.make(missing[group], bar.update)
        return kept


def _missing(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if not _is_whole(job.path)]


def _is_whole(path: Path) -> bool:
    """Return whether a picture is there and can be read."""
    try:
        open_picture(path)
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def open_picture(path: Path) -> "Image":
    """Return the picture in a file."""
    with required("PIL.Image").open(path) as image:
        picture: Image = image.convert("RGB")
        return picture


def pictures_of(jobs: Sequence[Job]) -> list["Image"]:
    """Return the pictures that were made."""
    return [open_picture(job.path) for job in jobs]


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Let the pipeline show no progress bars of its own within the block."""
    had = "_progress_bar_config" in vars(pipe)
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if had:
            pipe._progress_bar_config = before
        else:
            del pipe._progress_bar_config


def settle(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what all pictures of a folder are made with, or check that it is as it was.

    Raises:
        ValueError: the folder's pictures were made with other settings.
    """
    path = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    check_settings(folder, settings)
    if not path.exists():
        write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError where a folder's pictures were made with other settings."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return
    try:
        before = json.loads(path.read_bytes())
        if not isinstance(before, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Choose another folder, or remove this one."
        ) from error
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        differences = ", ".join(f"{name} {before.get(name)!r}, now {settings.get(name)!r}" for name in names)
        raise ValueError(
            f"`output_dir` must hold no pictures of other settings, but those in {folder} were made with "
            f"{differences}. Choose another folder, or remove this one."
        )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50] or "x"


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
