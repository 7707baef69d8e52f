"""What every method is given: objects, templates, and pictures of prompts."""

import sys
from pathlib import Path

WORLD = Path(__file__).parents[2] / "examples" / "world"
sys.path.insert(0, str(WORLD))

import world  # noqa: E402
from drawing import SIZE  # noqa: E402
from evaluate import generate  # noqa: E402
from judge import Judge, prompts_for, prompts_for_two, scores_of_two, unrelated_captions  # noqa: E402

__all__ = [
    "SIZE",
    "Judge",
    "generate",
    "objects",
    "pictures_of",
    "prompts_for",
    "prompts_for_two",
    "scores_of_two",
    "unrelated_captions",
    "world",
]
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "a drawing of a {}", "this is a {}", "one {}")
FIRST_TEST_SEED = 1000  # objects of lower seeds are for development


def objects(split, per_superclass):
    """Return objects of every superclass: of the "development" or the "test" seeds."""
    first = FIRST_TEST_SEED if split == "test" else 0
    return [world.new_object(s, first + i) for i in range(per_superclass) for s in world.SUPERCLASSES]


def pictures_of(pipe, prompts, words, *, seed):
    """Make one picture for each prompt, with `words` for the object."""
    return generate(pipe, [prompt.text.format(words) for prompt in prompts], seed=seed)
