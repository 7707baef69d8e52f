"""The loop of a run: stopped by errors and Ctrl-C, and its progress bar."""

import os
import re
import signal

import pytest
import torch
from helpers.small_model import assert_unchanged, state_of
from helpers.tiny_pipes import (
    IMAGES,
    assert_same_runs,
    learned,
    options_for,
    tiny_pipe,
)

from perfusion_pytorch import (
    loss_fn_weighted_by_mask,
    train_concept,
)
from perfusion_pytorch.training import loop, progress
from perfusion_pytorch.training.interruption import Terminated
from perfusion_pytorch.training.step import Trainer


def fail_at(step, error):
    """Make a step raise."""

    def patched(self, number, interruption, _step=Trainer.step):
        if number == step:
            raise error
        return _step(self, number, interruption)

    return patched


def test_after_an_exception_the_pipeline_is_what_it_was(tmp_path, monkeypatch):
    pipe = tiny_pipe("SDXL")
    pipe.unet.requires_grad_(True).train()
    state = state_of(pipe)
    monkeypatch.setattr(Trainer, "step", fail_at(2, MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        train_concept(pipe, IMAGES, **options_for(tmp_path, "SDXL", gradient_checkpointing=True))
    assert_unchanged(pipe, state)
    assert not pipe.unet.is_gradient_checkpointing and os.listdir(tmp_path) == ["checkpoint-2"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    from perfusion_pytorch.training import step as trainer

    losses = iter([1.0, 1.0, 1.0, float("nan")])

    def spoiled(*args):
        return loss_fn_weighted_by_mask(*args) * next(losses)

    monkeypatch.setattr(trainer, "loss_fn_weighted_by_mask", spoiled)
    with pytest.raises(RuntimeError, match="The loss must be finite, got nan in step 4"):
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path))
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in learned(tmp_path, 2).values())


def test_what_is_trained_and_not_finite_is_not_saved(tmp_path, monkeypatch):
    """The loss of a step says nothing of what the step itself made of the parameters."""

    def spoiled(self, number, interruption, _step=Trainer.step):
        result = _step(self, number, interruption)
        if number == 3:
            self.phase.parameters[0].data.view(-1)[0] = float("inf")
        return result

    monkeypatch.setattr(Trainer, "step", spoiled)
    with pytest.raises(
        RuntimeError,
        match=r"What is trained must be finite, but after step 4 '.*' is not. Lower the learning rates",
    ):
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, checkpoints_total_limit=1))
    assert os.listdir(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("signum", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_ctrl_c_saves_a_checkpoint_from_which_the_run_ends_bit_for_bit(signum, error, tmp_path, monkeypatch):
    """So does SIGTERM."""
    options = options_for(
        tmp_path / "one", lr_scheduler="cosine", lr_warmup_steps=2, max_grad_norm=0.1, adam_weight_decay=0.1
    )
    train_concept(tiny_pipe(), IMAGES, **options)
    options["output_dir"] = tmp_path / "two"
    pipe = tiny_pipe()
    state = state_of(pipe)

    def interrupted(self, number, interruption, _step=Trainer.step):
        if number == 2:
            os.kill(os.getpid(), signum)
        return _step(self, number, interruption)

    before = signal.getsignal(signum)
    with (
        monkeypatch.context() as patch,
        pytest.raises(error, match=r"checkpoint-3 was written. Resume from 'latest'") as stop,
    ):
        patch.setattr(Trainer, "step", interrupted)
        train_concept(pipe, IMAGES, **options)
    assert type(stop.value) is error and getattr(stop.value, "exit_code", 130) == 128 + signum
    assert signal.getsignal(signum) is before
    assert_unchanged(pipe, state)
    assert not (tmp_path / "two" / "concept.safetensors").exists()
    torch.manual_seed(5)  # which must mean nothing
    train_concept(pipe, IMAGES, **options, resume_from_checkpoint="latest")
    assert_same_runs(tmp_path / "one", tmp_path / "two", 4)


def test_the_progress_bar_shows_the_loss_and_without_it_nothing_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "can_show_bars", lambda: True)
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a"))
    assert capsys.readouterr() == ("", "")
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "b", progress=True))
    out, err = capsys.readouterr()
    assert out == "" and re.search(r"training: +100%.*4/4.*loss=\d\.\d{4}", err)


def test_without_a_terminal_a_line_is_logged_now_and_then(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "perfusion_pytorch")
    clock = iter(range(0, 10_000, 25))  # 25 s a step
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    options = options_for(tmp_path, max_train_steps=8, progress=True)
    summary = train_concept(tiny_pipe(), IMAGES, **options)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("progress")]
    assert [re.sub(r"loss \d+\.\d{4}", "loss", line) for line in lines] == [
        "step 1 of 8, loss",
        "step 4 of 8, loss, about 2 min left",
        "step 7 of 8, loss, less than a minute left",
        "step 8 of 8, loss",
    ]
    assert f"loss {summary.loss:.4f}" in lines[-1]


def test_without_progress_and_in_a_terminal_no_line_is_logged(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "perfusion_pytorch")
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a"))
    monkeypatch.setattr(loop, "can_show_bars", lambda: True)
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "b", progress=True))
    assert not [record for record in caplog.records if record.name.endswith("progress")]


def test_sigterm_before_the_steps_undoes_what_was_begun(tmp_path):
    pipe = tiny_pipe()
    state = state_of(pipe)
    options = options_for(tmp_path / "run", covariance=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated, match="Stopped before or after the steps"):
        train_concept(pipe, IMAGES, **options)
    assert_unchanged(pipe, state)
    assert not (tmp_path / "run").exists() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_callers_for_sigterm_stays(tmp_path, monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *args: heard.append(args[0]))

    def step(self, number, interruption, _step=Trainer.step):
        os.kill(os.getpid(), signal.SIGTERM)
        return _step(self, number, interruption)

    monkeypatch.setattr(Trainer, "step", step)
    try:
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] * 4


def test_the_lines_of_a_long_run_are_one_a_minute_and_say_what_is_left(caplog, monkeypatch):
    caplog.set_level("INFO", "perfusion_pytorch")
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = progress.LogLines(8000, is_enabled=True)
    for step in range(1, 8001):
        clock[0] += 0.9
        lines.step_done(step, 0.25)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 1 + 7999 // 67 + 1 and texts[0] == "step 1 of 8000, loss 0.2500"
    assert texts[1] == "step 68 of 8000, loss 0.2500, about 119 min left"
    assert texts[-2].endswith("less than a minute left") and texts[-1] == "step 8000 of 8000, loss 0.2500"
