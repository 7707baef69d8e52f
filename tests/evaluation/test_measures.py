"""CLIP and DINO, against what they compute, written out in plain torch."""

import json

import pytest
import torch
from helpers.tiny_judges import clip_of_pictures, clip_of_text, dino_of_pictures
from helpers.tiny_pipes import disc
from PIL import Image

from perfusion_pytorch.evaluation.measures import ClipMeasure, DinoMeasure, picture_change

TRAINING = [disc(i) for i in range(3)]
PICTURES = [Image.new("RGB", (16, 16), "red"), disc(1).rotate(90), disc(2).transpose(Image.FLIP_TOP_BOTTOM)]
TEXTS = ["a car on red", "a photo of a car", "a house"]


def near(values):
    return pytest.approx(values, abs=2e-6)


def test_clip_text_is_the_cosine_of_picture_and_text(clip):
    pictures = clip_of_pictures(clip, PICTURES)
    expected = [(p @ clip_of_text(clip, text)).item() for p, text in zip(pictures, TEXTS, strict=True)]
    found = ClipMeasure(clip, TRAINING).scores(PICTURES, TEXTS)
    assert found["CLIP text"] == near(expected) and max(expected) - min(expected) > 0.05


def test_clip_image_is_the_mean_cosine_with_the_training_pictures(clip):
    pictures, training = clip_of_pictures(clip, PICTURES), clip_of_pictures(clip, TRAINING)
    expected = [sum((p @ t).item() for t in training) / 3 for p in pictures]
    found = ClipMeasure(clip, TRAINING).scores(PICTURES, TEXTS)
    assert list(found) == ["CLIP image", "CLIP text"] and found["CLIP image"] == near(expected)
    assert max(expected) - min(expected) > 0.01


def test_dino_is_the_mean_cosine_of_class_tokens_with_the_training_pictures(dino):
    pictures, training = dino_of_pictures(dino, PICTURES), dino_of_pictures(dino, TRAINING)
    expected = [sum((p @ t).item() for t in training) / 3 for p in pictures]
    assert DinoMeasure(dino, TRAINING).scores(PICTURES, TEXTS) == {"DINO": near(expected)}
    assert max(expected) - min(expected) > 0.01


def test_the_ceiling_compares_each_training_picture_with_the_others(clip, dino):
    for measure, rows in (
        (ClipMeasure(clip, TRAINING), clip_of_pictures(clip, TRAINING)),
        (DinoMeasure(dino, TRAINING), dino_of_pictures(dino, TRAINING)),
    ):
        a, b, c = rows
        expected = [(a @ b + a @ c).item() / 2, (b @ a + b @ c).item() / 2, (c @ a + c @ b).item() / 2]
        assert measure.ceiling() == {next(iter(measure.ceiling())): near(expected)}
    assert ClipMeasure(clip, TRAINING[:1]).ceiling() == {"CLIP image": []}


def test_pictures_do_not_depend_on_the_batch_that_they_are_measured_in(clip, monkeypatch):
    together = ClipMeasure(clip, TRAINING).scores(PICTURES, TEXTS)
    monkeypatch.setattr("perfusion_pytorch.evaluation.measures.BATCH", 2)
    alone = ClipMeasure(clip, TRAINING).scores(PICTURES, TEXTS)
    assert all(alone[name] == near(values) for name, values in together.items())


def test_the_change_of_a_picture_is_of_255():
    red, other = Image.new("RGB", (4, 2), (255, 0, 10)), Image.new("RGB", (4, 2), (252, 6, 10))
    assert picture_change(red, other) == 3.0 == picture_change(other, red)
    half = red.copy()
    half.paste(other.crop((0, 0, 2, 2)))
    assert picture_change(red, half) == 1.5


def test_models_of_another_kind_are_refused(clip, dino, tmp_path):
    with pytest.raises(
        ValueError, match=r"`clip_model` must be a CLIP model's name or folder, .*kind 'dinov2'"
    ):
        ClipMeasure(dino, TRAINING)
    with pytest.raises(
        ValueError, match=r"`dino_model` must be a DINO model's .*kind 'clip', which reads texts"
    ):
        DinoMeasure(clip, TRAINING)
    with pytest.raises(ValueError, match=r"`dino_model` must be .* cannot be loaded"):
        DinoMeasure(tmp_path, TRAINING)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "resnet",
                "hidden_sizes": [8],
                "depths": [1],
                "embedding_size": 8,
                "num_channels": 3,
            }
        )
    )
    (tmp_path / "preprocessor_config.json").write_text((dino / "preprocessor_config.json").read_text())
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be a vision transformer such as DINO's, .*got ResNetModel"):
        DinoMeasure(tmp_path, TRAINING)


def test_a_picture_of_the_training_set_is_as_like_as_can_be(dino):
    measure = DinoMeasure(dino, TRAINING[:1])
    assert measure.scores(TRAINING[:1], ["a"]) == {"DINO": near([1.0])}
    assert torch.equal(measure.training.norm(dim=1), torch.ones(1)) or measure.training.norm() == near(1.0)
