"""The second small world, in a process of its own: its modules have the names of the first one's."""

import subprocess
import sys
from pathlib import Path

import pytest

WORLD = Path(__file__).parents[2] / "examples" / "world"


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=WORLD, capture_output=True, text=True, timeout=300
    )


def test_the_worlds_examples_run():
    result = run("-m", "doctest", "world.py")
    assert (result.returncode, result.stdout) == (0, "")


PROGRAM = """
import numpy as np
import world

for superclass in world.SUPERCLASSES:
    one, again, other = (world.new_object(superclass, seed) for seed in (3, 3, 4))
    assert one.identity == again.identity != other.identity
    for image, mask in one.pictures(3):
        assert image.size == mask.size == (world.SIZE, world.SIZE)
        assert 0.02 < np.asarray(mask).mean() / 255 < 0.9
for seed in range(300):
    picture, same = world.sample(seed), world.sample(seed)
    assert picture.caption == same.caption and picture.image.tobytes() == same.image.tobytes()
    assert len(picture.caption.split()) <= 28 and 1 <= len(picture.scene.things) <= 3
    words = picture.caption.split()
    for thing in picture.scene.things:
        left, top, right, bottom = thing.box
        assert min(left, top) >= 0 and max(right, bottom) <= world.SIZE
        assert (thing.breed or thing.superclass) in words
"""


@pytest.mark.slow
def test_new_objects_are_functions_of_their_seed_and_captions_name_what_is_there():
    result = run("-c", PROGRAM)
    assert result.returncode == 0, result.stderr
