"""The notebook runs from top to bottom, cut short, and each of its cells shows what its text says."""

import json
from pathlib import Path

import pytest
from helpers.quick_model import make_quick_model
from helpers.small_model import MODEL
from helpers.snippets import ROOT
from PIL import Image

from perfusion_pytorch import Concept

NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SHORTER = {"steps = 20": "steps = 3", "num_inference_steps=20": "num_inference_steps=2"}


def run(cell, names):
    """Run a cell, and return what a notebook would show below it: the value of its last line."""
    *_, last = [line for line in cell.split("\n") if line]
    if last[0] in " )" or " = " in last or last.startswith(("pipe.set", "import")):
        exec(cell, names)
        return None
    exec(cell[: cell.rindex(last)], names)
    return eval(last, names)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    examples = tmp_path / "examples" / "shapes"
    examples.mkdir(parents=True)
    for name in ("concepts", "pictures_house"):
        (examples / name).symlink_to(MODEL.parent / name)
    make_quick_model(examples / "tiny-sd")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERFUSION_CACHE", str(tmp_path / "cache"))
    names, shown = {}, []
    for cell in CELLS:
        for long, short in SHORTER.items():
            cell = cell.replace(long, short)
        shown.append(run(cell, names))
    start, picture, words, grid, trained, last = shown
    assert start is None and picture.size == last.size == (256, 256)
    assert words["<car-1>"] == pytest.approx(1, abs=0.15) and words["rose"] < 0.3
    assert isinstance(grid, Image.Image) and grid.height > 3 * 160
    concept, num_bytes, _ = trained
    assert Concept.load(Path(concept)).token == "<my-house>" and num_bytes == Path(concept).stat().st_size


def test_the_notebook_holds_no_outputs():
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in NOTEBOOK["cells"])
