"""The cells of a benchmark: each within the budget, in its own `try`, and written to JSON once it ends."""

import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

LATE = "skipped: the cell's time was over"
Parts = dict[str, float]  # seconds by part


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give the GPU back what nobody holds any more, such as the tensors of a step that ran out of memory."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def allocated_bytes() -> int:
    """Return what tensors on the GPU take up; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def one_line(error: Exception) -> str:
    """Return an error's kind and the first line of its message, at most 200 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


class Report:
    """The result of a run, as JSON in a file that is always up to date.

    Args:
        path: the file.
        facts: about the run, such as versions and device.
        minutes: the budget. A cell that is not expected to end within it is skipped.
        started: the moment, on `time.perf_counter`, from which it is counted.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], minutes: float, started: float) -> None:
        self.path = path
        self.started = started
        self.budget = 60 * minutes
        self.cells: dict[str, dict[str, Any]] = {}
        self.result: dict[str, Any] = {**facts, "minutes": minutes, "cells": self.cells}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def has_time_for(self, seconds: float) -> bool:
        """Report whether so many seconds are left."""
        return self.elapsed + seconds <= self.budget

    def cell(self, name: str, seconds: float, measure: Callable[[float], dict[str, Any]]) -> None:
        """Measure a cell, if there is time for it, and write all results so far.

        Args:
            name: of the cell.
            seconds: how long it is expected to take.
            measure: called with the moment, on `time.perf_counter`, when its seconds are over. What it
                returns is recorded, and so is an error.
        """
        if not self.has_time_for(seconds):
            self.skip([name], seconds)
            return
        start = time.perf_counter()
        try:
            found = measure(start + seconds)
        except Exception as error:  # one cell that fails leaves the others
            found = {"error": one_line(error)}
        free_memory()
        self._record(name, found | {"seconds of the cell": round(time.perf_counter() - start, 2)})

    def skip(self, names: Iterable[str], seconds: float) -> None:
        """Record that cells are skipped, because they need more seconds than are left."""
        left = max(0.0, self.budget - self.elapsed)
        for name in names:
            self._record(name, {"skipped": f"it needs about {seconds:.0f} s, and {left:.0f} s were left"})

    def fail(self, names: Iterable[str], error: Exception) -> None:
        """Record that cells could not be prepared."""
        for name in names:
            self._record(name, {"error": one_line(error)})

    def _record(self, name: str, found: dict[str, Any]) -> None:
        self.cells[name] = found
        self.write()
        outcome = found.get("skipped") or found.get("error") or "measured"
        print(f"{self.elapsed:6.1f} s  {name}: {outcome}", flush=True)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.result["seconds"] = round(self.elapsed, 1)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.result, indent=2) + "\n")
        partial.replace(self.path)


@dataclass(frozen=True)
class Found:
    """What runs returned that took turns.

    Attributes:
        rounds: the seconds by part of each run, in each round.
        errors: for each run that failed, one line that says why.
    """

    rounds: dict[str, list[Parts]]
    errors: dict[str, str]


def interleaved(
    runs: Mapping[str, Callable[[], Parts]],
    deadline: float,
    *,
    warm_up: Mapping[str, Callable[[], Any]] | None = None,
    least: int,
    most: int,
    slow_start: bool = False,
) -> Found:
    """Let runs take turns, in as many rounds as fit before a deadline.

    Args:
        runs: each returns its seconds by part.
        deadline: on `time.perf_counter`.
        warm_up: what runs first and is not counted; by default the runs themselves.
        least, most: numbers of rounds.
        slow_start: whether runs are left out whose turn to warm up comes after the deadline.
    """
    found = Found({}, {})

    def attempt(name: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            found.errors[name] = one_line(error)
        # Only now, since the error held what its frames hold.
        found.rounds.pop(name, None)
        free_memory()
        return None

    for name, run in (warm_up or runs).items():
        if slow_start and time.perf_counter() > deadline:
            found.errors[name] = LATE
        else:
            found.rounds[name] = []
            attempt(name, run)
    for number in range(most):
        if number >= least and time.perf_counter() > deadline:
            break
        for name in list(found.rounds):
            parts = attempt(name, runs[name])
            if name in found.rounds:
                found.rounds[name].append(parts)
    return found


def ratio(runs: Sequence[Parts], base: Sequence[Parts], names: Sequence[str]) -> float | None:
    """Return the median over rounds of a run's time over the base's, or None without any of the base's.

    Args:
        runs, base: seconds by part, in each round.
        names: of the parts that count.
    """
    if not base:
        return None
    pairs = zip(runs, base, strict=True)
    return median(sum(run[n] for n in names) / sum(other[n] for n in names) for run, other in pairs)


def medians(runs: Sequence[Parts]) -> Parts:
    """Return the median over rounds of each part's seconds; nothing of no round."""
    return {name: median(run[name] for run in runs) for name in runs[0]} if runs else {}
