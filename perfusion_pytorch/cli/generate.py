"""`perfusion generate`: pictures of prompts with concepts, as a labelled grid."""

import re
import time
import warnings
from contextlib import nullcontext

import torch

from perfusion_pytorch.cli.base_model import check_concepts, device_of, dtype_of, load_concepts, load_pipeline
from perfusion_pytorch.grids import labelled_grid, write_png
from perfusion_pytorch.pipelines.key_lock import global_key_lock
from perfusion_pytorch.pipelines.verbs import set_concepts


def run_generate(args, say) -> None:
    """Make pictures of prompts with concepts."""
    started, device = time.monotonic(), device_of(args)
    check_concepts(args)
    for folder in {args.output.parent, args.output_dir} - {None}:
        folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(args, dtype=dtype_of(args, device), device=device)
    pipe.set_progress_bar_config(disable=args.no_progress, leave=False)
    names = load_concepts(pipe, args, say=say) if args.concept else []
    for prompt in args.prompt if names else ():
        if not any(name in prompt for name in names):
            warnings.warn(f"The prompt {prompt!r} names none of the concepts {names}.", stacklevel=2)
    # Down a column of the grid, pictures start from the same noise.
    jobs = [
        (i, prompt, args.seed + j)
        for i, prompt in enumerate(args.prompt, 1)
        for j in range(args.num_images_per_prompt)
    ]
    rows = []
    for beta in args.betas or [None]:
        if beta is not None:
            set_concepts(pipe, names, beta=beta)
        with global_key_lock(pipe) if args.global_key_lock else nullcontext():
            rows.append(("" if beta is None else f"beta {beta:g}", _pictures(pipe, jobs, args)))
    if args.output_dir is not None:
        for label, images in rows:
            for (i, prompt, seed), image in zip(jobs, images, strict=True):
                parts = [
                    str(i),
                    re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60],
                    f"seed{seed}",
                    label.replace(" ", ""),
                ]
                write_png(args.output_dir / f"{'-'.join(part for part in parts if part)}.png", image, prompt)
    picture, count = rows[0][1][0], len(jobs) * len(rows)
    if count > 1:
        picture = labelled_grid(
            rows,
            [
                f"{prompt} (seed {seed})" if args.num_images_per_prompt > 1 else prompt
                for _, prompt, seed in jobs
            ],
        )
    write_png(args.output, picture, "\n".join(args.prompt))
    say(f"Wrote {args.output}" + (f", and each picture into {args.output_dir}." if args.output_dir else "."))
    say(
        f"{count} {'picture' if count == 1 else 'pictures'} in {time.monotonic() - started:.1f} s on {device}."
    )


def _pictures(pipe, jobs, args):
    """Return a picture for each (number, prompt, seed), which does not depend on the batch that it was made in."""
    options = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "height": args.height or args.resolution,
        "width": args.width or args.resolution,
    }
    options, images = {name: value for name, value in options.items() if value is not None}, []
    for first in range(0, len(jobs), args.batch_size):
        batch = jobs[first : first + args.batch_size]
        if args.negative_prompt is not None:
            options["negative_prompt"] = [args.negative_prompt] * len(batch)
        generators = [torch.Generator().manual_seed(seed) for *_, seed in batch]
        images += pipe([prompt for _, prompt, _ in batch], generator=generators, **options).images
    return images
