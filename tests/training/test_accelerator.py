"""accelerate as a run uses it: processes, precision, trackers."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_pipes import (
    IMAGES,
    assert_close,
    assert_same_runs,
    learned,
    options_for,
    tiny_pipe,
)

from perfusion_pytorch import (
    train_concept,
)


def test_a_tracker_gets_loss_and_rates(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {
        "report_to": "tensorboard",
        "logging_dir": "told",
        "lr_scheduler": "linear",
        "lr_warmup_steps": 2,
    }
    summary = train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, **options))
    (folder,) = summary.logging_dir.iterdir()
    events = reading.EventAccumulator(str(folder)).Reload()
    assert summary.logging_dir == tmp_path / "told" and [e.step for e in events.Scalars("loss")] == [
        1,
        2,
        3,
        4,
    ]
    assert events.Scalars("loss")[-1].value == pytest.approx(summary.loss)
    assert [e.value for e in events.Scalars("lr_output")] == pytest.approx([0.0, 0.015, 0.03, 0.015])
    assert [e.value for e in events.Scalars("lr_embedding")] == pytest.approx([0.0, 0.003, 0.006, 0.003])


@pytest.mark.parametrize("interval", [2, 100])
def test_the_scaler_of_half_precision_is_resumed_with_the_rest(interval, tmp_path, monkeypatch):
    """As on a GPU in float16, where accelerate scales the loss: no step is lost, and resuming is exact."""
    from perfusion_pytorch.training import accelerator as module
    from perfusion_pytorch.training import train

    def scaling(*args):
        accelerator = module.make_accelerator(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=interval)
        return accelerator

    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "plain"))
    monkeypatch.setattr(train, "make_accelerator", scaling)
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "whole"))
    assert_close(learned(tmp_path / "whole", 4), learned(tmp_path / "plain", 4), rtol=1e-3)
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "resumed", max_train_steps=2))
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "resumed"), resume_from_checkpoint="latest")
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed", 4)
    about = [
        json.loads((tmp_path / run / "checkpoint-4" / "state.json").read_text())["scaler"]
        for run in ("whole", "resumed")
    ]
    assert about[0] == about[1] and about[0]["scale"] == (1024.0 if interval == 2 else 256.0)


@pytest.mark.parametrize(
    ("report_to", "installed", "message"),
    [
        ("foo", ["tensorboard"], r"one of aim, clearml, .*, 'all' or 'none', got 'foo'. Installed are"),
        ("TensorBoard", ["tensorboard"], "'all' or 'none', got 'TensorBoard'"),
        (
            "comet_ml",
            ["tensorboard"],
            r"an installed tracker, \['tensorboard'\], .* Run pip install comet-ml",
        ),
        ("all", [], "is 'all', but no tracker is installed. Leave it out, or install one of aim, clearml"),
    ],
)
def test_only_known_trackers_are_advised(report_to, installed, message, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: installed)
    with pytest.raises(ValueError, match=message) as raised:
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, report_to=report_to))
    assert "pip install foo" not in str(raised.value)


def test_all_and_none_are_trackers_too(tmp_path):
    pytest.importorskip("tensorboard")
    everything = train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a", report_to="all"))
    nothing = train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "b", report_to="none"))
    assert list(everything.logging_dir.rglob("events*")) and nothing.logging_dir is None
    assert not (tmp_path / "b" / "logs").exists()


def test_training_that_splits_models_up_is_refused(tmp_path, monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType.DEEPSPEED)
    with pytest.raises(
        ValueError, match="must run plain data parallelism, since a concept is small, got DEEPSPEED"
    ):
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path))


def test_processes_that_accelerate_does_not_see_are_refused(tmp_path, monkeypatch):
    from perfusion_pytorch.training import accelerator

    two = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setattr(accelerator, "distributed", two)
    with pytest.raises(
        RuntimeError,
        match=r"torch.distributed runs 2 processes, but accelerate sees 1. Start them with `torchrun`",
    ):
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path))


def test_another_accelerator_mid_accumulation_does_not_stop_the_optimizer(tmp_path):
    from accelerate.state import GradientState

    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a"))
    GradientState()._set_sync_gradients(False)
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "b"))
    assert_same_runs(tmp_path / "a", tmp_path / "b", 4)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_what_the_callers_code_is_in_changes_nothing(mode, tmp_path):
    plain = train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a"))
    pipe, options = tiny_pipe(), options_for(tmp_path / "b")
    with mode():
        other = train_concept(pipe, IMAGES, **options)
    assert_same_runs(tmp_path / "a", tmp_path / "b", 4)
    assert (other.loss, other.similarity) == (plain.loss, plain.similarity)
