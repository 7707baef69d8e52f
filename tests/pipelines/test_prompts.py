"""Prompts with concepts are checked before they are encoded."""

import warnings

import pytest
from helpers.small_model import latents

from perfusion_pytorch import load_concept

LOST = "first 18 tokens, apart from other words, but was lost from the prompt"


def test_prompts_that_would_lose_a_concept(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    with pytest.raises(ValueError, match="must be written '<car-1>', in lower case"):
        latents(pipe, "a <Car-1> on red")
    with pytest.raises(ValueError, match=LOST):
        latents(pipe, "a " * 19 + "<car-1>")
    with pytest.raises(ValueError, match=LOST):
        latents(pipe, "a house", negative_prompt="a " * 19 + "<car-1>")
    with pytest.warns(UserWarning, match=r"No concept named <car-7> is loaded.*\['<car-1>'\]"):
        latents(pipe, "a <car-7> on red")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipe, "a <car-1> on red")


def test_the_warning_points_at_the_users_line(pipe, files):
    """Through diffusers' call, which is behind a decorator of torch, as well as directly."""
    load_concept(pipe, files / "car.safetensors")
    for call in (
        lambda: latents(pipe, "a <car-7>"),
        lambda: pipe.encode_prompt("a <car-8>", "cpu", 1, False),
    ):
        with pytest.warns(UserWarning, match="No concept named") as found:
            call()
        assert {record.filename for record in found} <= {__file__, latents.__code__.co_filename}
