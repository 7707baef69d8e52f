"""Outputs that cannot be written are refused before the model is loaded; what was refused leaves nothing."""

import pytest
from helpers.small_model import MODEL
from PIL import Image

from perfusion_pytorch import InputCovariance, read_picture_facts
from perfusion_pytorch.cli import covariance, generate
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.pipelines import covariance_cache

WITH_MODEL = ["--pretrained_model_name_or_path", str(MODEL), "--device", "cpu", "--no_progress"]
GENERATE = ["generate", *WITH_MODEL, "--prompt", "a car", "--num_inference_steps", "1"]


@pytest.fixture
def no_loading(monkeypatch):
    """Let the loading of a model fail."""

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    for module in (covariance, generate):
        monkeypatch.setattr(module, "load_pipeline", load)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "file/p.png"], "file/p.png cannot be written, because"),
        (["--output", "folder.png"], "folder.png must be a file that can be written, but it is a folder"),
        (["--output_dir", "file"], "file cannot be written, because"),
        (["--output_dir", "file/under"], "file/under cannot be written, because"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_generate_into_what_cannot_be_written(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    code, out, err = run(*GENERATE, *flags)
    assert (code, out) == (1, "") and message in err and len(err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


def test_a_refused_call_leaves_no_folder(run, tmp_path):
    new = tmp_path / "new"
    flags = ["--output", new / "p.png", "--output_dir", new / "each"]
    for refused in (["--height", "63"], ["--concept", tmp_path / "none"], ["--device", "cuda:77"]):
        assert run(*GENERATE, *flags, *refused)[0] == 1
    assert list(tmp_path.iterdir()) == []
    assert run(*GENERATE, *flags)[0] == 0
    assert {path.name for path in new.iterdir()} == {"p.png", "each"}


@pytest.mark.usefixtures("no_loading")
def test_covariance_into_what_cannot_be_written(run, tmp_path, captions):
    (tmp_path / "file").touch()
    flags = ["covariance", *WITH_MODEL, "--captions", captions]
    code, out, err = run(*flags, "--cache_dir", tmp_path / "file")
    assert (code, out) == (
        1,
        "",
    ) and "Choose another one by --cache_dir, or write it to a file by --output" in err
    code, out, err = run(*flags, "--cache_dir", tmp_path, "--output", tmp_path / "file" / "c")
    assert (code, out) == (1, "") and "file/c cannot be written, because" in err


def test_what_is_not_cached_is_not_said_to_be(run, tmp_path, captions):
    (tmp_path / "file").touch()
    flags = ["covariance", *WITH_MODEL, "--captions", captions, "--cache_dir", tmp_path / "file"]
    code, out, err = run(*flags, "--output", tmp_path / "new" / "c")
    assert code == 0 and "cached in" not in out and f"written to        {tmp_path / 'new' / 'c'}" in out
    assert err.startswith("perfusion: warning: The covariance cannot be cached (") and "by --cache_dir" in err
    assert InputCovariance.load(tmp_path / "new" / "c").num_tokens == 1500


def test_a_cache_that_cannot_be_written_is_used_where_it_holds_the_covariance(
    run, tmp_path, captions, monkeypatch
):
    flags = ["covariance", *WITH_MODEL, "--captions", captions, "--cache_dir", tmp_path / "cache"]
    assert run(*flags)[0] == 0

    def refuse(path, *_, **__):
        if tmp_path / "cache" in (path, path.parent):
            raise OSError(f"{path} cannot be written.")

    monkeypatch.setattr(covariance, "check_can_be_written", refuse)
    monkeypatch.setattr(covariance_cache, "write_atomically", refuse)
    code, out, err = run(*flags)
    assert (code, err) == (0, "") and "found in the cache" in out and "cached in" in out
    code, out, err = run(*flags, "--num_captions", "20")  # of which it holds none
    assert (code, out) == (1, "") and "cannot be written. Choose another one by --cache_dir, or" in err
    (cached,) = (tmp_path / "cache").iterdir()
    write_atomically(cached, b"damaged")
    code, out, err = run(*flags, "--output", tmp_path / "c")
    assert code == 0 and "computed in" in out and "cached in" not in out


def test_black_pictures_are_told(run, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline.__call__

    def flagging(self, *words, **options):
        result = made(self, *words, **options)
        result.images = [Image.new("RGB", image.size) for image in result.images]
        result.nsfw_content_detected = [True] * len(result.images)
        return result

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", flagging)
    code, out, err = run(*GENERATE, "--prompt", "a house", "--output", tmp_path / "p.png")
    assert code == 0 and "Wrote" in out
    assert err == (
        "perfusion: warning: 2 pictures are black, of 2, because the base model's safety checker flagged "
        "them. Try another prompt or seed.\n"
    )


def test_what_a_picture_was_made_with(run, concepts, tmp_path):
    car = concepts / "car.safetensors"
    flags = [
        "--prompt",
        "a <car-1>",
        "--concept",
        car,
        "--output",
        tmp_path / "p.png",
        "--output_dir",
        tmp_path,
    ]
    flags += ["--betas", "0.3", "0.9", "--num_images_per_prompt", "2", "--seed", "7", "--guidance_scale", "3"]
    assert run("generate", *WITH_MODEL, "--num_inference_steps", "1", *flags)[0] == 0
    grid = read_picture_facts(tmp_path / "p.png")
    assert grid["columns"] == [{"prompt": "a <car-1>", "seed": seed} for seed in (7, 8)]
    assert grid["rows"] == [{"beta": 0.3}, {"beta": 0.9}] and grid["concepts"][0]["beta"] == [0.3, 0.9]
    one = read_picture_facts(tmp_path / "1-a-car-1-seed8-beta0.9.png")
    assert (one["prompt"], one["seed"], one["concepts"][0]["beta"]) == ("a <car-1>", 8, 0.9)
    assert (one["num_inference_steps"], one["guidance_scale"], one["model"]) == (1, 3.0, "tiny-sd")
    code, out, err = run("info", tmp_path / "p.png")
    assert (code, err) == (0, "") and out.startswith(f"{tmp_path / 'p.png'}: a picture of tiny-sd\n")
    assert "<car-1>, superclass car, beta [0.3, 0.9], temperature 0.15, file car.safetensors, sha256 " in out
    assert run("info", tmp_path / "p.png", "--json")[1].startswith("{\n")


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--height", "32"], (64, 32)),
        (["--width", "32"], (32, 64)),
        (["--resolution", "32"], (32, 32)),
        (["--height", "40", "--width", "48"], (48, 40)),
    ],
)
def test_a_height_alone_is_not_ignored(run, tmp_path, flags, size):
    """diffusers takes the model's own for both where one is missing."""
    assert run(*GENERATE, *flags, "--output", tmp_path / "p.png")[0] == 0
    assert Image.open(tmp_path / "p.png").size == size
    assert read_picture_facts(tmp_path / "p.png")["height"] == size[1]


def test_flags_without_effect_are_a_warning(run, tmp_path):
    flags = ["--negative_prompt", "a house", "--guidance_scale", "1", "--output", tmp_path / "p.png"]
    code, _, err = run(*GENERATE, *flags)
    assert code == 0 and "--negative_prompt has no effect at --guidance_scale 1, only above 1" in err


@pytest.mark.parametrize("flag", ["--prompt", "--negative_prompt"])
def test_the_end_of_a_prompt_that_is_not_read_is_a_warning(run, tmp_path, flag):
    """diffusers writes this to its log, which the command does not show."""
    long = "a car left of a rose on a white background and a big red house beside a blue bear"
    given = {"--prompt": "a car", "--negative_prompt": "a bear"} | {flag: long}
    flags = [word for pair in given.items() for word in pair]
    command = ["generate", *WITH_MODEL, *flags, "--num_inference_steps", "1", "--output", tmp_path / "p.png"]
    code, _, err = run(*command)
    assert code == 0 and err == (
        f"perfusion: warning: The prompt {long!r} is too long: the model does not read its end, 'bear'.\n"
    )
