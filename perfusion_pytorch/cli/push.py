"""`perfusion push`: put a concept on the hub, with a model card."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from perfusion_pytorch.cli.command import Command, Say
from perfusion_pytorch.cli.flag_types import not_empty, png
from perfusion_pytorch.push import push_concept


def add_push_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion push`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a concept file, or a training run's folder")
    parser.add_argument("name", metavar="NAME", help="user/name on the hub; it is made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make it for its owner alone")
    parser.add_argument("--license", type=not_empty, metavar="ID", help="for the card, such as cc-by-4.0")
    parser.add_argument(
        "--picture",
        nargs="+",
        action="extend",
        type=png,
        default=[],
        metavar="FILE.png",
        help="pictures for the card (default: the newest validation pictures beside the file)",
    )


def run_push(args: Namespace, say: Say) -> None:
    """Push a concept to the hub, and say where it is and how to use it."""
    address = push_concept(
        args.file, args.name, private=args.private, license=args.license, pictures=args.picture
    )
    say(f"Pushed {args.file} to {address}.")
    say(f'Use it as --concept {args.name}, or by load_concept(pipe, "{args.name}").')


COMMAND = Command(
    name="push",
    usage="FILE NAME [flags]",
    help="put a concept on the hub",
    description=(
        "Put a concept on the hub, as concept.safetensors, with a model card and the card's pictures.\n"
        "Log in first by `hf auth login`, or set HF_TOKEN. Training pictures are never pushed."
    ),
    example="  perfusion push teddy/concept.safetensors someone/teddy --license cc-by-4.0",
    add_flags=add_push_flags,
    run=run_push,
)
