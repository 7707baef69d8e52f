"""`perfusion info`: what a concept file holds, or what a picture was made with."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from perfusion_pytorch.cli.command import Command, Say
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.concept_file import ABOUT, ARCHITECTURES, concept_path
from perfusion_pytorch.grids import read_picture_facts

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def add_info_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion info`."""
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a concept file, or a PNG picture of `perfusion`"
    )
    parser.add_argument("--json", action="store_true", help="show it as JSON")


def run_info(args: Namespace, say: Say) -> None:
    """Show what a concept file holds, or what a picture was made with."""
    if args.file.suffix.lower() in PICTURES:
        _show_picture(args, say)
        return
    args.file = concept_path(args.file)
    concept = Concept.load(args.file)
    facts = _facts(args.file, concept)
    if args.json:
        say(json.dumps(facts, indent=2))
        return
    beta, temperature = concept.eval_gate
    train_beta, train_temperature = concept.train_gate
    known = f", that of {facts['architecture']}" if facts["architecture"] else ""
    embeddings = " + ".join(f"{length} ({name})" for name, length in facts["embeddings"].items())
    parts = f"an embedding of {embeddings}, outputs of {len(concept.outputs)} layers"
    say(f"{args.file}: the concept {concept.token}, a {concept.superclass}")
    say(f"  base model  {concept.base_model} for text encodings of {concept.dim} features{known}")
    say(f"  gate        β {beta:g}, τ {temperature:g}; trained at β {train_beta:g}, τ {train_temperature:g}")
    say(f"  trained     {facts['trained_numbers']:,} numbers in {facts['dtype']}: {parts}")
    say(f"  size        {facts['bytes']:,} bytes, written by perfusion-pytorch {facts['library_version']}")


def _show_picture(args: Namespace, say: Say) -> None:
    facts = read_picture_facts(args.file)
    if args.json:
        say(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    say(f"{args.file}: a picture of {facts.pop('model', 'an unknown model')}")
    for name, value in facts.items():
        if isinstance(value, list):
            for one in value:
                say(f"  {name.removesuffix('s').replace('_', ' '):20}  {_line(one)}")
        elif value is not False:
            say(f"  {name.replace('_', ' '):20}  {_line(value)}")


def _line(value: Any) -> str:
    """Return a value of a picture's facts in one line."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(
        str(one) if name in ("prompt", "token") else f"{name} {one}" for name, one in value.items()
    )


def _facts(path: Path, concept: Concept) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[ABOUT])
    rows = [*concept.embeddings.values(), *concept.outputs.values()]
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "token": concept.token,
        "superclass": concept.superclass,
        "base_model": concept.base_model,
        "architecture": ARCHITECTURES.get(concept.dim),
        "dim": concept.dim,
        "train_gate": {"beta": concept.train_gate[0], "temperature": concept.train_gate[1]},
        "eval_gate": {"beta": concept.eval_gate[0], "temperature": concept.eval_gate[1]},
        "embeddings": {name: len(row) for name, row in concept.embeddings.items()},
        "outputs": {name: len(row) for name, row in concept.outputs.items()},
        "trained_numbers": sum(len(row) for row in rows),
        "dtype": str(rows[0].dtype).removeprefix("torch."),
        "concept_norm": concept.concept_norm,
        "format_version": about["format_version"],
        "library_version": about.get("library_version"),
    }


COMMAND = Command(
    name="info",
    usage="FILE [--json]",
    help="show what a concept file holds, or what a picture was made with",
    description=(
        "Show what a concept file holds, or what a picture of `perfusion` was made with.\n"
        "The file is checked, and nothing in it is ever executed."
    ),
    example="  perfusion info teddy/concept.safetensors\n  perfusion info grid.png",
    add_flags=add_info_flags,
    run=run_info,
)
