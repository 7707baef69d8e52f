"""A page on the small model, which is quick: four steps a picture, and a covariance of few captions."""

import os

import pytest
from helpers.quick_model import make_quick_model
from helpers.small_model import MODEL, make_pipe

from perfusion_pytorch import unload_concepts
from perfusion_pytorch.app.catalogue import Catalogue, concepts_in
from perfusion_pytorch.app.runs import Runs
from perfusion_pytorch.app.shared import Page, defaults_of, examples_in
from perfusion_pytorch.app.studio import Studio

SHAPES = MODEL.parent
PICTURES = SHAPES / "pictures"


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture
def studio(pipe):
    unload_concepts(pipe)
    return Studio({"small": lambda: pipe})


@pytest.fixture(scope="module")
def quick_model(tmp_path_factory):
    return make_quick_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def make_page(pipe, quick_model):
    """Return a function that makes a page whose files are in a folder."""

    def make(folder):
        uploads = folder / "uploads"
        uploads.mkdir(parents=True)
        runs = Runs(folder / "runs", {"PERFUSION_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"})
        filled = {"steps": 4, "guidance": 3.0, "prompt": "a {} on a green background"}
        return Page(
            Studio({"small": lambda: pipe}),
            Catalogue(concepts_in([SHAPES / "concepts"]), runs),
            runs,
            uploads,
            {"small": [f"--pretrained_model_name_or_path={quick_model}"]},
            defaults_of(pipe, **filled),
            examples={"small": examples_in(SHAPES)},
        )

    return make


@pytest.fixture(scope="module")
def served(make_page, tmp_path_factory):
    """A page that is served in this process: what the tabs share, its address, and its folder."""
    pytest.importorskip("gradio", reason="needs gradio: pip install gradio")
    from perfusion_pytorch.app.serve import prepare, serve

    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("app")
    page = make_page(folder)
    prepare(page.folder)
    url, close = serve(page)
    yield page, url.rstrip("/"), folder
    close()
    os.environ.clear()
    os.environ.update(before)
