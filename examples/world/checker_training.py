"""Train the judges of `checker.py` on rendered pictures, set their thresholds, and measure their own errors."""

from dataclasses import replace
from multiprocessing import get_context
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
import world
from checker import CELL, CROP, GRID, KINDS, Checker, crop
from drawing import BACKGROUNDS, SIZE
from plans import MARKS
from safetensors.torch import save_file
from stages import train_stage
from torch import nn

PATTERN_NAMES, MARK_NAMES, BACKGROUND_NAMES = tuple(world.PATTERNS), tuple(MARKS), tuple(BACKGROUNDS)


def roughened(pixels, generator):
    """Blur pictures a little and add noise, each by an amount of its own: generated ones are never as clean."""
    count = len(pixels)
    blur = torch.rand(count, 1, 1, 1, generator=generator)
    pixels = (1 - blur) * pixels + blur * F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    noise = 0.10 * torch.rand(count, 1, 1, 1, generator=generator) ** 2
    return pixels + noise * torch.randn(pixels.shape, generator=generator)


def any_scene(seed):
    """Draw a scene of none to four things of any superclasses, two alike now and then, wherever they do not overlap."""
    rng = Random(f"scene {seed}")
    background = rng.choice(BACKGROUND_NAMES)
    things = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 3, 4))):
        _, identity, _ = world._any_thing(rng, background)
        superclass = rng.choice(
            [t.superclass for t in things] if things and rng.random() < 0.25 else world.SUPERCLASSES
        )
        for _ in range(12):
            size = rng.uniform(27, 58) if not things else rng.uniform(27, 34)
            x, y = (rng.uniform(size / 2 - 1, SIZE - size / 2 + 1) for _ in range(2))
            thing = world.Thing(superclass, identity, None, size, x, y)
            if all(max(abs(x - t.x), abs(y - t.y)) > 0.45 * (size + t.size) for t in things):
                things.append(thing)
                break
    return world.Scene(background, world.shade_of(BACKGROUNDS[background], rng, by=10), tuple(things))


def _reader_example(seed):
    scene = world.sample(seed).scene if seed % 2 else any_scene(seed)
    rows = np.full((4, 4), -1.0, np.float32)
    for i, thing in enumerate(scene.things):
        rows[i] = world.SUPERCLASSES.index(thing.superclass), thing.x, thing.y, thing.size
    return np.asarray(world.draw_scene(scene)), BACKGROUND_NAMES.index(scene.background), rows


def _parallel(function, items):
    with get_context("fork").Pool() as pool:
        return [np.stack(column) for column in zip(*pool.map(function, items, chunksize=32), strict=True)]


def reader_loss(reader, pixels, backgrounds, things):
    """Return the reader's loss; things (b, 4, 4) are superclass or −1, x, y and size in pixels."""
    background, heat, box = reader(pixels)
    cells = (torch.arange(GRID) + 0.5) * CELL
    target = torch.zeros_like(heat)
    loss_box = heat.new_zeros(())
    rows = torch.arange(len(heat))
    for i in range(things.shape[1]):
        kind, x, y, size = things[:, i].unbind(1)
        there = kind >= 0
        spread = (0.09 * size).clamp_min(2.5).view(-1, 1, 1)
        bump = torch.exp(
            -((cells.view(1, 1, -1) - x.view(-1, 1, 1)) ** 2 + (cells.view(1, -1, 1) - y.view(-1, 1, 1)) ** 2)
            / (2 * spread**2)
        )
        bump = bump / bump.amax((1, 2), keepdim=True).clamp_min(1e-3) * there.view(-1, 1, 1)
        at = kind.clamp_min(0).long()
        target[rows, at] = torch.maximum(target[rows, at], bump)
        near = (bump > 0.5).float()
        offsets = torch.stack([
            (x.view(-1, 1, 1) - cells.view(1, 1, -1)).expand_as(bump) / CELL,
            (y.view(-1, 1, 1) - cells.view(1, -1, 1)).expand_as(bump) / CELL,
            (size / 40).clamp_min(0.1).log2().view(-1, 1, 1).expand_as(bump),
        ], dim=1)  # fmt: skip
        loss_box = loss_box + ((box - offsets).abs().mean(1) * near).sum() / there.sum().clamp_min(1) / 4
    # Focal loss for bumps (Law and Deng 2018): near a centre, a "no" counts little.
    probability, is_centre = heat.sigmoid().clamp(1e-4, 1 - 1e-4), target > 0.99
    yes = ((1 - probability) ** 2 * probability.log())[is_centre].sum()
    no = ((1 - target) ** 4 * probability**2 * (1 - probability).log())[~is_centre].sum()
    loss_heat = -(yes + no) / is_centre.sum().clamp_min(1)
    return loss_heat + loss_box + 0.5 * F.cross_entropy(background, backgrounds)


def variants(identity, rng):
    """Return the identity twice, then one that shares its proportions alone, and one that shares its colours alone."""
    other, another = world.any_identity(rng), world.any_identity(rng)
    shape = replace(other, proportions=identity.proportions)
    colours = replace(another, body=identity.body, second=identity.second, accent=identity.accent)
    return identity, identity, shape, colours


def portrait(superclass, identity, rng):
    """Draw an object in a scene of its own, alone or beside another thing; returns the picture and the thing."""
    names = [name for name in BACKGROUND_NAMES if world.suits(identity, name)] or list(BACKGROUND_NAMES)
    background = rng.choice(names)
    size = rng.uniform(29, 34) if rng.random() < 0.5 else rng.uniform(34, 57)
    x, y = (rng.uniform(size / 2, SIZE - size / 2) for _ in range(2))
    things = [world.Thing(superclass, identity, None, size, x, y)]
    if size < 34 and rng.random() < 0.7:
        kind, company, _ = world._any_thing(rng, background)
        x, y = ((v + 32) % 64 for v in (x, y))
        x, y = (min(49.0, max(15.0, v)) for v in (x, y))
        if max(abs(x - things[0].x), abs(y - things[0].y)) > 30:
            things.insert(0, world.Thing(kind, company, None, 29, x, y))
    scene = world.Scene(background, world.shade_of(BACKGROUNDS[background], rng), tuple(things))
    return np.asarray(world.draw_scene(scene)), things[-1]


def _verifier_example(number, seeds="identity"):
    rng = Random(f"{seeds} {number}")
    superclass = world.SUPERCLASSES[number % len(world.SUPERCLASSES)]
    identities = variants(world.any_identity(rng), rng)
    pictures, boxes, traits = [], [], []
    for identity in identities:
        image, thing = portrait(superclass, identity, rng)
        pictures.append(image)
        boxes.append((thing.x, thing.y, thing.size))
        kinds = [PATTERN_NAMES.index(identity.pattern), MARK_NAMES.index(identity.mark)]
        traits.append([*world.trait_numbers(identity), *kinds])
    return np.stack(pictures), np.array(boxes, np.float32), np.array(traits, np.float32)


def contrast(embeddings, labels, superclasses, temperature=0.08):
    """Return the supervised contrastive loss (Khosla et al. 2020) among the rows of each superclass.

    Args:
        embeddings: (b, features), of length 1.
        labels: rows of one label are alike (b,).
        superclasses: rows of different ones are not compared (b,).
    """
    logits = embeddings @ embeddings.T / temperature
    is_self = torch.eye(len(logits), dtype=torch.bool)
    logits = logits.masked_fill(is_self | (superclasses[:, None] != superclasses), -1e4)
    alike = (labels[:, None] == labels) & ~is_self
    likelihoods = logits.log_softmax(dim=1)
    has_pair = alike.any(1)
    return -(likelihoods * alike).sum(1)[has_pair].div(alike.sum(1)[has_pair]).mean()


def verifier_loss(verifier, crops, traits, superclasses):
    """Return the verifier's loss for crops (g, 4, 3, h, w) of the variants of g identities; traits (g, 4, numbers)."""
    groups = len(crops)
    embeddings, predicted = verifier(crops.flatten(0, 1))
    same = torch.arange(groups).unsqueeze(1).expand(groups, 4)
    apart = groups + torch.arange(4 * groups).view(groups, 4)  # labels of their own
    kinds = superclasses.unsqueeze(1).expand(groups, 4).flatten()
    shares = {"identity": (0, 1), "shape": (0, 1, 2), "colours": (0, 1, 3)}
    loss = 0.0
    for kind in KINDS:
        labels = apart.clone()
        labels[:, shares[kind]] = same[:, shares[kind]]
        loss = loss + contrast(embeddings[kind], labels.flatten(), kinds)
    traits = traits.flatten(0, 1)
    loss = loss + F.mse_loss(predicted[:, : world.NUM_TRAITS], traits[:, : world.NUM_TRAITS])
    patterns, marks = predicted[:, world.NUM_TRAITS :].split([len(PATTERN_NAMES), len(MARK_NAMES)], dim=1)
    kinds = traits[:, world.NUM_TRAITS :].long().T
    return loss + 0.3 * F.cross_entropy(patterns, kinds[0]) + 0.3 * F.cross_entropy(marks, kinds[1])


def jittered(boxes, generator):
    """Move boxes (b, 3) a little, as the reader is not exact."""
    shift = 1.5 * (2 * torch.rand(len(boxes), 2, generator=generator) - 1)
    scale = 1 + 0.08 * (2 * torch.rand(len(boxes), 1, generator=generator) - 1)
    return torch.cat([boxes[:, :2] + shift, boxes[:, 2:] * scale], dim=1)


def train(args):
    """Train both and write them with their thresholds; see `checker.main` for the arguments."""
    torch.manual_seed(0)
    checker = Checker()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    seeds = range(10**7, 10**7 + args.num_pictures)
    images, backgrounds, things = (torch.from_numpy(part) for part in _parallel(_reader_example, seeds))

    def read_loss(step, progress, generator):
        rows = torch.randint(len(images), (48,), generator=generator)
        pixels = roughened(images[rows].permute(0, 3, 1, 2).float() / 127.5 - 1, generator)
        return reader_loss(checker.reader, pixels, backgrounds[rows], things[rows]), {}

    train_stage(
        "reader",
        args.work_dir,
        nn.ModuleDict({"reader": checker.reader}),
        read_loss,
        peak=2e-3,
        steps=args.reader_steps,
    )
    faces, boxes, traits = (
        torch.from_numpy(part) for part in _parallel(_verifier_example, range(args.num_identities))
    )
    superclasses = torch.arange(args.num_identities) % len(world.SUPERCLASSES)

    def verify_loss(step, progress, generator):
        kinds = torch.randperm(len(world.SUPERCLASSES), generator=generator)[
            :2
        ]  # few, so that those compared are many
        pool = torch.nonzero(torch.isin(superclasses, kinds)).flatten()
        rows = pool[torch.randperm(len(pool), generator=generator)[:28]]
        pixels = faces[rows].flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
        crops = crop(roughened(pixels, generator), *jittered(boxes[rows].flatten(0, 1), generator).unbind(1))
        return verifier_loss(
            checker.verifier, crops.view(-1, 4, 3, CROP, CROP), traits[rows], superclasses[rows]
        ), {}

    modules = nn.ModuleDict({"verifier": checker.verifier})
    train_stage("verifier", args.work_dir, modules, verify_loss, peak=2e-3, steps=args.verifier_steps)
    set_thresholds(checker)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in checker.state_dict().items()}, args.output
    )


def probes(superclass, number, count, seeds):
    """Draw `count` portraits of identity `number`; returns the identity and [(picture, thing)]."""
    rng = Random(f"{seeds} {superclass} {number}")
    identity = world._far_identity(rng, [], by=0)
    return identity, [portrait(superclass, identity, rng) for _ in range(count)]


@torch.no_grad()
def similarities(checker, superclass, *, seeds, num_identities=40, count=3, through=None, is_found=True):
    """Compare pictures of identities with the references of all.

    Args:
        checker: the judges.
        superclass: of all the identities.
        seeds: a word that names the set of identities.
        num_identities, count: so many, and pictures of each.
        through: changes the pictures, uint8 (b, 64, 64, 3), for instance by an autoencoder.
        is_found: whether the reader finds the thing; else it is where it was drawn.

    Returns:
        {kind: (similarity to the own reference (b,), to the others' (b, others))}.
    """
    objects = [probes(superclass, i, count, seeds) for i in range(num_identities)]
    references = [checker.reference(superclass, identity) for identity, _ in objects]
    images = np.stack([image for _, pictures in objects for image, _ in pictures])
    things = [thing for _, pictures in objects for _, thing in pictures]
    images = images if through is None else through(images)
    if is_found:
        near = [
            [t for t in reading.things if t.superclass == superclass]
            for reading in checker.read(list(images))
        ]
        things = [
            min(seen, key=lambda s, t=thing: abs(s.x - t.x) + abs(s.y - t.y))
            if seen
            else replace(thing, x=0.0, y=0.0)
            for seen, thing in zip(near, things, strict=True)
        ]
    found, owner = checker.embed(list(images), things), torch.arange(num_identities).repeat_interleave(count)
    results = {}
    for kind in KINDS:
        table = found[kind] @ torch.stack([reference[kind] for reference in references]).T
        is_own = owner[:, None] == torch.arange(num_identities)
        results[kind] = table[is_own], table[~is_own].view(len(table), -1)
    return results


def set_thresholds(checker, far=0.01):
    """Set each superclass's thresholds so that a part `far` of other objects passes; on identities of their own."""
    for s, superclass in enumerate(world.SUPERCLASSES):
        found = similarities(checker, superclass, seeds="thresholds", num_identities=80)
        for kind in KINDS:
            checker.thresholds[kind][s] = found[kind][1].flatten().quantile(1 - far)


def own_errors(checker, *, count=600, num_identities=30, through=None):
    """Return how often the judges are wrong about rendered pictures that they did not see, in parts of 1.

    Args:
        checker: the judges.
        count: pictures of the world for the reader.
        num_identities: identities of each superclass for the verifier.
        through: as for `similarities`, for both.
    """
    pictures = [world.sample(seed) for seed in range(2 * 10**7, 2 * 10**7 + count)]
    images = np.stack([np.asarray(picture.image) for picture in pictures])
    readings = checker.read(list(images if through is None else through(images)))
    pairs = list(zip(pictures, readings, strict=True))
    both = [(t, r.find(t.superclass)) for p, r in pairs for t in p.scene.things if r.find(t.superclass)]
    related = [(p, r) for p, r in pairs if p.relation and len(p.scene.things) == 2]

    def wrong(claims):
        claims = list(claims)
        return 1 - sum(claims) / max(1, len(claims))

    errors = {
        "background": wrong(r.background == p.scene.background for p, r in pairs),
        "how many": wrong(len(r.things) == len(p.scene.things) for p, r in pairs),
        "superclasses and no others": wrong(
            r.superclasses == tuple(sorted(t.superclass for t in p.scene.things)) for p, r in pairs
        ),
        "relation": wrong(r.holds(p.relation, *[t.superclass for t in p.scene.things]) for p, r in related),
        "place, by more than 3 pixels": wrong(max(abs(t.x - s.x), abs(t.y - s.y)) <= 3 for t, s in both),
        "size, by more than a tenth": wrong(abs(s.size / t.size - 1) <= 0.1 for t, s in both),
    }
    tables = [
        similarities(checker, s, seeds="errors", num_identities=num_identities, through=through)
        for s in world.SUPERCLASSES
    ]
    for kind in KINDS:
        limits = checker.thresholds[kind].tolist()
        errors[f"{kind}: others accepted"] = 1 - wrong(
            v
            for t, limit in zip(tables, limits, strict=True)
            for v in (t[kind][1] > limit).flatten().tolist()
        )
        errors[f"{kind}: rejected"] = wrong(
            v for t, limit in zip(tables, limits, strict=True) for v in (t[kind][0] > limit).tolist()
        )
    return errors
