"""A checker that reads pictures of the world: background, which superclasses are there, and the look of each.

    python examples/shapes/checker.py      # trains it and prints its error rates

It is trained on rendered pictures only and never sees the generator. Its weights are beside this file.
"""

import argparse
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
import world
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

WEIGHTS = Path(__file__).with_name("checker.safetensors")
CHOICES = {
    "body": world.PAINTS,
    "second": world.PAINTS,
    "accent": world.PAINTS,
    "pattern": tuple(world.PATTERNS),
}
NUM_SUPERCLASSES, NUM_BACKGROUNDS = len(world.SUPERCLASSES), len(world.BACKGROUNDS)


@dataclass(frozen=True)
class Reading:
    """What the checker sees in one picture.

    `scores[superclass][part][choice]` are log-probabilities of the parts of a look.
    """

    background: str
    superclasses: frozenset[str]
    scores: dict[str, dict[str, dict[str, float]]]

    def look(self, superclass):
        """Return the most likely look of a superclass's object."""
        return world.Look(
            **{part: max(choices, key=choices.get) for part, choices in self.scores[superclass].items()}
        )

    def likelihood(self, superclass, look):
        """Return the log-probability of a look."""
        return sum(choices[getattr(look, part)] for part, choices in self.scores[superclass].items())

    def shows(self, superclass, look):
        """Return whether the superclass is there with exactly this look, in all four parts."""
        return superclass in self.superclasses and self.look(superclass) == look

    def breed(self, superclass, **new_looks):
        """Return the most likely breed or new look (by name) of a superclass; None if it is not there."""
        if superclass not in self.superclasses:
            return None
        looks = {name: world.BREEDS[name][1] for name in world.BREED_NAMES[superclass]} | new_looks
        return max(looks, key=lambda name: self.likelihood(superclass, looks[name]))


class Checker(nn.Module):
    """A small convolutional network; it reads the look of a superclass where it sees that superclass."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((32, 2), (48, 1), (64, 2), (96, 1), (128, 2), (128, 1), (128, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.background = nn.Linear(channels, NUM_BACKGROUNDS)
        self.where = nn.Conv2d(channels, NUM_SUPERCLASSES, 1)
        self.parts = nn.ModuleDict(
            {part: nn.Conv2d(channels, NUM_SUPERCLASSES * len(c), 1) for part, c in CHOICES.items()}
        )

    def forward(self, pixels):
        """Return logits of background (b, 12), presence (b, 8), and each part (b, 8, choices).

        Args:
            pixels: pictures (b, 3, 64, 64) in [-1, 1].
        """
        features = self.features(pixels)
        where = rearrange(self.where(features), "b s h w -> b s (h w)")
        attention = where.softmax(dim=-1)
        parts = {
            part: torch.einsum(
                "bsp,bscp->bsc",
                attention,
                rearrange(layer(features), "b (s c) h w -> b s c (h w)", s=NUM_SUPERCLASSES),
            )
            for part, layer in self.parts.items()
        }
        return self.background(features.mean(dim=(2, 3))), where.amax(dim=-1), parts

    @classmethod
    def load(cls):
        """Return the trained checker."""
        checker = cls()
        checker.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
        return checker.eval().requires_grad_(False)

    @torch.no_grad()
    def read(self, images):
        """Read a list of 64 × 64 RGB pictures."""
        pixels = (
            torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
            .permute(0, 3, 1, 2)
            .float()
            / 127.5
            - 1
        )
        background, presence, parts = self(pixels)
        parts = {part: logits.log_softmax(dim=-1).tolist() for part, logits in parts.items()}
        readings = []
        for row in range(len(images)):
            scores = {
                superclass: {
                    part: dict(zip(choices, parts[part][row][s], strict=True))
                    for part, choices in CHOICES.items()
                }
                for s, superclass in enumerate(world.SUPERCLASSES)
            }
            present = frozenset(
                name
                for name, logit in zip(world.SUPERCLASSES, presence[row].tolist(), strict=True)
                if logit > 0
            )
            readings.append(Reading(world.BACKGROUNDS[background[row].argmax()], present, scores))
        return readings


def _labelled(seed):
    """Draw picture number `seed`, all looks equally likely: the checker is to learn parts and not breeds.

    Returns pixels, the background's number, and for each superclass −1 (absent) or the numbers of its look.
    """
    scene, rng = world.sample(seed).scene, Random(f"look {seed}")
    labels = np.full((NUM_SUPERCLASSES, len(CHOICES)), -1)
    things = []
    for thing in scene.things:
        look = world.random_look(rng, scene.background)
        things.append(replace(thing, look=look, breed=None))
        labels[world.SUPERCLASSES.index(thing.superclass)] = [
            choices.index(getattr(look, part)) for part, choices in CHOICES.items()
        ]
    return (
        np.asarray(world.draw(replace(scene, things=tuple(things)))),
        world.BACKGROUNDS.index(scene.background),
        labels,
    )


def train(steps, count):
    """Train on `count` rendered pictures, with blur and noise, since generated ones are never as clean."""
    with Pool() as pool:
        seeds = range(10**7, 10**7 + count)
        rows = list(
            tqdm(pool.imap(_labelled, seeds, chunksize=64), total=count, desc="pictures", mininterval=10)
        )
    images, backgrounds, labels = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    torch.manual_seed(0)
    checker = Checker()
    optimizer = torch.optim.AdamW(checker.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in tqdm(range(steps), desc="checker", mininterval=10):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(count, (64,), generator=generator)
        pixels = images[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1
        blur = torch.rand(64, 1, 1, 1, generator=generator) * 0.8
        pixels = (1 - blur) * pixels + blur * F.avg_pool2d(
            pixels, 3, stride=1, padding=1, count_include_pad=False
        )
        pixels = pixels + 0.1 * torch.rand(64, 1, 1, 1, generator=generator) * torch.randn(
            pixels.shape, generator=generator
        )
        background, presence, parts = checker(pixels)
        target = labels[chosen]
        there = target[..., 0] >= 0
        loss = F.cross_entropy(background, backgrounds[chosen]) + 4 * F.binary_cross_entropy_with_logits(
            presence, there.float()
        )
        for i, logits in enumerate(parts.values()):
            loss = loss + F.cross_entropy(logits[there], target[..., i][there])
        loss.backward()
        nn.utils.clip_grad_norm_(checker.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save_file({name: tensor.half().contiguous() for name, tensor in checker.state_dict().items()}, WEIGHTS)


def own_errors(count=1000):
    """Return the checker's error rates on rendered pictures that it was not trained on, in parts of 1."""
    checker = Checker.load()
    pictures = [world.sample(seed) for seed in range(2 * 10**7, 2 * 10**7 + count)]
    readings = checker.read([picture.image for picture in pictures])
    things = [
        (thing, reading)
        for picture, reading in zip(pictures, readings, strict=True)
        for thing in picture.scene.things
    ]
    breeds = [(thing, reading) for thing, reading in things if thing.breed]
    new = [
        (s, i, world.sample_new_object(s, i, seed)[0])
        for s in world.SUPERCLASSES
        for i in (0, 1)
        for seed in range(1000, 1000 + count // 16)
    ]
    new_readings = checker.read([image for _, _, image in new])

    def wrong(claims):
        claims = list(claims)
        return 1 - sum(claims) / len(claims)

    return {
        "background": wrong(
            r.background == p.scene.background for p, r in zip(pictures, readings, strict=True)
        ),
        "superclasses": wrong(
            r.superclasses == {t.superclass for t in p.scene.things}
            for p, r in zip(pictures, readings, strict=True)
        ),
        "breed": wrong(r.breed(t.superclass) == t.breed for t, r in breeds),
        "exact look": wrong(r.shows(t.superclass, t.look) for t, r in things),
        "exact look, new objects": wrong(
            r.shows(s, world.HELD_OUT[s][i]) for (s, i, _), r in zip(new, new_readings, strict=True)
        ),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--num_pictures", type=int, default=40_000)
    args = parser.parse_args()
    train(args.steps, args.num_pictures)
    for name, error in own_errors().items():
        print(f"{name}: wrong in {error:.1%} of rendered pictures")


if __name__ == "__main__":
    main()
