"""Two judges of pictures of the world, which saw rendered pictures alone: what is in a picture, and whether it is a certain object.

    python examples/world/checker.py --train    # trains both
    python examples/world/checker.py            # prints their own errors, on rendered pictures that they did not see

The *reader* finds the background and all things: superclass, place and size of each. The *verifier* embeds a thing's crop, as faces are
verified: pictures of one object are near each other, those of others far. An object is accepted where its similarity to the reference is
above a threshold, that of its superclass, which one in a hundred other objects of the superclass passes. Two more embeddings know the
shape alone, and the colours alone, so that one can tell what is missing.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from drawing import BACKGROUNDS, SIZE
from plans import MARKS
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).with_name("checker.safetensors")
GRID = 16  # cells of the reader, along each edge
CELL = SIZE // GRID
CROP = 48  # pixels, edge of the verifier's crops
MARGIN = 1.12  # a crop's edge, in parts of the thing's box
KINDS = ("identity", "shape", "colours")  # what the verifier compares
EMBEDDING = 96  # features of each


@dataclass(frozen=True)
class Seen:
    """A thing that the reader sees: centre and edge of its box in pixels."""

    superclass: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Reading:
    """What the reader sees in a picture; `things` from the surest on."""

    background: str
    things: tuple[Seen, ...]

    @property
    def superclasses(self):
        """The things' superclasses in alphabetical order, each as often as it is seen."""
        return tuple(sorted(thing.superclass for thing in self.things))

    def find(self, superclass):
        """Return the surest thing of a superclass, or None."""
        return next((thing for thing in self.things if thing.superclass == superclass), None)

    def holds(self, relation, first, second):
        """Tell whether two superclasses are seen and stand in a relation of `world.RELATIONS`."""
        one, other = self.find(first), self.find(second)
        if one is None or other is None:
            return False
        axis, first_is_lower = world.RELATIONS[relation]
        here, there = ((one.x, other.x), (one.y, other.y))[axis]
        return (here < there - 4) if first_is_lower else (here > there + 4)


def _conv(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


class Reader(nn.Module):
    """Gives for pixels (b, 3, 64, 64) in [−1, 1]: background logits (b, names), and for each cell of 16 × 16 whether a thing's centre is
    there, (b, superclasses, 16, 16), and where exactly and how large, (b, 3, 16, 16)."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(_conv(3, 32, 2), _conv(32, 32), _conv(32, 64, 2), _conv(64, 64))
        self.coarse = nn.Sequential(_conv(64, 96, 2), _conv(96, 96), _conv(96, 96))
        self.merge = nn.Conv2d(96, 64, 1)
        self.last = _conv(64, 64)
        self.heat, self.box = nn.Conv2d(64, len(world.SUPERCLASSES), 1), nn.Conv2d(64, 3, 1)
        self.background = nn.Linear(96 + 64, len(BACKGROUNDS))
        nn.init.constant_(self.heat.bias, -3.0)

    def forward(self, pixels):
        fine = self.fine(pixels)
        coarse = self.coarse(fine)
        last = self.last(fine + F.interpolate(self.merge(coarse), scale_factor=2))
        pooled = torch.cat([coarse.mean((2, 3)), fine.mean((2, 3))], dim=1)
        return self.background(pooled), self.heat(last), self.box(last)


class Verifier(nn.Module):
    """Gives for crops (b, 3, 48, 48) in [−1, 1] an embedding of length 1 for each of `KINDS`, and (training alone) the traits."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            _conv(3, 32, 2), _conv(32, 64, 2), _conv(64, 64), _conv(64, 128, 2), _conv(128, 64)
        )
        self.flat = nn.Sequential(nn.Flatten(), nn.Linear(64 * 36, 256), nn.SiLU())
        self.heads = nn.ModuleDict({kind: nn.Linear(256, EMBEDDING) for kind in KINDS})
        self.traits = nn.Linear(256, world.NUM_TRAITS + len(world.PATTERNS) + len(MARKS))

    def forward(self, crops):
        features = self.flat(self.trunk(crops))
        return {kind: F.normalize(head(features), dim=-1) for kind, head in self.heads.items()}, self.traits(
            features
        )


def as_pixels(images):
    """Turn PIL pictures, or uint8 arrays (b, 64, 64, 3), into float pixels (b, 3, 64, 64) in [−1, 1]."""
    arrays = [
        image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB")) for image in images
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def crop(pixels, x, y, size):
    """Cut boxes out of pictures and scale them to `CROP`; what is outside repeats the edge.

    Args:
        pixels: (b, 3, 64, 64).
        x, y, size: centres and edges of the things' boxes in pixels, (b,) each.
    """
    steps = (torch.arange(CROP) + 0.5) / CROP * 2 - 1
    half = (size * MARGIN / 2).view(-1, 1)
    across, down = x.view(-1, 1) + half * steps, y.view(-1, 1) + half * steps
    count = len(pixels)
    grid = torch.stack(
        [across.unsqueeze(1).expand(count, CROP, CROP), down.unsqueeze(2).expand(count, CROP, CROP)], dim=-1
    )
    return F.grid_sample(pixels, grid / SIZE * 2 - 1, padding_mode="border", align_corners=False)


class Checker:
    """Both judges, and the thresholds: a dict by kind of one number for each superclass."""

    def __init__(self):
        self.reader, self.verifier = Reader().eval(), Verifier().eval()
        self.thresholds = {kind: torch.ones(len(world.SUPERCLASSES)) for kind in KINDS}

    @classmethod
    def load(cls, path=WEIGHTS):
        """Return the trained checker."""
        checker, tensors = cls(), {name: tensor.float() for name, tensor in load_file(path).items()}
        for name in ("reader", "verifier"):
            part = {
                key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")
            }
            getattr(checker, name).load_state_dict(part)
            getattr(checker, name).requires_grad_(False)
        checker.thresholds = {kind: tensors[f"threshold.{kind}"] for kind in KINDS}
        return checker

    def state_dict(self):
        """Return everything as named tensors."""
        tensors = {f"reader.{name}": tensor for name, tensor in self.reader.state_dict().items()}
        tensors |= {f"verifier.{name}": tensor for name, tensor in self.verifier.state_dict().items()}
        return tensors | {f"threshold.{kind}": values for kind, values in self.thresholds.items()}

    @torch.no_grad()
    def read(self, images, *, at_least=0.4):
        """Read pictures; a thing counts where the reader is surer than `at_least`."""
        readings = []
        for start in range(0, len(images), 64):
            background, heat, box = self.reader(as_pixels(images[start : start + 64]))
            heat = heat.sigmoid()
            is_peak = (heat == F.max_pool2d(heat, 5, 1, 2)) & (heat > at_least)
            for row in range(len(heat)):
                found = []
                for s, v, u in is_peak[row].nonzero().tolist():
                    dx, dy, size = box[row, :, v, u].tolist()
                    seen = Seen(
                        world.SUPERCLASSES[s], (u + 0.5 + dx) * CELL, (v + 0.5 + dy) * CELL, 40 * 2**size
                    )
                    found.append((heat[row, s, v, u].item(), seen))
                found.sort(key=lambda pair: -pair[0])
                kept = []
                for _, seen in found:  # of two readings of one thing the surer one stays
                    if all(
                        abs(seen.x - k.x) + abs(seen.y - k.y) > 0.35 * min(seen.size, k.size) for k in kept
                    ):
                        kept.append(seen)
                readings.append(Reading(tuple(BACKGROUNDS)[background[row].argmax()], tuple(kept)))
        return readings

    @torch.no_grad()
    def embed(self, images, things):
        """Return the embeddings of one thing in each picture: {kind: (b, features)}; `things` have x, y and size."""
        parts = []
        for start in range(0, len(images), 64):
            chosen = things[start : start + 64]
            boxes = torch.tensor([(thing.x, thing.y, thing.size) for thing in chosen], dtype=torch.float32)
            parts.append(self.verifier(crop(as_pixels(images[start : start + 64]), *boxes.unbind(1)))[0])
        return {kind: torch.cat([part[kind] for part in parts]) for kind in KINDS}

    def reference(self, superclass, identity, *, count=12):
        """Return an object's mean embeddings over rendered pictures, {kind: (features,)}, each of length 1."""
        pictures = world.NewObject(superclass, identity, 0).things(count)
        images = [world.draw_scene(scene) for scene, _ in pictures]
        found = self.embed(images, [thing for _, thing in pictures])
        return {kind: F.normalize(rows.mean(0), dim=0) for kind, rows in found.items()}

    def verify(self, images, superclass, reference, *, readings=None):
        """Tell for each picture whether an object is there.

        Args:
            images: pictures.
            superclass: the object's.
            reference: of `reference`.
            readings: of `read`, where they are known.

        Returns:
            {kind: bool array (b,)}, False where nothing of the superclass is seen; and the similarities {kind: (b,)}, then −1.
        """
        readings = self.read(images) if readings is None else readings
        things = [reading.find(superclass) for reading in readings]
        where = [i for i, thing in enumerate(things) if thing is not None]
        similarity = {kind: np.full(len(images), -1.0) for kind in KINDS}
        if where:
            found = self.embed([images[i] for i in where], [things[i] for i in where])
            for kind in KINDS:
                similarity[kind][where] = (found[kind] @ reference[kind]).numpy()
        s = world.SUPERCLASSES.index(superclass)
        return {kind: similarity[kind] > self.thresholds[kind][s].item() for kind in KINDS}, similarity


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true")
    parser.add_argument(
        "--work_dir", type=Path, default=Path(__file__).with_name("work"), help="checkpoints of the training"
    )
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--reader_steps", type=int, default=1500)
    parser.add_argument("--verifier_steps", type=int, default=2500)
    parser.add_argument(
        "--num_pictures", type=int, default=12_000, help="rendered pictures that the reader is trained on"
    )
    parser.add_argument(
        "--num_identities", type=int, default=2500, help="that the verifier is trained on, four pictures each"
    )
    args = parser.parse_args(argv)
    import checker_training

    if args.train:
        checker_training.train(args)
    for name, value in checker_training.own_errors(Checker.load(args.output)).items():
        print(f"{name}: {value:.2%}")


if __name__ == "__main__":
    main()
