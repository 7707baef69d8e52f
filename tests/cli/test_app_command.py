"""`perfusion app`: what it opens on, where its files are, and how it ends."""

import re

import pytest
from helpers.small_model import MODEL

from perfusion_pytorch.app.runs import Runs
from perfusion_pytorch.cli import app
from perfusion_pytorch.cli.parser import make_parser


@pytest.fixture
def served(monkeypatch):
    """Put a stand-in in the place of the server, which Ctrl-C ends at once; return its calls."""
    calls = []

    def serve(page, **where):
        calls.append((page, where))
        return "http://127.0.0.1:7860/", lambda: calls.append("closed")

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "serve", serve)
    monkeypatch.setattr(app.time, "sleep", sleep)
    monkeypatch.setattr(app, "required", lambda name: None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # put back afterwards
    return calls


def test_without_flags_it_opens_on_the_small_model_and_its_concepts(served, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output, _ = run("app", "--device", "cpu")
    (page, where), closed = served
    assert (code, closed, where) == (0, "closed", {"host": "127.0.0.1", "port": None})
    assert output.startswith("The page is at http://127.0.0.1:7860/ (Ctrl-C ends it).")
    assert page.models == ["tiny-sd"] and [offer.token for offer in page.catalogue.files] == [
        "<car-1>",
        "<house-1>",
    ]
    assert (page.defaults.edge, page.defaults.guidance, page.defaults.precision) == (64, 3.0, "no")
    assert page.folder == tmp_path / "perfusion_app" / "uploads"
    assert page.runs.folder == tmp_path / "perfusion_app" / "runs"
    assert page.model_flags == {"tiny-sd": [f"--pretrained_model_name_or_path={MODEL.resolve()}"]}
    assert page.examples["tiny-sd"].prompts == MODEL.resolve().parent / "prompts.txt"
    assert (page.clip_model, page.dino_model) == ("openai/clip-vit-base-patch32", "facebook/dinov2-small")


def test_flags_choose_models_concepts_and_the_address(served, run, tmp_path):
    (tmp_path / "other").symlink_to(MODEL)
    house = MODEL.parent / "concepts" / "house.safetensors"
    models = ["--pretrained_model_name_or_path", tmp_path / "other", MODEL]
    flags = ["--concept", house, "--output_dir", tmp_path / "out", "--port", "9", "--mask_model", "a/b"]
    flags += ["--clip_model", "a/clip", "--dino_model", tmp_path]
    code, _, _ = run("app", *models, *flags, "--device", "cpu", "--dtype", "float32")
    (page, where), _ = served
    assert code == 0 and where["port"] == 9 and page.mask_model == "a/b"
    assert len(page.models) == 2 and [offer.path for offer in page.catalogue.files] == [house]
    assert page.defaults.guidance == 7.5
    assert (page.clip_model, page.dino_model) == ("a/clip", str(tmp_path))


def test_an_address_for_others_is_warned_of(served, run, tmp_path):
    code, _, errors = run("app", "--host", "0.0.0.0", "--output_dir", tmp_path, "--device", "cpu")
    assert code == 0 and "--host 0.0.0.0 lets everyone who can reach this machine use the page." in errors


def test_outside_a_clone_a_model_must_be_named(served, run, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "SHAPES", tmp_path / "nothing")
    code, _, errors = run("app")
    assert (code, served) == (1, [])
    assert "--pretrained_model_name_or_path must name a model, since this is not a clone" in errors


def test_without_gradio_the_package_to_install_is_named(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, errors = run("app")
    assert code == 1 and re.search(r"This needs gradio \(.*\)\. Run pip install gradio\.", errors)


def test_flags_of_a_training_from_the_page_are_those_of_the_command(tmp_path):
    from perfusion_pytorch.app.training_request import TrainingRequest

    request = TrainingRequest(
        model="m",
        pictures=[],
        masks=[],
        token="<a-1>",
        superclass="--teddy bear",
        validation_prompt="- <a-1>",
        steps=7,
        batch=2,
        accumulation=3,
        precision="bf16",
        checkpointing=True,
        seed=5,
    )
    page = type("Page", (), {"mask_model": "a/b"})()
    flags = request.flags(request.options(page, tmp_path, tmp_path))
    model, folders = (
        ["--pretrained_model_name_or_path=m"],
        [f"--output_dir={tmp_path}", f"--instance_data_dir={tmp_path}"],
    )
    args = make_parser().parse_args(["train", *model, *flags, *folders])
    assert (args.token, args.superclass, args.validation_prompt) == ("<a-1>", "--teddy bear", ["- <a-1>"])
    assert (args.max_train_steps, args.train_batch_size, args.gradient_accumulation_steps) == (7, 2, 3)
    assert (args.mixed_precision, args.gradient_checkpointing, args.seed, args.mask_model) == (
        "bf16",
        True,
        5,
        None,
    )
    assert Runs(tmp_path).names() == []
