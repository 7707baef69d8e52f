"""The command line: help, exit codes, errors of one line, and where a base model comes from."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from helpers.small_model import MODEL

import perfusion_pytorch
from perfusion_pytorch.cli import base_model, info
from perfusion_pytorch.cli.main import main
from perfusion_pytorch.cli.parser import given_twice, make_parser

ROOT = Path(perfusion_pytorch.__file__).parents[1]
COMMANDS = ("train", "generate", "evaluate", "app", "covariance", "info", "similarities", "push")
WITH_MODEL = ["--pretrained_model_name_or_path", str(MODEL)]


def test_help_lists_the_commands(run):
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
    assert run("--version")[:2] == (
        0,
        f"perfusion-pytorch {perfusion_pytorch.concept_file.library_version()}\n",
    )


GENERATE = ["generate", *WITH_MODEL, "--prompt", "a car"]
WITH_CAR = [*GENERATE, "--concept", "f"]
TRAIN = [
    "train",
    *WITH_MODEL,
    "--instance_data_dir",
    "p",
    "--token",
    "<car-1>",
    "--superclass",
    "car",
    "--output_dir",
    "o",
]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["paint"], "invalid choice: 'paint'"),
        (["info"], "the following arguments are required: FILE"),
        (
            ["generate", "--prompt", "a"],
            "the following arguments are required: --pretrained_model_name_or_path",
        ),
        (["covariance", *WITH_MODEL, "--cap", "f"], "unrecognized arguments: --cap"),
        ([*GENERATE, "--seed", "x"], "argument --seed: must be a whole number, got 'x'"),
        (
            [*GENERATE, "--seed", "-1"],
            "argument --seed: must be a whole number from 0 to 2**62 - 1, got '-1'",
        ),
        ([*GENERATE, "--seed", str(2**64)], "argument --seed: must be a whole number from 0 to 2**62 - 1"),
        ([*WITH_CAR, "--beta", "0.3", "0.4"], "--beta must have one number for all concepts, got several."),
        ([*WITH_CAR, "--beta", "0.3", "--beta", "0.3"], "--beta must have one number for all concepts"),
        ([*WITH_CAR, "--beta", "<a>=1", "<a>=2"], "--beta must have one number for <a>, got several."),
        ([*WITH_CAR, "--temperature", "0.1", "0.2"], "--temperature must have one number for all concepts"),
        ([*WITH_CAR, "--betas", "0.5", "0.7", "0.50"], "--betas must name each once, got 0.5 twice"),
        ([*GENERATE, "--concept", "f", "g", "f"], "--concept must name each once, got f twice"),
        ([*GENERATE, "--resolution", "8", "--width", "8"], "so --height and --width cannot be given too"),
        ([*GENERATE, "--guidance_scale", "nan"], "argument --guidance_scale: must be a number, got 'nan'"),
        (
            [*GENERATE, "--batch_size", "0"],
            "argument --batch_size: must be a whole number of at least 1, got '0'",
        ),
        ([*GENERATE, "--height", "1.5"], "argument --height: must be a whole number, got '1.5'"),
        ([*GENERATE, "--output", "a.jpg"], "argument --output: must end in .png, got 'a.jpg'"),
        ([*GENERATE, "--concept", "f", "--beta", "<a>=x"], "argument --beta: must be a number, got 'x'"),
        ([*GENERATE, "--beta", "0.5"], "--beta needs --concept"),
        ([*GENERATE, "--betas", "0.5"], "--betas needs --concept"),
        ([*GENERATE, "--temperature", "0.5"], "--temperature needs --concept"),
        ([*GENERATE, "--global_key_lock"], "--global_key_lock needs --concept"),
        (
            [*GENERATE, "--concept", "f", "--beta", "1", "--betas", "0.5"],
            "--beta and --betas cannot both be given",
        ),
        (
            ["covariance", *WITH_MODEL, "--ridge", "-1"],
            "argument --ridge: must be at least 0 and finite, got '-1'",
        ),
        ([*TRAIN, "--adam_epsilon", "0"], "argument --adam_epsilon: must be above 0 and finite, got '0'"),
        ([*TRAIN, "--input_decay", "1"], "argument --input_decay: must be in [0, 1), got '1'"),
        ([*TRAIN, "--mask_dir", "m", "--no_masks"], "--mask_dir and --no_masks cannot be given together"),
        ([*TRAIN, "--mask_model", "m", "--no_masks"], "--mask_model and --no_masks cannot be given together"),
        ([*TRAIN, "--covariance", "c", "--captions", "f"], "--covariance is one already"),
        ([*TRAIN, "--covariance", "c", "--ridge", "1e-6"], "--covariance is one already"),
        ([*TRAIN, "--mixed_precision", "fp8"], "argument --mixed_precision: invalid choice: 'fp8'"),
        ([*TRAIN, "--max_train_steps", "0"], "argument --max_train_steps: must be at least 1, got '0'"),
        ([*TRAIN, "--seed", "1.5"], "argument --seed: must be a whole number, got '1.5'"),
        ([*TRAIN, "--checkpointing_steps", "-1"], "must be a whole number of at least 1, got '-1'"),
        ([*TRAIN, "--train_beta", "inf"], "argument --train_beta: must be a number, got 'inf'"),
        (
            [*TRAIN, "--learning_rate", "-1"],
            "argument --learning_rate: must be at least 0 and finite, got '-1'",
        ),
        ([*TRAIN, "--max_grad_norm", "0"], "argument --max_grad_norm: must be above 0, got '0'"),
    ],
)
def test_wrong_uses(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and message in err and err.startswith("usage: perfusion")


def test_an_unknown_flag_shows_the_usage_of_the_command(run):
    code, out, err = run("covariance", *WITH_MODEL, "--colour", "red")
    assert (code, out) == (2, "") and err.startswith("usage: perfusion covariance ")
    assert err.endswith("perfusion covariance: error: unrecognized arguments: --colour red\n")


def test_without_a_command_the_help_is_shown(run):
    assert run() == (0, make_parser().format_help(), "")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--seed", "1", "--seed=2"], ["--seed is given twice"]),
        (["--width", "8", "--no_progress", "--width", "9"], ["--width is given twice"]),
        (["--prompt", "a", "--prompt", "b"], []),  # both are made
        (["--no_progress"], []),
    ],
)
def test_of_a_flag_given_twice_the_last_is_taken_with_a_warning(flags, expected):
    parser = make_parser()._subparsers._group_actions[0].choices["generate"]
    lines = [f"{start}, so the last one is taken." for start in expected]
    assert given_twice(["generate", *flags], parser) == lines


def test_a_flag_and_its_opposite_are_a_warning(run, tmp_path):
    parser = make_parser()._subparsers._group_actions[0].choices["train"]
    lines = given_twice(["train", "--center_crop", "--no-center_crop"], parser)
    assert lines == ["--center_crop and --no-center_crop contradict each other, so the last one is taken."]
    code, _, err = run("covariance", "--device", "cpu", "--device", "cpu", *WITH_MODEL[:1], tmp_path)
    assert code == 1 and err.startswith("perfusion: warning: --device is given twice, so the last one is")


def test_a_failure_is_one_line(run, tmp_path):
    path = tmp_path / "none.safetensors"
    code, out, err = run("info", path)
    assert (code, out) == (1, "")
    assert err == f"perfusion: error: There is no concept file {path}. (--verbose shows where)\n"


def test_verbose_shows_where(run, tmp_path):
    code, _, err = run("info", tmp_path / "none.safetensors", "--verbose")
    assert (
        code == 1
        and "Traceback" in err
        and err.endswith(f"There is no concept file {tmp_path / 'none.safetensors'}.\n")
    )


def test_an_unexpected_error_is_shown_with_its_type(run, monkeypatch):
    def fail(args, say):
        return {}["of no\nuse"]

    monkeypatch.setattr(info, "COMMAND", replace(info.COMMAND, run=fail))
    assert run("info", "f") == (1, "", "perfusion: error: KeyError: 'of no\\nuse' (--verbose shows where)\n")


@pytest.mark.parametrize(("said", "expected"), [((), "Interrupted."), (("Saved.",), "Saved.")])
def test_ctrl_c(run, monkeypatch, said, expected):
    def interrupt(args, say):
        raise KeyboardInterrupt(*said)

    monkeypatch.setattr(info, "COMMAND", replace(info.COMMAND, run=interrupt))
    assert run("info", "f") == (130, "", f"perfusion: {expected}\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "./none",
            "There is no model folder ./none. Give a folder in diffusers' format, or a name on the model hub",
        ),
        (
            str(Path(__file__).parent),
            "must be a model folder in diffusers' format, but it holds no model_index.json",
        ),
    ],
)
def test_no_model(run, name, message):
    code, _, err = run("covariance", "--pretrained_model_name_or_path", name)
    assert code == 1 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("package", "argv"), [("diffusers", ["covariance", *WITH_MODEL]), ("accelerate", TRAIN)]
)
def test_a_package_that_is_missing_is_named_with_what_to_install(run, monkeypatch, package, argv):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(*argv)
    assert code == 1 and f"This needs {package} (" in err and f" Run pip install {package}. (" in err


def test_the_entry_point():
    assert entry_points(group="console_scripts")["perfusion"].load() is main


@pytest.mark.slow
def test_a_shell_sees_the_exit_code_and_a_closed_pipe_is_silent(concepts):
    command = f"{sys.executable} -m perfusion_pytorch info {concepts / 'car.safetensors'}"
    script = f"{command}2; echo $?; {command} | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    (error,), (first, second) = result.stderr.splitlines(), result.stdout.split()
    assert first == "1" and "There is no concept file" in error and second in "01"


@pytest.mark.slow
def test_what_a_console_cannot_hold_is_written_out(concepts):
    command = [sys.executable, "-m", "perfusion_pytorch"]
    options = {
        "cwd": ROOT,
        "capture_output": True,
        "text": True,
        "timeout": 100,
        "env": os.environ | {"PYTHONIOENCODING": "cp1252"},
    }
    for arguments in (["generate", "--help"], ["info", str(concepts / "car.safetensors")]):
        result = subprocess.run([*command, *arguments], **options)
        assert result.returncode == 0 and "\\u03b2" in result.stdout, result.stderr


@pytest.mark.slow
def test_help_and_info_need_no_extra_and_import_nothing_heavy(concepts):
    program = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("accelerate", "diffusers", "peft", "PIL", "tqdm", "transformers"):
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Refuse())
from perfusion_pytorch.cli.main import main
for argv in (["--help"], ["train", "--help"], ["info", {str(concepts / "car.safetensors")!r}]):
    assert main(argv) == 0, argv
raise SystemExit(main({TRAIN!r}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 1 and "the concept <car-1>" in result.stdout, result.stderr
    assert (
        "accelerate" in result.stderr and "Run pip install diffusers transformers accelerate" in result.stderr
    )


def test_a_variant_and_a_revision_reach_the_loading(run, monkeypatch):
    from diffusers import DiffusionPipeline

    def refuse(name, **options):
        raise OSError(f"{name} {options['revision']} {options['variant']} {options['torch_dtype']}")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    monkeypatch.setattr(base_model, "check_is_available", lambda name, **options: None)
    code, _, err = run(
        "covariance",
        "--pretrained_model_name_or_path",
        "some/model",
        "--revision",
        "main",
        "--variant",
        "fp16",
    )
    assert code == 1 and "some/model main fp16 torch.float32" in err
