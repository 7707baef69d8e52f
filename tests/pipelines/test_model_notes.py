"""What a model's folder says about captions and templates."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_pipes import IMAGES, tiny_pipe

from perfusion_pytorch.pipelines.covariance_cache import covariance_path
from perfusion_pytorch.pipelines.model_notes import NOTES_FILE, ModelNotes, notes_of
from perfusion_pytorch.training.inputs import load_inputs
from perfusion_pytorch.training.options import TrainingOptions


def pipe_of(folder):
    return SimpleNamespace(config=SimpleNamespace(_name_or_path=str(folder)))


def written(folder, said):
    (folder / NOTES_FILE).write_text(said if isinstance(said, str) else json.dumps(said))
    return pipe_of(folder)


def test_a_folder_names_its_captions_and_templates(tmp_path):
    (tmp_path / "captions.txt").write_text("a bear on red\n")
    pipe = written(tmp_path, {"captions": "captions.txt", "templates": ["a {}", "one {}"]})
    assert notes_of(pipe) == ModelNotes(tmp_path / "captions.txt", ("a {}", "one {}"))


@pytest.mark.parametrize(
    "pipe", [SimpleNamespace(), pipe_of(""), pipe_of("some/model"), pipe_of("no folder")]
)
def test_a_model_without_notes_has_empty_ones(pipe):
    assert notes_of(pipe) == ModelNotes()


def test_notes_may_hold_one_thing_alone(tmp_path):
    assert notes_of(written(tmp_path, {"templates": ["a {}"]})) == ModelNotes(None, ("a {}",))
    assert notes_of(written(tmp_path, {})) == ModelNotes()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "must be JSON"),
        ([], "must be an object"),
        ({"prompts": []}, "must be an object"),
        ({"captions": "none.txt"}, "must name a file beside it"),
        ({"captions": 3}, "must name a file beside it"),
        ({"templates": "a {}"}, "list of texts"),
        ({"templates": []}, "list of texts"),
        ({"templates": ["a car"]}, "list of texts"),
        ({"templates": ["{} on {}"]}, "list of texts with one {} each"),
    ],
)
def test_notes_of_another_form_are_refused(tmp_path, said, message):
    with pytest.raises(ValueError, match=message):
        notes_of(written(tmp_path, said))


def test_a_covariance_is_of_the_models_own_captions_by_default(tmp_path):
    (tmp_path / "captions.txt").write_text("a car on red\na blue car\n")
    pipe = tiny_pipe()
    built_in = covariance_path(pipe, cache_dir=tmp_path)
    written(tmp_path, {"captions": "captions.txt"})
    pipe.register_to_config(_name_or_path=str(tmp_path))
    own = covariance_path(pipe, cache_dir=tmp_path)
    assert own == covariance_path(pipe, ["a car on red", "a blue car"], cache_dir=tmp_path) != built_in
    given = covariance_path(pipe, ["a car"], cache_dir=tmp_path)
    assert given not in (own, built_in)


def test_training_uses_the_models_own_templates_by_default(tmp_path):
    pipe = tiny_pipe()
    written(tmp_path, {"templates": ["one {}", "a {} on red"]})
    pipe.register_to_config(_name_or_path=str(tmp_path))
    options = {"images": IMAGES, "token": "<car-1>", "superclass": "car", "output_dir": tmp_path}
    cpu = torch.device("cpu")
    found = load_inputs(pipe, TrainingOptions(**options), cpu)
    assert found.prompts == ["one <car-1>", "a <car-1> on red"]
    given = load_inputs(pipe, TrainingOptions(**options, templates=["a {}"]), cpu)
    assert given.prompts == ["a <car-1>"]
    with pytest.raises(ValueError, match="one or more texts"):
        load_inputs(pipe, TrainingOptions(**options, templates=[]), cpu)
