"""The pictures, captions and groundings that the model is trained on, made by all cores and kept in the work folder."""

import json
import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import world
from tqdm import tqdm
from words import ground

CHUNK = 250


def _describe(start):
    pictures = [world.sample(seed) for seed in range(start, start + CHUNK)]
    choices, numbers = (np.stack(column) for column in zip(*map(ground, pictures), strict=True))
    return (
        [picture.caption for picture in pictures],
        choices,
        numbers,
        [len(p.scene.things) for p in pictures],
    )


def _draw(start):
    return np.stack([np.asarray(world.sample(seed).image) for seed in range(start, start + CHUNK)])


def _parallel(function, count, what):
    starts = range(0, count, CHUNK)
    with get_context("fork").Pool() as pool:
        return list(tqdm(pool.imap(function, starts), total=len(starts), desc=what, mininterval=20))


def load_captions(folder: Path, count: int):
    """Return the world's first `count` captions and what their words stand for; made once.

    Returns:
        Captions, choices (count, tokens, kinds) int8, numbers (count, tokens, numbers) float16, and numbers of things (count,).
    """
    path = folder / f"captions-{count}.npz"
    if not path.exists():
        parts = _parallel(_describe, count, "captions")
        captions = [caption for part in parts for caption in part[0]][:count]
        choices, numbers, things = (np.concatenate([part[i] for part in parts])[:count] for i in (1, 2, 3))
        np.savez(
            folder / "tmp.npz", captions=json.dumps(captions), choices=choices, numbers=numbers, things=things
        )
        os.replace(folder / "tmp.npz", path)
    data = np.load(path)
    return json.loads(str(data["captions"])), data["choices"], data["numbers"], data["things"]


def load_pictures(folder: Path, count: int):
    """Return the world's first `count` pictures, uint8 (count, 64, 64, 3), read from the disk as they are needed; drawn once."""
    path = folder / f"pictures-{count}.npy"
    if not path.exists():
        temporary = folder / "tmp-pictures.npy"
        images = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.uint8, shape=(count, world.SIZE, world.SIZE, 3)
        )
        starts = range(0, count, CHUNK)
        with get_context("fork").Pool() as pool:
            parts = tqdm(pool.imap(_draw, starts), total=len(starts), desc="pictures", mininterval=20)
            for start, part in zip(starts, parts, strict=True):
                images[start : start + CHUNK] = part[: count - start]
        images.flush()
        os.replace(temporary, path)
    return np.load(path, mmap_mode="r")
