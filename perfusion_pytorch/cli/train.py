"""`perfusion train`: a thin layer over `train_concept`, with a flag for each of its arguments."""

import os
import shlex
import subprocess
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from perfusion_pytorch.cli.base_model import captions_of, load_pipeline, ridge_of
from perfusion_pytorch.cli.command import MODEL, Command, Say
from perfusion_pytorch.cli.flag_types import count_or_none, in_range, number, positive, whole
from perfusion_pytorch.cli.preview import run_preview
from perfusion_pytorch.cli.shared_flags import add_covariance_flags, add_model_flags
from perfusion_pytorch.cli.train_messages import in_flags, log_shown
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.pipelines.covariance_cache import cached_covariance
from perfusion_pytorch.training.accelerator import process_state
from perfusion_pytorch.training.options import (
    OPTION_DEFAULTS,
    OPTION_NAMES,
    OPTION_RANGES,
    OPTION_TYPES,
    PRECISIONS,
    SCHEDULERS,
)
from perfusion_pytorch.training.train import TrainingSummary, train_concept

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.float16, torch.bfloat16), strict=True))
NOT_FLAGS = {"captions", "covariance"}  # given by files beside the pictures, and by the covariance's flags


class Flag(NamedTuple):
    """A flag for an argument of `train_concept`.

    Its default, type and range are those of `TrainingOptions`.

    Attributes:
        name: what is typed after the dashes.
        argument: the argument's name.
        help: what it means.
        settings: what argparse is given beside; an own `type` wins.
    """

    name: str
    argument: str
    help: str
    settings: dict[str, Any]


def _flag(argument: str, help: str, *, name: str | None = None, **settings: Any) -> Flag:
    return Flag(name or argument, argument, help, settings)


FLAGS: dict[str, list[Flag]] = {
    "the concept": [
        _flag(
            "images",
            "pictures of the object: jpg, png, webp, heic and others; name.txt has the captions of name.jpg",
            name="instance_data_dir",
            type=Path,
            metavar="FOLDER",
        ),
        _flag(
            "token",
            'the new word for the object in prompts, lower case, in quotes: "<teddy-1>"',
            metavar="TOKEN",
        ),
        _flag(
            "superclass",
            'the kind of thing it is, in words that the model knows well: "teddy bear"',
            metavar="WORDS",
        ),
        _flag(
            "output_dir",
            "for concept.safetensors, its README.md, checkpoints and validation pictures",
            type=Path,
            metavar="FOLDER",
        ),
        _flag(
            "templates",
            "prompts with {} for the token, instead of the model's own or the built-in ones",
            name="instance_prompt",
            nargs="+",
            metavar="TEXT",
        ),
        _flag("resolution", "edge of the pictures (default: the model's own)", metavar="PIXELS"),
        _flag(
            "center_crop",
            "cut out the middle square; otherwise the whole picture is squeezed into one",
            action=BooleanOptionalAction,
        ),
    ],
    "masks: where the object is, so that the background is not learned with it": [
        _flag(
            "masks",
            "a mask for each picture, with its name: white, or not see-through, where the object is "
            "(default: FOLDER/masks, if it exists, and else the pictures' alpha channels)",
            name="mask_dir",
            type=Path,
            metavar="FOLDER",
        ),
        _flag(
            "mask_model",
            "make masks from the superclass's words with this CLIPSeg model, "
            "such as CIDAS/clipseg-rd64-refined",
            metavar="MODEL",
        ),
        _flag(
            "use_masks", "ignore FOLDER/masks and alpha channels too", name="no_masks", action="store_false"
        ),
    ],
    "training": [
        _flag("max_train_steps", "number of steps", metavar="N"),
        _flag(
            "embedding_steps",
            "how many of them train the embedding, alone and first "
            "(default: half; 0 trains all at once, as the paper does)",
            type=whole,
            metavar="N",
        ),
        _flag("train_batch_size", "rows of a forward pass on each device", metavar="N"),
        _flag("gradient_accumulation_steps", "forward passes of a step", metavar="N"),
        _flag("gradient_checkpointing", "save memory at the cost of time", action="store_true"),
        _flag(
            "mixed_precision",
            "load the model and compute in half precision; what is trained stays float32 (default: no)",
            choices=PRECISIONS,
        ),
        _flag("learning_rate", "learning rate of the value outputs", metavar="RATE"),
        _flag("embedding_learning_rate", "learning rate of the token's embedding", metavar="RATE"),
        _flag(
            "relative_learning_rates",
            "make both rates relative to the sizes of the model's own outputs and embeddings",
            action=BooleanOptionalAction,
        ),
        _flag("lr_scheduler", "how both rates change over time", choices=SCHEDULERS),
        _flag("lr_warmup_steps", "steps over which they rise", metavar="N"),
        _flag("adam_beta1", "decay of AdamW's first moment", metavar="B"),
        _flag("adam_beta2", "decay of AdamW's second moment", metavar="B"),
        _flag("adam_weight_decay", "AdamW's weight decay", metavar="W"),
        # 0 would divide by 0 for a parameter without gradients.
        _flag("adam_epsilon", "AdamW's epsilon", type=positive, metavar="E"),
        _flag("max_grad_norm", "scale larger gradients down to this norm", metavar="NORM"),
        _flag("timestep_power", "below 1, noisier times are drawn more often", metavar="P"),
        _flag("seed", "seed of everything random"),
    ],
    "the edit": [
        _flag(
            "gates_removal",
            "close the whole edit where the gate is shut; otherwise the edit is the paper's eq. 3",
            action=BooleanOptionalAction,
        ),
        _flag("train_beta", "gate bias while training", metavar="BETA"),
        _flag("train_temperature", "gate temperature while training", metavar="TAU"),
        _flag("eval_beta", "gate bias that the file recommends for inference", metavar="BETA"),
        _flag("eval_temperature", "gate temperature that the file recommends", metavar="TAU"),
        _flag("input_decay", "decay of the moving averages of encodings", metavar="D"),
        _flag(
            "frac_gradient_concept_embed",
            "scales the gradient from the edit into the text encoder",
            metavar="F",
        ),
    ],
    "checkpoints": [
        _flag(
            "checkpointing_steps",
            "steps from one checkpoint to the next; 0 for none",
            type=count_or_none,
            metavar="N",
        ),
        _flag("checkpoints_total_limit", "how many checkpoints to keep (default: all)", metavar="N"),
        _flag(
            "resume_from_checkpoint",
            '"latest" or a checkpoint\'s folder: continue from there',
            metavar="WHICH",
        ),
    ],
    "the hub": [
        _flag(
            "push_to_hub",
            "put the concept there at the end, with a model card, as user/name; log in by `hf auth login`",
            metavar="NAME",
        ),
    ],
    "validation and reports": [
        _flag(
            "validation_prompt",
            "make pictures of these prompts regularly, and at the end",
            nargs="+",
            metavar="TEXT",
        ),
        _flag("num_validation_images", "pictures of each prompt", metavar="N"),
        _flag("validation_steps", "steps from one grid of pictures to the next", metavar="N"),
        _flag("report_to", "one of accelerate's trackers, such as tensorboard; or all", metavar="TRACKER"),
        _flag("logging_dir", "folder in the output folder where it writes", metavar="FOLDER"),
        _flag(
            "progress",
            "show no progress bars, nor lines instead of them",
            name="no_progress",
            action="store_false",
        ),
    ],
}


def add_train_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion train`."""
    add_model_flags(parser)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            settings = _settings_of(flag.argument) | flag.settings
            if "action" in settings or "choices" in settings:
                settings.pop("type", None)
            group.add_argument(f"--{flag.name}", dest=flag.argument, help=flag.help, **settings)
    parser.add_argument(
        "--preview",
        action="store_true",
        help="write preview.png, the squares and masks that training would use, and train nothing",
    )
    group = parser.add_argument_group("hardware (accelerate chooses devices and processes)")
    group.add_argument(
        "--allow_tf32", action="store_true", help="faster, less exact products on Ampere GPUs and newer"
    )
    group = parser.add_argument_group("input covariance of the text encoder, computed once for a model")
    add_covariance_flags(group)
    group.add_argument(
        "--covariance", type=Path, metavar="FILE", help="use this file, from `perfusion covariance --output`"
    )


def _settings_of(argument: str) -> dict[str, Any]:
    """Return what argparse needs to know of an argument of `train_concept`: default or required, and type."""
    settings: dict[str, Any] = {"required": True}
    if argument in OPTION_DEFAULTS:
        settings = {"default": OPTION_DEFAULTS[argument]}
    types = get_args(OPTION_TYPES[argument]) or (OPTION_TYPES[argument],)
    read: Callable[[str], Any] | None = number if float in types else whole if int in types else None
    if read is not None and argument in OPTION_RANGES:
        read = in_range(read, OPTION_RANGES[argument])
    return settings if read is None else settings | {"type": read}


def run_train(args: Namespace, say: Say) -> None:
    """Train a concept, and say where everything is."""
    started = time.monotonic()
    process = process_state()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    pipe = load_pipeline(args, dtype=DTYPES[args.mixed_precision or "no"], device=process.device)
    options = {name: getattr(args, name) for name in OPTION_NAMES if name not in NOT_FLAGS}
    if args.preview:
        if process.is_main_process:
            run_preview(pipe, options, process.device, say)
        return process.destroy_process_group()
    options["covariance"] = _covariance(pipe, args, args.progress and process.is_main_process)
    with log_shown(), in_flags():
        summary = train_concept(pipe, options.pop("images"), **options)
    if process.is_main_process:
        _report(args, summary, time.monotonic() - started, say)
    process.destroy_process_group()  # the whole process is ours


def _covariance(
    pipe: Any, args: Namespace, progress: bool
) -> InputCovariance | Callable[[], InputCovariance]:
    """Return the covariance of the file that the flags name, or a function that computes it."""
    if args.covariance is not None:
        return InputCovariance.load(args.covariance)

    def compute() -> InputCovariance:
        return cached_covariance(
            pipe, captions_of(args, pipe), cache_dir=args.cache_dir, ridge=ridge_of(args), progress=progress
        )

    return compute


def _report(args: Namespace, summary: TrainingSummary, seconds: float, say: Say) -> None:
    loss = "" if summary.loss is None else f", the last at a loss of {summary.loss:.4f}"
    say(f"Trained {summary.token} ({args.superclass}): {summary.num_steps} steps{loss}.")
    say(f"  time          {summary.seconds:.0f} s of training, {seconds:.0f} s in all")
    say(f"  trainable     {summary.num_trainable:,} numbers")
    low, high = summary.similarity
    say(f"  similarity    r from {low:.2f} to {high:.2f} at the token; near 1 is right")
    say(f"  concept       {summary.concept} ({summary.num_bytes:,} bytes)")
    for name, paths in (("checkpoint", summary.checkpoints), ("pictures", summary.validation_pictures)):
        if paths:
            say(f"  {name:13} {paths[-1]}" + (f" and {len(paths) - 1} before it" if len(paths) > 1 else ""))
    if summary.pushed is not None:
        say(f"  on the hub    {summary.pushed}")
    if summary.logging_dir is not None:
        say(f"  logs          {summary.logging_dir}")
    say("What to type next:")
    say(f"  {_next_command(args, summary)}")


def _next_command(args: Namespace, summary: TrainingSummary) -> str:
    """Return a command that makes a picture of the concept, quoted for a shell."""
    words = [
        "perfusion generate --pretrained_model_name_or_path",
        _quoted(args.pretrained_model_name_or_path),
    ]
    for name in ("revision", "variant"):
        if (value := getattr(args, name)) is not None:
            words.append(f"--{name} {value}")
    words += ["--concept", _quoted(summary.concept), f'--prompt "a photo of a {summary.token}"']
    return " ".join(words)


def _quoted(value: str | os.PathLike) -> str:
    return subprocess.list2cmdline([os.fspath(value)]) if os.name == "nt" else shlex.quote(os.fspath(value))


COMMAND = Command(
    name="train",
    usage=(
        "--pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --token TOKEN --superclass WORDS "
        "--output_dir FOLDER [flags]"
    ),
    help="teach a model a new object from some pictures",
    description=(
        "Teach a model a new object from four to ten pictures of it. The result is one small file, for\n"
        "`perfusion generate`, or for `load_concept` in Python."
    ),
    example=(
        f"  perfusion train {MODEL} --instance_data_dir my_pictures \\\n"
        '      --token "<teddy-1>" --superclass "teddy bear" --output_dir teddy\n'
        "several GPUs or machines:\n"
        "  accelerate launch -m perfusion_pytorch train --pretrained_model_name_or_path …"
    ),
    add_flags=add_train_flags,
    run=run_train,
)
