"""What the parser needs to know of a command."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

MODEL = "--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5"  # in examples
Say = Callable[[str], None]  # shows a line to the user


@dataclass(frozen=True)
class Command:
    """A command of `perfusion`.

    Attributes:
        name: what is typed.
        usage: its arguments, in short.
        help: its line in the list of commands.
        description: what it does; lines that `--help` shows as they are.
        example: lines likewise.
        add_flags: adds its flags to its parser.
        run: runs it, given the parsed arguments and a function that shows a line.
    """

    name: str
    usage: str
    help: str
    description: str
    example: str
    add_flags: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Say], None]
