"""The small world, its model, its checker, and the personalization of it."""

import doctest
import sys
from dataclasses import astuple
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from perfusion_pytorch import Concept, InputCovariance, load_concept, token_similarities, train_concept
from perfusion_pytorch.pipelines.encoding import prompt_encoder
from perfusion_pytorch.training.options import PAPER
from perfusion_pytorch.training.pictures import load_pictures

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
sys.path.insert(0, str(SHAPES))

import checker as checker_module  # noqa: E402
import evaluate  # noqa: E402
import mix  # noqa: E402
import personalize  # noqa: E402
import pretrain  # noqa: E402
import world  # noqa: E402


def test_world_is_deterministic_and_pictures_differ():
    first, again, other = (world.sample(seed) for seed in (5, 5, 6))
    assert first.caption == again.caption and first.image.tobytes() == again.image.tobytes()
    assert first.image.size == (64, 64) and first.image.tobytes() != other.image.tobytes()


def test_the_worlds_example_runs():
    results = doctest.testmod(world)
    assert results.attempted and not results.failed


def test_world_has_the_words_it_promises():
    assert len(world.SUPERCLASSES) >= 8
    assert all(len(set(names)) >= 8 for names in world.BREED_NAMES.values())
    words = [name for names in world.BREED_NAMES.values() for name in names]
    assert len(set(words)) == len(words)
    for superclass, names in world.BREED_NAMES.items():
        looks = {world.BREEDS[name][1] for name in names}
        assert not any(world.is_held_out(superclass, look) for look in looks)
        for one, other in combinations([astuple(look) for look in (*looks, *world.HELD_OUT[superclass])], 2):
            assert sum(a != b for a, b in zip(one, other, strict=True)) >= 2  # a checker can tell them apart


def test_held_out_looks_are_in_no_picture_and_captions_tell_the_truth():
    for seed in range(3000):
        picture = world.sample(seed)
        words = picture.caption.split()
        assert len({thing.superclass for thing in picture.scene.things}) == len(picture.scene.things)
        for thing in picture.scene.things:
            assert not world.is_held_out(thing.superclass, thing.look)
            assert (thing.breed or thing.superclass) in words
            before = words[: words.index(thing.breed or thing.superclass)]
            for pattern, adjective in world.PATTERNS.items():
                assert adjective not in words or pattern == thing.look.pattern
            if before and before[-1] in world.PAINTS:
                assert before[-1] == thing.look.body
            assert picture.scene.background not in (thing.look.body, thing.look.second)
            left, top, right, bottom = thing.box
            assert min(left, top) >= 0 and max(right, bottom) <= world.SIZE
            if thing.breed:
                assert world.BREEDS[thing.breed] == (thing.superclass, thing.look)
        for phrase in ("background", "wall", "backdrop", "curtain"):
            if phrase in words:
                assert words[words.index(phrase) - 1] == picture.scene.background


def test_the_shipped_captions_are_the_worlds():
    captions = (SHAPES / "tiny-sd" / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert len(captions) == 20_000 and captions == [world.sample(seed).caption for seed in range(20_000)]


@pytest.mark.parametrize(
    "relation, axis, sign",
    [
        ("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1),
        ("beside", 0, -1), ("next to", 0, -1), ("and", 0, -1),
    ],
)  # fmt: skip
def test_relations_hold_in_the_picture(relation, axis, sign):
    found = 0
    for seed in range(3000):
        picture = world.sample(seed)
        if f" {relation} " in picture.caption and len(picture.scene.things) == 2:
            first, second = ((thing.x, thing.y)[axis] for thing in picture.scene.things)
            assert (first - second) * sign > 0
            found += 1
    assert found > 20


@pytest.mark.parametrize("superclass", world.SUPERCLASSES)
@pytest.mark.parametrize("pattern", world.PATTERNS)
def test_every_part_of_a_look_can_be_seen(superclass, pattern):
    def pixels(look):
        thing = world.Thing(superclass, look, None, 48, 32, 32)
        return np.asarray(world.draw(world.Scene("gray", world.COLOURS["gray"], (thing,)))).astype(int)

    look = world.Look("red", "blue", "yellow", pattern)
    changes = [
        world.Look("green", "blue", "yellow", pattern),
        world.Look("red", "white", "yellow", pattern),
        world.Look("red", "blue", "black", pattern),
    ]
    changes += [world.Look("red", "blue", "yellow", other) for other in world.PATTERNS if other != pattern]
    for changed in changes:
        assert (np.abs(pixels(look) - pixels(changed)).max(axis=-1) > 60).sum() >= 12


@pytest.mark.parametrize(
    "folder, superclass, index", [("pictures", "car", 1), ("pictures_house", "house", 0)]
)
def test_the_shipped_pictures_are_the_held_out_look_and_their_masks_cover_it(folder, superclass, index):
    look, pictures = world.HELD_OUT[superclass][index], load_pictures(SHAPES / folder, resolution=64)
    assert len(pictures) == 5
    pixels, masks = torch.stack([p.pixels for p in pictures]), torch.stack([p.mask for p in pictures])
    body = torch.tensor(world.COLOURS[look.body]).view(3, 1, 1) / 127.5 - 1
    painted = (pixels - body).abs().amax(dim=1) < 0.02
    assert painted.sum() > 500
    assert (masks[painted] > 0.9).all()
    readings = checker_module.Checker.load().read([picture.image() for picture in pictures])
    assert all(reading.shows(superclass, look) for reading in readings)


@pytest.mark.slow
def test_the_checker_is_rarely_wrong_about_rendered_pictures():
    errors = checker_module.own_errors(200)
    assert errors["background"] <= 0.01 and errors["superclasses"] <= 0.03 and errors["breed"] <= 0.03
    assert errors["exact look"] <= 0.10 and errors["exact look, new objects"] <= 0.10


def test_the_checker_sees_what_is_not_there():
    look = world.HELD_OUT["bear"][0]
    thing = world.Thing("bear", look, None, 40, 32, 32)
    other = world.Thing("bear", world.BREEDS["panda"][1], "panda", 40, 32, 32)
    images = [
        world.draw(world.Scene("teal", world.COLOURS["teal"], things)) for things in ((thing,), (other,), ())
    ]
    concept, panda, nothing = checker_module.Checker.load().read(images)
    assert concept.shows("bear", look) and not panda.shows("bear", look)
    assert panda.breed("bear") == "panda"
    assert not nothing.superclasses and not nothing.shows("bear", look) and nothing.breed("bear") is None


@pytest.fixture(scope="module")
def pipe():
    return evaluate.load_pipeline()


def test_every_word_of_the_world_is_one_token_and_captions_fit(pipe):
    captions = [world.sample(seed).caption for seed in range(2000)]
    assert len(pretrain.tokenize(pipe.tokenizer, captions)) == 2000
    for word in {word for caption in captions for word in caption.split()}:
        assert len(pipe.tokenizer(word).input_ids) == 3, word


@pytest.mark.slow
def test_the_model_follows_prompts(pipe):
    """A coarse check that the committed weights are good; `evaluate.py` measures them."""
    pictures = evaluate.held_out_pictures(24)
    readings = checker_module.Checker.load().read(
        evaluate.generate(pipe, [picture.caption for picture in pictures])
    )
    assert sum(r.background == p.scene.background for p, r in zip(pictures, readings, strict=True)) >= 20
    assert (
        sum(
            any(t.superclass in r.superclasses for t in p.scene.things)
            for p, r in zip(pictures, readings, strict=True)
        )
        >= 22
    )


def test_generation_does_not_depend_on_the_batch_size(pipe):
    prompts = ["a bear on a red background", "a koi on a white background", "a taxi"]
    one, three = (evaluate.generate(pipe, prompts, batch_size=size, steps=2) for size in (1, 3))
    difference = max(
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(one, three, strict=True)
    )
    assert difference <= 2


@pytest.mark.slow
def test_personalize_runs_in_seconds_and_writes_what_it_says(tmp_path, capsys):
    personalize.main(
        [
            "--output_dir",
            str(tmp_path),
            "--max_train_steps",
            "3",
            "--num_validation_prompts",
            "3",
            "--seed",
            "1",
        ]
    )
    assert "concept there" in capsys.readouterr().out
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 8 * 128 and grid.height > 6 * 128
    concept = Concept.load(tmp_path / "concept.safetensors")
    assert (concept.token, concept.superclass) == ("<car-1>", "car")
    assert all(name.endswith(".to_v") for name in concept.outputs) and all(
        tensor.any() for tensor in concept.tensors().values()
    )
    assert (tmp_path / "concept.safetensors").stat().st_size < 40_960


def test_each_shipped_concept_is_clearest_at_its_own_token_and_in_no_plain_word():
    pipe = evaluate.load_pipeline()
    names = [
        load_concept(pipe, SHAPES / "concepts" / f"{superclass}.safetensors")
        for superclass, _ in mix.CONCEPTS.values()
    ]
    prompts = [prompt.format(car=names[0], house=names[1]) for prompt in mix.GRID_PROMPTS]
    for row in token_similarities(pipe.unet, pipe.tokenizer, prompt_encoder(pipe), prompts):
        for word, similarities in row:
            for name, r in zip(names, similarities, strict=True):
                low, high = (0.7, 1.2) if word == name else (-0.25, 0.65) if word in names else (-0.25, 0.25)
                assert low < r < high, (word, name, r)  # mixed at β = 0.7 and 0.85


@pytest.mark.slow
def test_both_shipped_concepts_are_in_one_picture(tmp_path, capsys):
    """A coarse check of the committed files; `mix.py` measures them over more prompts."""
    mix.main(["--output_dir", str(tmp_path), "--num_validation_prompts", "8"])
    lines = capsys.readouterr().out.strip().split("\n")[1:4]
    base, both, locked = (
        [int(word.rstrip("%")) for word in line.split() if word.endswith("%")] for line in lines
    )
    assert base[2] == 0 and both[2] >= 50 and locked[2] >= 50
    grid = Image.open(tmp_path / "mix.png")
    assert grid.width > 8 * 128 and grid.height > 4 * 128


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, PAPER], ids=["defaults", "paper"])
def test_training_twice_learns_the_same_to_the_bit(way, two_threads, tmp_path):
    """Several rows share a prompt: their gradients must add up in one order, also with several threads."""
    options = {"max_train_steps": 12, "checkpointing_steps": 12, "progress": False}
    options |= {"covariance": InputCovariance(torch.eye(160)), "token": "<car-1>", "superclass": "car"}
    options |= way
    for name in ("a", "b"):
        train_concept(evaluate.load_pipeline(), SHAPES / "pictures", output_dir=tmp_path / name, **options)
    one, other = (load_file(tmp_path / name / "checkpoint-12" / "state.safetensors") for name in ("a", "b"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
