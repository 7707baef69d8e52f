"""What tabs with runs do alike, trainings and evaluations: start, watch, stop and resume them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from perfusion_pytorch.app import look
from perfusion_pytorch.app.run_kinds import Kind
from perfusion_pytorch.app.runs import FAILED, RUNNING, Progress
from perfusion_pytorch.app.shared import EXPLAINED, Page
from perfusion_pytorch.extras import required

Update = Any  # of a gradio component
Seen = Sequence[Any]  # what of a run is shown: its name, step, picture and state


@dataclass(frozen=True, eq=False)
class RunActions(ABC):
    """The actions of a tab with runs of a kind, on what the tabs share."""

    page: Page
    kind: ClassVar[Kind]

    @abstractmethod
    def start(self, values: Sequence[Any]) -> str:
        """Check what the tab's values describe, start it, and return its run's name."""

    @abstractmethod
    def shown(self, run: str, now: Progress | None, before: Seen) -> list[Update]:
        """Return what the tab shows of a run beside its status; None hides it, `before` was seen last."""

    @abstractmethod
    def result(self, run: str, now: Progress) -> tuple[str | None, bool]:
        """Return the file that a finished run offers, if it does, and whether it can be used."""

    def names(self) -> list[str]:
        """Return the names of the tab's runs."""
        return self.page.runs.names(self.kind)

    def begin(self, *values: Any) -> list[Update]:
        """Start a run, and return the list of runs with it chosen, and notes."""
        try:
            run = self.start(values)
        except EXPLAINED as error:
            return [required("gradio").skip(), self.explained(error)]
        return [self.runs(run), ""]

    def explained(self, error: Exception) -> str:
        """Return an error as a note, which names files without the folders that the page writes into."""
        text = str(error)
        for folder in (self.page.runs.folder, self.page.folder):
            text = re.sub(rf"{re.escape(str(folder))}/(\S*/)?", "", text)
        return look.note(text, is_wrong=True)

    def runs(self, run: str | None) -> Update:
        """Return the update that lists all runs, with one chosen."""
        names = self.names()
        return required("gradio").Dropdown(choices=names, value=run if run in names else None)

    def go_on(self, run: str | None) -> str:
        """Start a run again, and return a note."""
        try:
            self.page.runs.start(run or "")
        except EXPLAINED as error:
            return self.explained(error)
        return ""

    def end(self, run: str | None) -> None:
        """Ask a run to stop."""
        if run in self.names():
            self.page.runs.stop(str(run))

    def look_at(self, run: str | None, seen: Seen) -> list[Update]:
        """Return how far a run is: what was seen, status, four buttons, the timer, and what the tab shows.

        What has not changed since the last look is left as it is.
        """
        gradio = required("gradio")
        if run not in self.names():
            return [[], "", *_buttons(None, None), gradio.Timer(active=False), *self.shown("", None, [])]
        run = str(run)
        now = self.page.runs.progress(run)
        seen_now = [run, now.step, str(now.picture), now.state]
        before = list(seen) if seen and seen[0] == run else [None] * len(seen_now)
        buttons = [gradio.skip()] * 4
        if before[3] != now.state:
            file, is_usable = self.result(run, now) if now.result is not None else (None, False)
            buttons = _buttons(now, file, is_usable=is_usable)
        timer = gradio.Timer(active=now.state == RUNNING)
        return [seen_now, _status(run, now), *buttons, timer, *self.shown(run, now, before)]

    def sent_copy(self, path: Path, name: str) -> str:
        """Return a copy of a file, under a name that says what it is, where the server may send it from."""
        folder = self.page.folder / "results"
        folder.mkdir(exist_ok=True)
        copy = folder / name
        copy.write_bytes(path.read_bytes())
        return str(copy)


def _buttons(now: Progress | None, file: str | None, *, is_usable: bool = False) -> list[Update]:
    """Return the updates of stop, resume, download and use."""
    gradio = required("gradio")
    is_running, is_done = now is not None and now.state == RUNNING, now is not None and now.result is not None
    return [
        gradio.Button(interactive=is_running),
        gradio.Button(interactive=now is not None and not is_running and not is_done),
        gradio.DownloadButton(value=file, interactive=file is not None),
        gradio.Button(interactive=is_usable),
    ]


def _status(run: str, now: Progress) -> str:
    """Return, as HTML, how far a run is."""
    title = look.note(f"{run}: {now.state}, {now.counted}")
    message = look.note(now.message, is_wrong=now.state == FAILED)
    return title + look.progress_bar(now.step, now.last) + message
