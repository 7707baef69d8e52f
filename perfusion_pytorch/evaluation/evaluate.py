"""`evaluate_concepts`: pictures over prompts, strengths and seeds, their figures, and a recommendation."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.evaluation.base import base_settings, call_options
from perfusion_pytorch.evaluation.candidates import PERFUSION, Candidate, candidates_of, superclass_of
from perfusion_pytorch.evaluation.checkers import Checker
from perfusion_pytorch.evaluation.loading import check_is_plain, loaded
from perfusion_pytorch.evaluation.measures import (
    CLIP_MODEL,
    DINO_MODEL,
    ClipMeasure,
    DinoMeasure,
    Measure,
)
from perfusion_pytorch.evaluation.pictures import Maker, Plan, check_settings
from perfusion_pytorch.evaluation.prompts import prompts_for
from perfusion_pytorch.evaluation.result import Evaluation
from perfusion_pytorch.evaluation.run import Run
from perfusion_pytorch.evaluation.scoring import Scorer
from perfusion_pytorch.extras import required
from perfusion_pytorch.files import check_can_be_written
from perfusion_pytorch.hub import cached_snapshot
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.training.pictures import load_pictures

BETAS = (0.3, 0.5, 0.7, 0.9)
SCALES = (0.5, 0.75, 1.0, 1.25)
Path_ = str | os.PathLike


@beartype
def evaluate_concepts(
    pipe: Pipeline,
    files: Path_ | Sequence[Path_],
    images: Path_ | Sequence[Any],
    *,
    output_dir: Path_,
    prompts: Path_ | Sequence[str] = "objects",
    superclass: str | None = None,
    words: str | Mapping[str, str] | None = None,
    betas: Sequence[float] = BETAS,
    scales: Sequence[float] = SCALES,
    num_images_per_prompt: int = 2,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    batch_size: int = 1,
    clip_model: Path_ | None = CLIP_MODEL,
    dino_model: Path_ | None = DINO_MODEL,
    checkers: Sequence[Checker] = (),
    write: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Measure how good files of one thing are, at several strengths, and recommend a strength for each.

    A picture is made for every prompt, strength and seed. It is compared with the training pictures (DINO,
    CLIP image) and with its prompt (CLIP text). Pictures of the same prompts with the plain superclass, and
    of unrelated prompts, are compared with the base model's from the same noise. A second call makes only the
    pictures that are missing: one after an interruption, or with more prompts, strengths or files.

    Of the strengths that keep at least 95 % of the base model's figure for following prompts, the one whose
    pictures are most like the training pictures is recommended; of equals the weakest edit.

    Args:
        pipe: the base model, with nothing loaded on it. It is left as it was.
        files: what is compared, all of one thing: concepts of Perfusion, LoRAs (of diffusers or peft) and
            textual inversions, as safetensors files or the folders that training wrote. A concept may also
            be a name on the hub, such as "user/name".
        images: the training pictures, as `train_concept` takes them.
        output_dir: for `evaluation.json`, `evaluation.txt`, `pareto.png`, `grid.png`, and the pictures.
        prompts: "objects" or "living" for the built-in ones, a text file, or texts. A text with {} is a
            prompt of the thing, any other is an unrelated one.
        superclass: what the thing is, in words; by default as the concept files say.
        words: what stands for the thing in prompts of LoRAs, such as "sks car", and of textual inversions
            that do not name their token: for all of them, or by the path in `files`.
        betas: gate biases of the concept files.
        scales: of the LoRAs.
        num_images_per_prompt, seed: picture i of a prompt starts from noise number seed + i.
        num_inference_steps, guidance_scale, resolution: of the pictures; by default the pipeline's own.
        batch_size: pictures made at a time; they do not depend on it.
        clip_model, dino_model: names or folders of models for transformers; None leaves their figures out.
        checkers: functions of your own, called with pictures, their prompts (the superclass's word for the
            thing) and a `CheckedConcept`. They return a mapping of names to a number for each picture. What
            is named "identity" and "prompt" takes the place of DINO and CLIP in the recommendation.
        write: write each recommended β into its concept file as the default, and the file's figures beside
            it, as `evaluation.json`.
        progress: show a progress bar.

    Raises:
        ValueError: something cannot be used, or the folder holds pictures of other settings; no picture has
            been made then.
        OSError: a file is missing or cannot be written.
        ImportError: matplotlib is missing, or peft for a LoRA.

    Example:
        evaluation = evaluate_concepts(pipe, "teddy", "my_pictures", output_dir="teddy-evaluation")
        print(evaluation)
    """
    _check_numbers(betas=betas, scales=scales, counts=(num_images_per_prompt, batch_size), seed=seed)
    if clip_model is None and dino_model is None and not checkers:
        raise ValueError(
            "There must be something to measure with: give `clip_model`, `dino_model` or `checkers`."
        )
    check_is_plain(pipe)
    required("matplotlib.figure")
    candidates = candidates_of([files] if isinstance(files, (str, os.PathLike)) else files, words)
    if write:
        _check_can_be_written(candidates)
    superclass = superclass or superclass_of(candidates)
    texts = prompts_for(prompts, superclass)
    options = call_options(
        pipe,
        resolution=resolution,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    edge = options["height"]
    training = [p.image() for p in load_pictures(images, resolution=edge, use_masks=False)]
    folder = Path(output_dir)
    check_can_be_written(folder, is_folder=True)
    settings = base_settings(pipe, options)
    check_settings(folder, settings)
    for candidate in candidates:
        with loaded(pipe, candidate):  # what does not fit is found now, and not hours later
            pass
    measures = _measures(clip_model, dino_model, training)
    seeds = tuple(range(seed, seed + num_images_per_prompt))
    plan = Plan(folder, texts, superclass, seeds)
    return Run(
        plan,
        candidates,
        {kind: tuple(values) for kind, values in (("beta", betas), ("scale", scales))},
        training,
        settings,
        Scorer(plan, measures, checkers, plan.base_group()),
        Maker(pipe, options, batch_size),
    ).run(write=write, progress=progress)


def _measures(clip_model: Path_ | None, dino_model: Path_ | None, training: list[Any]) -> list[Measure]:
    measures: list[Measure] = []
    if dino_model is not None:
        measures.append(DinoMeasure(dino_model, training))
    if clip_model is not None:
        measures.append(ClipMeasure(clip_model, training))
    return measures


def _check_can_be_written(candidates: Sequence[Candidate]) -> None:
    paths = [candidate.path for candidate in candidates if candidate.kind == PERFUSION]
    if not paths:
        raise ValueError("`write` needs a concept file of Perfusion, since only it holds a β, but got none.")
    if len({path.resolve().parent for path in paths}) < len(paths):
        raise ValueError(
            "`write` puts a file's figures beside it, so that concept files must be in folders of their own, "
            f"got {list(map(str, paths))}. Move them, or leave `write` out."
        )
    for path in paths:
        if cached_snapshot(path):
            raise ValueError(
                f"`write` needs concept files of your own, but {path} is the hub's. "
                "Copy it, or leave `write` out."
            )
        check_can_be_written(path)


def _check_numbers(
    *, betas: Sequence[float], scales: Sequence[float], counts: Sequence[int], seed: int
) -> None:
    for name, values in (("betas", betas), ("scales", scales)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"`{name}` must be one or more different numbers, got {list(values)}.")
    if min(counts) < 1:
        raise ValueError(
            f"`num_images_per_prompt` and `batch_size` must be at least 1, got {counts[0]} and {counts[1]}."
        )
    if not 0 <= seed < 2**62:
        raise ValueError(f"`seed` must be a whole number from 0 to 2**62 - 1, got {seed}.")
