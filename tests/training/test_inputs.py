"""Pictures, masks and covariance of a run."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.pictures import half_red, left_white
from helpers.tiny_pipes import (
    IMAGES,
    MASKS,
    RESOLUTION,
    covariance_of,
    options_for,
    tiny_pipe,
    with_trainer,
)
from PIL import Image

from perfusion_pytorch import (
    train_concept,
)
from perfusion_pytorch.training.inputs import load_inputs
from perfusion_pytorch.training.options import TrainingOptions


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
    for wrong, name in ((lambda: covariance_of().matrix, "Tensor"), (lambda: None, "NoneType")):
        with pytest.raises(ValueError, match=f"`covariance` must be an InputCovariance, .* returned {name}"):
            train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "e", covariance=wrong))
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


def test_masks_that_a_mask_model_replaces_are_told(tmp_path, monkeypatch):
    from perfusion_pytorch.training import inputs

    (tmp_path / "pictures" / "masks").mkdir(parents=True)
    half_red(RESOLUTION, RESOLUTION).save(tmp_path / "pictures" / "a.png")
    white = torch.ones(RESOLUTION, RESOLUTION)
    monkeypatch.setattr(
        inputs, "add_masks", lambda pictures, *rest, **options: [replace(pictures[0], mask=white)]
    )
    options = {"masks": None, "mask_model": "a/clipseg"}
    with (
        pytest.warns(UserWarning, match="masks is not used, since `mask_model` makes the masks"),
        pytest.warns(UserWarning, match="mark all of the square keep nothing out: a.png"),
    ):
        with_trainer(tmp_path / "out", lambda trainer: None, tmp_path / "pictures", **options)


def test_generators_and_arrays_train_as_lists_do(tmp_path):
    def material(images, masks):
        return with_trainer(tmp_path / "out", lambda trainer: trainer.material, images, masks=masks)

    expected = material(IMAGES, MASKS)
    tensors = torch.stack([torch.tensor(np.asarray(image)).movedim(-1, 0) / 255 for image in IMAGES])
    arrays = np.stack([np.asarray(mask) > 0 for mask in MASKS])
    for images, masks in (
        (iter(IMAGES), (mask for mask in MASKS)),
        (tuple(IMAGES), arrays),
        (tensors, MASKS),
    ):
        found = material(images, masks)
        assert torch.equal(found.latents, expected.latents) and torch.equal(found.masks, expected.masks)


def test_cut_outs_alone_train_with_their_alpha_channels_as_masks(tmp_path):
    images = [half_red(RESOLUTION, RESOLUTION).rotate(90 * i).convert("RGBA") for i in range(3)]
    for image in images:
        image.putalpha(left_white(RESOLUTION, RESOLUTION))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        masks = with_trainer(tmp_path, lambda trainer: trainer.material.masks, images, masks=None)
    half = RESOLUTION // 4
    assert (masks[..., :half] == 1).all() and (masks[..., half:] == 0).all()


def test_a_photo_that_is_16_bits_deep_is_not_trained_as_white(tmp_path):
    greys = np.arange(RESOLUTION**2, dtype="<u2").reshape(RESOLUTION, RESOLUTION) * 257
    deep = Image.frombytes("I;16", greys.shape, greys.tobytes())
    plain = Image.fromarray((greys // 257).astype(np.uint8))

    def latents(image):
        return with_trainer(tmp_path, lambda trainer: trainer.material.latents, [image], masks=None)

    assert torch.equal(latents(deep), latents(plain))


def test_a_model_that_does_not_say_its_resolution_needs_one(tmp_path):
    pipe = tiny_pipe()
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(
        ValueError, match="`resolution` must be given, since the UNet's `sample_size` is None"
    ):
        train_concept(pipe, IMAGES, **options_for(tmp_path))
    options = TrainingOptions(images=IMAGES, **options_for(tmp_path, resolution=RESOLUTION))
    assert load_inputs(pipe, options, torch.device("cpu")).resolution == RESOLUTION
    train_concept(pipe, IMAGES, **options_for(tmp_path, resolution=RESOLUTION, max_train_steps=1))
