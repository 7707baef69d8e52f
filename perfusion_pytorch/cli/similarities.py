"""`perfusion similarities`: how similar each token of a prompt is to the concepts."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from perfusion_pytorch.cli.base_model import (
    check_concepts,
    device_of,
    dtype_of,
    load_concepts,
    load_pipeline,
)
from perfusion_pytorch.cli.command import MODEL, Command, Say
from perfusion_pytorch.cli.flag_types import words
from perfusion_pytorch.cli.shared_flags import add_concept_flags, add_hardware_flags, add_model_flags
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.diagnostics import token_similarities
from perfusion_pytorch.pipelines.encoding import prompt_encoder
from perfusion_pytorch.pipelines.parts import denoiser_of, loaded_on

FAR_FROM_ONE = 0.2  # distance of the concept's own similarity from 1 that is worth a warning

Table = list[tuple[str, tuple[float, ...]]]  # of a prompt: each token with its similarity to each concept


def add_similarities_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion similarities`."""
    add_model_flags(parser)
    add_hardware_flags(parser, precision="float32")
    group = parser.add_argument_group("concepts and prompts")
    add_concept_flags(group, required=True)
    group.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        type=words,
        metavar="TEXT",
        help="what to look at (default: the token and the superclass in a short prompt)",
    )
    group.add_argument("--json", action="store_true", help="show it as JSON")


def run_similarities(args: Namespace, say: Say) -> None:
    """Show the similarity r of each token of prompts to the concepts."""
    check_concepts(args)
    pipe = load_pipeline(args, dtype=dtype_of(args, default="float32"), device=device_of(args))
    names = load_concepts(pipe, args, say=lambda line: None)
    concepts = [loaded_on(pipe).concepts[name] for name in names]
    prompts = args.prompt or [
        f"a photo of a {word}" for concept in concepts for word in (concept.token, concept.superclass)
    ]
    rows = token_similarities(denoiser_of(pipe), pipe.tokenizer, prompt_encoder(pipe), prompts)
    tables = [without_padding(row, pipe.tokenizer.eos_token) for row in rows]
    if args.json:
        entries = [
            {
                "prompt": prompt,
                "tokens": [{"token": token, "r": dict(zip(names, r, strict=True))} for token, r in table],
                "remarks": remarks(table, concepts),
            }
            for prompt, table in zip(prompts, tables, strict=True)
        ]
        say(json.dumps(entries, indent=2))
        return
    width = max(len(token) for table in tables for token, _ in table)
    for prompt, table in zip(prompts, tables, strict=True):
        _show(prompt, table, concepts, width, say)
    gates = ", ".join(f"{concept.eval_gate[0]:g} of {concept.token}" for concept in concepts)
    say(
        "r is near 1 at the concept's own token and near 0 elsewhere; "
        f"the gate is half open at r = β ({gates})."
    )


def _show(prompt: str, table: Table, concepts: Sequence[Concept], width: int, say: Say) -> None:
    """Show a prompt's similarities, a token a line, and the remarks on them."""
    names = [concept.token for concept in concepts]
    say(f"{prompt}\n  {'':{width}}  " + "  ".join(f"{name:>8}" for name in names))
    for token, r in table:
        columns = [f"{value:{max(8, len(name))}.2f}" for value, name in zip(r, names, strict=True)]
        say(f"  {token:{width}}  " + "  ".join(columns))
    for line in remarks(table, concepts):
        say(f"  ! {line}")


def without_padding(row: Table, end: str) -> Table:
    """Return a prompt's table with its end and all padding as one row, which holds the largest r of them."""
    tokens = [token for token, _ in row]
    stop = tokens.index(end) if end in tokens else len(row)
    rest = [r for _, r in row[stop:]]
    if not rest:
        return row[:stop]
    return [*row[:stop], ("(end, padding)", tuple(max(values) for values in zip(*rest, strict=True)))]


def remarks(table: Table, concepts: Sequence[Concept]) -> list[str]:
    """Say in words what is wrong with a prompt's similarities, and what helps."""
    lines = []
    for j, concept in enumerate(concepts):
        column = [(token, r[j]) for token, r in table]
        lines += _remarks_on_own(column, concept) + _remarks_on_others(column, concept)
    return lines


def _remarks_on_own(column: list[tuple[str, float]], concept: Concept) -> list[str]:
    name = concept.token
    beta = concept.eval_gate[0]
    lines = []
    for r in [r for token, r in column if token == name]:
        if r < beta:
            lines.append(
                f"{name} is at r = {r:.2f}, below β {beta:g}: the gate hides the concept. "
                "Choose a lower β, or train it longer."
            )
        elif abs(r - 1) > FAR_FROM_ONE:
            lines.append(
                f"{name} is at r = {r:.2f}, far from 1: this prompt is unlike those that it was trained with."
            )
    return lines


def _remarks_on_others(column: list[tuple[str, float]], concept: Concept) -> list[str]:
    name = concept.token
    beta = concept.eval_gate[0]
    own = min((r for token, r in column if token == name), default=1.0)
    lines = []
    for token, r in column:
        if token == name or r <= beta:
            continue
        remedy = "A higher β keeps it out."
        if r >= own:
            remedy = "No β separates the two: train longer, or with more captions."
        lines.append(f"{token} is at r = {r:.2f}, above β {beta:g}: {name} shows there too. {remedy}")
    return lines


COMMAND = Command(
    name="similarities",
    usage="--pretrained_model_name_or_path MODEL --concept FILE [FILE ...] [flags]",
    help="look at what the gate sees in prompts",
    description=(
        "Show the similarity r of each token of prompts to the concepts: near 1 at the concept's own token,\n"
        "near 0 elsewhere. Look at it first when a concept misbehaves."
    ),
    example=(
        f"  perfusion similarities {MODEL} --concept teddy/concept.safetensors \\\n"
        '      --prompt "a <teddy-1> next to a dog"'
    ),
    add_flags=add_similarities_flags,
    run=run_similarities,
)
