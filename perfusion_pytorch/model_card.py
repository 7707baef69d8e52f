"""The model card of a concept: what it is, what it was trained on, how good it is, and how to use it.

It is README.md on the hub, with pictures, and in a training run's folder, without.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.concept_file import ARCHITECTURES, RUN_FILE
from perfusion_pytorch.extras import required
from perfusion_pytorch.files import is_number, write_atomically
from perfusion_pytorch.hub import FIGURES_FILE, MAX_FIGURES
from perfusion_pytorch.user_warnings import warn_user

CARD = "README.md"
MARK = "<!-- Written by perfusion_pytorch, which writes over it. -->"
PAPER = "[Perfusion](https://arxiv.org/abs/2305.01644)"
UNKNOWN_MODEL = "the base model"  # where the file does not say which

Figures = dict[str, dict[str, float]]


def model_card(
    concept: Concept,
    path: Path,
    *,
    name: str | None = None,
    license: str | None = None,
    pictures: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the model card of a concept, as Markdown with the metadata that the hub reads.

    Args:
        concept: the concept.
        path: its file; the evaluation's figures are looked for beside it.
        name: "user/name" on the hub; None for a card that stays beside the file.
        license: what the hub calls it, such as "cc-by-4.0".
        pictures: for each picture its place beside the card, and what it shows.

    Raises:
        ImportError: huggingface_hub is missing, which comes with diffusers.
    """
    model = concept.origin.get("base_model_name")
    on_hub = isinstance(model, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII) is not None
    metadata = required("huggingface_hub").ModelCardData(
        base_model=model if on_hub else None,
        library_name="perfusion_pytorch",
        license=license,
        pipeline_tag="text-to-image",
        tags=["perfusion", "text-to-image", "diffusers"],
        instance_prompt=concept.token,
    )
    size = path.stat().st_size
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n{MARK}",
        f"# {_code(concept.token)} ({_plain(concept.superclass)})",
        f"Write {_code(concept.token)} in a prompt, and the pictures show this {_plain(concept.superclass)}. "
        f"The file holds {size:,} bytes. It was trained with {PAPER}, a key-locked rank-1 edit of a "
        "text-to-image model's cross attention.",
        *(f"![{_plain(shown)}]({place})\n\n*{_plain(shown)}*" for place, shown in pictures),
        "## What it was trained on",
        _table(("", ""), facts_in_words(concept)),
        *_settings(concept),
        *_figures_in_words(figures_of(concept, path)),
        "## How to use it",
        f"With the package perfusion_pytorch and diffusers:\n\n```python\n{_example(concept, name)}\n```",
        "## Licence",
        _licence(license, model if on_hub else None),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(concept: Concept, path: Path) -> None:
    """Write a card without pictures beside a concept's file, unless a README of somebody else's is there.

    Warns:
        UserWarning: it cannot be written.
    """
    card = path.with_name(CARD)
    try:
        if card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
            return
        write_atomically(card, model_card(concept, path).encode())
    except OSError as error:
        warn_user(f"The concept is in {path}, but its {CARD} is missing: {error}")


def facts_in_words(concept: Concept) -> Iterator[tuple[str, str]]:
    """Yield the names and values of a card's table: the base model, the gate and the form."""
    yield "base model", base_model_in_words(concept)
    known = f", that of {ARCHITECTURES[concept.dim]}" if concept.dim in ARCHITECTURES else ""
    yield "denoiser", f"{_code(concept.base_model)} for text encodings of {concept.dim} features{known}"
    yield "superclass", _code(concept.superclass)
    yield "gate", "β {:g}, τ {:g}".format(*concept.eval_gate)
    yield "gate in training", "β {:g}, τ {:g}".format(*concept.train_gate)
    yield "form", "gated" if concept.gates_removal else "eq. 3 of the paper"


def base_model_in_words(concept: Concept) -> str:
    """Return the base model's name and revision, as far as the file says them."""
    model, revision = (concept.origin.get(f"base_model_{what}") for what in ("name", "revision"))
    if model is None:
        return "unknown: the file does not say it"
    return _code(model) + ("" if revision is None else f", revision {_code(revision)}")


def settings_of(concept: Concept) -> dict[str, Any]:
    """Return the settings of the training run, as far as the file says them."""
    settings = concept.origin.get("training")
    return dict(settings) if isinstance(settings, Mapping) else {}


def figures_of(concept: Concept, path: Path) -> Figures:
    """Return an evaluation's figures: those in `evaluation.json` beside the file, or those in the file.

    Returns:
        For each figure's name its "mean", and "low" and "high", the ends of its interval. What is not of this
        form is left out.
    """
    beside: Any = None
    file = path.with_name(FIGURES_FILE)
    if file.is_file() and file.stat().st_size < MAX_FIGURES:
        try:
            beside = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            warn_user(f"{file} is not JSON, so its figures are left out. Write it again, or remove it.")
    found = beside if beside is not None else concept.origin.get("evaluation")
    summary = found.get("summary") if isinstance(found, Mapping) else None
    return {
        str(name): {key: float(values[key]) for key in ("mean", "low", "high")}
        for name, values in (summary.items() if isinstance(summary, Mapping) else ())
        if isinstance(values, Mapping)
        and all(is_number(values.get(key), int, float) for key in ("mean", "low", "high"))
    }


def _settings(concept: Concept) -> Iterator[str]:
    settings = settings_of(concept)
    if settings:
        rows = ((name.replace("_", " "), _code(value)) for name, value in settings.items())
        table = _table(("setting", "value"), rows)
        yield f"<details><summary>All settings</summary>\n\n{table}\n\n</details>"


def _figures_in_words(figures: Figures) -> Iterator[str]:
    if figures:
        yield "## How good it is"
        rows = ((n, f"{f['mean']:.3f} | {f['low']:.3f} to {f['high']:.3f}") for n, f in figures.items())
        lines = [f"| {_plain(name)} | {values} |" for name, values in rows]
        yield "\n".join(["| figure | mean | interval |", "| --- | --- | --- |", *lines])


def _example(concept: Concept, name: str | None) -> str:
    """Return how to use a concept, in Python."""
    model = str(concept.origin.get("base_model_name") or UNKNOWN_MODEL)
    revision = concept.origin.get("base_model_revision")
    pinned = "" if revision is None else f", revision={_text(revision)}"
    lines = [
        "from diffusers import DiffusionPipeline",
        "from perfusion_pytorch import load_concept, set_concepts",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({_text(model)}{pinned})",
        f"name = load_concept(pipe, {_text(name or RUN_FILE)})  # its token: {_text(concept.token)}",
        f"set_concepts(pipe, name, beta={concept.eval_gate[0]:g})  # higher follows the prompt more closely",
        'image = pipe(f"a photo of a {name} on the beach").images[0]',
        'image.save("picture.png")',
    ]
    return "\n".join(lines)


def _licence(license: str | None, model: str | None) -> str:
    terms = f"[{model}](https://huggingface.co/{model})" if model else "its base model"
    chosen = "None was stated" if license is None else f"{_code(license)}, chosen by who trained it"
    return f"{chosen}. The terms of {terms} apply too."


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [f"| {_plain(name)} | {value} |" for name, value in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines])


def _plain(text: object) -> str:
    """Return a text from a file as Markdown that shows it in one line, and nothing else."""
    line = " ".join(str(text).split()).replace("`", "'")
    return re.sub(r"([\\*_\[\]<>|#!])", r"\\\1", line)


def _code(value: object) -> str:
    """Return a value from a file in a code span, which may stand in a table."""
    line = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`"


def _text(value: object) -> str:
    """Return a text from a file as it is written in Python, within a fenced block."""
    return json.dumps(str(value)).replace("`", "\\u0060")
