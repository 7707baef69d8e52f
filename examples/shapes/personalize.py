"""Teach the small Stable Diffusion a new object from five pictures, and look at what it learned.

    python examples/shapes/personalize.py

The object is a red car with a blue top, yellow wheels and a yellow band. No caption names this look, and the
model has never seen it. The script writes two files to `--output_dir`: `concept.safetensors`, and `grid.png`
with the training pictures on top, and below them one prompt per column and one gate bias β per row.

All settings are the library's defaults.
"""

import argparse
from dataclasses import astuple
from pathlib import Path
from random import Random

import numpy as np
import world
from checker import Checker
from evaluate import generate, load_pipeline
from PIL import Image
from pretrain import MODEL_FOLDER

from perfusion_pytorch import (
    disable_concepts,
    enable_concepts,
    set_concepts,
    token_similarities,
    train_concept,
)
from perfusion_pytorch.grids import labelled_grid
from perfusion_pytorch.pipelines.covariance_cache import cached_covariance
from perfusion_pytorch.pipelines.encoding import prompt_encoder

HERE = Path(__file__).parent
BETAS = (0.3, 0.5, 0.7, 0.9, 1.5)
GRID_PROMPTS = (
    "a photo of a large {} on a purple background",
    "a {} on a green background",
    "a small {} on a white background",
    "a {} left of a rose on a white background",
    "a panda beside a {} before a teal curtain",
    "a {} above a mug on a gray background",
    "a {superclass} on a pink background",
    "a taxi next to a stein on a green background",
)


def evaluation_prompts(count, superclass, look, seed=0):
    """Return (prompt with {} for the concept, background, all superclasses).

    The concept is alone in a third of the prompts, and beside another thing in the others.
    """
    rng, prompts = Random(seed), []
    others = [name for name, (kind, _) in world.BREEDS.items() if kind != superclass]
    for i in range(count):
        background = rng.choice([c for c in world.BACKGROUNDS if c not in astuple(look)])
        on = rng.choice(world.BACKGROUND_PHRASES[:1] + world.BACKGROUND_PHRASES[3:]).format(background)
        if i % 3 == 0:
            subject, present = f"a {rng.choice(('', 'small ', 'large '))}{{}}", {superclass}
        else:
            other = rng.choice(
                [
                    name
                    for name in others
                    if background not in (world.BREEDS[name][1].body, world.BREEDS[name][1].second)
                ]
            )
            other_words = ("an " if other[0] in "aeiou" else "a ") + other
            relation = rng.choice(("left of", "right of", "above", "below", "beside", "next to"))
            subject = (
                f"a {{}} {relation} {other_words}"
                if rng.random() < 0.5
                else f"{other_words} {relation} a {{}}"
            )
            present = {superclass, world.BREEDS[other][0]}
        prompts.append(
            (f"{rng.choice(('', 'a photo of ', 'a picture of '))}{subject} {on}", background, present)
        )
    return prompts


def measure(readings, prompts, superclass, look):
    """Measure pictures of prompts, each in parts of 1.

    Returns:
        How often the concept is there: its look is more likely than those of all the superclass's breeds.
        How often it is there exactly: every part of the look is right.
        How often the prompt is followed: background and superclasses are right, and there are no others.
    """
    there = sum(r.breed(superclass, concept=look) == "concept" for r in readings) / len(readings)
    exact = sum(r.shows(superclass, look) for r in readings) / len(readings)
    followed = sum(
        r.background == b and r.superclasses == s for r, (_, b, s) in zip(readings, prompts, strict=True)
    ) / len(readings)
    return there, exact, followed


def draw_grid(path, pictures, rows, prompts):
    """Write one PNG: the training pictures, and below them one row per (label, images)."""
    training = labelled_grid([("training, pictures", pictures)], [""] * len(pictures))
    made = labelled_grid(rows, prompts)
    sheet = Image.new("RGB", (max(training.width, made.width), training.height + made.height), "white")
    sheet.paste(training, (0, 0))
    sheet.paste(made, (0, training.height))
    sheet.save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", default=MODEL_FOLDER)
    parser.add_argument(
        "--instance_data_dir",
        type=Path,
        default=HERE / "pictures",
        help="PNG pictures, and masks under masks/",
    )
    parser.add_argument("--output_dir", type=Path, default=HERE / "output")
    parser.add_argument("--token", default="<car-1>")
    parser.add_argument("--superclass", default="car", choices=world.SUPERCLASSES)
    parser.add_argument(
        "--look",
        type=int,
        default=1,
        choices=(0, 1),
        help="which held-out look the pictures show, for the measuring",
    )
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument(
        "--num_validation_prompts", type=int, default=60, help="prompts that the checker measures, for each β"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pipe, checker = load_pipeline(args.pretrained_model_name_or_path), Checker.load()
    look = world.HELD_OUT[args.superclass][args.look]
    prompts = evaluation_prompts(args.num_validation_prompts, args.superclass, look)
    with_superclass = [prompt.format(args.superclass) for prompt, _, _ in prompts]
    grid_prompts = [prompt.format(args.token, superclass=args.superclass) for prompt in GRID_PROMPTS]

    # All is default: the model's folder says which captions and templates it understands.
    covariance = cached_covariance(pipe)
    summary = train_concept(
        pipe,
        args.instance_data_dir,
        token=args.token,
        superclass=args.superclass,
        output_dir=args.output_dir,
        covariance=covariance,
        max_train_steps=args.max_train_steps,
        checkpointing_steps=None,
        seed=args.seed,
    )
    rows = []
    for beta in BETAS:
        set_concepts(pipe, args.token, beta=beta)
        rows.append((f"beta = {beta}", generate(pipe, grid_prompts, seed=100, desc=f"β {beta}")))
    pictures = [Image.open(path) for path in sorted(args.instance_data_dir.glob("*.png"))]
    draw_grid(args.output_dir / "grid.png", pictures, rows, grid_prompts)
    print(f"\nWrote {args.output_dir / 'grid.png'}: look at it.")
    print(f"{summary.concept.name} ({summary.num_bytes:,} bytes) is beside it.")

    print(f"\nInput covariance: condition number {covariance.condition_number:.1e}.")
    print("Similarity r of each token to the concept:")
    for row in token_similarities(
        pipe.unet, pipe.tokenizer, prompt_encoder(pipe), [grid_prompts[i] for i in (0, 3, 6)]
    ):
        print(
            "  "
            + " ".join(
                f"{word}:{r:.2f}" for word, (r,) in row if word != "<|endoftext|>" or r == row[-1][1][0]
            )
        )

    disable_concepts(pipe)
    base_images = generate(pipe, with_superclass, desc="base model")
    base_readings = checker.read(base_images)
    enable_concepts(pipe)
    base_there, base_exact, base_followed = measure(base_readings, prompts, args.superclass, look)
    plain_words = f"'{args.superclass}' without the token: read as before"
    print(f"\n{'':22}concept there   exactly   prompt followed   {plain_words}   mean pixel change")
    print(f"{'base model':22}{base_there:>13.0%}{base_exact:>10.0%}{base_followed:>18.0%}")
    for beta in BETAS:
        set_concepts(pipe, args.token, beta=beta)
        images = generate(pipe, [prompt.format(args.token) for prompt, _, _ in prompts], desc=f"β {beta}")
        there, exact, followed = measure(checker.read(images), prompts, args.superclass, look)
        plain = generate(pipe, with_superclass, desc=f"β {beta}, without the token")
        same = [
            (a.background, a.superclasses, [a.look(s) for s in sorted(a.superclasses)])
            == (b.background, b.superclasses, [b.look(s) for s in sorted(b.superclasses)])
            for a, b in zip(base_readings, checker.read(plain), strict=True)
        ]
        change = np.mean(
            [
                np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()
                for a, b in zip(base_images, plain, strict=True)
            ]
        )
        shares = f"{there:>13.0%}{exact:>10.0%}{followed:>18.0%}{sum(same) / len(same):>30.0%}"
        print(f"{f'β = {beta}':22}{shares}{change:>37.3f}")


if __name__ == "__main__":
    main()
