"""The parser of the command line, put together from the commands."""

import argparse

from perfusion_pytorch.cli import covariance, generate, info, similarities, train
from perfusion_pytorch.cli.command import MODEL
from perfusion_pytorch.concept_file import library_version

COMMANDS = (train, generate, covariance, info, similarities)
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
    if "covariance" in given and given & {"captions", "num_captions", "ridge"}:
        return "--covariance is one already, so --captions, --num_captions and --ridge cannot be given too"
    flags = {"masks": "--mask_dir", "mask_model": "--mask_model"}
    masks = [flag for name, flag in flags.items() if name in given]
    if not values.get("use_masks", True):
        masks.append("--no_masks")
    return f"{' and '.join(masks)} cannot be given together" if len(masks) > 1 else None
