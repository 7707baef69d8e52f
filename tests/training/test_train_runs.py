"""A training run: how it is stopped, resumed, looked at, and what is refused before it begins."""

import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers.small_model import assert_unchanged, state_of
from helpers.tiny_pipes import (
    IMAGES,
    KINDS,
    RESOLUTION,
    assert_close,
    assert_same_runs,
    covariance_of,
    learned,
    options_for,
    tiny_pipe,
)
from PIL import Image
from safetensors.torch import load_file

from perfusion_pytorch import (
    loss_fn_weighted_by_mask,
    train_concept,
    unload_concepts,
    wrap_cross_attentions_,
)
from perfusion_pytorch.training.state import num_checkpoint_bytes
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
            self.parameters[0].data.view(-1)[0] = float("inf")
        return result

    monkeypatch.setattr(Trainer, "step", spoiled)
    with pytest.raises(
        RuntimeError,
        match=r"What is trained must be finite, but after step 4 '.*' is not. Lower the learning rates",
    ):
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, checkpoints_total_limit=1))
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_ctrl_c_saves_a_checkpoint_from_which_the_run_ends_bit_for_bit(tmp_path, monkeypatch):
    options = options_for(
        tmp_path / "one", lr_scheduler="cosine", lr_warmup_steps=2, max_grad_norm=0.1, adam_weight_decay=0.1
    )
    train_concept(tiny_pipe(), IMAGES, **options)
    options["output_dir"] = tmp_path / "two"
    pipe = tiny_pipe()
    state = state_of(pipe)

    def interrupted(self, number, interruption, _step=Trainer.step):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return _step(self, number, interruption)

    before = signal.getsignal(signal.SIGINT)
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match=r"checkpoint-3 was written. Resume from 'latest'"),
    ):
        patch.setattr(Trainer, "step", interrupted)
        train_concept(pipe, IMAGES, **options)
    assert signal.getsignal(signal.SIGINT) is before
    assert_unchanged(pipe, state)
    assert not (tmp_path / "two" / "concept.safetensors").exists()
    torch.manual_seed(5)  # which must mean nothing
    train_concept(pipe, IMAGES, **options, resume_from_checkpoint="latest")
    assert_same_runs(tmp_path / "one", tmp_path / "two", 4)


def test_what_a_resumed_run_says(tmp_path):
    options = options_for(tmp_path, max_train_steps=2)
    with pytest.warns(UserWarning, match="no checkpoint in .* to resume from; training starts anew"):
        train_concept(tiny_pipe(), IMAGES, **options, resume_from_checkpoint="latest")
    with pytest.raises(
        ValueError, match=r"must hold no checkpoints of another run, but .* has \['checkpoint-2'\]"
    ):
        train_concept(tiny_pipe(), IMAGES, **options)
    with pytest.raises(FileNotFoundError, match=r"got 'checkpoint-9'. There are \['checkpoint-2'\]"):
        train_concept(tiny_pipe(), IMAGES, **options, resume_from_checkpoint="checkpoint-9")
    with pytest.raises(ValueError, match="must be of the superclass 'house', got one of 'car'"):
        train_concept(
            tiny_pipe(), IMAGES, **options | {"superclass": "house"}, resume_from_checkpoint="latest"
        )
    with pytest.raises(ValueError, match="must be of the token '<car-2>', got one of '<car-1>'"):
        other = options | {
            "token": "<car-2>",
            "covariance": lambda: pytest.fail("the covariance was computed"),
        }
        train_concept(tiny_pipe(), IMAGES, **other, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="`max_train_steps` must be at least 2"):
        train_concept(
            tiny_pipe(), IMAGES, **options | {"max_train_steps": 1}, resume_from_checkpoint="latest"
        )
    with pytest.warns(UserWarning, match="other settings than it began with: seed, pictures"):
        changed = options | {"seed": 1, "masks": None}
        train_concept(tiny_pipe(), IMAGES, **changed, resume_from_checkpoint=tmp_path / "checkpoint-2")
    wide, pipe = tiny_pipe("SDXL"), tiny_pipe()
    state = state_of(wide)
    with (
        pytest.warns(UserWarning, match="covariance, model"),
        pytest.raises(ValueError, match=r"must be of this model, but 'down.* shape \(1, 1, 32\)"),
    ):
        train_concept(
            wide,
            IMAGES,
            **options | {"covariance": covariance_of("SDXL")},
            resume_from_checkpoint="checkpoint-2",
        )
    assert_unchanged(wide, state)
    summary = train_concept(
        pipe, IMAGES, **options | {"max_train_steps": 3}, resume_from_checkpoint="checkpoint-2"
    )
    assert summary.num_steps == 3  # a longer run at a constant rate is the same run
    train_concept(
        tiny_pipe(), IMAGES, **options | {"max_train_steps": 4}, resume_from_checkpoint="checkpoint-2"
    )
    with pytest.raises(
        ValueError,
        match=r"no checkpoints after checkpoint-2, .* has \['checkpoint-4'\]. Resume from 'latest'",
    ):
        train_concept(
            tiny_pipe(), IMAGES, **options | {"max_train_steps": 4}, resume_from_checkpoint="checkpoint-2"
        )
    train_concept(
        tiny_pipe(),
        IMAGES,
        **options_for(tmp_path / "elsewhere"),
        resume_from_checkpoint=tmp_path / "checkpoint-2",
    )


def test_validation_pictures_change_nothing_else(tmp_path):
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a"))
    prompts = {
        "validation_prompt": ["a <car-1>", "a photo"],
        "num_validation_images": 3,
        "validation_steps": 3,
    }
    summary = train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "b", **prompts))
    assert [path.name for path in summary.validation_pictures] == [
        "validation-000003.png",
        "validation-000004.png",
    ]
    for path in summary.validation_pictures:
        assert Image.open(path).size == (3 * RESOLUTION, 2 * RESOLUTION)
    one, two = (load_file(tmp_path / run / "checkpoint-4" / "state.safetensors") for run in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    pipe = tiny_pipe()
    prompts = {"validation_prompt": "a <car-1>", "num_validation_images": 1, "validation_steps": 9}
    summary = train_concept(pipe, IMAGES, **options_for(tmp_path / "c", **prompts))
    (path,) = summary.validation_pictures
    picture = pipe("a <car-1>", num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images[0]
    differences = [abs(a - b) for a, b in zip(picture.tobytes(), Image.open(path).tobytes(), strict=True)]
    assert max(differences) <= 3  # the file holds half precision


def test_validation_pictures_that_a_kill_left_out_are_made_on_resuming(tmp_path, monkeypatch):
    from perfusion_pytorch.training import loop as training_loop

    def killed(*args, **options):
        raise SystemExit

    options = options_for(
        tmp_path, validation_prompt="a <car-1>", num_validation_images=1, validation_steps=4
    )
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training_loop, "write_validation_grid", killed)
        train_concept(tiny_pipe(), IMAGES, **options)
    assert os.listdir(tmp_path / "checkpoint-4") and not list(tmp_path.glob("*.png"))
    summary = train_concept(tiny_pipe(), IMAGES, **options, resume_from_checkpoint="latest")
    assert [path.name for path in summary.validation_pictures] == ["validation-000004.png"]
    train_concept(
        tiny_pipe(),
        IMAGES,
        **options_for(tmp_path / "whole", **{"validation_prompt": "a <car-1>", "num_validation_images": 1}),
    )
    assert (tmp_path / "whole" / "validation-000004.png").read_bytes() == summary.validation_pictures[
        0
    ].read_bytes()


def test_ctrl_c_ends_validation_pictures_at_once(tmp_path, capsys):
    pipe, made = tiny_pipe(), []

    class Pressing(type(pipe)):
        def __call__(self, *args, **options):
            made.append(options)
            os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(*args, **options)

    pipe.__class__ = Pressing
    options = {
        "validation_prompt": "a <car-1>",
        "num_validation_images": 3,
        "validation_steps": 1,
        "progress": True,
    }
    with pytest.raises(KeyboardInterrupt, match="checkpoint-2 was written"):
        train_concept(pipe, IMAGES, **options_for(tmp_path, **options, checkpointing_steps=None))
    assert len(made) == 1 and os.listdir(tmp_path) == ["checkpoint-2"]
    assert "stopping after this step (again: at once)" in capsys.readouterr().err


def test_the_progress_bar_shows_the_loss_and_without_it_nothing_is_printed(tmp_path, capsys):
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a"))
    assert capsys.readouterr() == ("", "")
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "b", progress=True))
    out, err = capsys.readouterr()
    assert out == "" and re.search(r"training: +100%.*4/4.*loss=\d\.\d{4}", err)


def test_a_tracker_is_told_loss_and_rates(tmp_path):
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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_train_steps": 0}, "`max_train_steps` must be at least 1, got 0"),
        ({"checkpointing_steps": 0}, "`checkpointing_steps` must be at least 1, or None, got 0"),
        ({"learning_rate": float("inf")}, "`learning_rate` must be at least 0 and finite"),
        ({"lr_warmup_steps": -1}, "`lr_warmup_steps` must be at least 0"),
        ({"lr_scheduler": "steep"}, "`lr_scheduler` must be one of constant, .*, got 'steep'"),
        ({"max_grad_norm": 0}, "`max_grad_norm` must be above 0, or None"),
        ({"adam_beta2": 1.0}, "`adam_beta2` must be at least 0 and below 1"),
        ({"adam_epsilon": -1e-8}, "`adam_epsilon` must be at least 0 and finite"),
        ({"timestep_power": 0}, "`timestep_power` must be above 0 and finite"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be 'no', 'fp16', 'bf16' or None, got 'fp8'"),
        ({"mixed_precision": "fp16"}, "must be 'no' or 'bf16' on a CPU, got 'fp16'"),
        ({"report_to": "pigeon"}, "`report_to` must be an installed tracker, .*, got 'pigeon'"),
        ({"mask_model": "CIDAS/clipseg"}, "cannot be given along with `masks`"),
        ({"resolution": 17}, "`resolution` must be a multiple of 2 pixels, got 17"),
        ({"token": "<Car>"}, "`token` must be one lower-case word"),
        ({"superclass": ""}, "`superclass` must be one or more words"),
        ({"templates": ["a photo"]}, "`templates` must be"),
        ({"captions": ["a house"] * 3}, "A caption must name the concept"),
        ({"captions": ["a red " * 20 + "car"] * 3}, "was lost from the prompt"),
        (
            {"validation_prompt": ["a car", "a <Car-1>"]},
            "must be written '<car-1>', in lower case, got the prompt 'a <Car-1>'",
        ),
        ({"validation_prompt": "a red " * 20 + "<car-1>"}, "was lost from the prompt"),
        ({"train_temperature": 0}, "`train_temperature` must be above 0"),
        ({"covariance": torch.eye(5)}, "takes 12 features, but the covariance is of 5"),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    pipe, computed = tiny_pipe(), []
    state = state_of(pipe)
    with pytest.raises(ValueError, match=message):
        train_concept(
            pipe, IMAGES, **options_for(tmp_path, **{"covariance": lambda: computed.append(1)} | options)
        )
    assert_unchanged(pipe, state)
    assert not list(tmp_path.iterdir()) and not computed


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_without_room_for_the_checkpoints_is_found_first(tmp_path, monkeypatch, kind):
    summary = train_concept(tiny_pipe(kind), IMAGES, **options_for(tmp_path / "a", kind))
    size, expected = (
        sum(path.stat().st_size for path in summary.checkpoints[-1].iterdir()),
        num_checkpoint_bytes(tiny_pipe(kind)),
    )
    assert size <= expected <= size + 2**17
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * expected - 1)
    )  # two checkpoints, two to spare
    options = options_for(tmp_path / "b", kind, covariance=lambda: pytest.fail("the covariance was computed"))
    with pytest.raises(OSError, match=f"at least {4 * expected:,} bytes free, got {4 * expected - 1:,}"):
        train_concept(tiny_pipe(kind), IMAGES, **options)


def test_pipelines_that_are_refused(tmp_path):
    pipe = tiny_pipe()
    options = options_for(tmp_path)
    pipe.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(
        ValueError, match="`prediction_type` must be one of epsilon, v_prediction, sample, got 'flow'"
    ):
        train_concept(pipe, IMAGES, **options)
    pipe.scheduler.register_to_config(prediction_type="epsilon")
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes latents alone, of 4 channels, got 9"):
        train_concept(pipe, IMAGES, **options)
    pipe.unet.register_to_config(in_channels=4)
    pipe.unet._hf_hook = object()
    with pytest.raises(ValueError, match="must not be offloaded"):
        train_concept(pipe, IMAGES, **options)
    del pipe.unet._hf_hook
    train_concept(pipe, IMAGES, **options)
    with pytest.raises(ValueError, match="must have no loaded concepts"):
        train_concept(pipe, IMAGES, **options | {"token": "<car-2>", "output_dir": tmp_path / "two"})
    unload_concepts(pipe)
    wrap_cross_attentions_(pipe.unet, C=None)
    with pytest.raises(ValueError, match="must not be wrapped for training already"):
        train_concept(pipe, IMAGES, **options)


@pytest.mark.parametrize("interval", [2, 100])
def test_the_scaler_of_half_precision_is_resumed_with_the_rest(interval, tmp_path, monkeypatch):
    """As on a GPU in float16, where accelerate scales the loss: no step is lost, and a resumed run ends bit for bit."""
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


def test_masks_by_a_model_and_covariance_by_default(tmp_path, monkeypatch):
    from perfusion_pytorch.training import inputs

    asked = []

    def add_masks(pictures, text, model, *, device):
        asked.append((len(pictures), text, model, str(device)))
        return pictures

    monkeypatch.setattr(inputs, "add_masks", add_masks)
    monkeypatch.setattr(
        inputs, "cached_covariance", lambda pipe, **rest: asked.append(rest) or covariance_of()
    )
    train_concept(
        tiny_pipe(), IMAGES, **options_for(tmp_path, masks=None, covariance=None, mask_model="CIDAS/clipseg")
    )
    assert asked == [(3, "car", "CIDAS/clipseg", "cpu"), {"progress": False}]
    train_concept(
        tiny_pipe(),
        IMAGES,
        **options_for(tmp_path / "c", covariance=lambda: asked.append("C") or covariance_of()),
    )
    assert asked[2:] == ["C"]
    for wrong in (
        {"lr_scheduler": "steep"},
        {"input_decay": 1.0},
        {"captions": []},
        {"output_dir": "/proc/run"},
    ):
        options = options_for(tmp_path / "d", covariance=lambda: asked.append("D")) | wrong
        with pytest.raises((ValueError, OSError), match=f"`{next(iter(wrong))}` must"):
            train_concept(tiny_pipe(), IMAGES, **options)
    assert asked[3:] == []  # what is wrong is found first


def test_the_pipeline_is_on_the_device_from_the_covariance_on_and_goes_back(tmp_path, monkeypatch):
    from perfusion_pytorch.training import train

    pipe, moves = tiny_pipe(), []

    class Accelerator(type(train.make_accelerator(pipe, None, None, tmp_path))):
        device = torch.device("meta")

    def stop():
        moves.append(pipe.device.type)
        raise MemoryError("no room")

    monkeypatch.setattr(
        type(pipe), "device", property(lambda self: torch.device(moves[-1] if moves else "cpu"))
    )
    monkeypatch.setattr(type(pipe), "to", lambda self, device: moves.append(device.type))
    monkeypatch.setattr(train, "make_accelerator", lambda *args: Accelerator())
    with pytest.raises(MemoryError):
        train_concept(pipe, IMAGES, **options_for(tmp_path, covariance=stop))
    assert moves == ["meta", "meta", "cpu"]  # there, computed there, back


def test_plans_that_take_models_apart_are_refused(tmp_path, monkeypatch):
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


def test_an_accelerator_amid_its_own_accumulation_does_not_stop_the_optimizer(tmp_path):
    from accelerate.state import GradientState

    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a"))
    GradientState()._set_sync_gradients(False)
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "b"))
    assert_same_runs(tmp_path / "a", tmp_path / "b", 4)
