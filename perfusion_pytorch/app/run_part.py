"""The part of a tab that chooses a run, shows how far it is, and stops and resumes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perfusion_pytorch.app.run_actions import RunActions
from perfusion_pytorch.extras import required

SECONDS = 1.0  # between two looks at a run
QUIETLY: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(eq=False)
class RunPart:
    """The part's components."""

    actions: RunActions
    run: Any
    seen: Any  # what of the run is shown
    status: Any
    stop: Any
    resume: Any
    download: Any
    use: Any
    timer: Any

    def connect(self, begin: Any, inputs: Sequence[Any], notes: Any, shown: Sequence[Any]) -> dict[str, Any]:
        """Say what happens when, and return the event that looks at the run.

        Args:
            begin: the button that starts a run.
            inputs: what describes the run, in the order that the actions take it.
            notes: where messages are shown.
            shown: the components for what the actions show of a run.
        """
        actions, page = self.actions, self.actions.page
        buttons = [self.stop, self.resume, self.download, self.use]
        looks: dict[str, Any] = {
            "fn": actions.look_at,
            "inputs": [self.run, self.seen],
            "outputs": [self.seen, self.status, *buttons, self.timer, *shown],
            "concurrency_limit": None,
            **QUIETLY,
        }
        page.blocks.load(actions.runs, self.run, self.run, **QUIETLY)
        begin.click(actions.begin, inputs, [self.run, notes], **QUIETLY).then(**looks)
        self.run.input(**looks)
        self.stop.click(actions.end, self.run, None, **QUIETLY)
        self.resume.click(actions.go_on, self.run, notes, **QUIETLY).then(**looks)
        self.timer.tick(**looks)
        return looks


def add_run_part(actions: RunActions, label: str, *, prefix: str = "") -> RunPart:
    """Add the components to the tab that is being built.

    Args:
        actions: the tab's.
        label: what the tab's runs are called.
        prefix: of the components' names in the page.
    """
    gradio = required("gradio")
    run = gradio.Dropdown(actions.names(), value=None, label=label, elem_id=f"{prefix}run")
    seen = gradio.State([])
    status = gradio.HTML(elem_id=f"{prefix}status")
    off: dict[str, Any] = {"interactive": False, "min_width": 80}
    with gradio.Row():
        stop = gradio.Button("Stop", elem_id=f"{prefix}stop", **off)
        resume = gradio.Button("Resume", elem_id=f"{prefix}resume", **off)
        download = gradio.DownloadButton("Download", elem_id=f"{prefix}download", **off)
        use = gradio.Button("Use in Generate", variant="primary", scale=2, elem_id=f"{prefix}use", **off)
    timer = gradio.Timer(SECONDS, active=False)
    return RunPart(actions, run, seen, status, stop, resume, download, use, timer)
