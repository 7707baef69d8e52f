"""The tab that evaluates, without a browser: what it offers, and where a recommended β goes."""

import json

import pytest
from app.conftest import SHAPES
from app.test_evaluation_view import found
from PIL import Image

from perfusion_pytorch import Concept
from perfusion_pytorch.app.catalogue import Offer
from perfusion_pytorch.app.evaluate_actions import EvaluateActions
from perfusion_pytorch.app.generate_actions import GenerateActions
from perfusion_pytorch.app.run_kinds import EVALUATION

pytest.importorskip("gradio", reason="needs gradio: pip install gradio")

CAR = SHAPES / "concepts" / "car.safetensors"


@pytest.fixture
def page(make_page, tmp_path):
    page = make_page(tmp_path)
    page.generate = type("Tab", (), {"actions": GenerateActions(page), "opened": [None] * 7})
    return page


@pytest.fixture
def actions(page):
    return EvaluateActions(page)


@pytest.fixture
def trained(page):
    """The concept file of a training of the page."""
    folder = page.runs.new_folder("mine")
    page.runs.record(folder, {"token": "<car-1>", "steps": 1}, [])
    (folder / "concept.safetensors").write_bytes(CAR.read_bytes())
    return folder / "concept.safetensors"


def evaluated(page, path):
    """Return the name of a finished evaluation of a concept file."""
    folder = page.runs.new_folder("mine", EVALUATION)
    page.runs.record(folder, {"steps": 9, "files": [{"path": str(path)}] * 3}, [], EVALUATION)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(found()))
    Image.new("RGB", (4, 4), "red").save(folder / "evaluation" / "grid.png")
    return folder.name


def test_what_needs_no_hub_comes_first_on_the_small_model(actions, page):
    choices, chosen = actions.judges("small")
    assert chosen == ["checker"] and [value for _, value in choices] == ["checker", "dino", "clip"]
    assert actions.prompts("small")[1] == "examples"
    page.examples, page.clip_model = {}, "/home/someone/secret/clip"
    choices, chosen = actions.judges("small")
    assert chosen == ["dino", "clip"] and ("CLIP (clip)", "clip") in choices  # no folder is shown
    assert actions.prompts("small")[0][0] == ("the model's templates", "templates")


def test_the_page_says_which_pictures_it_knows(actions, page, tmp_path):
    label = next(iter(page.catalogue.offers()))
    assert "the 5 pictures that &lt;car-1&gt; was trained on" in actions.say_pictures("small", [label], {})
    assert "does not know them: add them" in actions.say_pictures("small", [], {})
    assert "is not offered" in actions.say_pictures("small", ["/etc/passwd"], {})


def test_beta_is_written_into_a_concept_that_the_page_trained(actions, page, trained):
    run = evaluated(page, trained)
    assert actions.can_write(run, "0").visible
    assert "β 0.9 is now the default of &lt;car-1&gt;, trained in mine-run1" in actions.write(run, "0")
    assert Concept.load(trained).eval_gate == (0.9, Concept.load(CAR).eval_gate[1])
    beside = json.loads(trained.with_name("evaluation.json").read_text())
    assert beside["recommended"] == 0.9 and len(beside["files"]) == 1


def test_beta_is_never_written_into_another_file(actions, page):
    run, before = evaluated(page, CAR), CAR.read_bytes()
    assert not actions.can_write(run, "0").visible
    assert "written into concepts that this page has trained, and car.safetensors is none" in actions.write(
        run, "0"
    )
    assert CAR.read_bytes() == before and not CAR.with_name("evaluation.json").exists()


@pytest.mark.parametrize("number", [None, "1", "2", "7", "-1", "../0"])
def test_only_a_concept_with_a_recommended_beta_can_be_used(actions, page, trained, number):
    run, before = evaluated(page, trained), trained.read_bytes()
    assert f"{run} recommends no β of a concept" in actions.write(run, number)
    assert f"{run} recommends no β of a concept" in actions.try_out(run, number, {})[-1]
    assert trained.read_bytes() == before


@pytest.mark.parametrize("run", [None, "..", "/etc", "mine-run1"])
def test_a_run_that_is_not_an_evaluation_leads_nowhere(actions, page, trained, run):
    assert "An evaluation must be chosen" in actions.write(run, "0")
    assert actions.look_at(run, [])[:2] == [[], ""]
    assert actions.names() == [] and "mine-run1" in page.runs.names()


def test_a_concept_is_used_at_its_recommended_beta(actions, page, trained):
    run = evaluated(page, trained)
    tabs, uploads, labels, chosen, prompt, beta, temperature, said = actions.try_out(run, "0", {})
    assert (tabs.selected, uploads, said) == ("generate", {}, "")
    assert labels.value == chosen == ["<car-1>  trained in mine-run1"]
    assert (prompt, beta) == ("a <car-1> on a green background", 0.9)
    assert temperature == Offer.of(CAR).temperature


def test_an_uploaded_concept_becomes_one_of_the_tabs_own(actions, page, tmp_path):
    copy = tmp_path / "runs" / "copy.safetensors"
    run = evaluated(page, copy)
    copy.write_bytes(CAR.read_bytes())
    uploads = actions.try_out(run, "0", {})[1]
    assert [offer.path for offer in uploads.values()] == [copy]
    assert actions.try_out(run, "0", uploads)[1] == uploads  # not twice
    copy.unlink()
    assert "copy.safetensors" in actions.try_out(run, "0", {})[-1]
    assert str(tmp_path) not in actions.try_out(run, "0", {})[-1]


def test_a_finished_evaluation_is_shown_once(actions, page, trained):
    run = evaluated(page, trained)
    seen, status, stop, resume, download, use, timer, said, plot, grid, number, write = actions.look_at(
        run, []
    )
    assert "finished, 9 of 9 pictures" in status and seen == [run, 9, "None", "finished"]
    assert (stop.interactive, resume.interactive, use.interactive, timer.active) == (
        False,
        False,
        True,
        False,
    )
    assert download.value["path"].endswith(f"{run}.json") and "car β 0.9" in said
    assert not plot.visible and grid.visible and number.value == "0" and write.visible
    again = actions.look_at(run, seen)
    assert all(update == {"__type__": "update"} for update in again[7:])
