"""Draw the tables, the Pareto plot and the grid of pictures from the cells of `run.py` and `mix.py`.

python benchmarks/evidence/report.py
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from claims import OURS, claims_table
from contenders import MAIN, parts
from figures import by_object, difference, mean_with_interval, of_view, read_cells
from PIL import Image
from sheets import cut
from task import FIRST_TEST_SEED, prompts_for, world

from perfusion_pytorch.evaluation.drawings import Curve, write_pareto
from perfusion_pytorch.grids import labelled_grid

HERE = Path(__file__).parent
PARTS = ("both", "identity", "followed")  # with intervals
COSTS = (
    ("shape alone", lambda r: r["figures"]["shape"]),
    ("colours alone", lambda r: r["figures"]["colours"]),
    ("plain changed", lambda r: r["figures"]["plain"]["changed"]),
    ("unrelated changed", lambda r: r["figures"]["unrelated"]["changed"]),
    ("trained", lambda r: r["trained numbers"]),
    ("bytes", lambda r: r["bytes"]),
    ("steps", lambda r: r["settings"]["steps"]),
    ("seconds", lambda r: r["seconds of training"]),
    ("seconds a picture", lambda r: r["seconds a picture"]),
)
GRID_SUPERCLASSES, GRID_PROMPTS = 4, 5


def main_table(groups):
    """Return a Markdown table, a contender a row; changes are of 255."""
    ours = by_object(groups.get(OURS, ()), of_view(None, PARTS[0]))
    head = ["", "objects", *PARTS, *(name for name, _ in COSTS), "ours − this, both"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, records in groups.items():
        values = [by_object(records, of_view(None, part)) for part in PARTS]
        cells = [name, str(len(values[0])), *(mean_with_interval(v.values()) for v in values)]
        cells += [f"{np.mean(list(by_object(records, figure).values())):.4g}" for _, figure in COSTS]
        gap = ""
        if name != OURS and ours.keys() & values[0].keys():
            mean, (low, high), _ = difference(ours, values[0])
            gap = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append("| " + " | ".join([*cells, gap]) + " |")
    return "\n".join(lines)


def views_table(groups):
    """Return a Markdown table of what else was made of what the contenders learned."""
    lines = ["| | view | " + " | ".join(PARTS) + " |", "| --- " * (len(PARTS) + 2) + "|"]
    for name, records in groups.items():
        views = dict.fromkeys(view for record in records for view in record["views"])
        for view in views:
            values = [by_object(records, of_view(view, part)).values() for part in PARTS]
            lines.append(f"| {name} | {view} | " + " | ".join(map(mean_with_interval, values)) + " |")
    return "\n".join(lines)


def pareto(groups, path):
    """Draw identity over prompt at each contender's strengths; the large mark is its default."""
    axes = ("followed", "identity")

    def point(records, view):
        return tuple(float(np.mean(list(by_object(records, of_view(view, axis)).values()))) for axis in axes)

    curves = []
    for name in MAIN:
        records = [record for record in groups.get(name, ()) if record["views"]]
        if records:
            swept = [view for view in records[0]["views"] if view.split()[0] in ("β", "scale")]
            points = [point(records, view) for view in swept]
            labels = [view.split()[1] if name == OURS else "" for view in swept]
            curves.append(Curve(name, points, labels, default=point(records, "default")))
    write_pareto(path, curves, x_label="prompt followed", y_label="identity accepted")


def grid(groups, folder):
    """Return pictures: contenders down, prompts across.

    They are of the first test object of each of the first four superclasses.
    """
    blocks = []
    for superclass in world.SUPERCLASSES[:GRID_SUPERCLASSES]:
        subject = world.new_object(superclass, FIRST_TEST_SEED)
        rows = [("training pictures", [image for image, _ in subject.pictures(GRID_PROMPTS)])]
        for name in MAIN:
            for record in groups.get(name, ()):
                if (record["superclass"], record["object"], record["seed"]) == (superclass, subject.seed, 0):
                    with Image.open(folder / f"{record['stem']}.png") as sheet:
                        rows.append((name, cut(sheet, GRID_PROMPTS)))
        if len(rows) > 1:
            count = record["settings"]["num_prompts"]
            texts = [prompt.text.format(f"<{superclass}>") for prompt in prompts_for(subject, count)]
            blocks.append(labelled_grid(rows, texts[:GRID_PROMPTS]))
    if not blocks:
        return None
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def mix_table(folder):
    """Return a Markdown table of two objects in one picture, with intervals over pairs."""
    ways = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        ways[record["way"]].append(record)
    figures = ("both objects", "followed", "everything")
    lines = ["| | pairs | " + " | ".join(figures) + " |", "| --- " * (len(figures) + 2) + "|"]
    for way, records in ways.items():
        cells = [mean_with_interval([record[figure] for record in records]) for figure in figures]
        lines.append(f"| {way} | {len(records)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results_dir", type=Path, default=HERE / "results")
    parser.add_argument("--output_dir", type=Path, default=HERE / "report")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found = read_cells(args.results_dir)
    names = [who.name for part in parts().values() for who in part]
    groups = {name: found[name] for name in [*names, *sorted(found.keys() - set(names))] if name in found}
    texts = {
        "table": main_table(groups),
        "views": views_table(groups),
        "claims": claims_table(groups),
        "mix": mix_table(args.results_dir / "mix"),
    }
    for name, text in texts.items():
        (args.output_dir / f"{name}.md").write_text(text + "\n")
        print(f"{name}\n{text}\n")
    pareto(groups, args.output_dir / "pareto.png")
    pictures = grid(groups, args.results_dir)
    if pictures is not None:
        pictures.save(args.output_dir / "grid.png")


if __name__ == "__main__":
    main()
