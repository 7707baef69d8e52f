"""A checker for `perfusion evaluate` on the small world: is it this object, and is the prompt followed?

    perfusion evaluate --pretrained_model_name_or_path examples/shapes/tiny-sd \
        --concept examples/shapes/concepts/car.safetensors \
        --instance_data_dir examples/shapes/pictures --prompts examples/shapes/prompts.txt \
        --checker examples/shapes/judge.py:judge --no_clip --no_dino \
        --num_inference_steps 20 --guidance_scale 3 --output_dir car-evaluation
"""

import itertools
from functools import cache

import world
from checker import Checker

SURFACES = ("background", "backdrop", "curtain", "wall")
LOOKS = {"car": world.HELD_OUT["car"][1], "house": world.HELD_OUT["house"][0]}  # of the two concepts here


@cache
def _checker():
    return Checker.load()


def judge(pictures, prompts, concept):
    """Return, for each picture, 1 or 0.

    "identity": the object's look is likelier than those of all named objects of its superclass. It is left
        out where the superclass is not that of one of the two concepts here.
    "prompt": the superclasses are those of the prompt, and there are no others; so is the background, if the
        prompt names one.
    """
    readings = _checker().read(pictures)
    look = LOOKS.get(concept.superclass)
    is_it = [reading.breed(concept.superclass, thing=look) == "thing" for reading in readings if look]
    follows = [
        background_in(text) in (None, reading.background) and reading.superclasses == superclasses_in(text)
        for reading, text in zip(readings, prompts, strict=True)
    ]
    return {"identity": is_it, "prompt": follows} if look else {"prompt": follows}


def background_in(text):
    """Return the background that a prompt names, or None.

    >>> background_in("a red car on a green background")
    'green'
    """
    words = text.split()
    found = [a for a, b in itertools.pairwise(words) if b in SURFACES]
    return found[0] if found else None


def superclasses_in(text):
    """Return the superclasses that a prompt names, also by their breeds.

    >>> sorted(superclasses_in("a car left of a rose on a white background"))
    ['car', 'flower']
    """
    words = text.split()
    breeds = {word: world.BREEDS[word][0] for word in words if word in world.BREEDS}
    return frozenset({word for word in words if word in world.SUPERCLASSES} | set(breeds.values()))
