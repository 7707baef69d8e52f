"""A model's folder may name the captions and templates that a run takes where none are given."""

import json
from argparse import Namespace

import pytest
import torch
from helpers.small_model import MODEL
from helpers.tiny_pipes import IMAGES, covariance_of, options_for, tiny_pipe

from perfusion_pytorch import train_concept
from perfusion_pytorch.cli.base_model import captions_of
from perfusion_pytorch.pipelines.model_notes import NOTES_FILE
from perfusion_pytorch.training import inputs
from perfusion_pytorch.training.inputs import load_inputs
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.templates import TEMPLATES


@pytest.fixture
def pipe(tmp_path):
    """A pipeline whose folder has notes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "captions.txt").write_text("a red car\na blue house\n")
    notes = {"captions": "captions.txt", "templates": ["one {} here", "{} alone"]}
    (folder / NOTES_FILE).write_text(json.dumps(notes))
    made = tiny_pipe()
    made.register_to_config(_name_or_path=str(folder))
    return made


def prompts_of(pipe, **options):
    given = TrainingOptions(images=IMAGES, token="<car-1>", superclass="car", output_dir="out", **options)
    return load_inputs(pipe, given, torch.device("cpu")).prompts


def test_templates_are_those_given_else_the_models_else_the_built_in_ones(pipe):
    assert prompts_of(pipe, templates=["a {}"]) == ["a <car-1>"]
    assert prompts_of(pipe) == ["one <car-1> here", "<car-1> alone"]
    assert prompts_of(tiny_pipe()) == [template.format("<car-1>") for template in TEMPLATES]


def test_captions_beside_the_pictures_go_before_the_models_templates(pipe):
    captions = ["a car on red", None, None]
    assert prompts_of(pipe, captions=captions) == ["one <car-1> here", "<car-1> alone", "a <car-1> on red"]


def test_the_covariance_by_default_is_of_the_models_captions(pipe, tmp_path, monkeypatch):
    asked = []

    def stand_in(pipe, captions, *, progress):
        asked.append(captions)
        return covariance_of()

    monkeypatch.setattr(inputs, "cached_covariance", stand_in)
    train_concept(pipe, IMAGES, **options_for(tmp_path / "a", covariance=None))
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "b", covariance=None))
    assert asked == [tmp_path / "model" / "captions.txt", None]


def test_the_commands_take_the_models_captions_too(pipe, captions):
    def texts(**flags):
        return list(captions_of(Namespace(**{"captions": None, "num_captions": None} | flags), pipe))

    assert texts() == ["a red car", "a blue house"]
    assert texts(num_captions=1) == ["a red car"]
    assert len(texts(captions=captions)) == 75
    assert len(captions_of(Namespace(captions=None, num_captions=9), tiny_pipe())) == 9


@pytest.mark.slow
def test_train_finds_the_covariance_that_the_covariance_command_computed(run, tmp_path, captions):
    """Both of the model's captions, and neither of the built-in ones."""
    model = tmp_path / "model"
    model.mkdir()
    for part in MODEL.iterdir():
        (model / part.name).symlink_to(part)
    (model / "own.txt").write_text(captions.read_text())
    (model / NOTES_FILE).unlink(missing_ok=True)
    (model / NOTES_FILE).write_text(json.dumps({"captions": "own.txt", "templates": ["a {}"]}))
    flags = ["--pretrained_model_name_or_path", model, "--cache_dir", tmp_path / "cache", "--no_progress"]
    code, out, err = run("covariance", *flags, "--device", "cpu")
    assert code == 0 and "1,500 tokens of 75 captions" in out, err
    cached = list((tmp_path / "cache").iterdir())
    concept = ["--instance_data_dir", MODEL.parent / "pictures", "--token", "<car-1>", "--superclass", "car"]
    steps = ["--output_dir", tmp_path / "out", "--max_train_steps", "2", "--checkpointing_steps", "0"]
    code, out, err = run("train", *flags, *concept, *steps)
    assert code == 0 and list((tmp_path / "cache").iterdir()) == cached, err
