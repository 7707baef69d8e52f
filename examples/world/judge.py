"""Prompts for a new object, and how pictures of them are judged: is it this object, and is the prompt followed?"""

from dataclasses import dataclass
from random import Random

import numpy as np
import world
from drawing import BACKGROUNDS, SIZE, TEXTURES

CHECKS = ("background", "superclasses", "size", "place", "relation")


@dataclass(frozen=True)
class Prompt:
    """A prompt with {} for the object's words, and what a picture that follows it shows.

    `pair` are the superclasses that stand in the `relation`, in its order; `size` and `place` are the world's words for them.
    """

    text: str
    background: str
    superclasses: tuple[str, ...]
    size: str | None = None
    place: str | None = None
    relation: str | None = None
    pair: tuple[str, ...] = ()

    def checks(self, reading, superclass):
        """Return which parts of the prompt a reading follows: {check: bool}, of those that the prompt has."""
        thing = reading.find(superclass)
        found = {
            "background": reading.background == self.background,
            "superclasses": reading.superclasses == self.superclasses,
        }
        if self.size is not None:
            found["size"] = thing is not None and has_size(thing.size, self.size)
        if self.place is not None:
            found["place"] = thing is not None and is_at(thing, self.place)
        if self.relation is not None:
            found["relation"] = reading.holds(self.relation, *self.pair)
        return found


def has_size(size, name):
    """Tell whether a size in pixels is what the world calls small or large: nearer to it than to medium."""
    names = tuple(world.SIZES)
    middles = [sum(world.SIZES[other][:2]) / 2 for other in names]
    return names[int(np.abs(np.array(middles) - size).argmin())] == name


def is_at(thing, place):
    """Tell whether a thing is in the part of its free room that a place of the world names."""
    for where, at in zip(world.PLACES[place], (thing.x, thing.y), strict=True):
        room = SIZE - thing.size - 2
        part = (at - thing.size / 2 - 1) / room if room > 2 else 0.5
        if where is not None and abs(part - (0.1 + 0.8 * where)) > 0.25:
            return False
    return True


def prompts_for(subject, count, seed=0):
    """Return prompts for an object, in turn with a size, a place, company (twice) and a texture behind it."""
    rng, prompts = Random(f"prompts {subject.superclass} {subject.seed} {seed}"), []
    grounds = [name for name in BACKGROUNDS if world.suits(subject.identity, name)]
    for i in range(count):
        kind = ("size", "place", "company", "company", "texture")[i % 5]
        fitting = [name for name in grounds if (name in TEXTURES) == (kind == "texture")] or grounds
        background = rng.choice(fitting)
        told = {"background": background, "superclasses": (subject.superclass,)}
        words = "a {}"
        if kind == "size":
            told["size"] = rng.choice(("small", "large"))
            words = f"a {told['size']} {{}}"
        elif kind == "place":
            told["place"] = rng.choice(("on the left", "on the right", "at the top", "at the bottom"))
            words = f"a {{}} {told['place']}"
        elif kind == "company":
            words, more = _in_company(rng, subject, background)
            told |= more
        phrases = world.ON_TEXTURE if background in TEXTURES else world.ON_COLOUR
        ground = rng.choice(phrases).format(background, a=world.with_article(background))
        prefix = rng.choice(("", "a photo of", "a picture of"))
        prompts.append(Prompt(f"{prefix} {words} {ground}".strip(), **told))
    return prompts


def _in_company(rng, subject, background):
    """Return words for an object beside a breed of another superclass, and what they tell."""
    breeds = [
        (name, superclass)
        for name, (superclass, identity) in world.BREEDS.items()
        if superclass != subject.superclass and world.suits(identity, background)
    ]
    name, superclass = rng.choice(breeds)
    relation = rng.choice(("left of", "right of", "above", "below"))
    pair, words = (subject.superclass, superclass), ("a {}", world.with_article(name))
    if rng.random() < 0.5:
        pair, words = pair[::-1], words[::-1]
    told = {"superclasses": tuple(sorted(pair)), "relation": relation, "pair": pair}
    return f"{words[0]} {relation} {words[1]}", told


def prompts_for_two(first, second, count, seed=0):
    """Return prompts with {0} and {1} for two objects of different superclasses, in any order and relation."""
    rng, prompts = (
        Random(f"prompts {first.superclass} {first.seed} {second.superclass} {second.seed} {seed}"),
        [],
    )
    grounds = [g for g in BACKGROUNDS if all(world.suits(s.identity, g) for s in (first, second))]
    for _ in range(count):
        background, relation = rng.choice(grounds), rng.choice(("left of", "right of", "above", "below"))
        pair, words = (first.superclass, second.superclass), ("a {0}", "a {1}")
        if rng.random() < 0.5:
            pair, words = pair[::-1], words[::-1]
        phrases = world.ON_TEXTURE if background in TEXTURES else world.ON_COLOUR
        ground = rng.choice(phrases).format(background, a=world.with_article(background))
        text = f"{words[0]} {relation} {words[1]} {ground}"
        told = {"superclasses": tuple(sorted(pair)), "relation": relation, "pair": pair}
        prompts.append(Prompt(text, background, **told))
    return prompts


def scores_of_two(images, checker, subjects, prompts):
    """Return figures of one picture for each prompt of `prompts_for_two`, in parts of 1: each object accepted, both, the prompt followed,
    and everything right."""
    readings = checker.read(images)
    accepted = []
    for subject in subjects:
        reference = checker.reference(subject.superclass, subject.identity)
        found, _ = checker.verify(images, subject.superclass, reference, readings=readings)
        accepted.append(found["identity"])
    followed = np.array(
        [all(p.checks(r, p.pair[0]).values()) for p, r in zip(prompts, readings, strict=True)]
    )
    both = accepted[0] & accepted[1]
    names = ("first", "second", "both objects", "followed", "everything")
    return {
        name: float(np.mean(values))
        for name, values in zip(names, (*accepted, both, followed, both & followed), strict=True)
    }


def unrelated_captions(subject, count):
    """Return the world's own captions that do not speak of the object's superclass."""
    taken = {subject.superclass, *world.BREED_NAMES[subject.superclass]}
    found, seed = [], 10**8
    while len(found) < count:
        caption = world.sample(seed).caption
        if taken.isdisjoint(caption.split()):
            found.append(caption)
        seed += 1
    return found


class Judge:
    """Judges pictures of one object.

    Args:
        checker: of `examples/world/checker.py`.
        subject: the object.
        prompts: of `prompts_for`.
    """

    def __init__(self, checker, subject, prompts):
        self.checker, self.subject, self.prompts = checker, subject, prompts
        self.reference = checker.reference(subject.superclass, subject.identity)

    def scores(self, images):
        """Return figures of one picture for each prompt, in parts of 1: identity (also its shape and its colours alone) accepted,
        prompt followed, both, and each check of the prompts that have it."""
        superclass, readings = self.subject.superclass, self.checker.read(images)
        accepted, _ = self.checker.verify(images, superclass, self.reference, readings=readings)
        checks = [p.checks(r, superclass) for p, r in zip(self.prompts, readings, strict=True)]
        followed = np.array([all(found.values()) for found in checks])
        figures = {kind: float(values.mean()) for kind, values in accepted.items()}
        figures |= {
            "followed": float(followed.mean()),
            "both": float((followed & accepted["identity"]).mean()),
        }
        for name in CHECKS:
            found = [held[name] for held in checks if name in held]
            figures |= {name: float(np.mean(found))} if found else {}
        return figures

    def change(self, before, after):
        """Return how far pictures are from those of before: the mean of 255, and the part that is read as before."""
        pixels = [
            np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()
            for a, b in zip(before, after, strict=True)
        ]
        pairs = zip(self.checker.read(before), self.checker.read(after), strict=True)
        same = [(a.background, a.superclasses) == (b.background, b.superclasses) for a, b in pairs]
        return {"changed": float(np.mean(pixels)), "read as before": float(np.mean(same))}
