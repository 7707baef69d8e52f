"""Prompts for new objects, and their judging: rendered pictures that follow a prompt pass, others do not."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "world"))

import world
from checker import Checker, Reading, Seen
from drawing import draw_scene
from judge import Judge, Prompt, has_size, is_at, prompts_for, prompts_for_two, scores_of_two

BEAR = world.new_object("bear", 7)


def test_prompts_are_functions_of_the_object_and_say_what_follows_them():
    prompts = prompts_for(BEAR, 40)
    assert prompts == prompts_for(BEAR, 40) != prompts_for(world.new_object("bear", 8), 40)
    assert all(prompt.text.count("{}") == 1 for prompt in prompts)
    for name in ("size", "place", "relation"):
        assert sum(getattr(prompt, name) is not None for prompt in prompts) >= 8
    for prompt in prompts:
        assert prompt.background in prompt.text.split() and "bear" in prompt.superclasses


def test_sizes_and_places_have_the_worlds_meaning():
    assert [has_size(size, "small") for size in (30, 36, 42, 54)] == [True, True, False, False]
    assert [has_size(size, "large") for size in (30, 42, 50, 58)] == [False, False, True, True]
    for name, (across, down) in world.PLACES.items():
        at = [32 if v is None else 17 + v * 30 for v in (across, down)]
        assert is_at(Seen("bear", *at, 32), name)
        if name != "in the middle":
            assert not is_at(Seen("bear", 64 - at[0], 64 - at[1], 32), name)


def test_each_part_of_a_prompt_is_checked():
    prompt = Prompt("…", "red", ("bear", "fish"), "small", "on the left", "left of", ("bear", "fish"))
    things = (Seen("bear", 16, 32, 30), Seen("fish", 48, 32, 30))
    right = Reading("red", things)
    assert prompt.checks(right, "bear") == dict.fromkeys(
        ("background", "superclasses", "size", "place", "relation"), True
    )
    wrong = {
        "background": replace(right, background="blue"),
        "superclasses": replace(right, things=(*things, Seen("mug", 32, 32, 30))),
        "size": replace(right, things=(replace(things[0], size=44, x=24), things[1])),
        "relation": replace(right, things=(things[0], replace(things[1], x=12))),
    }
    for name, reading in wrong.items():
        checks = prompt.checks(reading, "bear")
        assert [key for key, holds in checks.items() if not holds] == [name]


@pytest.fixture(scope="module")
def checker():
    return Checker.load()


def test_an_objects_own_pictures_are_accepted_and_another_objects_are_not(checker):
    prompts = [Prompt("a {}", scene.background, ("bear",)) for scene, _ in BEAR.things(10)]
    judge = Judge(checker, BEAR, prompts)
    own = [image for image, _ in BEAR.pictures(10)]
    other = [image for image, _ in world.new_object("bear", 8).pictures(10)]
    assert judge.scores(own)["both"] >= 0.9
    assert judge.scores(other)["identity"] <= 0.1
    assert judge.change(own, own) == {"changed": 0.0, "read as before": 1.0}
    assert judge.change(own, other)["changed"] > 5


def test_two_objects_in_one_picture_are_judged_together(checker):
    fish = world.new_object("fish", 7)
    prompts = prompts_for_two(BEAR, fish, 12)
    images = []
    for prompt in prompts:
        axis, first_is_lower = world.RELATIONS[prompt.relation]
        things = []
        for superclass, is_lower in zip(prompt.pair, (first_is_lower, not first_is_lower), strict=True):
            identity = (BEAR if superclass == "bear" else fish).identity
            centre = [32.0, 32.0]
            centre[axis] = 16.0 if is_lower else 48.0
            things.append(world.Thing(superclass, identity, None, 31, *centre))
        shade = world.BACKGROUNDS[prompt.background]
        images.append(draw_scene(world.Scene(prompt.background, shade, tuple(things))))
    assert scores_of_two(images, checker, (BEAR, fish), prompts)["everything"] >= 0.75
    assert scores_of_two(images[::-1], checker, (BEAR, fish), prompts)["followed"] < 0.75
