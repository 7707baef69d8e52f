"""The command line: help, exit codes, errors of one line, and each command on the small model."""

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops
from test_pipelines import MODEL, make_pipe, train
from tiny_pipes import tiny_pipe

import perfusion_pytorch
from perfusion_pytorch import Concept, InputCovariance, cli_commands, global_key_lock, load_concept, save_concept, set_concepts
from perfusion_pytorch.cli import main, make_parser

ROOT = Path(perfusion_pytorch.__file__).parents[1]
COMMANDS = ("train", "generate", "covariance", "info", "similarities")
WITH_MODEL = ["--pretrained_model_name_or_path", str(MODEL)]
FAST = ["--num_inference_steps", "2", "--device", "cpu", "--no_progress"]


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    """Files of a car and of a bear of two words."""
    folder = tmp_path_factory.mktemp("concepts")
    for name, token, superclass, seed in (("car", "<car-1>", "car", 1), ("bear", "<bear-1>", "teddy bear", 2)):
        pipe = make_pipe()
        train(pipe, token, superclass, seed)
        save_concept(pipe, folder / f"{name}.safetensors", dtype=torch.float32)
    return folder


# Help, exit codes, errors


def test_help_tells_what_there_is(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert re.findall(r"^    ([a-z]+)", out, re.M) == list(COMMANDS) and "examples:" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "") and f"usage: perfusion {command}" in out and "example:\n  perfusion" in out
    assert "None" not in out and "[]" not in out and "==SUPPRESS==" not in out
    parser = make_parser()._subparsers._group_actions[0].choices[command]
    assert all(action.help for action in parser._actions)


def test_the_version(run):
    assert run("--version")[:2] == (0, f"perfusion-pytorch {perfusion_pytorch.concept.library_version()}\n")


GENERATE = ["generate", *WITH_MODEL, "--prompt", "a car"]
TRAIN = ["train", *WITH_MODEL, "--instance_data_dir", "p", "--token", "<car-1>", "--superclass", "car", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["info"], "the following arguments are required: FILE"),
        (["generate", "--prompt", "a"], "the following arguments are required: --pretrained_model_name_or_path"),
        (["covariance", *WITH_MODEL, "--cap", "f"], "unrecognized arguments: --cap"),
        ([*GENERATE, "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        ([*GENERATE, "--guidance_scale", "nan"], "argument --guidance_scale: must be a number, got 'nan'"),
        ([*GENERATE, "--batch_size", "0"], "argument --batch_size: must be a whole number of at least 1, got '0'"),
        ([*GENERATE, "--height", "1.5"], "argument --height: must be a whole number, got '1.5'"),
        ([*GENERATE, "--output", "a.jpg"], "argument --output: must end in .png, got 'a.jpg'"),
        ([*GENERATE, "--concept", "f", "--beta", "<a>=x"], "argument --beta: must be a number, got 'x'"),
        ([*GENERATE, "--beta", "0.5"], "--beta needs --concept"),
        ([*GENERATE, "--betas", "0.5"], "--betas needs --concept"),
        ([*GENERATE, "--temperature", "0.5"], "--temperature needs --concept"),
        ([*GENERATE, "--global_key_lock"], "--global_key_lock needs --concept"),
        ([*GENERATE, "--concept", "f", "--beta", "1", "--betas", "0.5"], "--beta and --betas cannot both be given"),
        (["covariance", *WITH_MODEL, "--ridge", "-1"], "argument --ridge: must be at least 0, got '-1'"),
        ([*TRAIN, "--adam_epsilon", "0"], "argument --adam_epsilon: must be above 0, got '0'"),
        ([*TRAIN, "--input_decay", "1"], "argument --input_decay: must be at least 0 and below 1, got '1'"),
        ([*TRAIN, "--mask_dir", "m", "--no_masks"], "--mask_dir and --no_masks cannot both be given"),
        ([*TRAIN, "--covariance", "c", "--captions", "f"], "--covariance is one already"),
        ([*TRAIN, "--mixed_precision", "fp8"], "argument --mixed_precision: invalid choice: 'fp8'"),
    ],
)
def test_wrong_uses(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and message in err and err.startswith("usage: perfusion")


def test_a_failure_is_one_line(run, tmp_path):
    code, out, err = run("info", tmp_path / "none.safetensors")
    assert (code, out) == (1, "")
    assert err == f"perfusion: error: There is no concept file {tmp_path / 'none.safetensors'}. (--verbose shows where)\n"


def test_verbose_shows_where(run, tmp_path):
    code, _, err = run("info", tmp_path / "none.safetensors", "--verbose")
    assert code == 1 and "Traceback" in err and err.endswith(f"There is no concept file {tmp_path / 'none.safetensors'}.\n")


def test_an_error_that_nobody_thought_of_is_named(run, monkeypatch):
    def fail(args, say):
        return {}["of no\nuse"]

    monkeypatch.setattr(cli_commands, "run_info", fail)
    assert run("info", "f") == (1, "", "perfusion: error: KeyError: 'of no\\nuse' (--verbose shows where)\n")


@pytest.mark.parametrize(("said", "expected"), [((), "Interrupted."), (("Saved.",), "Saved.")])
def test_ctrl_c(run, monkeypatch, said, expected):
    def interrupt(args, say):
        raise KeyboardInterrupt(*said)

    monkeypatch.setattr(cli_commands, "run_info", interrupt)
    assert run("info", "f") == (130, "", f"perfusion: {expected}\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./none", "There is no model folder ./none. Give a folder in diffusers' format, or a name on the model hub."),
        (str(Path(__file__).parent), "must be a model folder in diffusers' format, but it holds no model_index.json"),
    ],
)
def test_no_model(run, name, message):
    code, _, err = run("covariance", "--pretrained_model_name_or_path", name)
    assert code == 1 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("package", "argv"), [("diffusers", ["covariance", *WITH_MODEL]), ("accelerate", TRAIN)])
def test_a_package_that_is_missing_is_named_with_its_extra(run, monkeypatch, package, argv):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(*argv)
    assert code == 1 and package in err and "Run pip install 'perfusion-pytorch[diffusers]'" in err


def test_the_entry_point():
    assert entry_points(group="console_scripts")["perfusion"].load() is main


def test_a_shell_sees_the_exit_code_and_a_closed_pipe_is_no_error(concepts):
    command = f"{sys.executable} -m perfusion_pytorch info {concepts / 'car.safetensors'}"
    script = f"{command}2; echo $?; {command} | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    (error,), (first, second) = result.stderr.splitlines(), result.stdout.split()
    assert first == "1" and "There is no concept file" in error and second in "01"


def test_help_and_info_need_no_extra_and_import_nothing_heavy(concepts):
    program = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("accelerate", "diffusers", "peft", "PIL", "tqdm", "transformers"):
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Refuse())
from perfusion_pytorch.cli import main
for argv in (["--help"], ["train", "--help"], ["info", {str(concepts / "car.safetensors")!r}]):
    assert main(argv) == 0, argv
raise SystemExit(main({TRAIN!r}))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1 and "the concept <car-1>" in result.stdout, result.stderr
    assert "accelerate" in result.stderr and "Run pip install 'perfusion-pytorch[diffusers]'" in result.stderr


# info


def test_info_in_words_and_as_json(run, concepts):
    path = concepts / "bear.safetensors"
    code, out, err = run("info", path)
    assert (code, err) == (0, "") and out.startswith(f"{path}: the concept <bear-1>, a teddy bear\n")
    assert "β 0.7, τ 0.15; trained at β 0.75, τ 0.1" in out and f"{path.stat().st_size:,} bytes" in out
    code, out, err = run("info", path, "--json")
    facts, concept = json.loads(out), Concept.load(path)
    assert (code, err) == (0, "")
    assert (facts["token"], facts["superclass"], facts["dim"]) == ("<bear-1>", "teddy bear", concept.dim)
    assert facts["eval_gate"] == {"beta": 0.7, "temperature": 0.15} and facts["dtype"] == "float32"
    assert facts["outputs"] == {name: len(row) for name, row in concept.outputs.items()}
    assert facts["trained_numbers"] == sum(facts["outputs"].values()) + sum(facts["embeddings"].values())
    assert facts["bytes"] == path.stat().st_size and facts["architecture"] is None


def test_info_of_a_damaged_file(run, concepts, tmp_path):
    data = bytearray((concepts / "car.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "car.safetensors").write_bytes(data)
    code, _, err = run("info", tmp_path / "car.safetensors")
    assert code == 1 and "its checksum does not fit its content" in err and len(err.splitlines()) == 1


# covariance


def test_covariance_is_computed_then_found_and_written(run, captions, tmp_path):
    flags = ["covariance", *WITH_MODEL, "--captions", captions, "--cache_dir", tmp_path / "cache", "--device", "cpu"]
    code, out, err = run(*flags, "--batch_size", "25", "--output", tmp_path / "c.safetensors")
    assert code == 0 and "covariance: " in err and "/3 " in err  # the bar
    assert out.startswith("Input covariance of 1,500 tokens of 75 captions, computed in ")
    (cached,) = (tmp_path / "cache").iterdir()
    assert str(cached) in out and str(tmp_path / "c.safetensors") in out and "with a ridge of 1e-06" in out
    written, held = InputCovariance.load(tmp_path / "c.safetensors"), InputCovariance.load(cached)
    assert torch.allclose(written.matrix, held.matrix, rtol=1e-6) and written.ridge == held.ridge
    code, out, err = run(*flags, "--no_progress")
    assert (code, err) == (0, "") and "found in the cache" in out


def test_covariance_with_other_settings(run, captions, tmp_path):
    flags = ["covariance", *WITH_MODEL, "--captions", captions, "--cache_dir", tmp_path / "cache", "--device", "cpu", "--no_progress"]
    code, out, err = run(*flags, "--num_captions", "10", "--ridge", "0.001", "--dtype", "bfloat16")
    assert (code, err) == (0, "") and "200 tokens of 10 captions" in out and "ridge of 0.001" in out


def test_covariance_from_built_in_captions_wants_a_model_of_everyday_words(run, tmp_path):
    code, out, err = run("covariance", *WITH_MODEL, "--cache_dir", tmp_path, "--num_captions", "300", "--device", "cpu")
    assert (code, out) == (1, "") and "by `--captions FILE`" in err and len(err.splitlines()) == 1


# similarities


def test_similarities_as_a_table_and_as_json(run, concepts):
    flags = ["similarities", *WITH_MODEL, "--device", "cpu", "--concept", concepts / "car.safetensors", concepts / "bear.safetensors"]
    code, out, err = run(*flags)
    assert (code, err) == (0, "")
    prompts = [f"a photo of a {word}" for word in ("<car-1>", "car", "<bear-1>", "teddy bear")]
    assert [line for line in out.splitlines() if line[0] not in " r"] == prompts
    code, out, _ = run(*flags, "--json", "--prompt", "a <car-1> on a <bear-1>", "a house")
    first, second = json.loads(out)
    assert code == 0 and [entry["token"] for entry in first["tokens"]] == [
        "<|startoftext|>", "a", "<car-1>", "on", "a", "<bear-1>", "(end, padding)",
    ]  # fmt: skip
    assert first["tokens"][2]["r"]["<car-1>"] > 0.5 and set(second["tokens"][0]["r"]) == {"<car-1>", "<bear-1>"}


def test_similarities_are_remarked_upon(run, concepts):
    flags = ["similarities", *WITH_MODEL, "--device", "cpu", "--concept", concepts / "car.safetensors", "--prompt", "a <car-1> on red"]
    _, out, _ = run(*flags, "--beta", "-9", "--json")
    said = json.loads(out)[0]["remarks"]
    assert any(
        re.match(r"red is at r = .*, above β -9: <car-1> shows there too. (A higher β keeps it out.|No β tells)", line) for line in said
    )
    _, out, _ = run(*flags, "--beta", "<car-1>=9")
    assert "  ! <car-1> is at r = " in out and "below β 9: the gate hides the concept" in out and "(9 of <car-1>)" in out
    _, out, _ = run(*flags, "--beta", "-0.5", "--json")
    (own,) = (entry["r"]["<car-1>"] for entry in json.loads(out)[0]["tokens"] if entry["token"] == "<car-1>")
    assert any("far from 1" in line for line in json.loads(out)[0]["remarks"]) == (abs(own - 1) > 0.2)


def test_remarks_say_what_can_be_done():
    concept = SimpleNamespace(token="<car-1>", eval_gate=(0.7, 0.15))

    def remarks(**similarities):
        return cli_commands._remarks([(token, (r,)) for token, r in similarities.items()], [concept])

    assert remarks(a=0.1, **{"<car-1>": 0.95}, house=0.69) == []
    assert remarks(**{"<car-1>": 0.95}, house=0.8) == [
        "house is at r = 0.80, above β 0.7: <car-1> shows there too. A higher β keeps it out."
    ]
    (line,) = remarks(**{"<car-1>": 0.95}, house=0.96)
    assert line.endswith("No β tells the two apart: train longer, or with more captions.")
    assert [line[:24] for line in remarks(**{"<car-1>": 0.6}) + remarks(**{"<car-1>": 1.3})] == [
        "<car-1> is at r = 0.60, ",
        "<car-1> is at r = 1.30, ",
    ]
    assert remarks(car=0.8)[0].endswith("A higher β keeps it out.") and "No β" in remarks(car=1.0)[0]


def test_a_file_that_is_no_concept_is_found_before_the_model_is_loaded(run, tmp_path):
    for command in ("generate", "similarities"):
        flags = ["--pretrained_model_name_or_path", "./none", "--concept", tmp_path / "none", "--prompt", "a"]
        assert "There is no concept file" in run(command, *flags)[2]


# generate


def picture_of(prompt, seed=0, concept=None, beta=None, lock=False, **options):
    pipe = make_pipe()
    if concept is not None:
        name = load_concept(pipe, concept)
        set_concepts(pipe, name, beta=beta)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed)} | options
    if lock:
        with global_key_lock(pipe):
            return pipe(prompt, **options).images[0]
    return pipe(prompt, **options).images[0]


def same(image, other):
    return image.size == other.size and image.convert("RGB").tobytes() == other.convert("RGB").tobytes()


def test_one_picture_is_the_pipelines_own(run, tmp_path):
    path = tmp_path / "new" / "car.png"
    code, out, err = run("generate", *WITH_MODEL, *FAST, "--prompt", "a car", "--seed", "5", "--guidance_scale", "4", "--output", path)
    assert (code, err) == (0, "") and f"Wrote {path}." in out and "1 picture in " in out
    assert same(Image.open(path), picture_of("a car", seed=5, guidance_scale=4.0))
    assert Image.open(path).text["Description"] == "a car"


def test_a_picture_with_a_concept(run, concepts, tmp_path):
    path, car = tmp_path / "car.png", concepts / "car.safetensors"
    flags = ["generate", *WITH_MODEL, *FAST, "--prompt", "a <car-1> on red", "--concept", car, "--output", path]
    code, out, err = run(*flags, "--beta", "0.4", "--temperature", "<car-1>=0.2", "--negative_prompt", "a house", "--resolution", "32")
    assert (code, err) == (0, "") and f"Loaded <car-1> (car), β 0.4, τ 0.2, from {car}." in out
    pipe = make_pipe()
    set_concepts(pipe, load_concept(pipe, car), beta=0.4, temperature=0.2)
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "generator": torch.Generator().manual_seed(0)}
    assert same(Image.open(path), pipe("a <car-1> on red", negative_prompt="a house", **options).images[0])
    run(*flags, "--global_key_lock", "--height", "32", "--width", "64")
    locked = picture_of("a <car-1> on red", concept=car, lock=True, height=32, width=64)
    assert same(Image.open(path), locked) and locked.size == (64, 32)


def test_a_grid_over_betas_and_prompts_and_seeds(run, concepts, tmp_path):
    car, prompts = concepts / "car.safetensors", ["a <car-1>", "a photo of a <car-1> on a blue background"]
    flags = [
        "generate",
        *WITH_MODEL,
        *FAST,
        "--concept",
        car,
        "--betas",
        "0.3",
        "0.9",
        "--num_images_per_prompt",
        "2",
        "--prompt",
        *prompts,
    ]
    code, out, err = run(*flags, "--output", tmp_path / "grid.png", "--output_dir", tmp_path / "each")
    assert (code, err) == (0, "") and "8 pictures in " in out and str(tmp_path / "each") in out
    names = {path.name for path in (tmp_path / "each").iterdir()}
    assert len(names) == 8 and {"1-a-car-1-seed0-beta0.3.png", "2-a-photo-of-a-car-1-on-a-blue-background-seed1-beta0.9.png"} <= names
    each = Image.open(tmp_path / "each" / "1-a-car-1-seed1-beta0.9.png")
    assert same(each, picture_of("a <car-1>", seed=1, concept=car, beta=0.9))
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 4 * 192 and grid.height > 2 * 192
    large = each.convert("RGB").resize((192, 192), Image.Resampling.NEAREST)
    x, y = grid.width - 3 * 196, grid.height - 196
    assert same(grid.crop((x, y, x + 192, y + 192)), large)
    run(*flags, "--output", tmp_path / "grid.png", "--output_dir", tmp_path / "batched", "--batch_size", "3")
    for name in names:
        difference = ImageChops.difference(*(Image.open(tmp_path / folder / name) for folder in ("each", "batched")))
        assert max(high for _, high in difference.getextrema()) <= 2, name  # of 255: batches round differently


def test_concepts_under_one_token_and_their_own_gates(run, concepts, tmp_path):
    car, bear = concepts / "car.safetensors", concepts / "bear.safetensors"
    flags = ["generate", *WITH_MODEL, *FAST, "--prompt", "a <car-1> on a <bear-1>", "--output", tmp_path / "p.png"]
    code, out, err = run(*flags, "--concept", car, "--concept", bear, "--beta", "0.6", "<bear-1>=0.5")
    assert (code, err) == (0, "") and "<car-1> (car), β 0.6" in out and "<bear-1> (teddy bear), β 0.5" in out
    code, _, err = run(*flags, "--concept", car, "--beta", "<cat-1>=0.5")
    assert code == 1 and "`--beta` must name one of the loaded concepts ['<car-1>'], got ['<cat-1>']" in err


def test_a_prompt_without_the_concept_is_a_warning(run, concepts, tmp_path):
    flags = ["generate", *WITH_MODEL, *FAST, "--concept", concepts / "car.safetensors", "--output", tmp_path / "p.png"]
    code, _, err = run(*flags, "--prompt", "a car")
    assert (code, err) == (0, "perfusion: warning: The prompt 'a car' names none of the concepts ['<car-1>'].\n")
    code, _, err = run(*flags, "--prompt", "a <car-1> and a <dog-1>")
    assert code == 0 and err.startswith("perfusion: warning: No concept named <dog-1> is loaded") and len(err.splitlines()) == 1


def test_precision_and_progress(run, tmp_path):
    flags = ["generate", *WITH_MODEL, "--prompt", "a car", "--num_inference_steps", "2", "--device", "cpu", "--output", tmp_path / "p.png"]
    code, _, err = run(*flags, "--dtype", "bfloat16")
    assert code == 0 and "0/2" in err


def test_a_variant_and_a_revision_reach_the_loading(run, monkeypatch):
    from diffusers import DiffusionPipeline

    def refuse(name, **options):
        raise OSError(f"{name} {options['revision']} {options['variant']} {options['torch_dtype']}")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    code, _, err = run("covariance", "--pretrained_model_name_or_path", "some/model", "--revision", "main", "--variant", "fp16")
    assert code == 1 and "some/model main fp16 torch.float32" in err


def test_a_pipeline_of_sdxl(run, captions, tmp_path):
    """From the covariance to pictures, and what is told of the file between them."""
    tiny_pipe("SDXL").save_pretrained(tmp_path / "xl")
    model = ["--pretrained_model_name_or_path", tmp_path / "xl"]
    assert run("covariance", *model, "--captions", captions, "--cache_dir", tmp_path, "--output", tmp_path / "c", "--no_progress")[0] == 0
    assert InputCovariance.load(tmp_path / "c").dim == 32
    pipe = tiny_pipe("SDXL")
    encodings = pipe.encode_prompt("a photo of a car", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0][0]
    car, i = pipe.tokenizer("car", add_special_tokens=False).input_ids[0], encodings[5].detach().clone()
    Concept(
        token="<car-1>",
        superclass="car",
        base_model=type(pipe.unet).__name__,
        embeddings={name: getattr(pipe, name).get_input_embeddings().weight[car].detach() for name in ("text_encoder", "text_encoder_2")},
        concept_input=i,
        concept_dual=i / (i @ i),
        superclass_input=encodings[4].detach().clone(),
        concept_norm=(i @ i).item(),
        outputs={name: torch.ones(m.out_features) for name, m in pipe.unet.named_modules() if name.endswith("attn2.to_v")},
    ).save(tmp_path / "car.safetensors")
    code, out, _ = run("info", tmp_path / "car.safetensors")
    assert code == 0 and "12 (text_encoder) + 20 (text_encoder_2)" in out
    code, out, err = run("similarities", *model, "--concept", tmp_path / "car.safetensors", "--prompt", "a photo of a <car-1>")
    assert (code, err) == (0, "") and re.search(r"^  <car-1> +1.00$", out, re.M)
    flags = ["--concept", tmp_path / "car.safetensors", "--prompt", "a photo of a <car-1>", "--output", tmp_path / "p.png"]
    assert run("generate", *model, *FAST, *flags, "--betas", "0.5", "0.9")[0] == 0
    assert Image.open(tmp_path / "p.png").width > 160
