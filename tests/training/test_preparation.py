"""A pipeline while it is trained: which are refused, and where it is."""

import pytest
import torch
from helpers.tiny_pipes import (
    IMAGES,
    options_for,
    tiny_pipe,
)

from perfusion_pytorch import (
    train_concept,
    unload_concepts,
    wrap_cross_attentions_,
)


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
    with pytest.raises(
        ValueError, match="takes and makes latents alone, of 4 channels, got `in_channels` of 9"
    ):
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


def test_the_pipeline_is_moved_before_the_covariance_is_computed_and_goes_back(tmp_path, monkeypatch):
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
