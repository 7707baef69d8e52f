"""`perfusion generate`: pictures of prompts with concepts, as a labelled grid."""

import re
import time
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from perfusion_pytorch.cli.base_model import check_concepts, device_of, dtype_of, load_concepts, load_pipeline
from perfusion_pytorch.cli.command import MODEL, Command, Say
from perfusion_pytorch.cli.flag_types import count, number, png, words
from perfusion_pytorch.cli.shared_flags import (
    add_concept_flags,
    add_hardware_flags,
    add_model_flags,
    add_sampling_flags,
)
from perfusion_pytorch.files import check_can_be_written
from perfusion_pytorch.grids import labelled_grid, write_png
from perfusion_pytorch.pipelines.key_lock import global_key_lock
from perfusion_pytorch.pipelines.parts import denoiser_of, text_encoders_of
from perfusion_pytorch.pipelines.picture_facts import picture_facts, warn_of_black_pictures
from perfusion_pytorch.pipelines.verbs import set_concepts
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.user_warnings import warn_user

if TYPE_CHECKING:
    from PIL.Image import Image


class _Job(NamedTuple):
    """A picture to make.

    Attributes:
        number: of its prompt, from 1.
        prompt: what it shows.
        seed: of the noise that it starts from.
    """

    number: int
    prompt: str
    seed: int


class _Row(NamedTuple):
    """The pictures at one gate bias.

    Attributes:
        label: what stands beside them in a grid.
        beta: the gate bias, where several were asked for.
        images: a picture for each job.
        facts: what they were made with, but for prompts and seeds.
    """

    label: str
    beta: float | None
    images: list["Image"]
    facts: dict[str, Any]


def add_generate_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion generate`."""
    add_model_flags(parser)
    add_hardware_flags(parser, precision="float16 on CUDA devices, float32 elsewhere")
    add_concept_flags(parser.add_argument_group("concepts"), required=False)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        type=words,
        required=True,
        metavar="TEXT",
        help="one or more, with the concepts' tokens",
    )
    group.add_argument(
        "--negative_prompt", type=words, metavar="TEXT", help="what the pictures should not show"
    )
    group.add_argument(
        "--betas",
        nargs="+",
        action="extend",
        type=number,
        metavar="BETA",
        help="make each picture at each of these gate biases, of all concepts",
    )
    group.add_argument(
        "--global_key_lock",
        action="store_true",
        help="lock all keys of a prompt instead of the concept's alone; works best with β of 0.4 to 0.6",
    )
    group.add_argument(
        "--num_images_per_prompt", type=count, default=1, metavar="N", help="pictures of each prompt"
    )
    _add_sampling_flags(parser)
    _add_output_flags(parser)


def _add_sampling_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    add_sampling_flags(group)
    for name in ("height", "width"):
        group.add_argument(
            f"--{name}", type=count, metavar="PIXELS", help=f"{name} (default: the model's own)"
        )


def _add_output_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=png,
        default=Path("perfusion.png"),
        metavar="FILE.png",
        help="the picture, or the grid of all pictures",
    )
    group.add_argument(
        "--output_dir", type=Path, metavar="FOLDER", help="also write each picture here, as a file of its own"
    )
    group.add_argument("--no_progress", action="store_true", help="show no progress bar")


def run_generate(args: Namespace, say: Say) -> None:
    """Make pictures of prompts with concepts."""
    started = time.monotonic()
    device = device_of(args)
    check_concepts(args)
    check_can_be_written(args.output)
    if args.output_dir is not None:
        check_can_be_written(args.output_dir, is_folder=True)
    half_or_full = "float16" if device.type == "cuda" else "float32"
    pipe = load_pipeline(args, dtype=dtype_of(args, default=half_or_full), device=device)
    pipe.set_progress_bar_config(disable=args.no_progress, leave=False)
    names = load_concepts(pipe, args, say=say) if args.concept else []
    _warn_of_prompts(pipe, args, names)
    # Down a column of the grid, pictures start from the same noise.
    jobs = [
        _Job(i, prompt, args.seed + j)
        for i, prompt in enumerate(args.prompt, 1)
        for j in range(args.num_images_per_prompt)
    ]
    rows, results = [], []
    for beta in args.betas or [None]:
        if beta is not None:
            set_concepts(pipe, names, beta=beta)
        with global_key_lock(pipe) if args.global_key_lock else nullcontext():
            made = _pictures(pipe, jobs, args)
            facts = _facts(pipe, names, args)
        results += made
        images = [image for result in made for image in result.images]
        rows.append(_Row("" if beta is None else f"beta {beta:g}", beta, images, facts))
    _write(rows, jobs, args)
    warn_of_black_pictures(pipe, results)
    num_pictures = len(jobs) * len(rows)
    say(f"Wrote {args.output}" + (f", and each picture into {args.output_dir}." if args.output_dir else "."))
    say(
        f"{num_pictures} {'picture' if num_pictures == 1 else 'pictures'} "
        f"in {time.monotonic() - started:.1f} s on {device}."
    )


def _warn_of_prompts(pipe: Pipeline, args: Namespace, names: list[str]) -> None:
    """Warn of what is given and has no effect."""
    for prompt in [*args.prompt, *filter(None, [args.negative_prompt])]:
        for _, tokenizer in text_encoders_of(pipe).values():
            ids = tokenizer(prompt).input_ids
            if len(ids) > tokenizer.model_max_length:
                rest = tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])
                warn_user(f"The prompt {prompt!r} is too long: the model does not read its end, {rest!r}.")
                break
    for prompt in args.prompt if names else ():
        if not any(name in prompt for name in names):
            warn_user(f"The prompt {prompt!r} names none of the concepts {names}.")
    if args.negative_prompt and args.guidance_scale is not None and args.guidance_scale <= 1:
        warn_user(
            f"--negative_prompt has no effect at --guidance_scale {args.guidance_scale:g}, only above 1."
        )


def _call_options(pipe: Pipeline, args: Namespace) -> dict[str, Any]:
    """Return what the pipeline is called with beside prompts and noise; None means its default."""
    height, width = args.height or args.resolution, args.width or args.resolution
    if height is None or width is None:
        # A pipeline that is given one of the two takes its own for both.
        own = _own_resolution(pipe) if height or width else None
        height, width = height or own, width or own
    return {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "height": height,
        "width": width,
    }


def _own_resolution(pipe: Any) -> int:
    """Return the edge, in pixels, of the pictures that the model was trained on."""
    size = cast(Any, denoiser_of(pipe)).config.sample_size
    return int(size if isinstance(size, int) else min(size)) * int(pipe.vae_scale_factor)


def _pictures(pipe: Pipeline, jobs: list[_Job], args: Namespace) -> list[Any]:
    """Return the pipeline's results, which do not depend on the batches that they were made in."""
    options = {name: value for name, value in _call_options(pipe, args).items() if value is not None}
    results = []
    for first in range(0, len(jobs), args.batch_size):
        batch = jobs[first : first + args.batch_size]
        if args.negative_prompt is not None:
            options["negative_prompt"] = [args.negative_prompt] * len(batch)
        generators = [torch.Generator().manual_seed(job.seed) for job in batch]
        results.append(pipe([job.prompt for job in batch], generator=generators, **options))
    return results


def _facts(pipe: Pipeline, names: list[str], args: Namespace) -> dict[str, Any]:
    """Return what the pictures of a row are made with, but for prompts and seeds."""
    path = Path(args.pretrained_model_name_or_path).expanduser()
    return picture_facts(
        pipe,
        files=dict(zip(names, args.concept, strict=True)),
        model=path.resolve().name if path.exists() else str(args.pretrained_model_name_or_path),
        revision=args.revision,
        variant=args.variant,
        negative_prompt=args.negative_prompt,
        **_call_options(pipe, args),
    )


def _write(rows: list[_Row], jobs: list[_Job], args: Namespace) -> None:
    """Write the picture, or the grid of several, and each picture where a folder is given."""
    if args.output_dir is not None:
        for row in rows:
            for job, image in zip(jobs, row.images, strict=True):
                path = args.output_dir / _file_name(job, row.label)
                write_png(path, image, job.prompt, facts={"prompt": job.prompt, "seed": job.seed} | row.facts)
    picture = rows[0].images[0]
    facts: dict[str, Any] = {"prompt": jobs[0].prompt, "seed": jobs[0].seed} | rows[0].facts
    if len(jobs) * len(rows) > 1:
        shows_seeds = args.num_images_per_prompt > 1
        columns = [f"{job.prompt} (seed {job.seed})" if shows_seeds else job.prompt for job in jobs]
        picture = labelled_grid([(row.label, row.images) for row in rows], columns)
        facts = {"columns": [{"prompt": job.prompt, "seed": job.seed} for job in jobs]} | rows[0].facts
        if args.betas:
            facts["rows"] = [{"beta": row.beta} for row in rows]
            for concept in facts["concepts"]:
                concept["beta"] = args.betas
    write_png(args.output, picture, "\n".join(args.prompt), facts=facts)


def _file_name(job: _Job, label: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower()).strip("-")[:60]
    parts = [str(job.number), name, f"seed{job.seed}", label.replace(" ", "")]
    return f"{'-'.join(part for part in parts if part)}.png"


COMMAND = Command(
    name="generate",
    usage=(
        "--pretrained_model_name_or_path MODEL --concept FILE [FILE ...] --prompt TEXT [TEXT ...] [flags]"
    ),
    help="make pictures with concepts",
    description=(
        "Make pictures of prompts with concepts.\n"
        "Several pictures become one labelled grid: one prompt a column, one gate bias β a row."
    ),
    example=(
        f"  perfusion generate {MODEL} --concept teddy/concept.safetensors \\\n"
        '      --prompt "a <teddy-1> in a boat" "a <teddy-1> on the moon" --betas 0.5 0.6 --output grid.png'
    ),
    add_flags=add_generate_flags,
    run=run_generate,
)
