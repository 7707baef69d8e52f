"""Validation pictures say what they were made with, and black ones are told of."""

import pytest
from helpers.small_model import make_pipe, train
from PIL import Image

from perfusion_pytorch import read_picture_facts
from perfusion_pytorch.training.interruption import Interruption
from perfusion_pytorch.training.validation import write_validation_grid


@pytest.fixture
def trained():
    pipe = make_pipe()
    return pipe, train(pipe, "<car-1>", "car")


def write(pipe, layers, path):
    options = {
        "token": "<car-1>",
        "count": 2,
        "resolution": 64,
        "seed": 7,
        "interruption": Interruption(),
    }
    write_validation_grid(pipe, layers, path, ["a <car-1>"], **options)


def test_what_they_were_made_with(trained, tmp_path):
    write(*trained, tmp_path / "v.png")
    facts = read_picture_facts(tmp_path / "v.png")
    assert (facts["rows"], facts["seeds"], facts["num_inference_steps"]) == (["a <car-1>"], [7, 8], 25)
    assert facts["concepts"] == [pytest.approx({"beta": 0.7, "temperature": 0.15})]
    assert facts["model"] == "tiny-sd"


def test_black_ones(trained, tmp_path, monkeypatch):
    pipe, layers = trained
    made = type(pipe).__call__

    def flagging(self, *words, **options):
        result = made(self, *words, **options)
        return type(result)(images=[Image.new("RGB", (64, 64))], nsfw_content_detected=[True])

    monkeypatch.setattr(type(pipe), "__call__", flagging)
    with pytest.warns(UserWarning, match="2 pictures are black, of 2, because the base"):
        write(pipe, layers, tmp_path / "v.png")
