"""What a model's folder says about captions and templates."""

import json
from types import SimpleNamespace

import pytest

from perfusion_pytorch.pipelines.model_notes import NOTES_FILE, ModelNotes, notes_of


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
