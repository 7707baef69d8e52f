"""Measure how often the small Stable Diffusion follows its prompts, over captions that it was not trained on.

python examples/shapes/evaluate.py
"""

import argparse
from pathlib import Path

import torch
import world
from checker import Checker
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from pretrain import MODEL_FOLDER, NUM_PICTURES
from tqdm import tqdm

HELD_OUT_SEEDS = 3 * 10**7


def load_pipeline(path=MODEL_FOLDER):
    """Load the small Stable Diffusion, without progress bars of its own."""
    logging.set_verbosity_error()
    pipe = StableDiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompts, *, seed=0, batch_size=32, steps=20, guidance=3.0, desc=None):
    """Make one picture per prompt; picture i starts from noise number seed + i, whatever the batch size."""
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=desc, leave=False, disable=desc is None):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        images += pipe(
            list(batch), num_inference_steps=steps, guidance_scale=guidance, generator=generators
        ).images
    return images


def held_out_pictures(count):
    """Return pictures of the world whose captions name a background and are not training captions."""
    known = {world.sample(seed).caption for seed in range(NUM_PICTURES)}
    pictures, seed = {}, HELD_OUT_SEEDS
    while len(pictures) < count:
        picture = world.sample(seed)
        named = any(
            f" {picture.scene.background} {word}" in picture.caption
            for word in ("background", "wall", "backdrop", "curtain")
        )
        if picture.caption not in known and named:
            pictures.setdefault(picture.caption, picture)
        seed += 1
    return list(pictures.values())


def contact_sheet(images, columns=10, scale=2):
    """Lay pictures out in rows."""
    edge = world.SIZE * scale + 2
    sheet = Image.new("RGB", (columns * edge, -(-len(images) // columns) * edge))
    for i, image in enumerate(images):
        sheet.paste(
            image.resize((edge - 2, edge - 2), Image.Resampling.NEAREST),
            (i % columns * edge, i // columns * edge),
        )
    return sheet


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", default=MODEL_FOLDER)
    parser.add_argument("--num_prompts", type=int, default=400)
    parser.add_argument("--sheet", type=Path, help="write the pictures as one PNG")
    args = parser.parse_args()
    pictures = held_out_pictures(args.num_prompts)
    images = generate(
        load_pipeline(args.pretrained_model_name_or_path),
        [picture.caption for picture in pictures],
        desc="pictures",
    )
    readings = Checker.load().read(images)
    scores = {
        "background": [],
        "superclass": [],
        "all superclasses, no others": [],
        "breed": [],
        "exact look of the breed": [],
        "named colour": [],
    }
    for picture, reading in zip(pictures, readings, strict=True):
        scores["background"].append(reading.background == picture.scene.background)
        things = picture.scene.things
        scores["all superclasses, no others"].append(
            reading.superclasses == {thing.superclass for thing in things}
        )
        for thing in things:
            scores["superclass"].append(thing.superclass in reading.superclasses)
            if thing.breed:
                scores["breed"].append(reading.breed(thing.superclass) == thing.breed)
                scores["exact look of the breed"].append(reading.shows(thing.superclass, thing.look))
            elif f" {thing.look.body} {thing.superclass}" in f" {picture.caption}":
                scores["named colour"].append(reading.look(thing.superclass).body == thing.look.body)
    for name, claims in scores.items():
        print(f"{name}: {sum(claims) / len(claims):.1%} of {len(claims)}")
    if args.sheet:
        contact_sheet(images[:100]).save(args.sheet)


if __name__ == "__main__":
    main()
