"""Train a small Stable Diffusion on the world of `world.py` and write it as a folder that `StableDiffusionPipeline` loads.

    python examples/world/pretrain.py                                     # all stages, on the device that is there
    python examples/world/pretrain.py --export                            # write what the checkpoint holds, and end
    python examples/world/pretrain.py --start_from examples/world/tiny-sd   # train the committed UNet on

Stages: pictures (drawn by all cores), text encoder (words grounded in their pictures, then frozen), autoencoder, latents, UNet (v-prediction,
zero terminal SNR). Each has a budget in minutes and is resumable: the same command goes on where the last checkpoint was. The defaults
depend on the device: on one GPU of the H100's class the whole takes ten minutes (bfloat16, batches of a thousand, all latents on the
device), on two CPU cores about ten hours. `samples-*.png` in the work folder show how the UNet comes on. Beside torch it needs diffusers,
transformers, safetensors, pillow and tqdm.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from data import load_captions, load_pictures
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging
from export import write_model
from PIL import Image
from stages import device
from text_stage import condition_number, separation, train_text_encoder
from transformers import CLIPTextModel
from unet_stage import (
    SAMPLE_PROMPTS,
    empty_prompt,
    for_whitened,
    load_average,
    make_pipeline,
    make_unet,
    train_unet,
)
from vae_stage import decibels, encode_pictures, reconstruct, refine_decoder_, train_autoencoder
from words import make_tokenizer, tokenize

HERE = Path(__file__).parent
MODEL_FOLDER = HERE / "tiny-sd"
NUM_NOTED = 5000  # captions that are written beside the model, for its input covariance
DEFAULTS = {  # by device
    "cpu": {
        "num_pictures": 60_000, "text_minutes": 6.0, "vae_minutes": 30.0, "unet_minutes": 540.0,
        "text_batch_size": 96, "vae_batch_size": 8, "unet_batch_size": 64, "vae_rate": 0.02, "unet_rate": 1e-3,
        "vae_channels": "16,32,64", "unet_channels": "64,128,192",
    },
    "cuda": {
        "num_pictures": 250_000, "text_minutes": 0.7, "vae_minutes": 2.3, "unet_minutes": 5.3,
        "text_batch_size": 512, "vae_batch_size": 128, "unet_batch_size": 1024, "vae_rate": 0.02, "unet_rate": 1.5e-3,
        "vae_channels": "32,64,96", "unet_channels": "64,128,192",
    },
}  # fmt: skip


def numbers(text):
    """Read numbers that commas separate."""
    return tuple(int(word) for word in text.split(","))


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work_dir", type=Path, default=HERE / "work", help="pictures, checkpoints and samples (gigabytes)"
    )
    parser.add_argument("--output_dir", type=Path, default=MODEL_FOLDER, help="where the finished model goes")
    parser.add_argument(
        "--export", action="store_true", help="only write the model that the checkpoints hold"
    )
    parser.add_argument(
        "--start_from", type=Path, metavar="FOLDER",
        help="a model's folder, or some of its parts: tokenizer, text_encoder and vae are taken as they are, a unet is trained on",
    )  # fmt: skip
    parser.add_argument("--latent_channels", type=int, default=16)
    parser.add_argument("--text_width", type=int, default=128)
    parser.add_argument("--save_every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument(
        "--compile", action="store_true", help="compile the UNet: worth its minutes in long runs on a GPU"
    )
    parser.add_argument(
        "--decoder_minutes",
        type=float,
        default=0.0,
        help="train the autoencoder's decoder on; the latents stay",
    )
    for stage in ("text", "vae", "decoder", "unet"):
        parser.add_argument(f"--{stage}_steps", type=int, help="a budget in steps beside that in minutes")
    for name, value in DEFAULTS[device()].items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args(argv)


def part(args, name):
    """Return the folder of a part of the model that training starts from, or None where it has none."""
    path = args.start_from / name if args.start_from else None
    return path if path is not None and path.is_dir() else None


def frozen(model):
    """Return a part that is trained no more, in float32 on the device."""
    return model.to(device(), torch.float32).eval().requires_grad_(False)


def draw_samples(folder, pipe, step):
    """Write the pictures of `SAMPLE_PROMPTS` as one strip."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(SAMPLE_PROMPTS))]
    images = pipe(
        list(SAMPLE_PROMPTS), num_inference_steps=20, guidance_scale=3.0, generator=generators
    ).images
    strip = Image.new("RGB", (len(images) * 130, 128), "white")
    for i, image in enumerate(images):
        strip.paste(image.resize((128, 128), Image.Resampling.NEAREST), (i * 130, 0))
    strip.save(folder / f"samples-{step:06d}.png")


def main(argv=None):
    args = parse(argv)
    logging.set_verbosity_error()
    began = time.monotonic()
    args.work_dir.mkdir(parents=True, exist_ok=True)

    def say(what):
        print(f"[{(time.monotonic() - began) / 60:.1f} min] {what}", flush=True)

    def budget(stage):
        steps = 0 if args.export else getattr(args, f"{stage}_steps")
        return {"steps": steps, "minutes": getattr(args, f"{stage}_minutes"), "save_every": args.save_every}

    captions, choices, targets, num_things = load_captions(args.work_dir, args.num_pictures)
    if (path := part(args, "tokenizer")) and not (args.work_dir / "tokenizer").exists():
        shutil.copytree(path, args.work_dir / "tokenizer")
    tokenizer = make_tokenizer(args.work_dir, captions)
    ids, choices, targets = (
        tokenize(tokenizer, captions),
        torch.from_numpy(choices),
        torch.from_numpy(targets),
    )
    say(f"{len(captions)} captions, {len(tokenizer)} tokens, device {device()}")

    if path := part(args, "text_encoder"):
        encoder = frozen(CLIPTextModel.from_pretrained(path))
    else:
        encoder = train_text_encoder(
            args.work_dir, tokenizer, ids, choices, targets,
            width=args.text_width, batch_size=args.text_batch_size, **budget("text"),
        )  # fmt: skip
    for move in (0.0, 1.0, 2.0):
        own, other = separation(encoder, ids, choices, move=move)
        right, quiet = ((own - 1).abs() <= 0.1).float().mean(), (other <= 0.2).float().mean()
        say(
            f"nouns moved by {move}: r within 0.1 of 1 in {right:.1%}, elsewhere at most 0.2 in {quiet:.1%} of prompts"
        )
    say(f"input covariance: condition number {condition_number(encoder, ids[:4000]):.1e}")

    images = load_pictures(args.work_dir, args.num_pictures)
    if path := part(args, "vae"):
        vae = frozen(AutoencoderKL.from_pretrained(path)).to(memory_format=torch.channels_last)
    else:
        vae = train_autoencoder(
            args.work_dir, images, numbers(args.vae_channels), args.latent_channels,
            batch_size=args.vae_batch_size, peak=args.vae_rate, **budget("vae"),
        )  # fmt: skip
    say(f"autoencoder: {decibels(images[:500], reconstruct(vae, images[:500])).mean():.2f} dB")
    latents = encode_pictures(args.work_dir, vae, images)

    unet = make_unet(args.latent_channels, latents.shape[-1], numbers(args.unet_channels), args.text_width)
    if path := part(args, "unet"):
        unet.load_state_dict(
            for_whitened(UNet2DConditionModel.from_pretrained(path).state_dict(), encoder, ids)
        )

    def pipeline(weights):
        model = make_unet(
            args.latent_channels, latents.shape[-1], numbers(args.unet_channels), args.text_width
        )
        model.load_state_dict(weights)
        return make_pipeline(tokenizer, encoder, vae, model.eval())

    if args.decoder_minutes:
        refine_decoder_(
            args.work_dir,
            vae,
            images,
            latents,
            batch_size=args.vae_batch_size,
            peak=args.vae_rate / 2,
            **budget("decoder"),
        )
        say(f"decoder: {decibels(images[:500], reconstruct(vae, images[:500])).mean():.2f} dB")

    if args.export:
        weights, step = load_average(args.work_dir, encoder, ids)
        say(f"the UNet's average after {step} steps")
    else:
        weights = train_unet(
            args.work_dir, unet, encoder, empty_prompt(tokenizer), ids, latents, num_things,
            batch_size=args.unet_batch_size, peak=args.unet_rate, compiled=args.compile, **budget("unet"),
            after=lambda step, weights: draw_samples(args.work_dir, pipeline(weights), step),
        )  # fmt: skip
    write_model(pipeline(weights), args.output_dir, captions[:NUM_NOTED])
    say(f"wrote {args.output_dir}")


if __name__ == "__main__":
    main()
