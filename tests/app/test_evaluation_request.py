"""Evaluations as the page asks for them: what the command is given, what is copied, and what is refused."""

from pathlib import Path

import pytest
import torch
from app.conftest import PICTURES, SHAPES
from safetensors.torch import save_file

from perfusion_pytorch.app import evaluation_request
from perfusion_pytorch.app.catalogue import Offer
from perfusion_pytorch.app.evaluation_request import EvaluationRequest, start
from perfusion_pytorch.app.runs import Runs
from perfusion_pytorch.cli.parser import read_arguments

CAR, HOUSE = (SHAPES / "concepts" / f"{name}.safetensors" for name in ("car", "house"))


@pytest.fixture
def page(make_page, tmp_path, monkeypatch):
    """A page whose runs have no processes."""
    monkeypatch.setattr(Runs, "start", Runs.path)
    return make_page(tmp_path)


def request(**changed):
    values = {"model": "small", "concepts": [Offer.of(CAR)], "judges": ["checker"], "betas": [0.3, 0.9]}
    return EvaluationRequest(**values | {"prompts": "examples", "steps": 2, "guidance": 3.0} | changed)


def args_of(page, name):
    """Return what the command reads from the flags of a run."""
    folder, about = page.runs.folder / name, page.runs.about(name)
    own = [f"--output_dir={folder / 'evaluation'}", f"--instance_data_dir={folder / 'pictures'}"]
    return read_arguments([about["command"], *about["flags"], *own]), about


def lora(path):
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 2)}, path)
    return str(path)


def test_the_first_click_needs_no_hub_and_takes_what_lies_beside_the_small_model(page):
    name = start(page, request())
    args, about = args_of(page, name)
    assert name == "car-1-evaluation1" and page.runs.names() == [name]
    assert args.files == [str(CAR.resolve())] and (args.clip_model, args.dino_model) == (None, None)
    assert args.checkers == [f"{SHAPES.resolve() / 'judge.py'}:judge"] and args.superclass == "car"
    assert Path(args.prompts).read_text() == (SHAPES / "prompts.txt").read_text()
    assert (args.betas, args.num_inference_steps, args.guidance_scale) == ([0.3, 0.9], 2, 3.0)
    # 12 prompts and 6 unrelated ones of the base model; of each β these and 12 plain ones.
    assert about["steps"] == 18 + 2 * (12 + 12 + 6)
    copied = page.runs.folder / name / "pictures"
    assert [p.read_bytes() for p in sorted(copied.iterdir())] == [
        p.read_bytes() for p in sorted(PICTURES.glob("*.png"))
    ]


def test_a_lora_is_compared_with_its_words_and_lies_in_the_runs_folder(page, tmp_path):
    sent = [lora(tmp_path / "..my lora!.safetensors"), lora(tmp_path / "other.safetensors")]
    changed = {"files": sent, "words": "sks car\nother = ohwx car", "scales": [1.0]}
    name = start(page, request(**changed))
    args, about = args_of(page, name)
    folder = page.runs.folder / name / "files"
    first = folder / "my lora_" / "my lora_.safetensors"
    assert args.files == [str(CAR.resolve()), str(first), str(folder / "other" / "other.safetensors")]
    assert args.words == [(args.files[1], "sks car"), (args.files[2], "ohwx car")]
    assert first.read_bytes() == Path(sent[0]).read_bytes()
    assert [file["words"] for file in about["files"]] == ["<car-1>", "sks car", "ohwx car"]


def test_a_lora_of_peft_needs_its_scale(page, tmp_path):
    sent, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1, 2)}, sent)
    config.write_text('{"r": 1, "lora_alpha": 8}')
    with pytest.raises(
        ValueError, match=r"adapter_model.* whose scale is in adapter_config\.json\. Add both"
    ):
        start(page, request(files=[str(sent)], words="sks car"))
    name = start(page, request(files=[str(sent), str(config)], words="sks car"))
    beside = page.runs.folder / name / "files" / "adapter_model" / "adapter_config.json"
    assert beside.read_text() == config.read_text()


def test_a_tabs_uploaded_concept_is_copied_since_uploads_are_deleted(page):
    upload = page.folder / "x" / "mine.safetensors"
    upload.parent.mkdir()
    upload.write_bytes(HOUSE.read_bytes())
    pictures = [str(path) for path in sorted((SHAPES / "pictures_house").glob("*.png"))[:2]]
    name = start(page, request(concepts=[Offer.of(upload)], pictures=pictures))
    args, _ = args_of(page, name)
    assert args.files == [str(page.runs.folder / name / "files" / "mine" / "mine.safetensors")]
    assert sorted(path.name for path in args.images.iterdir()) == ["1.png", "2.png"]


def test_a_training_of_the_page_brings_its_own_pictures(page):
    folder = page.runs.new_folder("mine")
    page.runs.record(folder, {"token": "<car-1>", "steps": 1}, [])
    (folder / "concept.safetensors").write_bytes(CAR.read_bytes())
    (folder / "pictures").mkdir()
    (folder / "pictures" / "seen.png").write_bytes((PICTURES / "1.png").read_bytes())
    name = start(page, request(concepts=[Offer.of(folder / "concept.safetensors")]))
    args, _ = args_of(page, name)
    assert [path.name for path in args.images.iterdir()] == ["seen.png"]


def test_own_prompts_are_a_file_of_the_run_and_templates_the_models(page):
    args, about = args_of(page, start(page, request(prompts="own", lines=" a {} here \n\n--write\na rose")))
    assert Path(args.prompts).read_text() == "a {} here\n--write\na rose" and not args.write
    assert about["steps"] == 1 + 2 + 2 * (1 + 1 + 2)
    args, _ = args_of(page, start(page, request(prompts="templates")))
    assert Path(args.prompts).read_text().splitlines()[:2] == ["a {}", "a photo of a {}"]
    args, _ = args_of(page, start(page, request(prompts="living")))
    assert args.prompts == "living"


def test_judges_of_the_hub_are_those_that_the_command_line_names(page, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation_request, "check_is_available", lambda name, **_: asked.append(name))
    page.clip_model = "someone/clip"
    args, _ = args_of(page, start(page, request(judges=["clip"])))
    assert (args.clip_model, args.dino_model, args.checkers, asked) == ("someone/clip", None, [], asked[:1])
    assert asked == ["someone/clip"]


def test_a_judge_that_is_not_to_be_had_is_told_before_a_run_is_made(page, monkeypatch):
    def refuse(name, **_):
        raise OSError(f"The model {name} is not in the local cache.")

    monkeypatch.setattr(evaluation_request, "check_is_available", refuse)
    with pytest.raises(
        OSError, match=r"dinov2-small is not in the local cache\. The page gets it as .*--dino_model"
    ):
        start(page, request(judges=["dino"]))
    assert not page.runs.folder.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"judges": []}, "There must be a judge"),
        ({"concepts": []}, "The number of files must be from 1 to 8, got 0"),
        ({"betas": []}, "β must be 1 to 8 different numbers from 0 to 5, got none"),
        ({"betas": [0.5, 0.5]}, "got 0.5 0.5"),
        ({"betas": [float("nan")]}, "got nan"),
        ({"scales": [9.0]}, "scales must be 1 to 8 different numbers from 0 to 5, got 9"),
        ({"images": 9}, "number of pictures of each prompt must be from 1 to 8, got 9"),
        ({"steps": 0}, "number of steps must be from 1 to 150, got 0"),
        ({"model": "/etc"}, r"The model must be one of \['small'\], got '/etc'"),
        ({"prompts": "own", "lines": ""}, "There must be 1 to 64 prompts"),
        ({"prompts": "own", "lines": "a {}\n" * 65}, "got 65 with at most 4 letters"),
        ({"prompts": "own", "lines": "a rose"}, "none of its 1 has one"),
        ({"prompts": "/etc/passwd"}, "There is no list of prompts '/etc/passwd'"),
        ({"concepts": [Offer.of(CAR), Offer.of(HOUSE)]}, r"the concept files say \['car', 'house'\]"),
        ({"files": ["/etc/passwd"]}, r"passwd must be a \.safetensors file"),
        ({"words": "a=b=c"}, "Words must be given as 'words' or 'file=words'"),
        ({"pictures": ["/etc/passwd"]}, "passwd must be a picture"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_and_leaves_no_run(page, changed, message):
    with pytest.raises(ValueError, match=message):
        start(page, request(**changed))
    assert page.runs.names() == [] and list(page.runs.folder.glob("*")) == []


def test_more_pictures_than_a_night_makes_are_refused(page, monkeypatch):
    monkeypatch.setattr(evaluation_request, "MOST_MADE", 77)
    with pytest.raises(ValueError, match=r"At most 77 pictures can be made, got 78\. Choose fewer"):
        start(page, request())


def test_pictures_that_the_page_does_not_know_must_be_added(page, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(CAR.read_bytes())
    with pytest.raises(ValueError, match="training pictures must be added, since the page does not know"):
        start(page, request(concepts=[Offer.of(copy)]))
