"""The `perfusion` command: train a concept, make pictures with it, and look at what it is."""

import argparse
import os
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path

from perfusion_pytorch.cli.flag_types import count, gate_value, not_negative, number, png
from perfusion_pytorch.cli.train import add_train_flags
from perfusion_pytorch.concept_file import library_version

MODEL = "--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5"
EXAMPLES = f"""\
examples:
  perfusion train {MODEL} --instance_data_dir my_pictures \\
      --token "<teddy-1>" --superclass "teddy bear" --output_dir teddy
  perfusion generate {MODEL} --concept teddy/concept.safetensors \\
      --prompt "a photo of a <teddy-1> on the beach" --betas 0.5 0.6 0.7
  perfusion info teddy/concept.safetensors

`perfusion COMMAND --help` tells all about a command. A token such as <teddy-1> needs quotes in a shell."""

FAILED, INTERRUPTED = 1, 130  # exit codes; 2, of a wrong use, is argparse's


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples, and tells the defaults that say something."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34)

    def _get_help_string(self, action):
        says_nothing = (
            action.default is None
            or action.default is argparse.SUPPRESS
            or action.default == []
            or action.nargs == 0
        )
        return (
            action.help
            if says_nothing or "default" in action.help
            else f"{action.help} (default: %(default)s)"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit code: 0, 1 where it failed, 2 where it was used wrongly, 130 after Ctrl-C.

    Args:
        argv: the arguments, by default those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # not every console or file of output can hold a β
    try:
        args = make_parser().parse_args(argv)
        if wrong := _contradiction(args):
            args.parser.error(wrong)
    except SystemExit as finished:  # --help, --version, or a wrong use
        return finished.code or 0
    with warnings.catch_warnings():
        if not args.verbose:
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", UserWarning)  # of ours; others warn of what is deprecated
            warnings.showwarning = _show_warning
        return _run(args)


def _contradiction(args):
    """Return what is wrong with flags that are right one by one, or None."""
    given = {name for name, value in vars(args).items() if value not in (None, False, [])}
    for name in ("beta", "betas", "temperature", "global_key_lock"):
        if "concept" in vars(args) and name in given and "concept" not in given:
            return f"--{name} needs --concept"
    if {"beta", "betas"} <= given:
        return "--beta and --betas cannot both be given"
    if "covariance" in given and given & {"captions", "num_captions", "ridge"}:
        return "--covariance is one already, so --captions, --num_captions and --ridge cannot be given too"
    masks = [
        flag for name, flag in (("masks", "--mask_dir"), ("mask_model", "--mask_model")) if name in given
    ]
    masks += ["--no_masks"] if "use_masks" in vars(args) and not args.use_masks else []
    if len(masks) > 1:
        return f"{' and '.join(masks)} cannot be given together"
    return None


def _run(args):
    try:
        module, function = args.run.split(":")
        getattr(import_module(module), function)(args, _say)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as interrupt:
        _complain(str(interrupt) or "Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        name = (
            ""
            if isinstance(error, (ValueError, OSError, ImportError, RuntimeError))
            else f"{type(error).__name__}: "
        )
        text = _in_flags(" ".join(str(error).split()), args.parser)
        _complain(f"error: {name}{text}" + ("" if args.verbose else " (--verbose shows where)"))
        return FAILED


def _in_flags(text, parser):
    """Name flags, where an error of the library names its arguments."""
    for action in parser._actions:
        if action.option_strings:
            text = text.replace(f"`{action.dest}`", action.option_strings[-1])
    return text


def _say(line):
    sys.stdout.write(f"{line}\n")


def _complain(text):
    sys.stderr.write(f"perfusion: {text}\n")


def _show_warning(message, category, filename, lineno, file=None, line=None):
    _complain(f"warning: {' '.join(str(message).split())}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="perfusion", description=__doc__, epilog=EXAMPLES, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"perfusion-pytorch {library_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, usage, help, description, example):
        module = {"train": "train", "generate": "generate"}.get(name, "commands")
        added = commands.add_parser(
            name,
            usage=f"perfusion {name} {usage}",
            help=help,
            description="\n".join(description),
            epilog="\n".join(("example:", *example)),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        added.set_defaults(run=f"perfusion_pytorch.cli.{module}:run_{name}", parser=added)
        return added

    train = command(
        "train",
        "--pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --token TOKEN --superclass WORDS --output_dir FOLDER [flags]",
        "teach a model a new object from some pictures",
        (
            "Teach a model a new object from four to ten pictures of it. What is learned is one small file, to be used by",
            "`perfusion generate`, or by `load_concept` in Python.",
        ),
        (
            f"  perfusion train {MODEL} --instance_data_dir my_pictures \\",
            '      --token "<teddy-1>" --superclass "teddy bear" --output_dir teddy',
            "several GPUs or machines:",
            "  accelerate launch -m perfusion_pytorch train --pretrained_model_name_or_path …",
        ),
    )
    add_model_flags(train)
    add_train_flags(train)
    group = train.add_argument_group("input covariance of the text encoder, computed once for a model")
    add_covariance_flags(group)
    group.add_argument(
        "--covariance",
        type=Path,
        metavar="FILE",
        help="take this one, of `perfusion covariance --output FILE`",
    )

    generate = command(
        "generate",
        "--pretrained_model_name_or_path MODEL --concept FILE [FILE ...] --prompt TEXT [TEXT ...] [flags]",
        "make pictures with concepts",
        (
            "Make pictures of prompts with concepts. Several pictures become one labelled grid: prompts across, gate biases β down.",
        ),
        (
            f"  perfusion generate {MODEL} --concept teddy/concept.safetensors \\",
            '      --prompt "a <teddy-1> in a boat" "a <teddy-1> on the moon" --betas 0.5 0.6 0.7 --output grid.png',
        ),
    )
    add_model_flags(generate, precision="float16 on CUDA devices, float32 elsewhere")
    add_concept_flags(generate.add_argument_group("concepts"), required=False)
    add_generate_flags(generate)

    covariance = command(
        "covariance",
        "--pretrained_model_name_or_path MODEL [flags]",
        "compute a model's input covariance beforehand",
        (
            "Compute the input covariance of a model's text encoder from captions, once. `perfusion train` does it too.",
        ),
        (f"  perfusion covariance {MODEL}",),
    )
    add_model_flags(covariance, precision="float32")
    group = covariance.add_argument_group("covariance")
    add_covariance_flags(group)
    group.add_argument("--batch_size", type=count, default=64, metavar="N", help="captions at a time")
    group.add_argument("--no_progress", action="store_true", help="show no progress bar")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write it to this file too, for `perfusion train --covariance FILE`",
    )

    info = command(
        "info",
        "FILE [--json]",
        "tell what a concept file holds",
        ("Tell what a concept file holds. The file is checked, and nothing of it is ever executed.",),
        ("  perfusion info teddy/concept.safetensors",),
    )
    info.add_argument("file", type=Path, metavar="FILE", help="the concept file")
    info.add_argument("--json", action="store_true", help="tell it as JSON")

    similarities = command(
        "similarities",
        "--pretrained_model_name_or_path MODEL --concept FILE [FILE ...] [flags]",
        "look at what the gate sees in prompts",
        (
            "Show the similarity r of each token of prompts to the concepts: near 1 at the concept's own token, near 0 elsewhere.",
            "The first thing to look at when a concept misbehaves.",
        ),
        (
            f"  perfusion similarities {MODEL} --concept teddy/concept.safetensors \\",
            '      --prompt "a <teddy-1> next to a dog"',
        ),
    )
    add_model_flags(similarities, precision="float32")
    group = similarities.add_argument_group("concepts and prompts")
    add_concept_flags(group, required=True)
    group.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="what to look at (default: the token and the superclass in a short prompt)",
    )
    group.add_argument("--json", action="store_true", help="show it as JSON")

    for added in (train, generate, covariance, info, similarities):
        added.add_argument(
            "--verbose", action="store_true", help="show all warnings, and where an error came from"
        )
    return parser


def add_model_flags(parser, *, precision=None):
    """Add the flags that name the base model, and where it runs in which precision; accelerate chooses that where no default is given."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        metavar="MODEL",
        help="folder in diffusers' format, or name on the model hub",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--variant", help="of the weights' files, such as fp16")
    if precision is not None:
        group = parser.add_argument_group("hardware")
        group.add_argument(
            "--device", help="such as cuda, cuda:1, mps or cpu (default: the fastest there is)"
        )
        group.add_argument(
            "--dtype",
            choices=("float32", "float16", "bfloat16"),
            help=f"of the weights (default: {precision})",
        )


def add_concept_flags(group, *, required):
    group.add_argument(
        "--concept",
        nargs="+",
        action="extend",
        default=[],
        required=required,
        metavar="FILE",
        help="concept files",
    )
    for name, what in (
        ("beta", "gate bias: lower shows more of a concept, higher follows the prompt"),
        ("temperature", "gate temperature"),
    ):
        group.add_argument(
            f"--{name}", nargs="+", action="extend", type=gate_value, default=[], metavar="VALUE",
            help=f'{what}; a number for all concepts or "<token>=number" for one (default: what the files say)',
        )  # fmt: skip


def add_generate_flags(parser):
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--prompt", nargs="+", required=True, metavar="TEXT", help="one or more; concepts by their tokens"
    )
    group.add_argument("--negative_prompt", metavar="TEXT", help="what should not be there")
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
        help="lock all keys of a prompt and not the concept's alone; wants β of 0.4 to 0.6",
    )
    group.add_argument(
        "--num_images_per_prompt", type=count, default=1, metavar="N", help="pictures of each prompt"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="picture i of a prompt starts from noise number seed + i"
    )
    group.add_argument(
        "--num_inference_steps", type=count, metavar="N", help="denoising steps (default: the pipeline's)"
    )
    group.add_argument(
        "--guidance_scale",
        type=number,
        metavar="G",
        help="classifier-free guidance (default: the pipeline's)",
    )
    for name in ("resolution", "height", "width"):
        group.add_argument(
            f"--{name}",
            type=count,
            metavar="PIXELS",
            help=f"{'edge' if name == 'resolution' else name} (default: the model's own)",
        )
    group.add_argument(
        "--batch_size",
        type=count,
        default=1,
        metavar="N",
        help="pictures made at a time; they do not depend on it",
    )
    group.add_argument(
        "--output",
        type=png,
        default=Path("perfusion.png"),
        metavar="FILE.png",
        help="the picture, or the grid of all",
    )
    group.add_argument(
        "--output_dir", type=Path, metavar="FOLDER", help="put each picture here too, as a file of its own"
    )
    group.add_argument("--no_progress", action="store_true", help="show no progress bar")


def add_covariance_flags(group):
    group.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="text file of captions, one a line (default: 100,000 built-in ones)",
    )
    group.add_argument("--num_captions", type=count, metavar="N", help="take the first ones only")
    group.add_argument(
        "--ridge", type=not_negative, help="λ: adds λ tr(C)/d to the diagonal (default: 1e-06)"
    )
    group.add_argument(
        "--cache_dir",
        type=Path,
        metavar="FOLDER",
        help="of the cache (default: $PERFUSION_CACHE or ~/.cache/perfusion_pytorch)",
    )
