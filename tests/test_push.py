"""Pushing concepts: what is on the hub then, and what is said where it cannot be."""

import json
from dataclasses import replace

import pytest
from helpers.tiny_concepts import tiny_concept
from helpers.tiny_pipes import IMAGES, options_for, tiny_pipe
from PIL import Image

from perfusion_pytorch import Concept, get_active_concepts, load_concept, push_concept, train_concept
from perfusion_pytorch.grids import write_png
from perfusion_pytorch.hub import find_concept

NAME = "alice/my-car"
FIGURES = {"summary": {"CLIP text": {"mean": 0.3, "low": 0.25, "high": 0.35}}}


@pytest.fixture
def run_folder(tmp_path):
    """A folder like a training run's."""
    folder = tmp_path / "run"
    for step, colour in ((9, "teal"), (10, "red")):
        facts = {"rows": ["a <car-1> on red"]}
        write_png(folder / f"validation-{step}.png", Image.new("RGB", (8, 8), colour), facts=facts)
    (folder / "photo.png").write_bytes(b"of somebody's home")
    (folder / "evaluation.json").write_text(json.dumps(FIGURES))
    tiny_concept(tiny_pipe()).save(folder / "concept.safetensors")
    return folder


def test_what_is_pushed_is_loaded_by_its_name(hub, run_folder):
    address = push_concept(run_folder, NAME)
    assert address == f"{hub.address}/{NAME}"
    files = hub.files(NAME)
    assert sorted(files) == ["README.md", "concept.safetensors", "evaluation.json", "pictures/1.png"]
    assert files["concept.safetensors"] == (run_folder / "concept.safetensors").read_bytes()
    assert files["pictures/1.png"] == (run_folder / "validation-10.png").read_bytes()
    assert json.loads(files["evaluation.json"]) == FIGURES
    card = files["README.md"].decode()
    assert "![a \\<car-1\\> on red](pictures/1.png)" in card and f'load_concept(pipe, "{NAME}")' in card
    assert "| CLIP text | 0.300 | 0.250 to 0.350 |" in card
    assert find_concept(NAME).read_bytes() == files["concept.safetensors"]
    pipe = tiny_pipe()
    load_concept(pipe, NAME)
    assert get_active_concepts(pipe) == ["<car-1>"]


def test_pushing_again_keeps_what_else_is_there(hub, run_folder):
    hub.add(NAME, {"notes.txt": b"mine", "README.md": b"old"})
    push_concept(run_folder / "concept.safetensors", NAME, license="cc-by-4.0")
    files = hub.files(NAME)
    assert files["notes.txt"] == b"mine" and b"\nlicense: cc-by-4.0\n" in files["README.md"]
    assert NAME not in hub.private
    push_concept(run_folder, "acme/car", private=True)
    assert "acme/car" in hub.private


def test_the_pictures_of_the_card_can_be_chosen(hub, run_folder, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(other)
    push_concept(run_folder, NAME, pictures=[other, run_folder / "validation-9.png"])
    files = hub.files(NAME)
    assert files["pictures/1.png"] == other.read_bytes() and "![other](pictures/1.png)" in str(
        files["README.md"]
    )
    assert files["pictures/2.png"] == (run_folder / "validation-9.png").read_bytes()
    with pytest.raises(ValueError, match=r"A picture of a model card must be a PNG file, got .*photo\.png"):
        push_concept(run_folder, NAME, pictures=[run_folder / "photo.png"])
    with pytest.raises(FileNotFoundError, match=r"There is no picture file none\.png"):
        push_concept(run_folder, NAME, pictures=["none.png"])
    with pytest.raises(ValueError, match=r"`pictures` must be a list of files, got the text 'other.png'"):
        push_concept(run_folder, NAME, pictures="other.png")


def test_nothing_is_asked_of_the_hub_for_what_cannot_be_pushed(hub, run_folder):
    for name in ("my-car", "alice/my/car", "alice/", "alice/my car"):
        with pytest.raises(ValueError, match='must be of the form "user/name", got'):
            push_concept(run_folder, name)
    with pytest.raises(ValueError, match=r"'alice/a--b' cannot be a name on the hub: .* Choose another"):
        push_concept(run_folder, "alice/a--b")
    (run_folder / "concept.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        push_concept(run_folder, NAME)
    assert hub.asked == []


def test_what_is_said_where_the_hub_refuses(hub, run_folder, monkeypatch):
    def push(name=NAME):
        push_concept(run_folder, name)

    with pytest.raises(
        ValueError, match="must be under one of alice, acme, whose token is used, got 'bob/car'"
    ):
        push("bob/car")
    hub.refuses = f"/api/models/{NAME}/commit"
    with pytest.raises(OSError, match=r"Nothing was pushed to .* does not allow it to this token \(403\)"):
        push()
    hub.refuses = "/lfs"
    with pytest.raises(OSError, match=r"Nothing was pushed to .* does not allow it to this token \(403\)"):
        push()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OSError, match=r"refuses the token \(401\). Log in by `hf auth login`"):
        push()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=r"pushed to alice/my-car without a token for the hub\. Log in"):
        push()
    assert not any(hub.models.values())


def test_the_command_says_where_it_is_in_two_lines_and_errors_in_one(hub, run_folder, run):
    code, out, err = run(
        "push", run_folder, NAME, "--license", "mit", "--picture", run_folder / "validation-9.png"
    )
    assert (code, err) == (0, "") and out.splitlines() == [
        f"Pushed {run_folder} to {hub.address}/{NAME}.",
        f'Use it as --concept {NAME}, or by load_concept(pipe, "{NAME}").',
    ]
    hub.status = 500
    code, out, err = run("push", run_folder, NAME)
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert f"error: Nothing was pushed to {NAME}, because the model hub answered 500. Try again later." in err


def test_a_run_pushes_its_concept_at_the_end(hub, tmp_path):
    options = options_for(
        tmp_path / "run", validation_prompt="a <car-1>", num_validation_images=1, validation_steps=4
    )
    summary = train_concept(tiny_pipe(), IMAGES, **options, push_to_hub=NAME)
    assert summary.pushed == f"{hub.address}/{NAME}"
    files = hub.files(NAME)
    assert sorted(files) == ["README.md", "concept.safetensors", "pictures/1.png"]
    assert files["concept.safetensors"] == summary.concept.read_bytes()
    assert files["pictures/1.png"] == summary.validation_pictures[-1].read_bytes()


def test_a_run_that_cannot_push_says_so_before_it_starts(hub, tmp_path):
    with pytest.raises(
        ValueError, match="must be under one of alice, acme, whose token is used, got 'bob/car'"
    ):
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "run"), push_to_hub="bob/car")
    assert not (tmp_path / "run").exists()


def test_a_run_is_good_where_pushing_fails_at_its_end(hub, tmp_path):
    hub.refuses = "/api/repos/create"
    with pytest.warns(
        UserWarning, match=r"it is not on the hub: .* \(403\).* Push it by `perfusion push .*car`"
    ):
        summary = train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "run"), push_to_hub=NAME)
    assert summary.pushed is None and Concept.load(summary.concept).token == "<car-1>"


def test_a_concept_that_is_pushed_may_lie_anywhere(hub, run_folder, tmp_path):
    concept = replace(Concept.load(run_folder / "concept.safetensors"), superclass="red car")
    concept.save(tmp_path / "alone.safetensors")
    push_concept(tmp_path / "alone.safetensors", NAME)
    assert sorted(hub.files(NAME)) == ["README.md", "concept.safetensors"]
