"""The parser of the command line, put together from the commands."""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from perfusion_pytorch.cli import app, covariance, evaluate, generate, info, push, similarities, train
from perfusion_pytorch.cli.command import MODEL
from perfusion_pytorch.concept_file import library_version

COMMANDS = (train, generate, evaluate, app, covariance, info, similarities, push)
DESCRIPTION = "Train a concept, make pictures with it, and inspect what it is."
EXAMPLES = f"""\
examples:
  perfusion train {MODEL} --instance_data_dir my_pictures \\
      --token "<teddy-1>" --superclass "teddy bear" --output_dir teddy
  perfusion generate {MODEL} --concept teddy/concept.safetensors \\
      --prompt "a photo of a <teddy-1> on the beach" --betas 0.5 0.6 0.7
  perfusion info teddy/concept.safetensors

`perfusion COMMAND --help` explains a command. A token such as <teddy-1> needs quotes in a shell."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples, and shows only informative defaults."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_uninformative = (
            action.default is None
            or action.default is argparse.SUPPRESS
            or action.default == []
            or action.nargs == 0
        )
        if is_uninformative or action.help is None or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments, with what `make_parser` says beside them.

    Raises:
        SystemExit: after help or version, or a wrong use; both are shown.
    """
    parser = make_parser()
    if not argv:
        parser.print_help()
        parser.exit()
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # the command's usage shows its flags
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if wrong := contradiction(args):
        args.parser.error(wrong)
    return args


def given_twice(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return, in words, which flags are given twice. argparse takes the last, as shells' users rely on."""
    last: dict[str, str] = {}
    twice = []
    for flag in (word.partition("=")[0] for word in argv):
        action = parser._option_string_actions.get(flag)
        if action is None or isinstance(action, argparse._ExtendAction):
            continue
        if (before := last.get(action.dest)) == flag:
            twice.append(f"{flag} is given twice, so the last one is taken.")
        elif before is not None:
            twice.append(f"{before} and {flag} contradict each other, so the last one is taken.")
        last[action.dest] = flag
    return twice


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Parsed arguments have, beside the flags' values, `run`, the command's function, and `parser`, its parser.
    """
    parser = argparse.ArgumentParser(
        prog="perfusion",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"perfusion-pytorch {library_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        command = module.COMMAND
        added = commands.add_parser(
            command.name,
            usage=f"perfusion {command.name} {command.usage}",
            help=command.help,
            description=command.description,
            epilog=f"example:\n{command.example}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        added.set_defaults(run=command.run, parser=added)
        command.add_flags(added)
        added.add_argument(
            "--verbose", action="store_true", help="show all warnings, and where an error came from"
        )
    return parser


def _more_than_once(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def contradiction(args: argparse.Namespace) -> str | None:
    """Return what is wrong with flags that are right one by one, or None."""
    values = vars(args)
    given = {name for name, value in values.items() if value not in (None, False, [])}
    if "concept" in values and "concept" not in given:
        for name in ("beta", "betas", "temperature", "global_key_lock"):
            if name in given:
                return f"--{name} needs --concept"
    if {"beta", "betas"} <= given:
        return "--beta and --betas cannot both be given"
    for name in ("beta", "temperature"):
        if twice := _more_than_once(name for name, _ in values.get(name) or ()):
            return (
                f"--{name} must have one number for {twice[0] or 'all concepts'}, got several. Give each "
                f'concept its own: --{name} "<token>=number"'
            )
    for name in ("betas", "concept"):
        if twice := _more_than_once(values.get(name) or ()):
            return f"--{name} must name each once, got {twice[0]} twice"
    if "resolution" in given and given & {"height", "width"}:
        return "--resolution is height and width, so --height and --width cannot be given too"
    if "covariance" in given and given & {"captions", "num_captions", "ridge"}:
        return "--covariance is one already, so --captions, --num_captions and --ridge cannot be given too"
    flags = {"masks": "--mask_dir", "mask_model": "--mask_model"}
    masks = [flag for name, flag in flags.items() if name in given]
    if not values.get("use_masks", True):
        masks.append("--no_masks")
    return f"{' and '.join(masks)} cannot be given together" if len(masks) > 1 else None
