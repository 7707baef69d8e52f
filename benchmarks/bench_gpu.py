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

The whole takes at most about `--minutes`, four by default. Cells come in the order of their worth; what no
longer fits is skipped, and the JSON says so. By a guess for an H100 ten minutes do for all of it. A cell
that fails, for want of memory for instance, is recorded with one line, and the others go on. `--output` gets
all figures, with versions and device, after every cell. `--table` prints the Markdown tables of such a file.
`--small` runs every kind of cell with tiny models, also on a CPU, within an hour at most. It shows that the
script works, and nothing about speed.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ALL = ("pictures", "waits", "many", "training", "covariance", "compiled")


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        models: by name.
        plan: model, dtype and kinds of cells, in the order of their worth. What is last is skipped first.
        seconds: how many each kind of cell is expected to take, by model; a training cell by its rows.
        rows: of training steps; the second alone where there is time for few.
        steps: denoising steps of a picture.
        many: how many concepts are "many".
        most_rounds: of a cell.
    """

    models: Mapping[str, Model]
    plan: Sequence[tuple[str, str, Sequence[str]]]
    seconds: Mapping[str, Mapping[str, float]]
    rows: tuple[int, ...]
    steps: int
    many: int
    most_rounds: int


REAL = Size(
    models=MODELS,
    plan=(
        ("SD 1.5", "bf16", ALL),
        ("SDXL", "bf16", ("pictures", "waits", "training", "covariance")),
        ("SD 1.5", "fp16", ("few pictures",)),
        ("SDXL", "fp16", ("few pictures",)),
        ("SDXL", "bf16", ("compiled", "many")),
        ("SD 1.5", "fp16", ("few training", "compiled")),
        ("SDXL", "fp16", ("few training", "compiled")),
        ("SD 1.5", "bf16", ("whole",)),
    ),
    seconds={  # guesses for an H100
        "SD 1.5": {
            "build": 5,
            "pictures": 10,
            "few pictures": 6,
            "waits": 2,
            "many": 16,
            "compiled": 30,
            "whole": 120,
            "training": 6,
            "batch 1": 2,
            "batch 4": 3,
            "batch 16": 6,
            "covariance": 3,
        },
        "SDXL": {
            "build": 6,
            "pictures": 18,
            "few pictures": 12,
            "waits": 3,
            "many": 50,
            "compiled": 35,
            "training": 14,
            "batch 1": 3,
            "batch 4": 5,
            "batch 16": 12,
            "covariance": 4,
        },
    },
    rows=(1, 4, 16),
    steps=20,
    many=1000,
    most_rounds=15,
)
SMALL = Size(
    models=SMALL_MODELS,
    plan=(
        ("SD 1.5", "bf16", ALL),
        ("SDXL", "bf16", ("pictures", "few training", "covariance")),
        ("SD 1.5", "fp16", ("few pictures", "few training")),
    ),
    seconds=dict.fromkeys(
        SMALL_MODELS,
        dict.fromkeys((*REAL.seconds["SD 1.5"], "batch 2"), 10.0) | {"covariance": 0.2, "compiled": 900.0},
    ),
    rows=(1, 2),
    steps=3,
    many=20,
    most_rounds=2,
)


class Session:
    """One model in one dtype, and the cells that are measured on it.

    Args:
        report: where results go.
        key, dtype: names of the model and the dtype.
        size: what is measured.
        device: where.
        folder: for concept files.
    """

    def __init__(
        self, report: Report, key: str, dtype: str, size: Size, device: torch.device, folder: Path
    ) -> None:
        self.report, self.size, self.label = report, size, f"{key}, {dtype}"
        self.seconds, self.resolution = size.seconds[key], size.models[key].resolution
        self.pipe = build(size.models[key], device, DTYPES[dtype])
        paths = list(write_concepts(self.pipe, folder, max(CONCEPTS.values())))
        self.pictures = Pictures(self.pipe, paths, size.steps, size.most_rounds)

    def measure(self, kind: str) -> None:
        """Measure the cells of a kind."""
        pictures = self.pictures
        cells: dict[str, tuple[str, Callable[[float], dict[str, Any]]]] = {
            "pictures": ("pictures: {}", partial(pictures.eager, NAMES)),
            "few pictures": ("pictures: {}", partial(pictures.eager, FEW)),
            "waits": ("waits: {}", partial(pictures.waits, NAMES)),
            "many": ("pictures: {}, many loaded", self._with_many),
            "compiled": ("pictures: {}, compiled blocks", partial(pictures.compiled, FEW)),
            "whole": ("pictures: {}, compiled", partial(pictures.compiled, FEW[:2], whole=True)),
            "covariance": ("covariance: {}", partial(captions_a_second, self.pipe)),
        }
        rows = self.size.rows
        if kind in cells:
            name, run = cells[kind]
            self.report.cell(name.format(self.label), self.seconds[kind], run)
        elif kind == "few training":
            self._train([(rows[1], False)])
        else:
            self._train([(number, is_saving) for is_saving in (False, True) for number in rows])

    def _with_many(self, deadline: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            paths = list(write_concepts(self.pipe, Path(folder), self.size.many))
            return self.pictures.with_many_loaded(paths, deadline)

    def _train(self, settings: Sequence[tuple[int, bool]]) -> None:
        """Measure training cells, which share their preparation: rows, and whether memory is saved."""
        names = {
            (rows, is_saving): f"training: {self.label}, batch {rows}"
            + (", checkpointing" if is_saving else "")
            for rows, is_saving in settings
        }

        def use(training: Training) -> None:
            for (rows, is_saving), name in names.items():
                run = partial(training.measure, rows, is_saving)
                self.report.cell(name, self.seconds[f"batch {rows}"], run)

        needed = self.seconds["training"] + self.seconds[f"batch {settings[0][0]}"]
        if not self.report.has_time_for(needed):
            self.report.skip(names.values(), needed)
            return
        try:
            with_training(self.pipe, self.resolution, self.size.most_rounds, use)
        except Exception as error:  # of the preparation, since cells have a `try` of their own
            self.report.fail([name for name in names.values() if name not in self.report.cells], error)


def run_plan(report: Report, size: Size, device: torch.device) -> None:
    """Measure all cells of a plan for which there is time."""
    for key, dtype, kinds in size.plan:
        names = [f"{kind}: {key}, {dtype}" for kind in kinds]
        needed = size.seconds[key]["build"] + min(size.seconds[key].get(kind, 0) for kind in kinds)
        if not report.has_time_for(needed):
            report.skip(names, needed)
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                session = Session(report, key, dtype, size, device, Path(folder))
                for kind in kinds:
                    session.measure(kind)
            except Exception as error:
                report.fail([f"session: {key}, {dtype}"], error)
        session = None
        free_memory()


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
    parser.add_argument("--minutes", type=float, help="4 by default, with --small 60")
    parser.add_argument("--small", action="store_true", help="tiny models, also on a CPU")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of --output, and measure nothing"
    )
    parser.add_argument("--output", type=Path, default=HERE / "bench_gpu.json")
    args = parser.parse_args(argv)
    if args.table:
        sys.stdout.write(markdown(json.loads(args.output.read_text())))
        return
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.small:
        parser.error("This needs a CUDA GPU. `--small` shows on a CPU that it works.")
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    minutes = args.minutes if args.minutes is not None else 60.0 if args.small else 4.0
    report = Report(args.output, facts_of(device), minutes, started)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of made-up concepts and pictures
        run_plan(report, SMALL if args.small else REAL, device)
    sys.stdout.write("\n" + markdown(report.result))


if __name__ == "__main__":
    main()
