"""What the page's runs are: trainings and evaluations, each a command of `perfusion`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perfusion_pytorch.concept_file import RUN_FILE
from perfusion_pytorch.evaluation.pictures import FOLDER
from perfusion_pytorch.evaluation.run import GRID
from perfusion_pytorch.evaluation.table import plural
from perfusion_pytorch.training.checkpoints import checkpoints_in

STARTING = "Starting: Python loads its packages."


@dataclass(frozen=True)
class Kind:
    """What differs between kinds of runs.

    Attributes:
        command: of `perfusion`.
        noun: in the names of folders.
        output: the folder within a run's that the command writes into.
        result: the file within a run's folder that is written last.
        ready: what to say of a finished run.
        flags: what the command always gets.
        steps: lines of the log; its groups are how many steps are done, and a loss or nothing.
        counted: how steps are shown, of how many.
        doing: says in words what a run does after what it has said.
        kept: says in words up to where a run in a folder can be resumed.
    """

    command: str
    noun: str
    output: str
    result: str
    ready: str
    flags: tuple[str, ...]
    steps: re.Pattern[str]
    counted: str
    doing: Callable[[str], str]
    kept: Callable[[Path], str]


STEP = re.compile(r"^step (\d+) of \d+, loss ([\d.]+|nan|inf)", re.MULTILINE)
# A progress bar's line, such as "pictures:  43%|####3     | 3/7 [00:01<00:02,  1.6picture/s, car β 0.5]".
BAR = re.compile(r"^pictures: +\d+%\|[^|\n]*\| (\d+)/\d+()", re.MULTILINE)
BAR_LABEL = re.compile(r"picture/?s?, (.*)\]\s*$")


def _training(text: str) -> str:
    lines = _lines_of(text)
    if not lines:
        return STARTING
    if lines[-1].startswith("perfusion: Stopped"):
        return "Stopping: the checkpoint is written."
    if not STEP.search(text):
        return "Preparing: pictures, prompts and the covariance."
    return lines[-1].capitalize() + "." if STEP.match(lines[-1]) else "Finishing."


def _checkpoints(folder: Path) -> str:
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        return "before the first checkpoint"
    return f"with a checkpoint after step {checkpoints[-1].name.rpartition('-')[2]}"


def _evaluation(text: str) -> str:
    lines = _lines_of(text)
    bars = [line for line in lines if BAR.match(line)]
    if not lines:
        return STARTING
    if lines[-1].startswith("perfusion: Stopped"):
        return "Stopping."
    if not bars:
        return "Preparing: the model, the files and the judges."
    if " 100%|" in bars[-1]:
        return "Measuring the pictures."
    label = BAR_LABEL.search(bars[-1])
    return "Making the pictures." if label is None else f"Making the pictures of {label[1]}."


def _pictures(folder: Path) -> str:
    count = sum(1 for _ in (folder / EVALUATION.output / FOLDER).rglob("*.png"))
    return f"with {plural(count, 'picture')} made"


def _lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


TRAINING = Kind(
    command="train",
    noun="run",
    output="",
    result=RUN_FILE,
    ready="The concept is ready.",
    flags=("--resume_from_checkpoint=latest",),
    steps=STEP,
    counted="step {} of {}",
    doing=_training,
    kept=_checkpoints,
)
EVALUATION = Kind(
    command="evaluate",
    noun="evaluation",
    output="evaluation",
    result=f"evaluation/{GRID}",
    ready="The figures are ready.",
    flags=(),
    steps=BAR,
    counted="{} of {} pictures",
    doing=_evaluation,
    kept=_pictures,
)
KINDS = {kind.command: kind for kind in (TRAINING, EVALUATION)}
