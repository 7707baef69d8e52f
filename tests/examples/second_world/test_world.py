"""The world with identities: deterministic, truthful captions, objects that differ."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "world"))

import words
import world


def test_pictures_are_functions_of_their_seed():
    one, again, other = world.sample(5), world.sample(5), world.sample(6)
    assert one == again and one.image.tobytes() == again.image.tobytes()
    assert one.image.size == (64, 64) and one.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("superclass", world.SUPERCLASSES)
def test_new_objects_are_far_from_every_breed_and_masks_cover_them(superclass):
    thing = world.new_object(superclass, 3)
    assert thing == world.new_object(superclass, 3) != world.new_object(superclass, 4)
    known = [world.BREEDS[name][1] for name in world.BREED_NAMES[superclass]]
    assert min(world.identity_distance(thing.identity, other) for other in known) >= world.FAR
    for image, mask in thing.pictures(3):
        assert (image.size, image.mode, mask.size, mask.mode) == ((64, 64), "RGB", (64, 64), "L")
        assert 0.05 < (np.asarray(mask) > 128).mean() < 0.7


def test_captions_are_short_and_their_relation_is_visible():
    for seed in range(2000):
        picture = world.sample(seed)
        things = picture.scene.things
        assert len(picture.caption.split()) + 2 <= words.NUM_TOKENS
        nouns = [word for word in picture.caption.split() if word in words.NOUNS]
        assert nouns == [thing.breed or thing.superclass for thing in things]
        if len(things) == 2:
            axis, first_is_lower = world.RELATIONS[picture.relation]
            first, second = ((thing.x, thing.y)[axis] for thing in things)
            assert (first < second) == first_is_lower


def test_breeds_of_a_superclass_are_far_apart():
    for names in world.BREED_NAMES.values():
        identities = [world.BREEDS[name][1] for name in names]
        for i, one in enumerate(identities):
            assert all(world.identity_distance(one, other) >= world.FAR for other in identities[:i])


def test_backgrounds_of_a_texture_and_of_a_colour_are_both_named():
    grounds = {world.sample(seed).scene.background for seed in range(400)}
    assert set(world.TEXTURES) <= grounds and set(world.COLOURS) <= grounds
