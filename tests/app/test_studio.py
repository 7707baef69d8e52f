"""Pictures of the page: decided by their request alone, whoever asked for what before."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small_model import MODEL

from perfusion_pytorch import load_concept, set_concepts, unload_concepts
from perfusion_pytorch.app.studio import Chosen, Request

CAR, HOUSE = (MODEL.parent / "concepts" / f"{name}.safetensors" for name in ("car", "house"))
PROMPT = "a <car-1> on a green background"
REQUEST = Request("small", PROMPT, (Chosen(CAR, 0.5, 0.05),), seed=3, steps=2, guidance=3.0, size=64)


def picture_by_hand(pipe, request, prompt):
    generator = torch.Generator().manual_seed(request.seed)
    return pipe(prompt, generator=generator, num_inference_steps=2, guidance_scale=3.0).images[0]


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_a_picture_is_that_of_the_library(studio, pipe):
    drawn = studio.draw(replace(REQUEST, concepts=(Chosen(CAR, 0.9, 0.1),)), with_base=True)
    unload_concepts(pipe)
    base = picture_by_hand(pipe, REQUEST, "a car on a green background")
    set_concepts(pipe, load_concept(pipe, CAR), beta=0.9, temperature=0.1)
    expected = picture_by_hand(pipe, REQUEST, PROMPT)
    unload_concepts(pipe)
    assert same(drawn.image, expected) and same(drawn.base, base) and not same(drawn.image, drawn.base)
    assert drawn.base_prompt == "a car on a green background" and drawn.tokens == ["<car-1>"]


def test_another_request_in_between_changes_nothing(studio):
    before = studio.draw(REQUEST)
    studio.draw(
        replace(REQUEST, prompt="a <house-1>", concepts=(Chosen(HOUSE, 0.3, 0.2), Chosen(CAR, 1.2, 0.3)))
    )
    studio._kept.clear()
    assert same(studio.draw(REQUEST).image, before.image)


def test_a_picture_that_was_made_is_not_made_again(studio, pipe, monkeypatch):
    first = studio.draw(REQUEST, with_base=True)
    monkeypatch.setattr(type(pipe), "__call__", lambda *a, **k: pytest.fail("made again"))
    again = studio.draw(REQUEST, with_base=True)
    assert same(first.image, again.image) and same(first.base, again.base)


def test_a_changed_concept_file_is_read_again(studio, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(CAR.read_bytes())
    assert studio.tokens("small", [path]) == ["<car-1>"]
    path.write_bytes(HOUSE.read_bytes())
    assert studio.tokens("small", [path]) == ["<house-1>"]


def test_words_have_the_r_that_the_gate_sees(studio):
    words = studio.draw(REQUEST).words
    assert [word for word, _ in words] == ["a", "<car-1>", "on", "a", "green", "background"]
    assert words[1][1][0] == pytest.approx(1, abs=0.15) and all(
        r < 0.3 for word, (r,) in words if word != "<car-1>"
    )


def test_a_prompt_with_a_token_that_is_not_chosen_is_refused(studio):
    with pytest.raises(
        ValueError, match=r"^<dog-7> must be one of the chosen concepts, <car-1>\. Choose its file"
    ):
        studio.draw(replace(REQUEST, prompt="a <car-1> beside a <dog-7>"))
    with pytest.raises(ValueError, match=r"^<car-1> must be a chosen concept\."):
        studio.draw(replace(REQUEST, concepts=()))


def test_what_is_odd_about_a_prompt_is_noted(studio):
    notes = studio.draw(replace(REQUEST, prompt="a rose" + " and a rose" * 30)).notes
    assert notes == [
        "The prompt names none of the chosen concepts: <car-1>.",
        "The prompt is too long: the model does not read its end.",
    ]


def test_a_grid_has_a_column_for_each_beta_and_the_base_model(studio):
    one, three = studio.grid(REQUEST, [0.5]), studio.grid(REQUEST, [0.3, 0.9], with_base=True)
    assert three.width > 2.9 * one.width and three.height == one.height
    with pytest.raises(
        ValueError, match=r"A grid needs a concept and 1 to 8 values of β, got 1 concepts and 9"
    ):
        studio.grid(REQUEST, [0.1] * 9)


def test_the_same_concept_twice_is_refused(studio, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(CAR.read_bytes())
    with pytest.raises(ValueError, match="Two of the chosen files hold the same concept"):
        studio.tokens("small", [CAR, copy])
    assert studio.tokens("small", [CAR]) == ["<car-1>"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt", " ", "length of the prompt must be from 1 to 1000, got 0"),
        ("prompt", "a" * 1001, "got 1001"),
        ("steps", 0, "number of steps must be from 1 to 150"),
        ("seed", -1, "seed must be from 0"),
        ("size", 10**6, "size must be from 8 to 4096"),
        ("guidance", float("nan"), "guidance must be from 0 to 50, got nan"),
        ("concepts", (Chosen(CAR, 0.5, 0.05),) * 5, "number of concepts must be from 0 to 4, got 5"),
    ],
)
def test_a_request_out_of_range_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        replace(REQUEST, **{name: value})


def test_an_unknown_model_is_refused(studio):
    with pytest.raises(ValueError, match=r"The model must be one of \['small'\], got '/etc'"):
        studio.draw(replace(REQUEST, model="/etc"))


def test_a_picture_says_what_it_was_made_with(studio):
    facts = json.loads(studio.draw(REQUEST).image.info["perfusion"])
    (concept,) = facts["concepts"]
    assert (facts["prompt"], facts["seed"], concept["token"], concept["beta"]) == (PROMPT, 3, "<car-1>", 0.5)
    assert concept["file"] == "car.safetensors"
