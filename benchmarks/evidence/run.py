"""Compare methods on objects of the small world: a JSON file for each method, object and seed.

    python benchmarks/evidence/run.py
    python benchmarks/evidence/run.py --split development --options '{"learning_rate": 0.08}'

Each cell loads the model, trains, and makes the same pictures. Cells run in `--jobs` processes of one
thread each, so that an interrupted run goes on where it was. `report.py` reads the files.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from methods import METHODS, Task
from task import NUM_PICTURES, WORLD, Judge, generate, objects, pictures_of, prompts_for, unrelated_captions
from tqdm import tqdm

import perfusion_pytorch
from perfusion_pytorch import InputCovariance, calculate_input_covariance
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.pipelines.encoding import prompt_encoder

HERE = Path(__file__).parent
PACKAGES = ("torch", "diffusers", "transformers", "peft")


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", default=WORLD / "tiny-sd")
    parser.add_argument("--split", choices=("development", "test"), default="test")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        help="JSON: the methods' settings that are not their defaults",
    )
    parser.add_argument("--objects_per_superclass", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num_prompts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--no_masks", action="store_true")
    parser.add_argument("--num_pictures", type=int, default=NUM_PICTURES)
    parser.add_argument(
        "--sweep", action="store_true", help="measure all strengths of each method's knob too"
    )
    parser.add_argument("--output_dir", type=Path, default=HERE / "results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


def covariance_of(model, folder):
    """Return the input covariance of the model's text encoder over the world's captions; computed once."""
    import world
    from evaluate import load_pipeline

    path = folder / "covariance.safetensors"
    if not path.exists():
        captions = [world.sample(seed).caption for seed in range(10_000)]
        covariance = calculate_input_covariance(
            captions, prompt_encoder(load_pipeline(model)), batch_size=256, ridge=1e-6
        )
        covariance.save(path)
    return InputCovariance.load(path)


def name_of(method, subject, seed, settings):
    """Return a cell's file name: what it is of, and a hash of its settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{method}-{subject.superclass}-{subject.seed}-{seed}-{digest}".replace(" ", "_").replace(",", "")


def run_cell(method, subject, seed, settings, model, folder):
    """Train one method on one object, measure, and write the figures; returns the file's path."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    from checker import Checker
    from evaluate import contact_sheet, load_pipeline

    name = name_of(method, subject, seed, settings)
    pipe, prompts = load_pipeline(model), prompts_for(subject, settings["num_prompts"])
    judge = Judge(Checker.load(), subject, prompts)
    plain_before = pictures_of(pipe, prompts, subject.superclass, seed=1000)
    unrelated = unrelated_captions(subject, settings["num_prompts"] // 2)
    unrelated_before = generate(pipe, unrelated, seed=2000)
    pairs = subject.pictures(settings["num_pictures"])
    task = Task(
        pictures=[image for image, _ in pairs],
        masks=None if settings["no_masks"] else [mask for _, mask in pairs],
        superclass=subject.superclass,
        covariance=covariance_of(model, folder),
        steps=settings["steps"],
        seed=seed,
        folder=folder / "trained" / name,
    )
    learned = METHODS[method](pipe, task, **settings["options"])
    began = time.perf_counter()
    with learned.context():
        images = pictures_of(pipe, prompts, learned.words, seed=1000)
        seconds_a_picture = (time.perf_counter() - began) / len(images)
        figures = judge.scores(images)
        figures["plain"] = judge.change(
            plain_before, pictures_of(pipe, prompts, subject.superclass, seed=1000)
        )
        figures["unrelated"] = judge.change(unrelated_before, generate(pipe, unrelated, seed=2000))
        sweep = {}
        for scale in learned.scales if settings["sweep"] else ():
            learned.set_scale(scale)
            sweep[scale] = judge.scores(pictures_of(pipe, prompts, learned.words, seed=1000))
    contact_sheet(images).save(folder / f"{name}.png")
    record = {
        "method": method,
        "superclass": subject.superclass,
        "object": subject.seed,
        "seed": seed,
        "settings": settings,
        "figures": figures,
        "sweep": sweep,
        "ceiling": judge.scores([image for image, _ in subject.pictures(len(prompts))])["identity"],
        "trained numbers": learned.num_trained,
        "bytes": learned.path.stat().st_size,
        "seconds of training": learned.seconds,
        "seconds a picture": seconds_a_picture,
        "versions": {package: version(package) for package in PACKAGES}
        | {"perfusion_pytorch": perfusion_pytorch.__version__},
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    write_atomically(folder / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
    return folder / f"{name}.json"


def main(argv=None):
    args = parse(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    names = ("num_prompts", "steps", "no_masks", "num_pictures", "sweep", "options")
    settings = {name: getattr(args, name) for name in names}
    cells = list(product(args.seeds, objects(args.split, args.objects_per_superclass), args.methods))
    wanted = [
        (method, subject, seed)
        for seed, subject, method in cells
        if not (args.output_dir / f"{name_of(method, subject, seed, settings)}.json").exists()
    ]
    covariance_of(args.pretrained_model_name_or_path, args.output_dir)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(run_cell, *cell, settings, args.pretrained_model_name_or_path, args.output_dir)
            for cell in wanted
        ]
        try:
            for done in tqdm(
                as_completed(running), total=len(cells), initial=len(cells) - len(wanted), desc="cells"
            ):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
