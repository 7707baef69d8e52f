"""Search each method's settings on development objects: the same number for each.

    python benchmarks/evidence/search.py

The best has the highest part of pictures that are the object and follow the prompt; of equals, the one
whose two parts are higher. It goes to `settings.json`; `search.md` lists all that were tried. Perfusion runs
with the library's defaults: what is found for it is to become one of them.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from cells import Cell, covariance_of
from contenders import SETTINGS, Contender
from run import OURS, run_all
from task import WORLD, objects

from perfusion_pytorch.files import write_atomically

HERE = Path(__file__).parent
RATES = (0.01, 0.02, 0.04, 0.08)
ABSOLUTE_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
GRIDS = {
    "perfusion": [{"learning_rate": rate} for rate in RATES],
    "perfusion, as the paper": [
        {"learning_rate": 0.03 * f, "embedding_learning_rate": 0.006 * f} for f in (0.1, 0.3, 1, 3)
    ],
    "textual inversion": [{"rate": rate} for rate in RATES],
    "LoRA, rank 1": [{"rate": rate} for rate in ABSOLUTE_RATES],
    "LoRA, rank 4": [{"rate": rate} for rate in ABSOLUTE_RATES],
    "LoRA, all projections": [{"rate": rate} for rate in ABSOLUTE_RATES],
    "Custom Diffusion": [{"rate": rate / 10} for rate in ABSOLUTE_RATES],
}


def worth(cells):
    """Return the means by which settings are compared: both, and the sum of the two parts."""
    records = [json.loads(cell.path.read_text())["figures"] for cell in cells]
    both = np.mean([record["both"] for record in records])
    parts = np.mean([record["identity"] + record["followed"] for record in records])
    return float(both), float(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", type=Path, default=WORLD / "tiny-sd")
    parser.add_argument("--methods", nargs="+", choices=GRIDS, default=list(GRIDS), metavar="METHOD")
    parser.add_argument("--num_objects", type=int, default=4, help="each of another superclass")
    parser.add_argument("--num_prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output_dir", type=Path, default=HERE / "search")
    parser.add_argument("--settings", type=Path, default=SETTINGS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    covariance_of(args.pretrained_model_name_or_path, args.output_dir)
    subjects, model = objects("development", 1)[: args.num_objects], args.pretrained_model_name_or_path
    tried = {
        method: [
            [
                Cell(
                    Contender(f"{method} {i}", method, options),
                    s,
                    0,
                    args.steps,
                    args.num_prompts,
                    0,
                    model,
                    args.output_dir,
                )
                for s in subjects
            ]
            for i, options in enumerate(GRIDS[method])
        ]
        for method in args.methods
    }
    run_all([cell for groups in tried.values() for group in groups for cell in group], args.jobs)
    best = json.loads(args.settings.read_text()) if args.settings.exists() else {}
    lines = ["| method | settings | both | identity + followed |", "| --- | --- | --- | --- |"]
    for method, groups in tried.items():
        found = [worth(group) for group in groups]
        if method != OURS:
            best[method] = GRIDS[method][found.index(max(found))]
        for options, (both, parts) in zip(GRIDS[method], found, strict=True):
            words = ", ".join(f"{name} {value:g}" for name, value in options.items())
            lines.append(f"| {method} | {words} | {both:.2f} | {parts:.2f} |")
    write_atomically(args.settings, (json.dumps(best, indent=1) + "\n").encode())
    (args.output_dir / "search.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
