"""The plot of likeness over prompts, and the grid of pictures."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfusion_pytorch.evaluation.figures import Figure
from perfusion_pytorch.evaluation.pictures import Group, Groups, open_picture
from perfusion_pytorch.evaluation.result import Evaluation, FileFigures
from perfusion_pytorch.extras import required
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.grids import labelled_grid, write_png

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_COLUMNS = 6  # of the grid
LARGEST_CELL = 256  # pixels
COLOUR_OF_REFERENCES = "0.45"


@dataclass(frozen=True)
class Curve:
    """What one line of a plot shows.

    Attributes:
        name: of the line, in the legend.
        points: (x, y) of each strength.
        labels: a text beside each point.
        marked: which point is drawn large, if any.
        default: a large mark that need not be among the points, if any.
        errors: for each point (below and above x, below and above y), the ends of its intervals.
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    marked: int | None = None
    default: tuple[float, float] | None = None
    errors: Sequence[tuple[float, float, float, float]] = ()


def write_pareto(
    path: str | os.PathLike[str],
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    references: Mapping[str, tuple[float | None, float | None]] | None = None,
) -> None:
    """Write a PNG with a line for each curve; further up and to the right is better.

    Args:
        path: the file.
        curves: what is drawn.
        x_label, y_label: of the axes.
        references: dashed lines by name: one across at y, one upright at x, or both, which cross in a point.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    # Not pyplot: it would choose a window system, and keep figures for the whole process.
    canvas = required("matplotlib.backends.backend_agg").FigureCanvasAgg
    figure = required("matplotlib.figure").Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        _draw(axes, curve, f"C{number}")
    for name, (x, y) in (references or {}).items():
        _draw_reference(axes, name, x, y)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    data = io.BytesIO()
    canvas(figure).print_figure(data, format="png", dpi=150)
    write_atomically(path, data.getvalue())


def _draw(axes: Any, curve: Curve, colour: str) -> None:
    xs, ys = zip(*curve.points, strict=True) if curve.points else ((), ())
    if curve.errors:
        left, right, below, above = zip(*curve.errors, strict=True)
        axes.errorbar(
            xs, ys, xerr=(left, right), yerr=(below, above), fmt="none", ecolor=colour, alpha=0.3, linewidth=1
        )
    axes.plot(xs, ys, "-o", color=colour, markersize=4, linewidth=1, label=curve.name)
    large = curve.default if curve.marked is None else curve.points[curve.marked]
    if large is not None:
        axes.plot(*large, "o", color=colour, markersize=10)
    for point, label in _labels_of_points(curve).items():
        axes.annotate(label, point, xytext=(6, 6), textcoords="offset points", fontsize=8, color=colour)


def _labels_of_points(curve: Curve) -> dict[tuple[float, float], str]:
    """Return the label of each point; points at one place share theirs."""
    labels: dict[tuple[float, float], str] = {}
    for point, label in zip(curve.points, curve.labels, strict=bool(curve.labels)):
        labels[point] = f"{labels[point]}, {label}" if point in labels else label
    return labels


def _draw_reference(axes: Any, name: str, x: float | None, y: float | None) -> None:
    style: dict[str, Any] = {"color": COLOUR_OF_REFERENCES, "linewidth": 1, "linestyle": "--", "zorder": 0}
    if x is not None:
        axes.axvline(x, **style)
    if y is not None:
        axes.axhline(y, **style)
    if x is not None and y is not None:
        axes.plot(x, y, "s", color=COLOUR_OF_REFERENCES, markersize=6)
        axes.annotate(name, (x, y), xytext=(-6, 6), textcoords="offset points", fontsize=8, ha="right")
    elif y is not None:  # at the left end of the line
        axes.annotate(
            name,
            (0, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
        )


def draw_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write the plot of an evaluation, whose two axes are what its recommendation compares."""
    identity, prompt = evaluation.identity, evaluation.prompt
    if identity is None or prompt is None:
        raise ValueError("The plot needs a figure of likeness and one of following prompts.")
    ceiling = evaluation.training.get(identity)
    references = {"base model": (evaluation.base[prompt].mean, evaluation.base[identity].mean)}
    if ceiling is not None:
        references["training pictures"] = (None, ceiling.mean)  # type: ignore[assignment]
    write_pareto(
        path,
        [_curve(file, identity, prompt) for file in evaluation.files],
        x_label=f"prompts followed ({prompt})",
        y_label=f"like the training pictures ({identity})",
        references=references,
    )


def _curve(file: FileFigures, identity: str, prompt: str) -> Curve:
    pairs = [(row.figures[prompt], row.figures[identity]) for row in file.strengths]
    chosen = [i for i, row in enumerate(file.strengths) if row.strength == file.recommended]
    large = chosen[0] if chosen and file.recommended is not None else None
    note = "" if large is None else f", {file.candidate.label(file.recommended)} recommended"
    return Curve(
        file.candidate.name + note,
        [(x.mean, y.mean) for x, y in pairs],
        [file.candidate.label(row.strength) for row in file.strengths],
        large,
        errors=[(*_errors(x), *_errors(y)) for x, y in pairs],
    )


def _errors(figure: Figure) -> tuple[float, float]:
    return max(0.0, figure.mean - figure.low), max(0.0, figure.high - figure.mean)


def draw_grid(
    path: Path,
    evaluation: Evaluation,
    training: Sequence["Image"],
    templates: Sequence[str],
    base: Group,
    others: Groups,
) -> None:
    """Write a grid: training pictures, the base model, and each file at each strength; a column a prompt.

    Each prompt's picture is that of the first seed. Of many prompts some are shown, evenly chosen.
    """
    columns = _evenly(len(templates), MOST_COLUMNS)
    rows = [("training, pictures", _in_a_row(training, len(columns)))]
    rows.append(("base model", [open_picture(base.plain[i].path) for i in columns]))
    size = evaluation.num_images_per_prompt
    for file in evaluation.files:
        for strength, group in others[file.candidate]:
            mark = ", recommended" if strength is not None and strength == file.recommended else ""
            knob = "" if strength is None else f", {file.candidate.knob} {strength:g}"
            pictures = [open_picture(group.shown[i * size].path) for i in columns]
            rows.append((f"{file.candidate.name}{knob}{mark}", pictures))
    heads = [templates[i].replace("{}", "...") for i in columns]
    grid = labelled_grid([(label, [_small(image) for image in images]) for label, images in rows], heads)
    write_png(path, grid, "\n".join(heads))


def _evenly(count: int, most: int) -> list[int]:
    """Return at most so many of the first numbers, evenly chosen.

    Example:
        >>> _evenly(3, 6), _evenly(16, 4)
        ([0, 1, 2], [0, 4, 8, 12])
    """
    return [i * count // min(count, most) for i in range(min(count, most))]


def _in_a_row(pictures: Sequence["Image"], count: int) -> list["Image"]:
    """Return the first pictures, and white ones where there are too few."""
    blank = required("PIL.Image").new("RGB", pictures[0].size, "white")
    return [*pictures[:count], *[blank] * (count - len(pictures))]


def _small(image: "Image") -> "Image":
    edge = max(image.size)
    if edge <= LARGEST_CELL:
        return image
    scale = LARGEST_CELL / edge
    return image.resize((round(image.width * scale), round(image.height * scale)))
