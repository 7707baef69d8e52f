"""Show two concepts, learned separately, in one picture of the small Stable Diffusion, and count both.

    python examples/shapes/mix.py

Both files are in `concepts/`. Each concept has its own gate bias. The pictures are made with and without
global key-locking. `mix.png` in `--output_dir` has one prompt per column and one seed per row.
"""

import argparse
from dataclasses import astuple
from pathlib import Path
from random import Random

import world
from checker import Checker
from evaluate import generate, load_pipeline
from personalize import HERE, draw_grid
from PIL import Image
from pretrain import MODEL_FOLDER

from perfusion_pytorch import get_active_concepts, global_key_lock, load_concept, set_concepts

# token: superclass, and which of its held-out looks the concept has
CONCEPTS = {"<car-1>": ("car", 1), "<house-1>": ("house", 0)}
BETAS = {"car": 0.7, "house": 0.85}  # the house's look is the stronger one
GRID_PROMPTS = (
    "a {car} left of a {house} on a purple background",
    "a {house} left of a {car} on a white background",
    "a {car} above a {house} on a gray background",
    "a photo of a {house} beside a {car} before a teal curtain",
    "a {car} and a {house} on a black background",
    "a {car} next to a rose on a white background",
    "a panda right of a {house} on a teal background",
    "a car left of a house on a purple background",
)


def evaluation_prompts(count, seed=0):
    """Return (prompt with {car} and {house}, background): both concepts, in any order and relation."""
    rng, prompts = Random(seed), []
    painted = {
        colour
        for superclass, index in CONCEPTS.values()
        for colour in astuple(world.HELD_OUT[superclass][index])
    }
    for _ in range(count):
        background = rng.choice([c for c in world.BACKGROUNDS if c not in painted])
        first, second = rng.sample(("{car}", "{house}"), 2)
        on = rng.choice(world.BACKGROUND_PHRASES[:1] + world.BACKGROUND_PHRASES[3:]).format(background)
        subject = f"a {first} {rng.choice(tuple(world.RELATIONS))} a {second} {on}"
        prompts.append((f"{rng.choice(('', 'a photo of ', 'a picture of '))}{subject}", background))
    return prompts


def measure(readings, prompts):
    """Return how often each concept is there, both are, and the prompt is followed, in parts of 1.

    A prompt is followed where the background and both superclasses are right.
    """
    superclasses = [superclass for superclass, _ in CONCEPTS.values()]
    there = [
        [
            reading.breed(superclass, concept=world.HELD_OUT[superclass][index]) == "concept"
            for superclass, index in CONCEPTS.values()
        ]
        for reading in readings
    ]
    followed = [
        reading.background == background and reading.superclasses == set(superclasses)
        for reading, (_, background) in zip(readings, prompts, strict=True)
    ]
    n = len(readings)
    return (
        [sum(row[i] for row in there) / n for i in range(len(superclasses))],
        sum(map(all, there)) / n,
        sum(followed) / n,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", default=MODEL_FOLDER)
    parser.add_argument("--concept_dir", type=Path, default=HERE / "concepts")
    parser.add_argument("--output_dir", type=Path, default=HERE / "output")
    parser.add_argument("--num_validation_prompts", type=int, default=200)
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipe, checker = load_pipeline(args.pretrained_model_name_or_path), Checker.load()
    prompts = evaluation_prompts(args.num_validation_prompts)
    plain = {superclass: superclass for superclass, _ in CONCEPTS.values()}
    base = checker.read(generate(pipe, [prompt.format(**plain) for prompt, _ in prompts], desc="base model"))

    names = {
        superclass: load_concept(pipe, args.concept_dir / f"{superclass}.safetensors")
        for superclass, _ in CONCEPTS.values()
    }
    set_concepts(
        pipe, list(names.values()), beta={names[superclass]: beta for superclass, beta in BETAS.items()}
    )
    with_both = [prompt.format(**names) for prompt, _ in prompts]
    found = {
        "base model": base,
        "both concepts": checker.read(generate(pipe, with_both, desc="both concepts")),
    }
    with global_key_lock(pipe):
        found["keys locked"] = checker.read(generate(pipe, with_both, desc="global key-locking"))
    print(
        f"{'':14}"
        + "".join(f"{name:>12}" for name in get_active_concepts(pipe))
        + f"{'both':>12}{'prompt followed':>18}"
    )
    for label, readings in found.items():
        there, both, followed = measure(readings, prompts)
        print(
            f"{label:14}" + "".join(f"{share:>12.0%}" for share in there) + f"{both:>12.0%}{followed:>18.0%}"
        )

    grid_prompts = [prompt.format(**names) for prompt in GRID_PROMPTS]
    rows = [(f"seed {seed}", generate(pipe, grid_prompts, seed=seed)) for seed in (100, 200, 300)]
    folders = (HERE / "pictures", HERE / "pictures_house")
    pictures = [Image.open(path) for folder in folders for path in sorted(folder.glob("*.png"))[:4]]
    draw_grid(args.output_dir / "mix.png", pictures, rows, grid_prompts)
    print(f"\nWrote {args.output_dir / 'mix.png'}: look at it.")


if __name__ == "__main__":
    main()
