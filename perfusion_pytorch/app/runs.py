"""Training runs of the page: each is `perfusion train` in a process of its own, with a folder of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfusion_pytorch.concept_file import RUN_FILE
from perfusion_pytorch.early_interrupts import INTERRUPTED
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.training.checkpoints import checkpoints_in

TRAIN = (sys.executable, "-m", "perfusion_pytorch", "train")
PICTURES = "pictures"  # a run's uploads
ABOUT = "run.json"  # how it was started
LOG = "log.txt"  # what it said
STEP = re.compile(r"^step (\d+) of (\d+), loss ([\d.]+|nan|inf)", re.MULTILINE)
ERROR = re.compile(r"^perfusion: error: (.*?)(?: \(--verbose shows where\))?$", re.MULTILINE)
STARTED = "== started"  # a line of the log
LAST_BYTES = 2_000_000  # of the log that are read: some 30,000 steps
SECONDS_TO_STOP = 60  # for the step that a run is in, and its checkpoint
MOST_RUNS = 200

RUNNING, STOPPED, FINISHED, FAILED = "running", "stopped", "finished", "failed"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        state: "running", "stopped", "finished" or "failed".
        step, last: steps that are done, of how many.
        losses: (step, loss) pairs.
        message: what to know, in a sentence.
        picture: its newest validation pictures.
        concept: its concept file, once it is finished.
    """

    state: str
    step: int
    last: int
    losses: list[tuple[int, float]]
    message: str
    picture: Path | None
    concept: Path | None


@dataclass(eq=False)
class Runs:
    """The runs in a folder, one of which may be going on.

    Attributes:
        folder: it holds a folder for each run.
        environment: variables that a run's process has beside this one's.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    _processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def names(self) -> list[str]:
        """Return the names of all runs, the newest first."""
        found = self.folder.glob(f"*/{ABOUT}")
        return [path.parent.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]

    def path(self, name: str) -> Path:
        """Return a run's folder.

        Raises:
            ValueError: there is no such run.
        """
        if name not in self.names():
            raise ValueError(f"There is no run {name!r}. Choose one of {self.names()}.")
        return self.folder / name

    def about(self, name: str) -> dict[str, Any]:
        """Return how a run was started: its token, superclass, model and flags."""
        return json.loads((self.path(name) / ABOUT).read_text(encoding="utf-8"))

    def new_folder(self, token: str) -> Path:
        """Make the folder of a new run, named after its token.

        Raises:
            ValueError: there are too many runs.
        """
        stem = re.sub(r"[^a-z0-9]+", "-", token.lower()).strip("-")[:40] or "run"
        with self._lock:
            if len(self.names()) >= MOST_RUNS:
                raise ValueError(f"{self.folder} holds {MOST_RUNS} runs. Delete some of its folders.")
            self.folder.mkdir(parents=True, exist_ok=True)
            number = 1
            while (path := self.folder / f"{stem}-run{number}").exists():
                number += 1
            path.mkdir()
        return path

    def record(self, path: Path, facts: Mapping[str, Any], flags: Sequence[str]) -> str:
        """Write down how a run is started, and return its name."""
        about = {**facts, "flags": list(flags)}
        write_atomically(path / ABOUT, json.dumps(about, indent=1).encode())
        return path.name

    def start(self, name: str) -> None:
        """Start a run's process, or start it again: it goes on from its newest checkpoint, if it has one.

        Raises:
            ValueError: a run is going on already.
        """
        folder = self.path(name)
        with self._lock:
            busy = [other for other, process in self._processes.items() if process.poll() is None]
            if busy:
                raise ValueError(f"{busy[0]} is being trained. Stop it first, or wait until it is finished.")
            words = [*TRAIN, *self.about(name)["flags"]]
            words += [f"--output_dir={folder}", f"--instance_data_dir={folder / PICTURES}"]
            words.append("--resume_from_checkpoint=latest")
            environment = {**os.environ, "PERFUSION_LOG_SECONDS": "0", **self.environment}
            with open(folder / LOG, "ab") as log:
                log.write(f"{STARTED}\n".encode())
                log.flush()
                self._processes[name] = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the page, which then stops the run
                )

    def stop(self, name: str) -> None:
        """Ask a run to stop after the step that it is in, with a checkpoint."""
        process = self._processes.get(name)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)

    def is_running(self, name: str) -> bool:
        """Return whether a run's process is going on."""
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def close(self) -> None:
        """Stop the run that is going on, and wait until it has written its checkpoint."""
        end = time.monotonic() + SECONDS_TO_STOP
        for name, process in self._processes.items():
            self.stop(name)
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def progress(self, name: str) -> Progress:
        """Return how far a run is, from its process, its folder and what it said."""
        folder, is_running = self.path(name), self.is_running(name)
        text = _end_of(folder / LOG)
        _, _, latest = text.rpartition(STARTED)  # what the last start said
        steps = {int(step): float(loss) for step, _, loss in STEP.findall(text)}
        step, last = max(steps, default=0), int(self.about(name)["steps"])
        concept = folder / RUN_FILE
        code = None if name not in self._processes else self._processes[name].poll()
        if is_running:
            state, message = RUNNING, _doing(latest)
        elif concept.exists() and code in (0, None):
            state, message = FINISHED, "The concept is ready."
        elif code in (None, INTERRUPTED, -signal.SIGINT, 128 + signal.SIGTERM):
            state, message = STOPPED, f"Stopped {_where(folder)}. Resume goes on from there."
        else:
            errors = ERROR.findall(latest)
            ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            state = FAILED
            message = errors[-1] if errors else f"The run ended {ended} {_where(folder)}. Resume tries again."
        pictures = sorted(folder.glob("validation-*.png"))
        return Progress(
            state,
            last if state == FINISHED else step,
            last,
            sorted(steps.items()),
            message,
            pictures[-1] if pictures else None,
            concept if state == FINISHED else None,
        )


def _where(folder: Path) -> str:
    """Return, in words, up to where a run can be resumed."""
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        return "before the first checkpoint"
    return f"with a checkpoint after step {checkpoints[-1].name.rpartition('-')[2]}"


def _doing(text: str) -> str:
    """Return, in words, what a run is doing after what it has said."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "Starting: Python loads its packages."
    if lines[-1].startswith("perfusion: Stopped"):
        return "Stopping: the checkpoint is written."
    if not STEP.search(text):
        return "Preparing: pictures, prompts and the covariance."
    return lines[-1].capitalize() + "." if STEP.match(lines[-1]) else "Finishing."


def _end_of(path: Path) -> str:
    """Return the end of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
