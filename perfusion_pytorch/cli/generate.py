"""`perfusion generate`: pictures of prompts with concepts, as a labelled grid."""

import re
import time
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from perfusion_pytorch.cli.base_model import check_concepts, device_of, dtype_of, load_concepts, load_pipeline
from perfusion_pytorch.cli.command import MODEL, Command, Say
from perfusion_pytorch.cli.flag_types import count, number, png
from perfusion_pytorch.cli.shared_flags import add_concept_flags, add_hardware_flags, add_model_flags
from perfusion_pytorch.grids import labelled_grid, write_png
from perfusion_pytorch.pipelines.key_lock import global_key_lock
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


def add_generate_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion generate`."""
    add_model_flags(parser)
    add_hardware_flags(parser, precision="float16 on CUDA devices, float32 elsewhere")
    add_concept_flags(parser.add_argument_group("concepts"), required=False)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--prompt", nargs="+", required=True, metavar="TEXT", help="one or more, with the concepts' tokens"
    )
    group.add_argument("--negative_prompt", metavar="TEXT", help="what the pictures should not show")
    group.add_argument(
        "--betas",
        nargs="+",
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
    group.add_argument(
        "--seed", type=int, default=0, help="picture i of a prompt starts from noise number seed + i"
    )
    _add_sampling_flags(parser)
    _add_output_flags(parser)


def _add_sampling_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--num_inference_steps", type=count, metavar="N", help="denoising steps (default: the pipeline's)"
    )
    group.add_argument(
        "--guidance_scale",
        type=number,
        metavar="G",
        help="classifier-free guidance (default: the pipeline's)",
    )
    for name, what in (("resolution", "edge"), ("height", "height"), ("width", "width")):
        group.add_argument(
            f"--{name}", type=count, metavar="PIXELS", help=f"{what} (default: the model's own)"
        )
    group.add_argument(
        "--batch_size",
        type=count,
        default=1,
        metavar="N",
        help="pictures made at a time; the pictures do not depend on it",
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
    for folder in {args.output.parent, args.output_dir} - {None}:
        folder.mkdir(parents=True, exist_ok=True)
    half_or_full = "float16" if device.type == "cuda" else "float32"
    pipe = load_pipeline(args, dtype=dtype_of(args, default=half_or_full), device=device)
    pipe.set_progress_bar_config(disable=args.no_progress, leave=False)
    names = load_concepts(pipe, args, say=say) if args.concept else []
    for prompt in args.prompt if names else ():
        if not any(name in prompt for name in names):
            warn_user(f"The prompt {prompt!r} names none of the concepts {names}.")
    # Down a column of the grid, pictures start from the same noise.
    jobs = [
        _Job(i, prompt, args.seed + j)
        for i, prompt in enumerate(args.prompt, 1)
        for j in range(args.num_images_per_prompt)
    ]
    rows = []
    for beta in args.betas or [None]:
        if beta is not None:
            set_concepts(pipe, names, beta=beta)
        with global_key_lock(pipe) if args.global_key_lock else nullcontext():
            rows.append(("" if beta is None else f"beta {beta:g}", _pictures(pipe, jobs, args)))
    _write(rows, jobs, args)
    num_pictures = len(jobs) * len(rows)
    say(f"Wrote {args.output}" + (f", and each picture into {args.output_dir}." if args.output_dir else "."))
    say(
        f"{num_pictures} {'picture' if num_pictures == 1 else 'pictures'} "
        f"in {time.monotonic() - started:.1f} s on {device}."
    )


def _pictures(pipe: Pipeline, jobs: list[_Job], args: Namespace) -> list["Image"]:
    """Return a picture for each job, which does not depend on the batch that it was made in."""
    given = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "height": args.height or args.resolution,
        "width": args.width or args.resolution,
    }
    options = {name: value for name, value in given.items() if value is not None}
    images = []
    for first in range(0, len(jobs), args.batch_size):
        batch = jobs[first : first + args.batch_size]
        if args.negative_prompt is not None:
            options["negative_prompt"] = [args.negative_prompt] * len(batch)
        generators = [torch.Generator().manual_seed(job.seed) for job in batch]
        images += pipe([job.prompt for job in batch], generator=generators, **options).images
    return images


def _write(rows: list[tuple[str, list["Image"]]], jobs: list[_Job], args: Namespace) -> None:
    """Write the picture, or the grid of several, and each picture where a folder is given."""
    if args.output_dir is not None:
        for label, images in rows:
            for job, image in zip(jobs, images, strict=True):
                write_png(args.output_dir / _file_name(job, label), image, job.prompt)
    picture = rows[0][1][0]
    if len(jobs) * len(rows) > 1:
        shows_seeds = args.num_images_per_prompt > 1
        columns = [f"{job.prompt} (seed {job.seed})" if shows_seeds else job.prompt for job in jobs]
        picture = labelled_grid(rows, columns)
    write_png(args.output, picture, "\n".join(args.prompt))


def _file_name(job: _Job, label: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower()).strip("-")[:60]
    parts = [str(job.number), words, f"seed{job.seed}", label.replace(" ", "")]
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
