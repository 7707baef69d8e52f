"""The table that a terminal shows, and how to read it, in words."""

import textwrap
from collections.abc import Iterator

from perfusion_pytorch.evaluation.candidates import SYMBOLS
from perfusion_pytorch.evaluation.figures import Figure, Figures
from perfusion_pytorch.evaluation.measures import CLIP_IMAGE, CLIP_TEXT, DINO
from perfusion_pytorch.evaluation.result import PLAIN_CHANGE, UNRELATED_CHANGE, Evaluation

CHANGES = (PLAIN_CHANGE, UNRELATED_CHANGE)
MARK = "->"  # before the recommended strength
GAP = "  "
LINE = 100  # characters of a line of text


def table_of(evaluation: Evaluation) -> str:
    """Return the figures as lines of text, with a legend and the recommendation below them."""
    rows = [row for file in evaluation.files for row in file.strengths]
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    lines = [_head_line(evaluation), ""]
    lines += _aligned([["", *names], *_rows(evaluation, names)])
    lines += ["", *_legend(evaluation, names), "", *_recommendations(evaluation)]
    return "\n".join(lines)


def _head_line(evaluation: Evaluation) -> str:
    count = evaluation.num_images_per_prompt
    return (
        f"{evaluation.superclass}: {plural(evaluation.num_prompts, 'prompt')}, "
        f"{plural(count, 'picture')} of each; {plural(evaluation.num_training, 'training picture')}."
    )


def _rows(evaluation: Evaluation, names: list[str]) -> Iterator[list[str]]:
    if evaluation.training:
        yield ["training pictures", *_cells(evaluation.training, names)]
    for file in evaluation.files:
        for row in file.strengths:
            is_chosen = row.strength is not None and row.strength == file.recommended
            label = f"{file.candidate.name} {file.candidate.label(row.strength)}".strip()
            yield [f"{MARK} {label}" if is_chosen else label, *_cells(row.figures, names)]
    yield ["base model", *_cells(evaluation.base, names)]


def _cells(figures: Figures, names: list[str]) -> list[str]:
    return [_cell(name, figures.get(name)) for name in names]


def _cell(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "-"
    if name in CHANGES:
        return f"{figure.mean:.2f}"
    return f"{figure.mean:.3f} ± {figure.margin:.3f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return rows as lines, the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    indent = len(MARK) + 1
    lines = []
    for first, *cells in rows:
        head = first if first.startswith(MARK) else " " * indent + first
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(GAP.join([f"{head:<{widths[0] + indent}}", *aligned]).rstrip())
    return lines


def _legend(evaluation: Evaluation, names: list[str]) -> Iterator[str]:
    likeness = [name for name in (DINO, CLIP_IMAGE) if name in names]
    if likeness:
        yield (
            f"{' and '.join(likeness)}: how much pictures are like the training pictures. The base model, "
            "which never saw the thing,"
        )
        yield "  is the floor. The training pictures, compared with each other, are the ceiling."
    if CLIP_TEXT in names:
        yield f"{CLIP_TEXT}: how well pictures fit their prompts. The base model shows what is possible."
    own = [name for name in names if name not in (DINO, CLIP_IMAGE, CLIP_TEXT, *CHANGES)]
    if own:
        yield f"{', '.join(own)}: of your checkers."
    yield (
        f"{PLAIN_CHANGE}, {UNRELATED_CHANGE}: how far pictures without the thing (a plain "
        f"'{evaluation.superclass}', or something else)"
    )
    yield "  are from the base model's: of 255, and 0 is best."
    yield "± is half of the 95 % interval, over prompts."


def _recommendations(evaluation: Evaluation) -> Iterator[str]:
    for file in evaluation.files:
        knob = file.candidate.knob
        if knob is None:
            continue
        what = "" if file.recommended is None else f"{SYMBOLS[knob]} {file.recommended:g} is recommended: "
        yield from textwrap.wrap(f"{file.candidate.name}: {what}{file.reason}", LINE, subsequent_indent="  ")


def plural(count: int, noun: str) -> str:
    """Return a number of things in words, such as "2 prompts"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
