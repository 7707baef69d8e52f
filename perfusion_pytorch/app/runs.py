"""Runs of the page: each is a command of `perfusion` in a process of its own, with a folder of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfusion_pytorch.app.run_kinds import KINDS, TRAINING, Kind
from perfusion_pytorch.early_interrupts import INTERRUPTED
from perfusion_pytorch.files import write_atomically

COMMAND = (sys.executable, "-m", "perfusion_pytorch")
PICTURES = "pictures"  # a run's uploads
ABOUT = "run.json"  # how it was started
LOG = "log.txt"  # what it said
ERROR = re.compile(r"^perfusion: error: (.*?)(?: \(--verbose shows where\))?$", re.MULTILINE)
STARTED = "== started"  # a line of the log
LAST_BYTES = 2_000_000  # of the log that are read: some 20,000 steps
SECONDS_TO_STOP = 60  # for the step that a run is in, and its checkpoint
MOST_RUNS = 200

RUNNING, STOPPED, FINISHED, FAILED = "running", "stopped", "finished", "failed"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        state: "running", "stopped", "finished" or "failed".
        step, last: steps that are done, of how many.
        counted: the same in words.
        message: what to know, in a sentence.
        losses: (step, loss) pairs of a training.
        picture: its newest validation pictures.
        result: what it has made, once it is finished.
    """

    state: str
    step: int
    last: int
    counted: str
    message: str
    losses: list[tuple[int, float]]
    picture: Path | None
    result: Path | None


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

    def names(self, kind: Kind | None = None) -> list[str]:
        """Return the names of all runs, or of those of a kind, the newest first."""
        found = sorted(self.folder.glob(f"*/{ABOUT}"), key=lambda path: -path.stat().st_mtime)
        return [path.parent.name for path in found if kind in (None, _kind_of(_read(path)))]

    def path(self, name: str) -> Path:
        """Return a run's folder.

        Raises:
            ValueError: there is no such run.
        """
        if name not in self.names():
            raise ValueError(f"There is no run {name!r}. Choose one of {self.names()}.")
        return self.folder / name

    def about(self, name: str) -> dict[str, Any]:
        """Return how a run was started: what `record` was given."""
        return _read(self.path(name) / ABOUT)

    @contextmanager
    def new(self, stem: str, kind: Kind = TRAINING) -> Iterator[Path]:
        """Make a new run's folder, which the block fills and records, and start the run after the block.

        Args:
            stem: what the run is named after.
            kind: what it is.

        Raises:
            ValueError: there are too many runs, or one is going on already. The folder is removed then, as
                it is where the block fails.
        """
        folder = self.new_folder(stem, kind)
        try:
            yield folder
            self.start(folder.name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def new_folder(self, stem: str, kind: Kind = TRAINING) -> Path:
        """Make the folder of a new run, and return it.

        Raises:
            ValueError: there are too many runs.
        """
        stem = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40] or "run"
        with self._lock:
            if len(self.names()) >= MOST_RUNS:
                raise ValueError(f"{self.folder} holds {MOST_RUNS} runs. Delete some of its folders.")
            self.folder.mkdir(parents=True, exist_ok=True)
            number = 1
            while (path := self.folder / f"{stem}-{kind.noun}{number}").exists():
                number += 1
            path.mkdir()
        return path

    def record(
        self, path: Path, facts: Mapping[str, Any], flags: Sequence[str], kind: Kind = TRAINING
    ) -> str:
        """Write down how a run is started, and return its name.

        Args:
            path: its folder.
            facts: what the page wants to know of it; "steps" says how many there are.
            flags: of its command.
            kind: what it is.
        """
        about = {**facts, "command": kind.command, "flags": list(flags)}
        write_atomically(path / ABOUT, json.dumps(about, indent=1).encode())
        return path.name

    def start(self, name: str) -> None:
        """Start a run's process, or start it again: it goes on from where it was stopped.

        Raises:
            ValueError: a run is going on already.
        """
        folder, about = self.path(name), self.about(name)
        kind = _kind_of(about)
        with self._lock:
            busy = [other for other, process in self._processes.items() if process.poll() is None]
            if busy:
                raise ValueError(f"{busy[0]} is going on. Stop it first, or wait until it is finished.")
            words = [*COMMAND, kind.command, *about["flags"]]
            words += [f"--output_dir={folder / kind.output}", f"--instance_data_dir={folder / PICTURES}"]
            words += kind.flags
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
        """Ask a run to stop: a training after the step that it is in, with a checkpoint."""
        process = self._processes.get(name)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)

    def is_running(self, name: str) -> bool:
        """Return whether a run's process is going on."""
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def close(self) -> None:
        """Stop the run that is going on, and wait until it has ended."""
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
        folder, about = self.path(name), self.about(name)
        kind, text = _kind_of(about), _end_of(folder / LOG)
        losses = {int(step): loss for step, loss in kind.steps.findall(text)}
        step, last = max(losses, default=0), int(about["steps"])
        result = folder / kind.result
        state, message = self._state(name, kind, text.rpartition(STARTED)[2])
        step = last if state == FINISHED else step
        pictures = sorted(folder.glob("validation-*.png"))
        return Progress(
            state,
            step,
            last,
            kind.counted.format(step, last),
            message.replace(f"{folder}/", ""),  # whoever looks at the page need not know where it is
            [(step, float(loss)) for step, loss in sorted(losses.items()) if loss],
            pictures[-1] if pictures else None,
            result if state == FINISHED else None,
        )

    def _state(self, name: str, kind: Kind, text: str) -> tuple[str, str]:
        """Return a run's state, and what to know of it, from what its last start said."""
        folder, process = self.folder / name, self._processes.get(name)
        code = None if process is None else process.poll()
        if process is not None and code is None:
            return RUNNING, kind.doing(text)
        if (folder / kind.result).exists() and code in (0, None):
            return FINISHED, kind.ready
        if code in (None, INTERRUPTED, -signal.SIGINT, 128 + signal.SIGTERM):
            return STOPPED, f"Stopped {kind.kept(folder)}. Resume goes on from there."
        errors = ERROR.findall(text)
        ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return (
            FAILED,
            errors[-1] if errors else f"The run ended {ended} {kind.kept(folder)}. Resume tries again.",
        )


def _read(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return about


def _kind_of(about: Mapping[str, Any]) -> Kind:
    return KINDS[about.get("command", TRAINING.command)]  # the first pages had trainings alone


def _end_of(path: Path) -> str:
    """Return the end of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            text = file.read().decode("utf-8", "replace")
            return text.replace("\r", "\n")  # with which progress bars go back
    except FileNotFoundError:
        return ""
