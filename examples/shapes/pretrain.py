"""Train a small Stable Diffusion on the world of `world.py`, for `StableDiffusionPipeline` to load.

    python examples/shapes/pretrain.py

There are four stages: pictures (drawn once), text encoder (words grounded in their pictures, then frozen),
autoencoder, and UNet (v-prediction, zero terminal SNR). Run the command again to resume a killed run at its
last checkpoint. `samples-*.png` in the work folder show the UNet's progress. All stages take under three
hours on two CPU cores; a GPU is used if there is one. This trains a finished model further:

    python examples/shapes/pretrain.py --work_dir more --start_from examples/shapes/tiny-sd \\
        --unet_steps 7000 --unet_rate 5e-4

The committed model was trained further in this way four times, in three and a half hours: by 1,800 and 7,000
steps at 5e-4, by 1,400 at 4e-4, and by 6,500 at 5e-4. This code makes the fourth. The first three drew pairs
only as often as the world does, and in any order where the caption leaves the order open.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
MODEL_FOLDER = HERE / "tiny-sd"
NUM_TOKENS = 20  # longest caption of the world: 19, with start and end
NUM_PICTURES = 40_000
NOUNS = frozenset((*world.SUPERCLASSES, *world.BREEDS))
PLACE_WORDS = frozenset(("left", "right", "top", "bottom", "middle", "above", "below"))
GROUNDS = {  # what words may stand for, and the choices of each
    "superclass": world.SUPERCLASSES,
    "body": world.PAINTS,
    "second": world.PAINTS,
    "accent": world.PAINTS,
    "pattern": tuple(world.PATTERNS),
    "background": (*world.BACKGROUNDS, "none"),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLE_PROMPTS = (
    "a photo of a large panda on a green background",
    "a koi left of a rose on a black background",
    "a small red car on a white background",
    "a picture of an oak before a yellow curtain",
    "a monarch above a stein on a gray background",
    "a house on the right on a blue background",
    "a tankard on a purple background",
    "a brown bear next to a taxi on a pink background",
)


def learning_rate(peak, progress, warmup=0.05):
    """Return the rate at a `progress` in [0, 1]: a linear rise to `peak`, then a cosine to zero."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def training_dtype(edge=1024):
    """Return the faster of float32 and bfloat16 on this device; on CPUs the gain varies tenfold."""
    if DEVICE != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(edge, edge).to(dtype)
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            seconds[dtype] = min(seconds.get(dtype, math.inf), time.perf_counter() - start)
    return min(seconds, key=seconds.get)


def train_stage(name, folder, modules, batch_loss, *, steps, peak, every=250, after=None, average=None):
    """Train modules for some steps, with checkpoints; everything random is a function of the step.

    Args:
        name: the stage, after which its checkpoint is named.
        folder: where the checkpoint is.
        modules: a `ModuleDict`, restored from the checkpoint and trained in place.
        batch_loss: `(step, generator) -> scalar loss`.
        steps: length of the run; the learning rate is a function of step / steps.
        peak: highest learning rate.
        every: steps between checkpoints.
        after: called with the step at each checkpoint.
        average: an `EMAModel` of the same parameters, stepped and saved along.
    """
    path = folder / f"{name}.pt"
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    start = 0
    if path.exists():
        state = torch.load(path, map_location=DEVICE, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        if average is not None:
            average.load_state_dict(state["average"])
    modules.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    smooth = None
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, (step + 1) / steps)
        loss = batch_loss(step, torch.Generator().manual_seed(step))
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.step(modules.parameters())
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            if average is not None:
                state["average"] = average.state_dict()
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            if after is not None:
                after(step + 1)
    modules.eval().requires_grad_(False)


def _sample(seed):
    picture = world.sample(seed)
    return np.asarray(picture.image), picture.caption


def load_pictures(folder, count=NUM_PICTURES):
    """Draw the world's first `count` pictures, or read them: uint8 (count, 64, 64, 3), and their captions."""
    path = folder / f"pictures-{count}.npz"
    if not path.exists():
        with Pool() as pool:
            rows = list(
                tqdm(
                    pool.imap(_sample, range(count), chunksize=64),
                    total=count,
                    desc="pictures",
                    mininterval=10,
                )
            )
        np.savez(
            folder / "tmp.npz",
            images=np.stack([image for image, _ in rows]),
            captions=np.array([c for _, c in rows]),
        )
        os.replace(folder / "tmp.npz", path)
    data = np.load(path)
    return data["images"], data["captions"].tolist()


def as_batch(images):
    """Turn uint8 pictures (b, h, w, 3) into a float batch (b, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(images).to(DEVICE).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def make_tokenizer(folder, captions):
    """Read the tokenizer, or train one in CLIP's format until every word of the captions is one token.

    It is kept because the trainer breaks ties by chance: another run would give some words other numbers.
    """
    path = folder / "tokenizer"
    if path.exists():
        return CLIPTokenizer.from_pretrained(path)
    backend = CLIPTokenizer().backend_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=10**6, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    words = sorted({word for caption in captions for word in caption.split()})
    backend.train_from_iterator(words * 2 + [chr(i) for i in range(33, 127)] * 2, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = [t for t in model["vocab"] if not t.startswith("<|")] + ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=NUM_TOKENS
    )
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise RuntimeError(f"Every word of the captions must be one token, but these are not: {split}.")
    tokenizer.save_pretrained(folder / "tmp-tokenizer")
    os.replace(folder / "tmp-tokenizer", path)
    return tokenizer


def tokenize(tokenizer, captions):
    """Return token ids (b, n), padded with the end token as Stable Diffusion's are."""
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    if ids.shape[1] != NUM_TOKENS:
        raise ValueError(f"A caption must have at most {NUM_TOKENS} tokens, got one of {ids.shape[1]}.")
    return ids


def groundings(captions, scenes):
    """Return what words stand for in their pictures.

    A noun stands for its thing: superclass, the parts of its look, place and size. A word of place ("left",
    "above") stands for the place of the caption's first thing. A colour stands for the background, or for a
    thing and then not for the background.

    Args:
        captions: captions of the world; each word is one token, after the start token.
        scenes: their scenes.

    Returns:
        Numbers of choices by name, each int64 (b, n), −1 where a word stands for nothing of the kind; and x,
        y and size in parts of the picture's edge, float32 (b, n, 3), NaN where a word stands for no place.
    """
    names = {name: np.full((len(captions), NUM_TOKENS), -1) for name in GROUNDS}
    places = np.full((len(captions), NUM_TOKENS, 3), np.nan, dtype=np.float32)
    for row, (caption, scene) in enumerate(zip(captions, scenes, strict=True)):
        words, things = caption.split(), iter(scene.things)
        for at, word in enumerate(words, start=1):
            if word in NOUNS:
                thing = next(things)
                names["superclass"][row, at] = world.SUPERCLASSES.index(thing.superclass)
                for part in ("body", "second", "accent", "pattern"):
                    names[part][row, at] = GROUNDS[part].index(getattr(thing.look, part))
                places[row, at] = np.array([thing.x, thing.y, thing.size]) / world.SIZE
            elif word in PLACE_WORDS:
                places[row, at] = (
                    np.array([scene.things[0].x, scene.things[0].y, scene.things[0].size]) / world.SIZE
                )
            elif word in world.COLOURS:
                behind = [w for w in words[at:] if w != "teddy"]
                names["background"][row, at] = GROUNDS["background"].index(
                    "none" if behind and behind[0] in NOUNS else word
                )
    return {name: torch.from_numpy(numbers) for name, numbers in names.items()}, torch.from_numpy(places)


def leakage(encoder, ids, encodings, is_noun, generator):
    """Measure how much nouns change the encodings behind them, by replacing a random noun.

    The new noun's embedding is moved at random by as much as embeddings differ, so that the result also holds
    for words that are not learned yet. Only nouns are replaced, because a colour may change the noun that it
    describes.

    Args:
        encoder: text encoder.
        ids: token ids (b, n).
        encodings: the encoder's output for them (b, n, d).
        is_noun: bool (b, n); every row holds a noun.
        generator: draws the choices.

    Returns:
        The mean squared change behind the replaced noun, relative to the change at the noun itself; a scalar.
    """
    at = torch.multinomial(is_noun.float(), 1, generator=generator)
    nouns = ids[is_noun]
    others = nouns[torch.randint(len(nouns), at.shape, generator=generator)]
    table = encoder.get_input_embeddings()
    move = torch.rand(len(ids), 1, generator=generator) * torch.randn(
        len(ids), table.embedding_dim, generator=generator
    )
    positions = torch.arange(ids.shape[1])
    behind = (positions > at).to(DEVICE)
    own = (positions == at).to(DEVICE)

    def moved(module, inputs, rows):
        return rows + own.unsqueeze(-1) * (move.to(DEVICE) * module.weight.detach().std()).unsqueeze(1)

    hook = table.register_forward_hook(moved)
    changed = encoder(ids.scatter(1, at, others).to(DEVICE)).last_hidden_state
    hook.remove()
    change = (changed - encodings).float().square().mean(-1)
    return change[behind].mean() / change[own].mean().clamp_min(1e-3)


def train_text_encoder(folder, tokenizer, captions, scenes, *, steps, width=160):
    """Train the text encoder so that a linear map of a word's encoding gives what the word stands for.

    CLIP's own contrast of whole captions and pictures was tried first. With as few words as the world has,
    every encoding then takes up its neighbours: the word behind a noun had r = 0.75 (the noun itself has 1,
    in the metric of the input covariance). And the looks of breeds had a thousandth of the encodings' power,
    where a UNet finds them last. Here the look is linear in the noun's encoding, in the same directions for
    all superclasses, so that a value output can make a look that no word has. `leakage` keeps a noun out of
    other encodings.
    """
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=NUM_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # With CLIP's own initial scale (0.02) the context drowns the words from the first step on.
    encoder.embeddings.token_embedding.weight.data.normal_(std=0.15)
    heads = nn.ModuleDict(
        {name: nn.Linear(width, len(choices)) for name, choices in GROUNDS.items()}
        | {"place": nn.Linear(width, 3)}
    )
    modules = nn.ModuleDict({"text": encoder, "heads": heads}).to(DEVICE)
    ids = tokenize(tokenizer, captions)
    numbers, places = groundings(captions, scenes)
    is_noun = numbers["superclass"] >= 0

    def batch_loss(step, generator):
        rows = torch.randint(len(ids), (192,), generator=generator)
        encodings = encoder(ids[rows].to(DEVICE)).last_hidden_state
        losses = {"leakage": 4 * leakage(encoder, ids[rows], encodings, is_noun[rows], generator)}
        for name, target in numbers.items():
            losses[name] = F.cross_entropy(
                heads[name](encodings).flatten(0, 1), target[rows].flatten().to(DEVICE), ignore_index=-1
            )
        target = places[rows].to(DEVICE)
        has_place = ~target.isnan()
        losses["place"] = 20 * F.mse_loss(heads["place"](encodings)[has_place], target[has_place])
        if (step + 1) % 100 == 0:
            tqdm.write(
                f"text encoder, step {step + 1}: "
                + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            )
        return sum(losses.values())

    train_stage("text", folder, modules, batch_loss, steps=steps, peak=1.5e-3)
    return encoder


def train_autoencoder(folder, images, *, steps):
    """Train the autoencoder."""
    torch.manual_seed(0)
    channels = (24, 48, 64)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    ).to(DEVICE)

    def batch_loss(step, generator):
        pixels = as_batch(images[torch.randint(len(images), (16,), generator=generator).numpy()])
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(DEVICE)
            error = vae.decode(posterior.mean + posterior.std * noise).sample.float() - pixels
        return error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()

    train_stage("vae", folder, nn.ModuleDict({"vae": vae}), batch_loss, steps=steps, peak=3e-3)
    return vae


@torch.no_grad()
def encode_pictures(folder, vae, images, *, set_scale):
    """Return the scaled latents (count, 4, 16, 16) of all pictures; `set_scale` makes their variance one."""
    digest = hashlib.sha256(
        b"".join(tensor.cpu().numpy().tobytes() for tensor in vae.state_dict().values())
    ).hexdigest()
    path = folder / f"latents-{len(images)}-{digest[:12]}.pt"
    if not path.exists():
        parts = []
        for start in tqdm(range(0, len(images), 64), desc="latents", mininterval=10):
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                parts.append(vae.encode(as_batch(images[start : start + 64])).latent_dist.mean.float().cpu())
        latents = torch.cat(parts)
        torch.save({"latents": latents.half(), "scale": 1 / latents.std().item()}, folder / "tmp.pt")
        os.replace(folder / "tmp.pt", path)
    state = torch.load(path, weights_only=True)
    if set_scale:
        vae.register_to_config(scaling_factor=state["scale"])
    return state["latents"] * vae.config.scaling_factor


def make_unet(encoder):
    """Return an untrained UNet; its first level, 16 × 16, has no attention, to keep steps fast on a CPU."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(DEVICE)


@torch.no_grad()
def whitening(encoder, ids, *, ridge=1e-3, scale=3.0, num_captions=10_000):
    """Return the symmetric matrix that gives the encodings of all positions second moment scale² · I.

    Breeds differ in directions that hold a thousandth of the encodings' power, and gradient descent learns
    such directions last. In 200 steps from one start, the part of an object's error at t = 999 that breed
    words save rose from 0.196 to 0.268 with this, and to 0.232 without. `ridge` is relative to the mean
    eigenvalue.
    """
    width = encoder.config.hidden_size
    moment = torch.zeros(width, width, dtype=torch.float64, device=DEVICE)
    for batch in ids[:num_captions].split(500):
        encodings = encoder(batch.to(DEVICE)).last_hidden_state.double().flatten(0, 1)
        moment += encodings.T @ encodings / (min(num_captions, len(ids)) * ids.shape[1])
    values, vectors = torch.linalg.eigh(moment)
    return (scale * (vectors * (values + ridge * values.mean()).rsqrt()) @ vectors.T).float()


@torch.no_grad()
def change_basis_(unet, matrix):
    """Multiply all cross attentions' key and value weights by a matrix (width, width), on the right."""
    for name, layer in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer.weight.copy_(layer.weight @ matrix)


def train_unet(folder, unet, tokenizer, encoder, vae, latents, captions, *, steps, peak, first_power=0.1):
    """Train the UNet on v-prediction with zero terminal SNR; return the average of its weights as a pipeline.

    The UNet is trained on whitened encodings. At the end the whitening is multiplied into its keys and
    values, so that the finished model takes the encoder's own encodings, as every Stable Diffusion does.
    """
    dtype = training_dtype()
    unet.to(memory_format=torch.channels_last)
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        unet.set_attn_processor(AttnProcessor())  # the fused attention's bfloat16 backward is slow on CPU
    noises = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    ids, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    num_things = torch.tensor(
        [sum(word in NOUNS for word in caption.split()) for caption in captions], dtype=torch.float32
    )
    white = whitening(encoder, ids)
    change_basis_(unet, torch.linalg.inv(white))
    average = EMAModel(unet.parameters(), decay=0.9995, use_ema_warmup=True, power=0.8)
    average.to(DEVICE)

    def batch_loss(step, generator):
        # Pictures of two things are harder, and are drawn twice as often.
        rows = torch.multinomial(num_things, 64, generator=generator)
        batch_ids = torch.where(torch.rand(64, 1, generator=generator) < 0.1, empty, ids[rows]).to(DEVICE)
        clean = latents[rows].float().to(DEVICE)
        noise = torch.randn(clean.shape, generator=generator).to(DEVICE)
        # Late times first: only at signal-to-noise ratios below about 0.03 must an object's look come from
        # the text, since the noisy picture does not show it. Nine in ten draws are above 800 at the start of
        # the run; at its end all times are drawn nearly alike.
        power = first_power + (0.9 - first_power) * step / steps
        times = (1000 * torch.rand(64, generator=generator) ** power).long().to(DEVICE)
        with torch.no_grad():
            encodings = encoder(batch_ids).last_hidden_state @ white
        noisy = noises.add_noise(clean, noise, times).contiguous(memory_format=torch.channels_last)
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
            prediction = unet(noisy, times, encodings).sample
        return F.mse_loss(prediction.float(), noises.get_velocity(clean, noise, times))

    def pipeline():
        scheduler = DDIMScheduler.from_config(noises.config)
        return StableDiffusionPipeline(
            vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )

    def after(step):
        if step % 500 and step != steps:
            return
        average.store(unet.parameters())
        average.copy_to(unet.parameters())
        change_basis_(unet, white)
        unet.eval()
        pipe = pipeline()
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe(
            list(SAMPLE_PROMPTS),
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(i) for i in range(8)],
        ).images
        strip = Image.new("RGB", (8 * 128, 128))
        for i, picture in enumerate(pictures):
            strip.paste(picture.resize((128, 128)), (i * 128, 0))
        strip.save(folder / f"samples-{step:05d}.png")
        unet.train()
        average.restore(unet.parameters())

    train_stage(
        "unet",
        folder,
        nn.ModuleDict({"unet": unet}),
        batch_loss,
        steps=steps,
        peak=peak,
        after=after,
        average=average,
    )
    average.copy_to(unet.parameters())
    change_basis_(unet, white)
    return pipeline()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=HERE / "work",
        help="checkpoints, pictures and samples (several hundred MB)",
    )
    parser.add_argument("--output_dir", type=Path, default=MODEL_FOLDER, help="where the finished model goes")
    parser.add_argument(
        "--start_from", type=Path, help="a finished model, whose UNet is trained on, instead of new weights"
    )
    parser.add_argument("--text_steps", type=int, default=600)
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--unet_steps", type=int, default=6500)
    parser.add_argument("--unet_rate", type=float, default=1e-3, help="highest learning rate of the UNet")
    parser.add_argument("--num_pictures", type=int, default=NUM_PICTURES)
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    images, captions = load_pictures(args.work_dir, args.num_pictures)
    if args.start_from is None:
        tokenizer = make_tokenizer(args.work_dir, captions)
        scenes = [world.sample(seed).scene for seed in range(args.num_pictures)]
        encoder = train_text_encoder(args.work_dir, tokenizer, captions, scenes, steps=args.text_steps)
        vae = train_autoencoder(args.work_dir, images, steps=args.vae_steps)
        unet = make_unet(encoder)
    else:
        start = StableDiffusionPipeline.from_pretrained(args.start_from).to(DEVICE)
        tokenizer, encoder, vae, unet = (
            start.tokenizer,
            start.text_encoder,
            start.vae,
            make_unet(start.text_encoder),
        )
        unet.load_state_dict(start.unet.state_dict())
    latents = encode_pictures(args.work_dir, vae, images, set_scale=args.start_from is None)
    pipe = train_unet(
        args.work_dir,
        unet,
        tokenizer,
        encoder,
        vae,
        latents,
        captions,
        steps=args.unet_steps,
        peak=args.unet_rate,
        first_power=0.1 if args.start_from is None else 0.6,
    )
    if args.start_from is None:
        pipe.to(torch.float16).save_pretrained(args.output_dir)
        # Unlike diffusers, transformers loads a model in the precision that its configuration names. With
        # this a plain `from_pretrained` gives a pipeline of float32 throughout.
        path = args.output_dir / "text_encoder" / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # Shipped Stable Diffusions name CLIP's weights so. Every version of transformers reads these names;
        # some write others.
        path = args.output_dir / "text_encoder" / "model.safetensors"
        weights = {
            f"text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
    else:  # all other files stay the same, byte for byte
        if args.start_from.resolve() != args.output_dir.resolve():
            shutil.copytree(args.start_from, args.output_dir, dirs_exist_ok=True)
        unet.to(torch.float16).save_pretrained(args.output_dir / "unet")


if __name__ == "__main__":
    main()
