"""`perfusion evaluate`: what it shows, writes, and says when it cannot go on."""

import json
import shutil

import pytest
from helpers.tiny_concepts import tiny_concept
from helpers.tiny_judges import save_clip, save_dino
from helpers.tiny_pipes import IMAGES, tiny_pipe

from perfusion_pytorch import Concept
from perfusion_pytorch.cli import evaluate
from perfusion_pytorch.cli.evaluate import words_value
from perfusion_pytorch.cli.parser import make_parser


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny Stable Diffusion, CLIP and DINO, training pictures, prompts, and a concept."""
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_pipe()
    pipe.save_pretrained(folder / "sd")
    save_clip(folder / "clip"), save_dino(folder / "dino")
    tiny_concept(pipe).save(folder / "mine.safetensors")
    (folder / "mine").mkdir()
    for i, image in enumerate(IMAGES):
        image.save(folder / "mine" / f"{i}.png")
    (folder / "prompts.txt").write_text("a {} on red\na photo of a {}\na house\n")
    return folder


@pytest.fixture
def flags(models, tmp_path):
    concept = shutil.copy(models / "mine.safetensors", tmp_path / "mine.safetensors")
    given = {
        "pretrained_model_name_or_path": models / "sd",
        "concept": concept,
        "instance_data_dir": models / "mine",
        "prompts": models / "prompts.txt",
        "clip_model": models / "clip",
        "dino_model": models / "dino",
        "output_dir": tmp_path / "out",
        "num_inference_steps": 1,
        "num_images_per_prompt": 1,
        "device": "cpu",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return [*words, "--betas", "0.3", "0.8", "--no_progress"]


def test_the_table_is_shown_and_the_recommended_beta_written(run, flags, tmp_path):
    code, out, err = run("evaluate", *flags, "--write")
    assert (code, err) == (0, "")
    table = (tmp_path / "out" / "evaluation.txt").read_text()
    assert out.startswith(f"{table}\n") and "DINO" in table and "± " in table
    beta = Concept.load(tmp_path / "mine.safetensors").eval_gate[0]
    report = json.loads((tmp_path / "out" / "evaluation.json").read_bytes())
    assert beta == report["recommended"] and report["rule"]["identity"] == "DINO"
    assert json.loads((tmp_path / "evaluation.json").read_bytes())["summary"] == report["summary"]
    assert f"Wrote β {beta:g} into {tmp_path / 'mine.safetensors'}, and evaluation.json beside it." in out
    assert f"pareto.png and grid.png into {tmp_path / 'out'}." in out and "13 pictures made in" in out
    code, out, err = run("evaluate", *flags)
    assert (code, err) == (0, "") and "0 pictures made in " in out and ", 13 were there already." in out
    assert "--write puts the recommended β into the concept file." in out


def test_a_checker_of_a_file_without_clip_and_dino(run, flags, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def half(pictures, prompts, concept):\n    return {'half': [0.5 for _ in pictures]}\n")
    flags = [f for f in flags if str(f).rpartition("/")[2] not in ("clip", "dino")]
    flags = [f for f in flags if f not in ("--clip_model", "--dino_model")]
    code, out, err = run("evaluate", *flags, "--no_clip", "--no_dino", "--checker", f"{path}:half")
    assert (code, err) == (0, "") and "0.500 ± 0.000" in out and "CLIP" not in out
    assert "Wrote evaluation.json, evaluation.txt and grid.png into" in out


def test_errors_speak_of_flags_and_come_before_the_work(run, flags, models, tmp_path):
    for more, message in (
        (["--concept", "nowhere.safetensors"], "There is no file nowhere.safetensors."),
        (["--words", "other=sks car"], "--words must name one of the files"),
        (["--checker", "nothing"], "--checker must be named as module:function or file.py:function"),
        (["--prompts", models / "none.txt"], "--prompts must be 'objects' or 'living', or a text file"),
        (["--dino_model", models / "clip"], "--dino_model must be a DINO model's name or folder"),
    ):
        code, out, err = run("evaluate", *flags, *more)
        assert (code, out) == (1, "") and message in err and len(err.splitlines()) <= 2, err
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_says_how_it_goes_on(run, flags, tmp_path, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_concepts", stopped)
    code, _, err = run("evaluate", *flags)
    assert code == 130 and f"The pictures in {tmp_path / 'out'} are kept: the same command goes on" in err


def test_words_for_all_files_or_for_one():
    assert words_value("sks car") == (None, "sks car")
    assert words_value("a/b.safetensors=sks car") == ("a/b.safetensors", "sks car")
    with pytest.raises(Exception, match="must hold words, got 'a='"):
        words_value("a=")


def test_models_can_be_left_out_or_named_but_not_both(run):
    code, _, err = run("evaluate", "--no_clip", "--clip_model", "m")
    assert code == 2 and "--clip_model: not allowed with argument --no_clip" in err
    parser = make_parser()
    args = parser.parse_args(
        ["evaluate", *["--pretrained_model_name_or_path", "m", "--concept", "c", "--instance_data_dir", "p"]]
    )
    assert args.clip_model == "openai/clip-vit-base-patch32" and args.dino_model == "facebook/dinov2-small"
