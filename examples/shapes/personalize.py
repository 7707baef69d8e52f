"""Teach the small Stable Diffusion a new object from five pictures, and look at what it learned.

    python examples/shapes/personalize.py

The object is a green car with a blue top, black wheels and black stripes, a look that no caption names and that the model has never
seen. Written to `--output_dir`: `concept.safetensors`, and `grid.png` with the training pictures on top, prompts across and the gate bias
β down.
"""

import argparse
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
import world
from checker import Checker
from evaluate import generate, load_pipeline
from PIL import Image, ImageDraw, ImageFont
from pretrain import MODEL_FOLDER
from tqdm import tqdm

from perfusion_pytorch import (
    add_concept_token_,
    calculate_input_covariance,
    concept_inputs,
    concept_similarity,
    get_finetune_optimizer,
    loss_fn_weighted_by_mask,
    save_concept,
    tokenize_with_concept,
    wrap_cross_attentions_,
)

HERE = Path(__file__).parent
LOOK = world.HELD_OUT["car"][0]  # what the shipped pictures show; only the measuring knows it
TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "a drawing of a {}",
    "a painting of a {}",
    "this is a {}",
    "there is a {}",
    "one {}",
)
BETAS = (0.3, 0.5, 0.7, 0.9, 1.2)
GRID_PROMPTS = (
    "a photo of a large {} on a yellow background",
    "a {} on a red background",
    "a small {} on a white background",
    "a {} left of a rose on a white background",
    "a panda beside a {} before a teal curtain",
    "a {} above a red house on a gray background",
    "a car on a pink background",
    "a taxi next to a stein on a yellow background",
)


def covariance_of(pipe, num_captions):
    """Estimate the input covariance from the world's captions; as in Stable Diffusion, every position reaches the UNet, and so counts."""

    def encode(texts):
        ids = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pipe.text_encoder(ids).last_hidden_state, torch.ones_like(ids, dtype=torch.bool)

    captions = (world.sample(seed).caption for seed in range(num_captions))
    # The ridge only fills the one direction that the last layer norm leaves empty.
    return calculate_input_covariance(
        captions, encode, batch_size=256, ridge=1e-6, progress=lambda it: tqdm(it, "covariance", -(-num_captions // 256), leave=False)
    )


def load_pictures(folder):
    """Return the folder's PNG pictures as pixels (b, 3, h, w) in [-1, 1], and their masks (b, h, w) in [0, 1]."""
    paths = sorted(Path(folder).glob("*.png"))
    if not paths:
        raise SystemExit(f"{folder} holds no PNG pictures.")
    missing = [path.name for path in paths if not (path.parent / "masks" / path.name).exists()]
    if missing:
        raise SystemExit(f"Every picture needs a mask of the same name in {folder}/masks, but there is none for {missing}.")
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    masks = np.stack([np.asarray(Image.open(path.parent / "masks" / path.name).convert("L")) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(masks).float() / 255


def train(pipe, embedding, pixels, masks, *, token, steps, lr_output, lr_embedding, batch_size=16, seed=0):
    """Train the concept: the embedding row and one value output for each layer. Everything random is a function of (seed, step)."""
    unet, encoder, noises = pipe.unet, pipe.text_encoder, pipe.scheduler
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    masks = F.interpolate(masks.unsqueeze(1), latents.shape[-2:], mode="area")
    ids = tokenize_with_concept(pipe.tokenizer, [template.format(token) for template in TEMPLATES], token)
    prompts = embedding.with_superclass(ids)
    with torch.no_grad():
        superclass_encodings = encoder(prompts.ids).last_hidden_state
    optimizer = get_finetune_optimizer(unet, encoder, lr_output=lr_output, lr_embedding=lr_embedding)
    unet.train()
    bar = tqdm(range(steps), desc="training")
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 10**6 + step)
        picture = torch.randint(len(latents), (batch_size,), generator=generator)
        template = torch.randint(len(ids), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
        # As in pretraining, late times more often: an object's look is decided there.
        times = (noises.config.num_train_timesteps * torch.rand(batch_size, generator=generator) ** 0.5).long()
        inputs = {
            "text_enc_with_superclass": superclass_encodings[template],
            "concept_indices": prompts.concept_indices[template],
            "superclass_indices": prompts.superclass_indices[template],
        }
        noisy = noises.add_noise(latents[picture], noise, times)
        with concept_inputs(unet, **inputs):
            prediction = unet(noisy, times, encoder(ids[template]).last_hidden_state).sample
            target = noises.get_velocity(latents[picture], noise, times)
            loss = loss_fn_weighted_by_mask(prediction, target, masks[picture])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    unet.eval()


def set_gate(layers, beta, temperature=0.15):
    """Set the inference gate of every layer."""
    for layer in layers.values():
        layer.eval_beta.fill_(beta)
        layer.eval_temperature.fill_(temperature)


@torch.no_grad()
def similarities(pipe, layers, prompts):
    """Return, for each prompt, its words and their similarity r to the concept."""
    dual = next(iter(layers.values())).concept_dual
    rows = []
    for prompt in prompts:
        ids = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        r = concept_similarity(pipe.text_encoder(ids).last_hidden_state, dual)[0, :, 0]
        words = [word.removesuffix("</w>") for word in pipe.tokenizer.convert_ids_to_tokens(ids[0])]
        rows.append(list(zip(words, r.tolist(), strict=True)))
    return rows


def evaluation_prompts(count, superclass, look, seed=0):
    """Return (prompt with {} for the concept, background, all superclasses): a third with the concept alone, else beside another thing."""
    rng, prompts = Random(seed), []
    others = [name for name, (kind, _) in world.BREEDS.items() if kind != superclass]
    for i in range(count):
        background = rng.choice([c for c in world.BACKGROUNDS if c not in (look.body, look.second)])
        on = rng.choice(world.BACKGROUND_PHRASES[:1] + world.BACKGROUND_PHRASES[3:]).format(background)
        if i % 3 == 0:
            subject, present = f"a {rng.choice(('', 'small ', 'large '))}{{}}", {superclass}
        else:
            other = rng.choice([name for name in others if background not in (world.BREEDS[name][1].body, world.BREEDS[name][1].second)])
            other_words = ("an " if other[0] in "aeiou" else "a ") + other
            relation = rng.choice(("left of", "right of", "above", "below", "beside", "next to"))
            subject = f"a {{}} {relation} {other_words}" if rng.random() < 0.5 else f"{other_words} {relation} a {{}}"
            present = {superclass, world.BREEDS[other][0]}
        prompts.append((f"{rng.choice(('', 'a photo of ', 'a picture of '))}{subject} {on}", background, present))
    return prompts


def measure(readings, prompts, superclass, look):
    """Measure pictures of prompts, each in parts of 1.

    Returns:
        How often the concept is there: its look is more likely than those of all the superclass's breeds, as breeds are counted.
        How often it is there exactly: every part of the look is right.
        How often the prompt is followed: the background and all superclasses are right, and there are no others.
    """
    there = sum(r.breed(superclass, concept=look) == "concept" for r in readings) / len(readings)
    exact = sum(r.shows(superclass, look) for r in readings) / len(readings)
    followed = sum(r.background == b and r.superclasses == s for r, (_, b, s) in zip(readings, prompts, strict=True)) / len(readings)
    return there, exact, followed


def draw_grid(path, pictures, rows, prompts):
    """Write the training pictures on top, and below one row for each (label, images), under the prompts."""
    font, cell, left, head = ImageFont.load_default(12), world.SIZE * 2, 76, 54
    width = left + len(prompts) * (cell + 4)
    sheet = Image.new("RGB", (width, cell + 8 + head + len(rows) * (cell + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((4, 50), "training\npictures", "black", font)
    for i, picture in enumerate(pictures[: len(prompts)]):
        sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (left + i * (cell + 4), 0))
    for i, prompt in enumerate(prompts):
        lines, line = [], ""
        for word in prompt.split():
            if pen.textlength(f"{line} {word}", font) > cell:
                lines, line = [*lines, line], word
            else:
                line = f"{line} {word}".strip()
        pen.multiline_text((left + i * (cell + 4), cell + 8), "\n".join([*lines, line]), "black", font, spacing=2)
    for j, (label, images) in enumerate(rows):
        top = cell + 8 + head + j * (cell + 4)
        pen.multiline_text((4, top + 50), label, "black", font)
        for i, image in enumerate(images):
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (left + i * (cell + 4), top))
    sheet.save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default=MODEL_FOLDER)
    parser.add_argument(
        "--instance_data_dir", type=Path, default=HERE / "pictures", help="PNG pictures, and masks of the same names under masks/"
    )
    parser.add_argument("--output_dir", type=Path, default=HERE / "output")
    parser.add_argument("--token", default="<car-1>")
    parser.add_argument("--superclass", default="car")
    parser.add_argument("--max_train_steps", type=int, default=250)
    parser.add_argument("--learning_rate", type=float, default=0.03, help="of the value outputs")
    parser.add_argument("--embedding_learning_rate", type=float, default=0.0005)
    parser.add_argument("--num_captions", type=int, default=20_000, help="captions that the covariance is computed from")
    parser.add_argument("--num_validation_prompts", type=int, default=60, help="prompts that the checker measures, for each β")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipe, checker = load_pipeline(args.pretrained_model_name_or_path), Checker.load()
    pixels, masks = load_pictures(args.instance_data_dir)
    prompts = evaluation_prompts(args.num_validation_prompts, args.superclass, LOOK)
    with_superclass = [prompt.format(args.superclass) for prompt, _, _ in prompts]
    grid_prompts = [prompt.format(args.token) for prompt in GRID_PROMPTS]
    base_images = generate(pipe, with_superclass, desc="base model")
    base_readings = checker.read(base_images)

    covariance = covariance_of(pipe, args.num_captions)
    embedding = add_concept_token_(pipe.text_encoder, pipe.tokenizer, args.token, args.superclass)
    pipe.unet.requires_grad_(False)
    layers = wrap_cross_attentions_(pipe.unet, C=covariance)
    train(
        pipe, embedding, pixels, masks,
        token=args.token, steps=args.max_train_steps, seed=args.seed,
        lr_output=args.learning_rate, lr_embedding=args.embedding_learning_rate,
    )  # fmt: skip
    save_concept(pipe, args.output_dir / "concept.safetensors")

    print(f"\nInput covariance: condition number {covariance.condition_number:.1e}. Similarity r of each token to the concept:")
    for row in similarities(pipe, layers, [grid_prompts[0], grid_prompts[3], grid_prompts[6]]):
        print("  " + " ".join(f"{word}:{r:.2f}" for word, r in row if word != "<|endoftext|>" or r == row[-1][1]))

    base_there, base_exact, base_followed = measure(base_readings, prompts, args.superclass, LOOK)
    print(f"\n{'':22}concept there   exactly   prompt followed   '{args.superclass}' without the token: read as before   mean pixel change")
    print(f"{'base model':22}{base_there:>13.0%}{base_exact:>10.0%}{base_followed:>18.0%}")
    rows = []
    for beta in BETAS:
        set_gate(layers, beta)
        images = generate(pipe, [prompt.format(args.token) for prompt, _, _ in prompts], desc=f"β {beta}")
        there, exact, followed = measure(checker.read(images), prompts, args.superclass, LOOK)
        plain = generate(pipe, with_superclass, desc=f"β {beta}, without the token")
        same = [
            (a.background, a.superclasses, [a.look(s) for s in sorted(a.superclasses)])
            == (b.background, b.superclasses, [b.look(s) for s in sorted(b.superclasses)])
            for a, b in zip(base_readings, checker.read(plain), strict=True)
        ]
        change = np.mean([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(base_images, plain, strict=True)])
        print(f"{f'β = {beta}':22}{there:>13.0%}{exact:>10.0%}{followed:>18.0%}{sum(same) / len(same):>30.0%}{change:>37.2f}")
        rows.append((f"beta = {beta}", generate(pipe, grid_prompts, seed=100)))
    pictures = [Image.fromarray(((p.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()) for p in pixels]
    draw_grid(args.output_dir / "grid.png", pictures, rows, grid_prompts)
    size = (args.output_dir / "concept.safetensors").stat().st_size
    print(f"\nWrote {args.output_dir / 'grid.png'}: look at it, and concept.safetensors ({size:,} bytes) beside it.")


if __name__ == "__main__":
    main()
