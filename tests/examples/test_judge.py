"""The checker of `perfusion evaluate` on the small world."""

import sys
from dataclasses import astuple
from pathlib import Path

import pytest
from PIL import Image

from perfusion_pytorch import evaluate_concepts
from perfusion_pytorch.evaluation.checkers import CheckedConcept, checker_named
from perfusion_pytorch.evaluation.prompts import prompts_for

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
sys.path.insert(0, str(SHAPES))

import evaluate  # noqa: E402
import world  # noqa: E402
from judge import background_in, judge, superclasses_in  # noqa: E402

CAR = CheckedConcept("car", "car", "<car-1>", 0.5)


def test_the_judge_knows_the_car_from_others():
    training = [Image.open(path) for path in sorted((SHAPES / "pictures").glob("*.png"))]
    others = [p for p in map(world.sample, range(200)) if {t.superclass for t in p.scene.things} == {"car"}]
    assert len(others) >= 3
    assert judge(training, [""] * len(training), CAR)["identity"] == [True] * len(training)
    assert not any(judge([p.image for p in others], [""] * len(others), CAR)["identity"])


def test_the_judge_reads_backgrounds_and_things_in_prompts():
    pictures = [p for p in map(world.sample, range(300)) if background_in(p.caption)][:60]
    claims = judge([p.image for p in pictures], [p.caption for p in pictures], CAR)["prompt"]
    assert sum(claims) >= 0.9 * len(claims)
    moved = [p.caption for p in pictures[1:] + pictures[:1]]
    assert sum(judge([p.image for p in pictures], moved, CAR)["prompt"]) <= 0.2 * len(claims)


def test_a_prompt_without_a_background_is_followed_with_any():
    training = [Image.open(path) for path in sorted((SHAPES / "pictures").glob("*.png"))]
    assert all(judge(training, ["a photo of a car"] * len(training), CAR)["prompt"])
    assert not any(judge(training, ["a photo of a bear"] * len(training), CAR)["prompt"])


def test_of_a_thing_that_it_does_not_know_it_says_whether_prompts_are_followed():
    training = [Image.open(path) for path in sorted((SHAPES / "pictures").glob("*.png"))]
    bear = CheckedConcept("bear", "bear", "<bear-1>", 0.5)
    assert judge(training, ["a car"] * len(training), bear) == {"prompt": [True] * len(training)}


def test_the_prompts_are_those_that_the_world_understands():
    prompts = prompts_for(SHAPES / "prompts.txt", "car")
    assert len(prompts.templates) == 12 and len(prompts.unrelated) == 6
    look = astuple(world.HELD_OUT["car"][1])
    for text in prompts.templates:
        assert background_in(text) in world.BACKGROUNDS and background_in(text) not in look
        assert "car" in superclasses_in(text.format("car"))
    assert all("car" not in superclasses_in(text) for text in prompts.unrelated)


@pytest.mark.slow
def test_the_car_is_told_from_the_base_models_cars(tmp_path):
    """Measured with 12 prompts, 2 pictures of each and 20 steps: 0.92 and 0.04."""
    result = evaluate_concepts(
        evaluate.load_pipeline(),
        SHAPES / "concepts" / "car.safetensors",
        SHAPES / "pictures",
        output_dir=tmp_path,
        prompts=[
            "a {} on a green background",
            "a large {} on a pink background",
            "a rose on a white background",
        ],
        betas=[0.5],
        num_inference_steps=10,
        guidance_scale=3.0,
        clip_model=None,
        dino_model=None,
        checkers=[checker_named(f"{SHAPES / 'judge.py'}:judge")],
        progress=False,
    )
    assert result.summary["identity"].mean >= 0.75 and result.base["identity"].mean <= 0.25
    assert result.training["identity"].mean == 1 and result.summary["plain change"].mean < 1
    assert result.files[0].recommended == 0.5
