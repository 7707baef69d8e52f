"""`perfusion info`: what a concept file holds, or what a picture was made with."""

import json
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from perfusion_pytorch.cli.command import Command, Say
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.concept_file import ABOUT, ARCHITECTURES
from perfusion_pytorch.grids import read_picture_facts
from perfusion_pytorch.hub import cached_snapshot, find_concept
from perfusion_pytorch.model_card import figures_of, settings_of

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
UNKNOWN = "unknown: the file does not say it"


def add_info_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion info`."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a concept file, a name on the hub such as user/name, or a PNG picture of `perfusion`",
    )
    parser.add_argument("--json", action="store_true", help="show it as JSON")


def run_info(args: Namespace, say: Say) -> None:
    """Show what a concept file holds, or what a picture was made with."""
    if Path(args.file).suffix.lower() in PICTURES:
        _show_picture(args, say)
        return
    path = find_concept(args.file, with_figures=True)
    concept = Concept.load(path)
    facts = _facts(path, concept)
    if args.json:
        say(json.dumps(facts, indent=2))
    else:
        for line in _lines(path, concept, facts):
            # A file of somebody else's must not send control characters to the terminal.
            say("".join(letter if letter.isprintable() else "?" for letter in line))


def _lines(path: Path, concept: Concept, facts: dict[str, Any]) -> Iterator[str]:
    """Yield, in words, what a concept file holds."""
    beta, temperature = concept.eval_gate
    train_beta, train_temperature = concept.train_gate
    known = f", that of {facts['architecture']}" if facts["architecture"] else ""
    embeddings = " + ".join(f"{length} ({name})" for name, length in facts["embeddings"].items())
    parts = f"an embedding of {embeddings}, outputs of {len(concept.outputs)} layers"
    yield f"{path}: the concept {concept.token}, a {concept.superclass}"
    if facts["hub"] is not None:
        yield f"  on the hub  {facts['hub']['name']}, commit {facts['hub']['commit']}"
    yield f"  base model  {_base_model(facts)}"
    yield f"  denoiser    {concept.base_model} for text encodings of {concept.dim} features{known}"
    yield f"  gate        β {beta:g}, τ {temperature:g}; trained at β {train_beta:g}, τ {train_temperature:g}"
    yield f"  trained     {facts['trained_numbers']:,} numbers in {facts['dtype']}: {parts}"
    yield f"  size        {facts['bytes']:,} bytes, written by perfusion-pytorch {facts['library_version']}"
    settings = ", ".join(f"{name} {value}" for name, value in facts["training"].items())
    head, indent = f"  {'settings':12}", " " * 14
    yield from textwrap.wrap(settings or UNKNOWN, 100, initial_indent=head, subsequent_indent=indent)
    for name, figure in facts["evaluation"].items():
        yield f"  figure      {name}: {figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _base_model(facts: dict[str, Any]) -> str:
    name, revision = facts["base_model_name"], facts["base_model_revision"]
    if name is None:
        return UNKNOWN
    return name if revision is None else f"{name}, revision {revision}"


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
    snapshot = cached_snapshot(path)
    rows = [*concept.embeddings.values(), *concept.outputs.values()]
    return {
        "file": str(path),
        "hub": None if snapshot is None else {"name": snapshot[0], "commit": snapshot[1]},
        "bytes": path.stat().st_size,
        "token": concept.token,
        "superclass": concept.superclass,
        "base_model": concept.base_model,
        "base_model_name": concept.origin.get("base_model_name"),
        "base_model_revision": concept.origin.get("base_model_revision"),
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
        "training": settings_of(concept),
        "evaluation": figures_of(concept, path),
    }


COMMAND = Command(
    name="info",
    usage="FILE [--json]",
    help="show what a concept file holds, or what a picture was made with",
    description=(
        "Show what a concept file holds, or what a picture of `perfusion` was made with.\n"
        "The file is checked, and nothing in it is ever executed."
    ),
    example=(
        "  perfusion info teddy/concept.safetensors\n"
        "  perfusion info someone/teddy\n"
        "  perfusion info grid.png"
    ),
    add_flags=add_info_flags,
    run=run_info,
)
