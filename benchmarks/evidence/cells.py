"""One cell of the evidence: a contender learns an object with a seed, and the pictures are judged."""

import hashlib
import json
import platform
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from contenders import Contender
from methods import METHODS, Task
from sheets import cached, lay_out
from task import Judge, generate, pictures_of, prompts_for, unrelated_captions

import perfusion_pytorch
from perfusion_pytorch import InputCovariance, calculate_input_covariance
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.pipelines.encoding import prompt_encoder

PACKAGES = ("torch", "diffusers", "transformers", "peft")
NOISE, UNRELATED_NOISE = 1000, 2000  # the first seeds of the pictures


@dataclass(frozen=True)
class Cell:
    """What is run.

    Attributes:
        contender: who learns.
        subject: the object, of `world.new_object`.
        seed: of the training.
        steps: how many.
        num_prompts: for the figures.
        num_view_prompts: how many of these each further view is judged by; 0 for no such views.
        model: the base model's folder.
        folder: for the results.
    """

    contender: Contender
    subject: object
    seed: int
    steps: int
    num_prompts: int
    num_view_prompts: int
    model: Path
    folder: Path

    @property
    def settings(self):
        """All that the figures depend on, but for the object, the seed, the model and the code."""
        counts = {
            "steps": self.steps,
            "num_prompts": self.num_prompts,
            "num_view_prompts": self.num_view_prompts,
        }
        return self.contender.facts() | counts

    @property
    def name(self):
        """The name of its files: what it is of, and a hash of its settings."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        words = (self.contender.name, self.subject.superclass, self.subject.seed, self.seed, digest)
        return "-".join(map(str, words)).replace(" ", "_").replace(",", "").replace("/", "_")

    @property
    def path(self):
        """The file of its figures."""
        return self.folder / f"{self.name}.json"


def covariance_of(model, folder):
    """Return the input covariance of the model's text encoder over the world's captions; computed once."""
    import world
    from evaluate import load_pipeline

    path = folder / "covariance.safetensors"
    if not path.exists():
        captions = [world.sample(seed).caption for seed in range(10_000)]
        covariance = calculate_input_covariance(
            captions, prompt_encoder(load_pipeline(model)), batch_size=256, ridge=1e-6
        )
        covariance.save(path)
    return InputCovariance.load(path)


def task_of(cell):
    """Return what the cell's contender is to learn."""
    pairs = cell.subject.pictures(cell.contender.num_pictures)
    return Task(
        pictures=[image for image, _ in pairs],
        masks=[mask for _, mask in pairs] if cell.contender.masks else None,
        superclass=cell.subject.superclass,
        covariance=covariance_of(cell.model, cell.folder),
        steps=cell.steps,
        seed=cell.seed,
        folder=cell.folder / "trained" / cell.name,
    )


def base_pictures(cell, pipe, prompts, unrelated):
    """Return the base model's pictures of the plain superclass and of unrelated prompts.

    All cells of an object share them.
    """
    subject, folder = cell.subject, cell.folder / "base"
    stem = f"{subject.superclass}-{subject.seed}-{cell.num_prompts}"

    def plain():
        return pictures_of(pipe, prompts, subject.superclass, seed=NOISE)

    def others():
        return generate(pipe, unrelated, seed=UNRELATED_NOISE)

    return (
        cached(folder / f"{stem}-plain.png", plain, len(prompts)),
        cached(folder / f"{stem}-unrelated.png", others, len(unrelated)),
    )


def measure(cell, pipe, learned, checker, prompts, unrelated, before):
    """Return figures of the pictures that a contender makes, and write its pictures as a sheet."""
    subject, judge = cell.subject, Judge(checker, cell.subject, prompts)
    began = time.perf_counter()
    images = pictures_of(pipe, prompts, learned.words, seed=NOISE)
    seconds = (time.perf_counter() - began) / len(images)
    figures = judge.scores(images)
    figures["plain"] = judge.change(before[0], pictures_of(pipe, prompts, subject.superclass, seed=NOISE))
    figures["unrelated"] = judge.change(before[1], generate(pipe, unrelated, seed=UNRELATED_NOISE))
    lay_out(images).save(cell.path.with_suffix(".png"))
    some, views = prompts[: cell.num_view_prompts], {}
    judge_of_views = Judge(checker, subject, some)
    for name, view in ({"default": nullcontext} | learned.views).items() if some else ():
        with view():
            views[name] = judge_of_views.scores(pictures_of(pipe, some, learned.words, seed=NOISE))
    return {
        "figures": figures,
        "views": views,
        "base": judge.scores(before[0]),
        "seconds a picture": seconds,
    }


def run_cell(cell):
    """Run a cell and write its figures; returns their file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    from checker import Checker
    from evaluate import load_pipeline

    pipe, prompts = load_pipeline(cell.model), prompts_for(cell.subject, cell.num_prompts)
    unrelated = unrelated_captions(cell.subject, cell.num_prompts // 2)
    before = base_pictures(cell, pipe, prompts, unrelated)
    learned = METHODS[cell.contender.method](pipe, task_of(cell), **cell.contender.options)
    record = {
        "name": cell.contender.name,
        "superclass": cell.subject.superclass,
        "object": cell.subject.seed,
        "seed": cell.seed,
        "settings": cell.settings,
        **measure(cell, pipe, learned, Checker.load(), prompts, unrelated, before),
        "trained numbers": learned.num_trained,
        "bytes": learned.path.stat().st_size,
        "seconds of training": learned.seconds,
        "versions": {package: version(package) for package in PACKAGES}
        | {"perfusion_pytorch": perfusion_pytorch.__version__},
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    write_atomically(cell.path, (json.dumps(record, indent=1) + "\n").encode())
    return cell.path
