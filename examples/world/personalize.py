"""Teach the small Stable Diffusion a new object from five pictures, and look at what it learned.

    python examples/world/personalize.py

The object is one that no word stands for, and whose traits no caption names. The script writes to `--output_dir`: the pictures and masks that
it learns from, `concept.safetensors`, and `grid.png` with these pictures on top, and below them one prompt per column and one gate bias β
per row. Then it counts, over prompts of its own, how often the checkers find this very object and the rest of the prompt.
"""

import argparse
from pathlib import Path

import world
from checker import Checker
from evaluate import MODEL_FOLDER, generate, load_pipeline
from judge import Judge, prompts_for
from PIL import Image

from perfusion_pytorch import set_concepts, train_concept
from perfusion_pytorch.grids import labelled_grid

HERE = Path(__file__).parent
BETAS = (0.0, 0.5, 0.9, 1.5)
GRID_PROMPTS = (
    "a photo of a large {} on a green background",
    "a {} on a black background",
    "a small {} on the left on a white background",
    "a {} left of a rose on a white background",
    "a panda above a {} on a gray background",
    "a {} next to a stein on a yellow background",
    "a {} on bricks",
    "a {superclass} on a pink background",
)


def draw_grid(path, pictures, rows, prompts):
    """Write one PNG: the training pictures, and below them one row per (label, images)."""
    training = labelled_grid([("training pictures", pictures)], [""] * len(pictures))
    made = labelled_grid(rows, prompts)
    sheet = Image.new("RGB", (max(training.width, made.width), training.height + made.height), "white")
    sheet.paste(training, (0, 0))
    sheet.paste(made, (0, training.height))
    sheet.save(path)


def write_pictures(folder, subject, count):
    """Write an object's training pictures, and their masks under masks/; returns the pictures."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    pairs = subject.pictures(count)
    for i, (image, mask) in enumerate(pairs):
        image.save(folder / f"{i}.png")
        mask.save(folder / "masks" / f"{i}.png")
    return [image for image, _ in pairs]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", default=MODEL_FOLDER)
    parser.add_argument("--superclass", default="bear", choices=world.SUPERCLASSES)
    parser.add_argument(
        "--object", type=int, default=0, help="number of the object; below 1000 for development"
    )
    parser.add_argument("--num_pictures", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output")
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument(
        "--num_validation_prompts", type=int, default=40, help="prompts that the checkers judge, for each β"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    subject, token = world.new_object(args.superclass, args.object), f"<{args.superclass}-1>"
    folder = args.output_dir / "pictures"
    pictures = write_pictures(folder, subject, args.num_pictures)
    pipe = load_pipeline(args.pretrained_model_name_or_path)
    summary = train_concept(
        pipe,
        folder,
        masks=folder / "masks",
        token=token,
        superclass=args.superclass,
        output_dir=args.output_dir,
        max_train_steps=args.max_train_steps,
        checkpointing_steps=None,
        seed=args.seed,
    )
    grid_prompts = [prompt.format(token, superclass=args.superclass) for prompt in GRID_PROMPTS]
    rows = []
    for beta in BETAS:
        set_concepts(pipe, token, beta=beta)
        rows.append((f"beta = {beta}", generate(pipe, grid_prompts, seed=100, desc=f"β {beta}")))
    draw_grid(args.output_dir / "grid.png", pictures, rows, grid_prompts)
    print(f"\nWrote {args.output_dir / 'grid.png'}: look at it.")
    print(f"{summary.concept.name} ({summary.num_bytes:,} bytes) is beside it.")

    prompts = prompts_for(subject, args.num_validation_prompts)
    judge = Judge(Checker.load(), subject, prompts)
    plain = [prompt.text.format(args.superclass) for prompt in prompts]
    set_concepts(pipe, [])
    before = generate(pipe, plain, seed=1000, desc="base model")
    print(f"\n{'':12}{'identity':>10}{'followed':>10}{'both':>8}   change of the plain word, of 255")
    base = judge.scores(before)
    print(f"{'base model':12}{base['identity']:>10.0%}{base['followed']:>10.0%}{base['both']:>8.0%}")
    for beta in BETAS:
        set_concepts(pipe, token, beta=beta)
        found = judge.scores(
            generate(pipe, [p.text.format(token) for p in prompts], seed=1000, desc=f"β {beta}")
        )
        change = judge.change(before, generate(pipe, plain, seed=1000, desc=f"β {beta}, plain"))["changed"]
        figures = f"{found['identity']:>10.0%}{found['followed']:>10.0%}{found['both']:>8.0%}"
        print(f"{f'β = {beta}':12}{figures}{change:>10.3f}", flush=True)


if __name__ == "__main__":
    main()
