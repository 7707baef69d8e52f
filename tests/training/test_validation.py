"""Validation pictures change nothing else, and missing ones are made on resuming."""

import os
import signal

import pytest
import torch
from helpers.tiny_pipes import (
    IMAGES,
    RESOLUTION,
    options_for,
    tiny_pipe,
)
from PIL import Image
from safetensors.torch import load_file

from perfusion_pytorch import (
    train_concept,
)
from perfusion_pytorch.training import loop


@pytest.mark.slow
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


def test_a_validation_prompt_with_a_longer_token_does_not_hold_the_concept(tmp_path):
    """Its picture is the one without an edit: `my-car` is not in `my-car2`."""
    pipe = tiny_pipe()
    pipe.tokenizer.add_tokens(["my-car2"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    options = {"token": "my-car", "validation_prompt": "a my-car2", "num_validation_images": 1}
    summary = train_concept(pipe, IMAGES, **options_for(tmp_path, **options, validation_steps=9))
    (path,) = summary.validation_pictures
    picture = pipe("a my-car2", num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.tobytes() == Image.open(path).tobytes()


@pytest.mark.slow
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


def test_ctrl_c_ends_validation_pictures_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "can_show_bars", lambda: True)
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
