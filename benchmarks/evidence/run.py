"""Compare methods on objects of the small world: figures and a sheet of pictures for each object and seed.

    python benchmarks/evidence/run.py

Each cell loads the model, trains, and makes the same pictures. Cells run in `--jobs` processes of one
thread each; an interrupted run goes on where it was. `mix.py` puts two objects into one picture, and
`report.py` reads the files.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from cells import Cell, covariance_of, run_cell, task_of
from contenders import contender, parts
from methods import METHODS
from task import WORLD, objects
from tqdm import tqdm

from perfusion_pytorch.files import write_atomically

HERE = Path(__file__).parent
OURS = "perfusion"


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", type=Path, default=WORLD / "tiny-sd")
    parser.add_argument("--parts", nargs="+", choices=parts(), default=list(parts()))
    parser.add_argument("--split", choices=("development", "test"), default="test")
    parser.add_argument("--objects_per_superclass", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num_prompts", type=int, default=40)
    parser.add_argument(
        "--num_view_prompts",
        type=int,
        default=20,
        help="for each other gate, scale and lock, of the first seed",
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output_dir", type=Path, default=HERE / "results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


def cells_of(args, chosen, subjects):
    """Return the cells of contenders, objects and seeds; those of equal time get the steps that fit."""
    cells = []
    for seed, subject, who in product(args.seeds, subjects, chosen):
        views = args.num_view_prompts if seed == args.seeds[0] else 0
        steps = args.steps if who.equal == "steps" else steps_in_time(args, who.method)
        model, folder = args.pretrained_model_name_or_path, args.output_dir
        cells.append(Cell(who, subject, seed, steps, args.num_prompts, views, model, folder))
    return cells


def pace(args, method):
    """Return the seconds that a method takes before its first step, and for each.

    They are measured once, on a development object, while the other processes are not there yet.
    """
    path = args.output_dir / "pace.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if method not in known:
        from evaluate import load_pipeline

        torch.set_num_threads(1)
        seconds, counts = [], (8, 32)
        for steps in counts:
            with tempfile.TemporaryDirectory() as folder:
                model, subject = args.pretrained_model_name_or_path, objects("development", 1)[0]
                cell = Cell(contender(method), subject, 0, steps, 1, 0, model, args.output_dir)
                task = replace(task_of(cell), folder=Path(folder))
                options = cell.contender.options
                seconds.append(METHODS[method](load_pipeline(model), task, **options).seconds)
        each = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
        known[method] = [max(0.0, seconds[0] - counts[0] * each), each]
        write_atomically(path, (json.dumps(known, indent=1) + "\n").encode())
    return known[method]


def steps_in_time(args, method):
    """Return how many steps of a method fit into the time that Perfusion takes for its own."""
    ours_before, ours_each = pace(args, OURS)
    before, each = pace(args, method)
    return max(1, round((ours_before + args.steps * ours_each - before) / each))


def run_all(cells, jobs):
    """Run the cells that have no figures yet, in `jobs` processes."""
    wanted = [cell for cell in cells if not cell.path.exists()]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run_cell, cell) for cell in wanted]
        try:
            for done in tqdm(
                as_completed(running), total=len(cells), initial=len(cells) - len(wanted), desc="cells"
            ):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv=None):
    args = parse(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    covariance_of(args.pretrained_model_name_or_path, args.output_dir)
    subjects = objects(args.split, args.objects_per_superclass)
    for part in args.parts:
        print(f"part: {part}", flush=True)
        run_all(cells_of(args, parts()[part], subjects), args.jobs)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
