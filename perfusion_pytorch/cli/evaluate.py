"""`perfusion evaluate`: how good concept files are, and which β is best."""

import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

from perfusion_pytorch.cli.base_model import device_of, dtype_of, load_pipeline
from perfusion_pytorch.cli.command import MODEL, Command, Say
from perfusion_pytorch.cli.flag_types import count, not_empty, number
from perfusion_pytorch.cli.shared_flags import add_hardware_flags, add_model_flags, add_sampling_flags
from perfusion_pytorch.evaluation.candidates import PERFUSION, candidates_of
from perfusion_pytorch.evaluation.checkers import checker_named
from perfusion_pytorch.evaluation.evaluate import BETAS, SCALES, evaluate_concepts
from perfusion_pytorch.evaluation.measures import CLIP_MODEL, DINO_MODEL
from perfusion_pytorch.evaluation.result import Evaluation
from perfusion_pytorch.files import check_can_be_written

# Of `evaluate_concepts`, as the flags give them.
ARGUMENTS = (
    "images",
    "output_dir",
    "prompts",
    "superclass",
    "betas",
    "scales",
    "num_images_per_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "resolution",
    "batch_size",
    "clip_model",
    "dino_model",
    "write",
    "progress",
)


def add_evaluate_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion evaluate`."""
    add_model_flags(parser)
    add_hardware_flags(parser, precision="float16 on CUDA devices, float32 elsewhere")
    _add_subject_flags(parser)
    _add_picture_flags(parser)
    _add_measure_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        type=Path,
        default=Path("evaluation"),
        metavar="FOLDER",
        help="for figures, plot, grid and pictures; pictures that are there already are kept and used",
    )
    group.add_argument(
        "--write",
        action="store_true",
        help="write the recommended β into the concept files, and evaluation.json beside each",
    )
    group.add_argument("--no_progress", dest="progress", action="store_false", help="show no progress bar")


def _add_subject_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("what is evaluated")
    group.add_argument(
        "--concept",
        dest="files",
        nargs="+",
        action="extend",
        type=not_empty,
        required=True,
        metavar="FILE",
        help="files of one thing: concepts, and to compare with them LoRAs and textual inversions",
    )
    group.add_argument(
        "--instance_data_dir",
        dest="images",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the training pictures, or others of the same thing",
    )
    group.add_argument(
        "--superclass", type=not_empty, metavar="WORDS", help="what it is (default: as the concept files say)"
    )
    group.add_argument(
        "--words",
        nargs="+",
        action="extend",
        type=words_value,
        default=[],
        metavar="WORDS",
        help='what stands for the thing in prompts of LoRAs, such as "sks car", or of one, "FILE=sks car"',
    )


def _add_picture_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--prompts",
        default="objects",
        metavar="LIST",
        help="objects, living, or a text file: one prompt a line, with {} for the thing; lines without it "
        "are unrelated prompts",
    )
    group.add_argument(
        "--betas",
        nargs="+",
        type=number,
        default=BETAS,
        metavar="BETA",
        help=f"gate biases of concepts (default: {_listed(BETAS)})",
    )
    group.add_argument(
        "--scales",
        nargs="+",
        type=number,
        default=SCALES,
        metavar="SCALE",
        help=f"scales of LoRAs (default: {_listed(SCALES)})",
    )
    group.add_argument(
        "--num_images_per_prompt", type=count, default=2, metavar="N", help="pictures of each prompt"
    )
    add_sampling_flags(group)


def _add_measure_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("measures")
    for name, default in (("clip", CLIP_MODEL), ("dino", DINO_MODEL)):
        one = group.add_mutually_exclusive_group()
        one.add_argument(
            f"--{name}_model",
            default=default,
            metavar="MODEL",
            help=f"name or folder of the {name.upper()} model",
        )
        one.add_argument(
            f"--no_{name}",
            dest=f"{name}_model",
            action="store_const",
            const=None,
            help=f"measure without {name.upper()}",
        )
    group.add_argument(
        "--checker",
        dest="checkers",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE:FUNCTION",
        help="measure with a function of your own too, of a module or of a file.py; its code is run",
    )


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def words_value(text: str) -> tuple[str | None, str]:
    """Read "sks car" or "FILE=sks car" as (file or None, words).

    Example:
        >>> words_value("sks car"), words_value("lora.safetensors=sks car")
        ((None, 'sks car'), ('lora.safetensors', 'sks car'))
    """
    name, equals, words = text.rpartition("=")
    if not words.strip():
        raise ArgumentTypeError(f"must hold words, got {text!r}")
    return (name if equals else None), words


def _words_of(args: Namespace) -> str | dict[str, str] | None:
    """Return the words for all files or for some; those with a file's name win."""
    for_all = [words for name, words in args.words if name is None]
    named = {name: words for name, words in args.words if name is not None}
    if len(for_all) > 1:
        raise ValueError(f"`words` must be given once for all files, got {for_all}. Write FILE=words.")
    if not for_all or not named:
        return for_all[0] if for_all else (named or None)
    others = [c.path for c in candidates_of(args.files, for_all[0]) if c.kind != PERFUSION]
    return {str(path): for_all[0] for path in others} | named


def run_evaluate(args: Namespace, say: Say) -> None:
    """Measure concept files, and show how good they are."""
    started = time.monotonic()
    device = device_of(args)
    words = _words_of(args)
    candidates_of(args.files, words)  # read before the model is loaded, which takes longer
    checkers = [checker_named(name) for name in args.checkers]
    check_can_be_written(args.output_dir, is_folder=True)
    half_or_full = "float16" if device.type == "cuda" else "float32"
    pipe = load_pipeline(args, dtype=dtype_of(args, default=half_or_full), device=device)
    options = {name: getattr(args, name) for name in ARGUMENTS}
    try:
        evaluation = evaluate_concepts(pipe, args.files, words=words, checkers=checkers, **options)
    except KeyboardInterrupt as stop:
        raise type(stop)(
            f"Stopped. The pictures in {args.output_dir} are kept: the same command goes on from there."
        ) from stop
    for line in str(evaluation).splitlines():
        say(line)
    say("")
    _say_what_was_written(evaluation, args, say)
    kept = f", {evaluation.num_kept} were there already" if evaluation.num_kept else ""
    say(f"{evaluation.num_made} pictures made in {time.monotonic() - started:.1f} s on {device}{kept}.")


def _say_what_was_written(evaluation: Evaluation, args: Namespace, say: Say) -> None:
    for file in evaluation.files:
        if file.candidate.kind != PERFUSION or file.recommended is None:
            continue
        if args.write:
            say(f"Wrote β {file.recommended:g} into {file.candidate.path}, and evaluation.json beside it.")
        elif file is evaluation.files[0]:
            say("--write puts the recommended β into the concept file.")
    plot = ", pareto.png" if evaluation.identity is not None and evaluation.prompt is not None else ""
    say(f"Wrote evaluation.json, evaluation.txt{plot} and grid.png into {evaluation.output_dir}.")


COMMAND = Command(
    name="evaluate",
    usage=(
        "--pretrained_model_name_or_path MODEL --concept FILE [FILE ...] --instance_data_dir FOLDER [flags]"
    ),
    help="measure how good concepts are, and find the best β",
    description=(
        "Measure how much pictures of concepts are like the training pictures, how well they fit prompts,\n"
        "and what they change elsewhere, at several gate biases β; and recommend a β.\n"
        "An interrupted run goes on where it stopped: type the same command again."
    ),
    example=(
        f"  perfusion evaluate {MODEL} --concept teddy/concept.safetensors \\\n"
        "      --instance_data_dir my_pictures --output_dir teddy-evaluation --write"
    ),
    add_flags=add_evaluate_flags,
    run=run_evaluate,
)
