"""What do concepts cost on a GPU? Pictures, training steps, memory, and the input covariance.

    pip install -e '.[benchmarks]'
    python benchmarks/bench_gpu.py

Stable Diffusion 1.5 and XL run at their real configurations, with random weights: no model is downloaded.
Measured are

- a picture, its prompt, denoising and decoding apart, with no, 1, 3 and 8 concepts, all of them in the
  prompt; with 1,000 loaded concepts of which one is in the prompt; and with peft's LoRA of ranks 1 and 4 on
  the keys and values of the cross attentions. In bfloat16 and float16, eager and compiled.
- a training step with 1, 4 and 16 rows, with and without gradient checkpointing: the frozen model's forward
  and backward to the text encodings, both phases of `train_concept`, textual inversion, and a LoRA.
- the peak memory of each, weights included; captions a second of the covariance; and whether a denoiser
  call of a picture waits for the GPU anywhere (`torch.cuda.set_sync_debug_mode("error")`).

Contenders share the weights and take turns. A ratio is the median over rounds of a contender's time over the
base's in the same round. As many rounds are made as fit into a cell's seconds.

The whole takes at most about `--minutes`, four by default. What no longer fits is skipped, and the JSON says
so; ten minutes are enough for all of it. A cell that fails, for want of memory for instance, is recorded with
one line, and the others go on. `--output` gets all figures, with versions and device, after every cell.
`--table` prints the Markdown tables of such a file. `--small` runs everything with tiny models, also on a
CPU, which shows that it works and nothing about speed.
"""

import argparse
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.cells import Report, free_memory
from gpu.concepts import write_concepts
from gpu.covariance import captions_a_second
from gpu.models import MODELS, SMALL_MODELS, Model, build
from gpu.pictures import BASE, CONCEPTS, LORAS, Pictures
from gpu.table import markdown
from gpu.training import Training, with_training

HERE = Path(__file__).parent
NAMES = [BASE, *CONCEPTS, *LORAS]
FEW = [BASE, "1 concept", "8 concepts", "LoRA, rank 1"]
ROWS = (1, 4, 16)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# How many seconds each cell is expected to take on an H100. The rows' are for each number of rows.
SECONDS: Mapping[str, Mapping[str, float]] = {
    "SD 1.5": {
        "build": 6,
        "pictures": 14,
        "few pictures": 8,
        "waits": 3,
        "many": 25,
        "compiled": 35,
        "whole": 120,
        "training": 6,
        "1 rows": 3,
        "4 rows": 4,
        "16 rows": 7,
        "covariance": 4,
    },
    "SDXL": {
        "build": 10,
        "pictures": 24,
        "few pictures": 14,
        "waits": 4,
        "many": 60,
        "compiled": 40,
        "whole": 240,
        "training": 14,
        "1 rows": 4,
        "4 rows": 7,
        "16 rows": 14,
        "covariance": 5,
    },
}
# In the order of their worth: model, dtype, cells. What is last is skipped first.
PLAN = (
    ("SD 1.5", "bf16", ("pictures", "waits", "many", "training", "covariance", "compiled")),
    ("SDXL", "bf16", ("pictures", "waits", "training", "covariance")),
    ("SD 1.5", "fp16", ("few pictures",)),
    ("SDXL", "fp16", ("few pictures",)),
    ("SDXL", "bf16", ("compiled", "many")),
    ("SD 1.5", "fp16", ("few training", "compiled")),
    ("SDXL", "fp16", ("few training", "compiled")),
    ("SD 1.5", "bf16", ("whole",)),
)


class Session:
    """One model in one dtype, and the cells that are measured on it.

    Args:
        report: where results go.
        label: model and dtype, as they are in the cells' names.
        pipe, model: the pipeline and its configuration.
        seconds: how long each kind of cell is expected to take.
        folder: for concept files.
        steps: denoising steps of a picture.
        many: how many concepts are "many".
    """

    def __init__(
        self,
        report: Report,
        label: str,
        pipe: Any,
        model: Model,
        seconds: Mapping[str, float],
        folder: Path,
        steps: int,
        many: int,
    ) -> None:
        self.report, self.label, self.pipe, self.model = report, label, pipe, model
        self.seconds, self.folder, self.many = seconds, folder, many
        self.pictures = Pictures(pipe, list(write_concepts(pipe, folder, max(CONCEPTS.values()))), steps)

    def measure(self, kind: str) -> None:
        """Measure one kind of cell."""
        pictures = self.pictures
        simple: dict[str, tuple[str, Callable[[float], dict[str, Any]]]] = {
            "pictures": ("pictures: {}", partial(pictures.eager, NAMES)),
            "few pictures": ("pictures: {}", partial(pictures.eager, FEW)),
            "waits": ("waits: {}", partial(pictures.waits, NAMES)),
            "many": ("pictures: {}, many loaded", self._with_many),
            "compiled": ("pictures: {}, compiled blocks", partial(pictures.compiled, FEW)),
            "whole": ("pictures: {}, compiled", partial(pictures.compiled, FEW[:2], whole=True)),
            "covariance": ("covariance: {}", partial(captions_a_second, self.pipe)),
        }
        if kind in simple:
            name, run = simple[kind]
            self.report.cell(name.format(self.label), self.seconds[kind], run)
        elif kind == "few training":
            self._train([(4, False)])
        else:
            self._train([(rows, is_recomputed) for is_recomputed in (False, True) for rows in ROWS])

    def _with_many(self, deadline: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            paths = list(write_concepts(self.pipe, Path(folder), self.many))
            return self.pictures.with_many_loaded(paths, deadline)

    def _train(self, settings: list[tuple[int, bool]]) -> None:
        """Measure training cells, which share their preparation."""
        names = {
            (rows, is_recomputed): f"training: {self.label}, {rows} rows"
            + (", checkpointing" if is_recomputed else "")
            for rows, is_recomputed in settings
        }

        def use(training: Training) -> None:
            for (rows, is_recomputed), name in names.items():
                run = partial(training.measure, rows, is_recomputed)
                self.report.cell(name, self.seconds[f"{rows} rows"], run)

        preparation = self.seconds["training"]
        if self.report.has_time_for(preparation + self.seconds[f"{settings[0][0]} rows"]):
            try:
                with_training(self.pipe, self.model.resolution, use)
            except Exception as error:  # of the preparation: cells have a `try` of their own
                self.fail([name for name in names.values() if name not in self.report.cells], error)
        else:
            for name in names.values():
                self.report.cell(name, float("inf"), lambda _: {})

    def fail(self, names: list[str], error: Exception) -> None:
        """Record an error in cells."""

        def measure(_: float) -> dict[str, Any]:
            raise error

        for name in names:
            self.report.cell(name, 0, measure)


def run_plan(report: Report, models: Mapping[str, Model], device: torch.device, small: bool) -> None:
    """Measure all cells of the plan for which there is time."""
    for key, dtype, kinds in PLAN:
        seconds = dict.fromkeys(SECONDS[key], 0.1) if small else SECONDS[key]
        label = f"{key}, {dtype}"
        first = seconds.get(kinds[0], seconds["training"])
        if not report.has_time_for(seconds["build"] + first):
            for kind in kinds:
                report.cell(f"{kind}: {label}", float("inf"), lambda _: {})
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                pipe = build(models[key], device, DTYPES[dtype])
                steps, many = (3, 20) if small else (20, 1000)
                session = Session(report, label, pipe, models[key], seconds, Path(folder), steps, many)
                for kind in kinds:
                    session.measure(kind)
            except Exception as error:
                message = error
                report.cell(f"build: {label}", 0, lambda _, message=message: _raise(message))
        pipe = session = None
        free_memory()


def _raise(error: Exception) -> dict[str, Any]:
    raise error


def facts_of(device: torch.device) -> dict[str, Any]:
    """Return versions and device, for the JSON."""
    names = ("torch", "diffusers", "transformers", "accelerate", "peft")
    facts: dict[str, Any] = {
        "versions": {name: __import__(name).__version__ for name in names}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": f"cpu, {platform.machine()}",
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["memory of the device, bytes"] = torch.cuda.get_device_properties(0).total_memory
        facts["CUDA"] = torch.version.cuda
    return facts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--small", action="store_true", help="tiny models, also on a CPU")
    parser.add_argument("--table", action="store_true", help="print the tables of --output, and measure nothing")
    parser.add_argument("--output", type=Path, default=HERE / "bench_gpu.json")
    args = parser.parse_args(argv)
    if args.table:
        sys.stdout.write(markdown(json.loads(args.output.read_text())))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.small:
        parser.error("This needs a CUDA GPU. `--small` shows on a CPU that it works.")
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report = Report(args.output, facts_of(device), args.minutes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of made-up concepts and pictures
        run_plan(report, SMALL_MODELS if args.small else MODELS, device, args.small)
    sys.stdout.write("\n" + markdown(report.result))


if __name__ == "__main__":
    main()
