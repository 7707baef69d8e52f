"""What an evaluation found, as the page shows it: a table and sentences."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from perfusion_pytorch.evaluation.candidates import SYMBOLS
from perfusion_pytorch.evaluation.table import CHANGES, plural

Figures = Mapping[str, Mapping[str, float]]


def table(found: Mapping[str, Any]) -> str:
    """Return the figures as an HTML table in which nothing of a file is markup, and what it says in words.

    Args:
        found: the content of `evaluation.json`.
    """
    rows = [row for file in found["files"] for row in file["strengths"]]
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    meanings = {name: escape(found["meanings"].get(name, ""), quote=True) for name in names}
    head = "".join(f'<th title="{meanings[name]}">{escape(name)}</th>' for name in names)
    body = "".join(_row(label, figures, names, mark) for label, figures, mark in _rows(found))
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in recommendations(found))
    return (
        f'<div class="figures"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f'<div class="caption"><p>{escape(_head(found))} ± is half of the 95 % interval, over prompts. '
        f"Changes are of 255, and 0 is best. Point at a figure's name to see what it is.</p>{sentences}</div>"
    )


def recommendations(found: Mapping[str, Any]) -> list[str]:
    """Return, for each file that has strengths, a sentence that says which is recommended, and why."""
    sentences = []
    for file in found["files"]:
        if file["knob"] is not None:
            is_known = file["recommended"] is not None
            what = f"{_strength(file, file['recommended'])} is recommended: " if is_known else ""
            sentences.append(f"{file['name']}: {what}{file['reason']}")
    return sentences


def only(found: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the figures of one file, to lie beside it, as `perfusion evaluate --write` leaves them."""
    file = found["files"][number]
    rows = [row["figures"] for row in file["strengths"] if row["strength"] == file["recommended"]]
    summary = rows[0] if rows else {}
    return {**found, "summary": summary, "recommended": file["recommended"], "files": [file]}


def _head(found: Mapping[str, Any]) -> str:
    prompts, pictures, training = (
        plural(found[name], noun)
        for name, noun in (
            ("num_prompts", "prompt"),
            ("num_images_per_prompt", "picture"),
            ("num_training_pictures", "training picture"),
        )
    )
    return f"{found['superclass']}: {prompts}, {pictures} of each; {training}."


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, Figures, bool]]:
    """Yield label, figures, and whether it is recommended."""
    if found["training_pictures"]:
        yield "training pictures", found["training_pictures"], False
    for file in found["files"]:
        for row in file["strengths"]:
            is_chosen = row["strength"] is not None and row["strength"] == file["recommended"]
            yield f"{file['name']} {_strength(file, row['strength'])}".strip(), row["figures"], is_chosen
    yield "base model", found["base_model"], False


def _row(label: str, figures: Figures, names: Sequence[str], is_chosen: bool) -> str:
    cells = "".join(f"<td>{_cell(name, figures.get(name))}</td>" for name in names)
    kind = ' class="chosen" title="recommended"' if is_chosen else ""
    return f"<tr{kind}><th>{escape(label)}</th>{cells}</tr>"


def _cell(name: str, figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    if name in CHANGES:
        return f"{figure['mean']:.2f}"
    return f"{figure['mean']:.3f}<small> ± {(figure['high'] - figure['low']) / 2:.3f}</small>"


def _strength(file: Mapping[str, Any], strength: float | None) -> str:
    return "" if strength is None or file["knob"] is None else f"{SYMBOLS[file['knob']]} {strength:g}"
