"""`perfusion train`: every flag reaches `train_concept` unchanged, and a whole run on the small model."""

import inspect
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.small_model import MODEL
from helpers.tiny_pipes import KINDS, RESOLUTION, covariance_of, tiny_pipe
from PIL import Image

from perfusion_pytorch import Concept, InputCovariance, train_concept
from perfusion_pytorch.cli import train as cli_train
from perfusion_pytorch.cli.parser import make_parser
from perfusion_pytorch.training.interruption import Terminated
from perfusion_pytorch.training.train import TrainingSummary

PICTURES = Path(__file__).parents[2] / "examples" / "shapes" / "pictures"
GIVEN = {"images": PICTURES, "token": "<car-1>", "superclass": "car"}
# For each flag what is typed, and what `train_concept` gets.
FLAGS = {
    "instance_prompt": (["a {}", "one {}"], "templates", ["a {}", "one {}"]),
    "resolution": (["32"], "resolution", 32),
    "center_crop": ([], "center_crop", True),
    "no-center_crop": ([], "center_crop", False),
    "mask_dir": ([str(PICTURES / "masks")], "masks", PICTURES / "masks"),
    "mask_model": (["a/clipseg"], "mask_model", "a/clipseg"),
    "no_masks": ([], "use_masks", False),
    "max_train_steps": (["7"], "max_train_steps", 7),
    "train_batch_size": (["3"], "train_batch_size", 3),
    "gradient_accumulation_steps": (["2"], "gradient_accumulation_steps", 2),
    "gradient_checkpointing": ([], "gradient_checkpointing", True),
    "mixed_precision": (["bf16"], "mixed_precision", "bf16"),
    "learning_rate": (["0.02"], "learning_rate", 0.02),
    "embedding_learning_rate": (["1e-3"], "embedding_learning_rate", 1e-3),
    "lr_scheduler": (["cosine"], "lr_scheduler", "cosine"),
    "lr_warmup_steps": (["5"], "lr_warmup_steps", 5),
    "adam_beta1": (["0.8"], "adam_beta1", 0.8),
    "adam_beta2": (["0.99"], "adam_beta2", 0.99),
    "adam_weight_decay": (["0.01"], "adam_weight_decay", 0.01),
    "adam_epsilon": (["1e-7"], "adam_epsilon", 1e-7),
    "max_grad_norm": (["1"], "max_grad_norm", 1.0),
    "timestep_power": (["0.5"], "timestep_power", 0.5),
    "seed": (["11"], "seed", 11),
    "train_beta": (["0.7"], "train_beta", 0.7),
    "train_temperature": (["0.2"], "train_temperature", 0.2),
    "embedding_steps": (["7"], "embedding_steps", 7),
    "relative_learning_rates": ([], "relative_learning_rates", True),
    "no-relative_learning_rates": ([], "relative_learning_rates", False),
    "gates_removal": ([], "gates_removal", True),
    "no-gates_removal": ([], "gates_removal", False),
    "eval_beta": (["0.6"], "eval_beta", 0.6),
    "eval_temperature": (["0.3"], "eval_temperature", 0.3),
    "input_decay": (["0.9"], "input_decay", 0.9),
    "frac_gradient_concept_embed": (["0.5"], "frac_gradient_concept_embed", 0.5),
    "checkpointing_steps": (["0"], "checkpointing_steps", None),
    "checkpoints_total_limit": (["2"], "checkpoints_total_limit", 2),
    "resume_from_checkpoint": (["latest"], "resume_from_checkpoint", "latest"),
    "validation_prompt": (
        ["a <car-1>", "a red <car-1>"],
        "validation_prompt",
        ["a <car-1>", "a red <car-1>"],
    ),
    "num_validation_images": (["2"], "num_validation_images", 2),
    "validation_steps": (["50"], "validation_steps", 50),
    "report_to": (["tensorboard"], "report_to", "tensorboard"),
    "logging_dir": (["here"], "logging_dir", "here"),
    "push_to_hub": (["someone/car"], "push_to_hub", "someone/car"),
    "no_progress": ([], "progress", False),
}
OF_THE_MODEL = {"pretrained_model_name_or_path", "revision", "variant", "allow_tf32"}
OF_THE_COVARIANCE = {"captions", "num_captions", "ridge", "cache_dir", "covariance"}
NOT_OF_TRAINING = {"help", "verbose", "preview"} | OF_THE_MODEL | OF_THE_COVARIANCE


@pytest.fixture
def flags(tmp_path, captions):
    """The flags that are always needed, and a covariance that is quickly computed."""
    model = ["--pretrained_model_name_or_path", MODEL]
    concept = ["--instance_data_dir", PICTURES, "--token", "<car-1>", "--superclass", "car"]
    folders = ["--output_dir", tmp_path / "out", "--captions", captions, "--cache_dir", tmp_path / "cache"]
    return ["train", *model, *concept, *folders]


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Put a stand-in in the place of `train_concept`; return the calls' arguments."""
    calls = []

    def stand_in(pipe, images, **options):
        if callable(options["covariance"]):
            options["covariance"] = options["covariance"]()
        calls.append(inspect.signature(train_concept).bind(pipe, images, **options).arguments)
        here = tmp_path / "out" / "my concept.safetensors"
        return TrainingSummary(
            "<car-1>",
            here,
            5000,
            700,
            7,
            0.125,
            (0.95, 1.04),
            3.0,
            (tmp_path / "a", tmp_path / "b"),
            (tmp_path / "p.png",),
            None,
        )

    monkeypatch.setattr(cli_train, "train_concept", stand_in)
    return calls


def test_each_argument_has_a_flag_and_each_flag_a_test():
    parameters = set(inspect.signature(train_concept).parameters)
    expected = parameters - cli_train.NOT_FLAGS - {"pipe"}
    assert {flag.argument for flags in cli_train.FLAGS.values() for flag in flags} == expected
    assert {argument for _, argument, _ in FLAGS.values()} | set(GIVEN) | {"output_dir"} == expected
    train = make_parser()._subparsers._group_actions[0].choices["train"]
    typed = {
        option.removeprefix("--")
        for action in train._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert typed - NOT_OF_TRAINING == set(FLAGS) | {"instance_data_dir", "token", "superclass", "output_dir"}


def test_without_flags_the_defaults_are_those_of_train_concept(run, flags, trained, tmp_path):
    code, _, err = run(*flags)
    (arguments,) = trained
    assert code == 0, err
    expected = {
        name: p.default
        for name, p in inspect.signature(train_concept).parameters.items()
        if p.default is not p.empty
    }
    pipe, covariance = arguments.pop("pipe"), arguments.pop("covariance")
    expected |= GIVEN | {"output_dir": tmp_path / "out"}
    assert arguments == {
        name: value for name, value in expected.items() if name not in ("captions", "covariance")
    }
    assert covariance.num_tokens == 20 * 75 and covariance.ridge == 1e-6
    assert pipe.unet.dtype == torch.float32


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_reaches_train_concept(run, flags, trained, tmp_path, monkeypatch, flag):
    """With the same type as the default's."""
    monkeypatch.setattr(
        cli_train, "cached_covariance", lambda *args, **options: InputCovariance(torch.eye(2))
    )
    monkeypatch.setattr(cli_train, "load_pipeline", lambda args, **options: None)
    typed, argument, expected = FLAGS[flag]
    assert run(*flags, f"--{flag}", *typed)[0] == 0
    assert run(*flags)[0] == 0
    changed, plain = trained
    assert changed[argument] == expected and type(changed[argument]) is type(expected)
    assert {name for name in plain if plain[name] is not changed[name] and plain[name] != changed[name]} <= {
        argument,
        "covariance",
    }


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_model_is_loaded_in_the_precision_that_is_asked_for(
    run, flags, trained, monkeypatch, precision, dtype
):
    monkeypatch.setattr(
        cli_train, "cached_covariance", lambda *args, **options: InputCovariance(torch.eye(2))
    )
    assert run(*flags, "--mixed_precision", precision)[0] == 0
    assert trained[0]["pipe"].unet.dtype == dtype


def test_the_covariance_of_a_file_and_of_other_settings(run, flags, trained, tmp_path):
    assert run(*flags, "--num_captions", "9", "--ridge", "0.01", "--allow_tf32")[0] == 0
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    assert (trained[0]["covariance"].num_tokens, trained[0]["covariance"].ridge) == (180, 0.01)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    trained[0]["covariance"].save(tmp_path / "c.safetensors")
    here = flags.index("--captions")
    assert run(*flags[:here], *flags[here + 2 :], "--covariance", tmp_path / "c.safetensors")[0] == 0
    assert torch.allclose(
        trained[1]["covariance"].matrix, trained[0]["covariance"].matrix, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--report_to": "nothing"}, "--report_to must be one of aim, "),
        ({"--mixed_precision": "fp16"}, "--mixed_precision must be 'no' or 'bf16' on a CPU"),
        (
            {"--instance_data_dir": "none"},
            "--instance_data_dir must be a folder of pictures or a list of them, got none",
        ),
        ({"--token": "<Car-1>"}, "--token must be one lower-case word"),
        ({"--superclass": " "}, "--superclass must be one or more words"),
        ({"--output_dir": __file__}, "--output_dir must be a folder that can be written to"),
    ],
)
def test_mistakes_are_found_before_the_covariance_is_computed(run, flags, tmp_path, changed, message):
    code, out, err = run(*flags, *(word for pair in changed.items() for word in pair))  # the last one counts
    lines = [line for line in err.splitlines() if "is given twice" not in line]
    assert (code, out) == (1, "") and message in err and len(lines) == 1
    assert not (tmp_path / "cache").exists()


def test_the_summary_says_what_to_type_next(run, flags, trained, tmp_path):
    code, out, _ = run(*flags)
    assert (
        code == 0
        and "700 numbers" in out
        and "7 steps, the last at a loss of 0.1250" in out
        and "(5,000 bytes)" in out
        and "r from 0.95 to 1.04 at the token" in out
    )
    assert f"{tmp_path / 'b'} and 1 before it" in out and str(tmp_path / "p.png") in out
    words = shlex.split(out.splitlines()[-1])
    args = make_parser().parse_args(words[1:])
    assert words[:2] == ["perfusion", "generate"] and args.concept == [
        str(tmp_path / "out" / "my concept.safetensors")
    ]
    assert args.pretrained_model_name_or_path == str(MODEL) and args.prompt == ["a photo of a <car-1>"]


@pytest.mark.slow
def test_from_pictures_to_pictures(run, flags, tmp_path):
    """A whole run, as short as can be, and the command that it suggests next.

    It finds the covariance that was computed beforehand.
    """
    beforehand = [
        "covariance",
        *flags[1:3],
        *flags[flags.index("--captions") :],
        "--device",
        "cpu",
        "--no_progress",
    ]
    assert run(*beforehand)[0] == 0
    cached = [(path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").iterdir()]
    code, out, err = run(
        *flags, "--max_train_steps", "2", "--train_batch_size", "2", "--checkpointing_steps", "1"
    )
    assert code == 0, err
    assert (
        len(cached) == 1
        and [(path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").iterdir()] == cached
    )
    concept = Concept.load(tmp_path / "out" / "concept.safetensors")
    assert (concept.token, concept.superclass) == ("<car-1>", "car")
    path = tmp_path / "out" / "concept.safetensors"
    assert f"{path} ({path.stat().st_size:,} bytes)" in out
    assert str(tmp_path / "out" / "checkpoint-2") in out and "2 steps" in out
    next_command = shlex.split(out.splitlines()[-1])[1:]
    assert run(*next_command, "--num_inference_steps", "2", "--output", tmp_path / "p.png")[0] == 0
    assert f"  resumes    {tmp_path}" not in err and f"  output     {tmp_path / 'out'}" in err
    assert re.search(r"step 1 of 2, loss \d\.\d{4}\nstep 2 of 2, loss", err)
    resume = ["--train_batch_size", "2", "--resume_from_checkpoint", "latest"]
    code, out, err = run(*flags, "--max_train_steps", "3", *resume)
    assert code == 0 and "3 steps" in out, err
    assert f"  resumes    {tmp_path / 'out' / 'checkpoint-2'}, after step 2 of 3\n" in err


def test_messages_are_about_flags(run, flags, monkeypatch):
    """Those of a run that was stopped, and those about the pipeline."""

    def stopped(*args, **options):
        raise Terminated(
            "Stopped; o/checkpoint-3 was written. Resume from 'latest' (`resume_from_checkpoint`)."
        )

    monkeypatch.setattr(cli_train, "train_concept", stopped)
    assert run(*flags) == (
        143,
        "",
        "perfusion: Stopped; o/checkpoint-3 was written. Resume from 'latest' (--resume_from_checkpoint).\n",
    )

    def refused(*args, **options):
        raise ValueError("`pipe` must have a VAE that is one of AutoencoderKL, got AutoencoderTiny.")

    monkeypatch.setattr(cli_train, "train_concept", refused)
    code, out, err = run(*flags)
    assert (code, out) == (1, "")
    assert "error: the model of --pretrained_model_name_or_path must have a VAE that is" in err


def test_what_the_library_logs_is_shown_and_the_log_is_as_before(run, flags, trained, monkeypatch):
    stand_in, logger = cli_train.train_concept, logging.getLogger("perfusion_pytorch")

    def speaking(*args, **options):
        logging.getLogger("perfusion_pytorch.training.progress").info("step 1 of %d", 7)
        return stand_in(*args, **options)

    monkeypatch.setattr(cli_train, "train_concept", speaking)
    before = (logger.level, logger.propagate, list(logger.handlers))
    code, _, err = run(*flags, "--no_progress")
    assert (code, err) == (0, "step 1 of 7\n")
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


@pytest.mark.slow
def test_sigterm_ends_the_command_with_a_checkpoint_and_143(flags, tmp_path):
    command = [sys.executable, "-m", "perfusion_pytorch", *map(str, flags), "--max_train_steps", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--train_batch_size", "1"], env=environment, **pipes)
    for line in process.stderr:
        if line.startswith("step 1 of 100000, loss"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    (last,) = err.splitlines()
    assert process.returncode == 143
    assert re.fullmatch(
        r"perfusion: Stopped; .*/out/checkpoint-\d+ was written. Resume from 'latest' "
        r"\(--resume_from_checkpoint\).",
        last,
    )
    assert [path.name[:11] for path in (tmp_path / "out").iterdir()] == ["checkpoint-"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_stable_diffusion_is_trained_and_used(run, tmp_path, kind):
    tiny_pipe(kind).save_pretrained(tmp_path / "model")
    covariance_of(kind).save(tmp_path / "c.safetensors")
    model = ["--pretrained_model_name_or_path", tmp_path / "model"]
    train = [
        "train",
        *model,
        "--instance_data_dir",
        PICTURES,
        "--token",
        "<car-1>",
        "--superclass",
        "car",
        "--output_dir",
        tmp_path / "out",
    ]
    options = [
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "2",
        "--checkpointing_steps",
        "1",
        "--covariance",
        tmp_path / "c.safetensors",
    ]
    code, out, err = run(*train, *options, "--instance_prompt", "a {}", "--no_progress")
    assert (
        code == 0
        and "2 steps" in out
        and Concept.load(tmp_path / "out" / "concept.safetensors").token == "<car-1>"
    ), err
    generate = [
        "generate",
        *model,
        "--concept",
        tmp_path / "out" / "concept.safetensors",
        "--prompt",
        "a <car-1>",
        "--device",
        "cpu",
    ]
    code, out, err = run(
        *generate, "--num_inference_steps", "2", "--no_progress", "--output", tmp_path / "p.png"
    )
    assert code == 0 and Image.open(tmp_path / "p.png").size == (RESOLUTION, RESOLUTION), err
