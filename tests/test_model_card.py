"""The model card: what it says, that it is safe, and that its example runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.tiny_concepts import tiny_concept
from helpers.tiny_pipes import IMAGES, options_for, tiny_pipe

from perfusion_pytorch import Concept, train_concept
from perfusion_pytorch.model_card import MARK, figures_of, model_card, write_card

EXAMPLES = Path(__file__).parents[1] / "examples" / "shapes"
ORIGIN = {
    "base_model_name": "someone/some-model",
    "base_model_revision": 40 * "a",
    "training": {"max_train_steps": 500, "learning_rate": 0.04, "lr_scheduler": "cosine"},
}


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a concept of an origin: the concept and its file."""

    def save(origin=ORIGIN, **changes):
        concept, path = (
            replace(tiny_concept(tiny_pipe()), origin=origin, **changes),
            tmp_path / "concept.safetensors",
        )
        concept.save(path)
        return concept, path

    return save


def parts_of(card):
    """The metadata and the text of a card."""
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card_says_what_was_trained_on_what_and_how(saved):
    concept, path = saved()
    metadata, text = parts_of(model_card(concept, path, name="alice/car", license="mit"))
    assert metadata == {
        "base_model": "someone/some-model",
        "instance_prompt": "<car-1>",
        "library_name": "perfusion_pytorch",
        "license": "mit",
        "pipeline_tag": "text-to-image",
        "tags": ["perfusion", "text-to-image", "diffusers"],
    }
    assert "# `<car-1>` (car)\n" in text and f"holds {path.stat().st_size:,} bytes" in text
    assert f"| base model | `someone/some-model`, revision `{40 * 'a'}` |" in text
    assert "| max train steps | `500` |\n| learning rate | `0.04` |\n| lr scheduler | `cosine` |" in text
    assert "How good it is" not in text and "![" not in text
    assert "`mit`, chosen by who trained it. The terms of [someone/some-model](https://" in text


def test_a_card_of_an_old_file_says_that_it_does_not_know(saved):
    concept, path = saved(origin={})
    metadata, text = parts_of(model_card(concept, path))
    assert "base_model" not in metadata and "license" not in metadata and "All settings" not in text
    assert "| base model | unknown: the file does not say it |" in text
    assert "None was stated. The terms of its base model apply too." in text


def test_texts_of_a_file_cannot_make_markup(saved):
    bad = "car`](x) ![i](http://x)\n\n# <script>|"
    concept, path = saved({"base_model_name": f"```\n{bad}", "training": {bad: bad}}, superclass=bad)
    figures = {"summary": {bad: {"mean": 1, "low": 0, "high": 2}}}
    path.with_name("evaluation.json").write_text(json.dumps(figures))
    metadata, text = parts_of(model_card(concept, path, pictures=[("pictures/1.png", bad)]))
    assert "base_model" not in metadata
    in_code = re.sub(r"`[^`\n]+`", "", text.split("```python")[0])
    assert not re.findall(r"(?<!\\)<script|(?<!\\)!\[i|^# <", in_code, re.M) and text.count("```") == 2
    assert len(re.findall(r"^\| .*(?<!\\)\|$", text, re.M)) == text.count("\n| ")


def test_figures_are_read_beside_the_file_and_in_it(saved):
    summary = {"DINO": {"mean": 0.5, "low": 0.4, "high": 0.6}, "odd": {"mean": "0.5"}, "none": None}
    concept, path = saved(ORIGIN | {"evaluation": {"summary": summary}})
    assert figures_of(concept, path) == {"DINO": summary["DINO"]}
    beside = path.with_name("evaluation.json")
    beside.write_text(json.dumps({"summary": {"CLIP": {"mean": 1, "low": 0, "high": 2}}}))
    assert figures_of(concept, path) == {"CLIP": {"mean": 1.0, "low": 0.0, "high": 2.0}}
    assert "## How good it is\n\n| figure | mean | interval |" in model_card(concept, path)
    beside.write_text("[" * 10)
    with pytest.warns(UserWarning, match=r"evaluation.json is not JSON, so its figures are left out"):
        assert figures_of(concept, path) == {"DINO": summary["DINO"]}


def test_the_example_of_a_card_runs(saved, tmp_path, monkeypatch):
    path = EXAMPLES / "concepts" / "car.safetensors"
    concept = replace(Concept.load(path), origin={"base_model_name": "tiny-sd"})
    card = model_card(concept, path, name=str(path))
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.S)
    assert len(code.splitlines()) <= 10
    (tmp_path / "tiny-sd").symlink_to(EXAMPLES / "tiny-sd")
    monkeypatch.chdir(tmp_path)
    exec(code.replace('on the beach")', 'on a red background", num_inference_steps=1)'), {})
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_readme_of_somebody_elses_is_kept(saved):
    concept, path = saved()
    readme = path.with_name("README.md")
    readme.write_text("my project")
    write_card(concept, path)
    assert readme.read_text() == "my project"
    readme.write_text(f"{MARK}\nan older one")
    write_card(concept, path)
    assert readme.read_text() == model_card(concept, path)


def test_a_card_that_cannot_be_written_is_a_warning(saved):
    concept, path = saved()
    path.with_name("README.md").mkdir()
    with pytest.warns(UserWarning, match=r"concept\.safetensors, but its README\.md is missing"):
        write_card(concept, path)


def test_a_run_writes_a_card_and_its_settings_into_the_file(tmp_path):
    summary = train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, validation_prompt=None, seed=3))
    concept = Concept.load(summary.concept)
    settings = concept.origin["training"]
    assert (settings["pictures"], settings["masks"], settings["prompts"]) == (3, 3, 2)
    assert (settings["max_train_steps"], settings["rows of a step"], settings["seed"]) == (4, 4, 3)
    assert (settings["learning_rate"], settings["embedding_steps"], settings["resolution"]) == (0.03, 0, 16)
    card = (tmp_path / "README.md").read_text()
    assert card == model_card(concept, summary.concept) and "![" not in card
    assert "| learning rate | `0.03` |" in card
