"""Pictures, masks and covariance of a run."""

import pytest
from helpers.tiny_pipes import (
    IMAGES,
    covariance_of,
    options_for,
    tiny_pipe,
)

from perfusion_pytorch import (
    train_concept,
)


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
