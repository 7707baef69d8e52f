"""Draw the tables, the Pareto plot and the grid of pictures from the cells of `run.py`.

python benchmarks/evidence/report.py
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from perfusion_pytorch.evaluation.drawings import Curve, write_pareto
from perfusion_pytorch.evaluation.figures import bootstrap_interval

HERE = Path(__file__).parent
OURS = "perfusion"
FIGURES = (
    ("both", lambda r: r["figures"]["both"]),
    ("identity", lambda r: r["figures"]["identity"]),
    ("followed", lambda r: r["figures"]["followed"]),
    ("shape alone", lambda r: r["figures"]["shape"]),
    ("colours alone", lambda r: r["figures"]["colours"]),
    ("plain changed", lambda r: r["figures"]["plain"]["changed"]),
    ("unrelated changed", lambda r: r["figures"]["unrelated"]["changed"]),
    ("trained", lambda r: r["trained numbers"]),
    ("bytes", lambda r: r["bytes"]),
    ("seconds", lambda r: r["seconds of training"]),
)


def read_cells(folder):
    """Return the records of a folder's cells."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def by_object(records, figure):
    """Return {(superclass, object): mean over seeds} of a figure."""
    values = defaultdict(list)
    for record in records:
        values[record["superclass"], record["object"]].append(figure(record))
    return {key: float(np.mean(rows)) for key, rows in values.items()}


def difference(ours, theirs):
    """Return the mean of ours minus theirs over the objects that both have, and its interval."""
    shared = sorted(ours.keys() & theirs.keys())
    gaps = [ours[key] - theirs[key] for key in shared]
    return float(np.mean(gaps)), bootstrap_interval(gaps)


def groups_of(records):
    """Return {label: records}: of each method, and where settings differ, of each of its settings."""
    groups = defaultdict(list)
    for record in records:
        groups[record["method"], json.dumps(record["settings"], sort_keys=True)].append(record)
    methods = [method for method, _ in groups]
    labels = {}
    for (method, settings), rows in groups.items():
        several = methods.count(method) > 1
        labels[f"{method} {json.dumps(json.loads(settings)['options'])}" if several else method] = rows
    return labels


def table(records):
    """Return a Markdown table, a method a row, with intervals over objects."""
    groups = groups_of(records)
    ours = by_object(groups[OURS], FIGURES[0][1]) if OURS in groups else None
    lines = ["| | objects | " + " | ".join(name for name, _ in FIGURES) + " | ours − this, both |"]
    lines.append("| --- " * (len(FIGURES) + 3) + "|")
    for method, rows in groups.items():
        values = [by_object(rows, figure) for _, figure in FIGURES]
        low, high = bootstrap_interval(list(values[0].values()))
        cells = [f"{np.mean(list(v.values())):.3g}" for v in values]
        cells[0] += f" ({low:.2f} to {high:.2f})"
        gap = ""
        if ours is not None and method != OURS:
            mean, (low, high) = difference(ours, values[0])
            gap = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(f"| {method} | {len(values[0])} | " + " | ".join(cells) + f" | {gap} |")
    return "\n".join(lines)


def pareto(records, path):
    """Draw identity over prompt for each method's strengths; its default is the large mark."""
    curves = []
    for method, rows in groups_of(records).items():
        swept = [row for row in rows if row["sweep"]]
        points = [
            tuple(
                float(np.mean([row["sweep"][scale][name] for row in swept if scale in row["sweep"]]))
                for name in ("followed", "identity")
            )
            for scale in (swept[0]["sweep"] if swept else ())
        ]
        default = tuple(
            float(np.mean(list(by_object(rows, lambda r, n=name: r["figures"][n]).values())))
            for name in ("followed", "identity")
        )
        curves.append(Curve(method, points, default=default))
    write_pareto(path, curves, x_label="prompt followed", y_label="identity accepted")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results_dir", type=Path, default=HERE / "results")
    parser.add_argument("--output_dir", type=Path, default=HERE / "report")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    records = read_cells(args.results_dir)
    text = table(records)
    (args.output_dir / "table.md").write_text(text + "\n")
    pareto(records, args.output_dir / "pareto.png")
    print(text)


if __name__ == "__main__":
    main()
