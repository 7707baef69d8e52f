"""Prompts with concepts are checked before they are encoded."""

import warnings

import pytest
from helpers.small_model import latents

from perfusion_pytorch import (
    load_concept,
)


def test_prompts_that_would_lose_a_concept(pipe, files):
    load_concept(pipe, files / "car.safetensors")
    with pytest.raises(ValueError, match="must be written '<car-1>', in lower case"):
        latents(pipe, "a <Car-1> on red")
    with pytest.raises(
        ValueError, match="first 18 tokens, apart from other words, but was lost from the prompt"
    ):
        latents(pipe, "a " * 19 + "<car-1>")
    with pytest.raises(
        ValueError, match="first 18 tokens, apart from other words, but was lost from the prompt"
    ):
        latents(pipe, "a house", negative_prompt="a " * 19 + "<car-1>")
    with pytest.warns(UserWarning, match=r"No concept named <car-7> is loaded.*\['<car-1>'\]"):
        latents(pipe, "a <car-7> on red")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipe, "a <car-1> on red")
