"""Measure the small Stable Diffusion against its goals, over captions that it was not trained on.

    python examples/world/evaluate.py --sheet sheet.png

The ceiling of every figure is what the checkers read in rendered pictures of the same captions, which is printed beside it.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import world
from checker import KINDS, Checker
from checker_training import own_errors
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from drawing import SIZE
from PIL import Image
from tqdm import tqdm
from vae_stage import decibels, reconstruct

MODEL_FOLDER = Path(__file__).with_name("tiny-sd")
NUM_TRAINED = 60_000  # captions that the committed model may have seen
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
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
        images += pipe(batch, **options).images
    return images


def held_out_pictures(count):
    """Return pictures of the world whose captions name the background and were not trained on, each caption once."""
    known = {world.sample(seed).caption for seed in range(NUM_TRAINED)}
    pictures, seed = {}, HELD_OUT_SEEDS
    while len(pictures) < count:
        picture = world.sample(seed)
        if picture.caption not in known and picture.scene.background in picture.caption.split():
            pictures.setdefault(picture.caption, picture)
        seed += 1
    return list(pictures.values())


def related(picture):
    """Return the superclasses of the two things that stand in the caption's relation; None without one."""
    things = picture.scene.things
    if picture.relation is None:
        return None
    # Of three, the pair that stands together is named first or last: what relates is the first thing and the last one.
    return things[0].superclass, things[-1].superclass


def scores_of(images, pictures, checker):
    """Return {measure: list of claims} for pictures of captions.

    Args:
        images: one for each caption.
        pictures: captions and scenes, of `held_out_pictures`.
        checker: the judges.
    """
    readings = checker.read(images)
    claims = {name: [] for name in ("background", "superclasses and no others", "relation")}
    claims |= {f"breed's {kind}": [] for kind in KINDS}
    by_breed = {}
    for i, (picture, reading) in enumerate(zip(pictures, readings, strict=True)):
        things = picture.scene.things
        claims["background"].append(reading.background == picture.scene.background)
        claims["superclasses and no others"].append(
            reading.superclasses == tuple(sorted(thing.superclass for thing in things))
        )
        if picture.relation is not None:
            claims["relation"].append(reading.holds(picture.relation, *related(picture)))
        for thing in things:
            if thing.breed:
                by_breed.setdefault(thing.breed, []).append(i)
    for breed, rows in by_breed.items():
        superclass, identity = world.BREEDS[breed]
        reference = checker.reference(superclass, identity)
        chosen = [images[i] for i in rows]
        accepted, _ = checker.verify(chosen, superclass, reference, readings=[readings[i] for i in rows])
        for kind in KINDS:
            claims[f"breed's {kind}"] += accepted[kind].tolist()
    return claims


def vae_scores(vae, checker, count=300):
    """Return the reconstruction's signal-to-noise ratio in decibels, and the checkers' errors on reconstructed pictures."""
    images = np.stack([np.asarray(world.sample(HELD_OUT_SEEDS + i).image) for i in range(count)])
    errors = own_errors(checker, through=lambda images: reconstruct(vae, np.asarray(images)))
    return decibels(images, reconstruct(vae, images)).mean(), errors


def contact_sheet(images, columns=10, scale=2):
    """Lay pictures out in rows."""
    edge = SIZE * scale + 2
    sheet = Image.new("RGB", (columns * edge, -(-len(images) // columns) * edge))
    for i, image in enumerate(images):
        place = (i % columns * edge, i // columns * edge)
        sheet.paste(image.resize((edge - 2, edge - 2), Image.Resampling.NEAREST), place)
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", default=MODEL_FOLDER)
    parser.add_argument("--num_prompts", type=int, default=400)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--skip_vae", action="store_true", help="do not judge the autoencoder alone")
    parser.add_argument("--sheet", type=Path, help="write the first hundred pictures as one PNG")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    pipe, checker = load_pipeline(args.pretrained_model_name_or_path), Checker.load()
    pictures = held_out_pictures(args.num_prompts)
    captions = [picture.caption for picture in pictures]

    found = {}
    began = time.perf_counter()
    generate(pipe, captions[:8], guidance=args.guidance_scale)
    found["seconds for 20 steps of 8 pictures"] = time.perf_counter() - began
    images = generate(pipe, captions, guidance=args.guidance_scale, desc="pictures")
    rendered = scores_of([picture.image for picture in pictures], pictures, checker)
    for name, claims in scores_of(images, pictures, checker).items():
        found[name] = sum(claims) / len(claims)
        ceiling = sum(rendered[name]) / len(claims)
        print(f"{name}: {found[name]:.1%} of {len(claims)} (rendered: {ceiling:.1%})", flush=True)
    print(f"20 steps of 8 pictures: {found['seconds for 20 steps of 8 pictures']:.1f} s")
    if not args.skip_vae:
        found["VAE, dB"], errors = vae_scores(pipe.vae, checker)
        print(f"VAE: {found['VAE, dB']:.2f} dB")
        for name, error in errors.items():
            found[f"through the VAE, {name}"] = error
            print(f"through the VAE, {name}: {error:.2%}")
    if args.sheet:
        contact_sheet(images[:100]).save(args.sheet)
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
