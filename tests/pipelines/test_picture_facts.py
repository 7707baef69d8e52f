"""What pictures were made with goes into their files, and black ones are told of, with the reason."""

import json
import os
import random
import warnings
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.damage import cut_or_flipped
from helpers.small_model import make_pipe
from PIL import Image

from perfusion_pytorch import (
    disable_concepts,
    global_key_lock,
    load_concept,
    read_picture_facts,
    set_concepts,
)
from perfusion_pytorch.grids import write_png
from perfusion_pytorch.pipelines.picture_facts import picture_facts, warn_of_black_pictures

GREY, BLACK = Image.new("RGB", (8, 8), "grey"), Image.new("RGB", (8, 8))


def result(*images, flagged=None):
    return SimpleNamespace(images=list(images), nsfw_content_detected=flagged)


def test_facts_come_back_from_a_picture(tmp_path):
    facts = {"prompt": "a <bär-1>", "seed": 5, "concepts": [{"token": "<bär-1>", "beta": 0.5}]}
    write_png(tmp_path / "new" / "p.png", GREY, "a <bär-1>", facts=facts)
    assert read_picture_facts(str(tmp_path / "new" / "p.png")) == facts
    assert Image.open(tmp_path / "new" / "p.png").text["Description"] == "a <bär-1>"


def test_bytes_that_are_not_text_are_kept_out_of_the_way(tmp_path):
    """As the shell passes them in a prompt."""
    prompt = b"a \xff car\0".decode("utf-8", "surrogateescape")
    write_png(tmp_path / "p.png", GREY, prompt, facts={"prompt": prompt})
    assert read_picture_facts(tmp_path / "p.png") == {"prompt": prompt}


def test_the_facts_of_a_pipeline(files):
    pipe = make_pipe()
    car = load_concept(pipe, files / "car.safetensors")
    set_concepts(pipe, car, beta=0.25, temperature=0.125)
    facts = picture_facts(pipe, files={car: files / "car.safetensors"}, prompt="a", height=None)
    digest = sha256((files / "car.safetensors").read_bytes()).hexdigest()
    gate = {"beta": 0.25, "temperature": 0.125, "file": "car.safetensors", "sha256": digest}
    assert facts["concepts"] == [{"token": car, "superclass": "car"} | gate]
    assert (facts["prompt"], facts["num_inference_steps"], facts["guidance_scale"]) == ("a", 50, 7.5)
    assert (facts["model"], facts["dtype"], facts["global_key_lock"]) == ("tiny-sd", "float32", False)
    assert facts["versions"]["torch"] == torch.__version__ and "height" not in facts
    assert os.sep not in json.dumps(facts)  # no folder of this machine
    with global_key_lock(pipe):
        assert picture_facts(pipe, guidance_scale=3.0)["guidance_scale"] == 3.0
        assert picture_facts(pipe)["global_key_lock"] is True
    disable_concepts(pipe)
    assert picture_facts(pipe)["concepts"] == []


def test_a_picture_that_does_not_say(tmp_path):
    GREY.save(tmp_path / "p.png")
    with pytest.raises(ValueError, match=r"p.png must say what it was made with, but it does not"):
        read_picture_facts(tmp_path / "p.png")
    GREY.save(tmp_path / "p.jpg")
    with pytest.raises(ValueError, match=r"p.jpg must be a whole PNG file, but it cannot be read"):
        read_picture_facts(tmp_path / "p.jpg")
    with pytest.raises(FileNotFoundError, match=r"There is no picture .*none.png"):
        read_picture_facts(tmp_path / "none.png")


def test_no_damaged_picture_tells_other_facts(tmp_path):
    path, facts = tmp_path / "p.png", {"prompt": "a car", "seed": 5}
    write_png(path, GREY, facts=facts)
    for what, content in cut_or_flipped(path.read_bytes(), random.Random(0), 100):
        path.write_bytes(content)
        try:
            assert read_picture_facts(path) == facts, what
        except ValueError as error:
            assert str(path) in str(error), what


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (
            [result(BLACK, flagged=[True])],
            "^1 picture is black, of 1, because the base model's safety checker",
        ),
        (
            [result(GREY, BLACK, flagged=[False, True]), result(BLACK, flagged=[True])],
            "^2 pictures are black, of 3, because the base model's safety checker flagged them. Try another",
        ),
        ([result(BLACK, GREY)], "^1 picture is black, of 2, because the model returned no finite numbers"),
        ([result(BLACK.convert("L"))], "^1 picture is black, of 1"),
    ],
)
def test_black_pictures_are_a_warning_that_says_why(results, message):
    with pytest.warns(UserWarning, match=message) as caught:
        warn_of_black_pictures(make_pipe(), results)
    assert len(caught) == 1


def test_pictures_that_are_not_black_are_no_warning():
    dark = Image.new("RGB", (8, 8), (0, 0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_black_pictures(make_pipe(), [result(GREY, dark), result(GREY, flagged=[False]), result()])


def test_an_overflow_of_a_vae_in_half_precision_is_named():
    """As the first SDXL's in float16: the pipeline turns what is not finite into black."""
    pipe = make_pipe()
    pipe.vae.half()
    pipe.vae.decoder.conv_out.bias.data.fill_(torch.inf)
    pipe.vae.decode = lambda latents, return_dict=False, **_: (torch.full((1, 3, 8, 8), torch.nan).half(),)
    latents = torch.zeros(1, 4, 16, 16)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = pipe("a car", num_inference_steps=1, latents=latents)
    with pytest.warns(
        UserWarning, match="float16, and its numbers grew too large.* `dtype`: float32 or bfloat16"
    ):
        warn_of_black_pictures(pipe, [made])
