"""The methods that are compared, with the same pictures, masks, captions, noises and times.

Each function of `METHODS` trains on a fresh pipeline and returns a `Learned`. All but Perfusion share
`_train`.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from safetensors.torch import save_file
from task import TEMPLATES, generate

from perfusion_pytorch import (
    add_concept_token_,
    concept_gates,
    global_key_lock,
    loss_fn_weighted_by_mask,
    train_concept,
)
from perfusion_pytorch.layers.loaded import LoadedProjection
from perfusion_pytorch.layers.wrapped import WrappedProjection
from perfusion_pytorch.training.draws import draw_rows
from perfusion_pytorch.training.material import encode_pictures
from perfusion_pytorch.training.options import PAPER
from perfusion_pytorch.training.pictures import load_pictures

TOKEN, RARE_WORD = "<new-1>", "q"
ALL_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
CROSS_ATTENTION = ("attn2.to_k", "attn2.to_v")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.25, 1.5)  # of LoRAs


@dataclass
class Learned:
    """What a method learned, on its pipeline.

    Attributes:
        words: what stands for the object in prompts.
        num_trained: how many numbers were trained.
        path: the file that holds them.
        seconds: of the training.
        views: other ways to make pictures of it, with no more training: by name, a function that returns the
            context in which they are made.
    """

    words: str
    num_trained: int
    path: Path
    seconds: float
    views: dict[str, Callable] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is learned, from which pictures and masks (PIL), in how many steps, and the seed of all draws."""

    pictures: list
    masks: list | None
    superclass: str
    covariance: object
    steps: int
    seed: int
    folder: Path


# -------------------------------------------------------------------------------------------------- Perfusion

BETAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.5)
TEMPERATURES = (0.01, 0.15, 0.3)
LOCKED_SHARES = (0.0, 0.5)


def perfusion(pipe, task, **options):
    """This library's `train_concept`."""
    began = time.perf_counter()
    summary = train_concept(
        pipe,
        task.pictures,
        masks=task.masks,
        use_masks=task.masks is not None,
        token=TOKEN,
        superclass=task.superclass,
        output_dir=task.folder,
        covariance=task.covariance,
        templates=TEMPLATES,
        max_train_steps=task.steps,
        checkpointing_steps=None,
        seed=task.seed,
        progress=False,
        **options,
    )
    seconds = time.perf_counter() - began
    return Learned(TOKEN, summary.num_trainable, summary.concept, seconds, perfusion_views(pipe))


def perfusion_views(pipe):
    """Return other gates and locks for what was learned; each ends with its block."""
    views = {f"β {beta:g}": partial(concept_gates, pipe, beta=beta) for beta in BETAS}
    views |= {f"τ {tau:g}": partial(concept_gates, pipe, temperature=tau) for tau in TEMPERATURES}
    views |= {f"keys locked by {share:g}": partial(keys_locked, pipe, share) for share in LOCKED_SHARES}
    views["global lock"] = partial(global_key_lock, pipe)
    return views


@contextmanager
def keys_locked(pipe, share):
    """Lock the concept's keys in part: at 0 they are those of its embedding, at 1 those of its superclass."""
    layers = [m for m in pipe.unet.modules() if isinstance(m, LoadedProjection) and m.is_key_proj]
    for layer in layers:
        layer.forward = partial(_partly_locked, layer, share)
    yield
    for layer in layers:
        del layer.forward


def _partly_locked(layer, share, text_enc):
    locked = layer.edits.split(text_enc).keys
    return WrappedProjection.forward(layer, text_enc + share * (locked - text_enc))


# ------------------------------------------------------------------------------------------ what others share


def _train(pipe, task, groups, words, *, prior=None):
    """Train parameters with the diffusion loss.

    Args:
        pipe: the pipeline; frozen but for what is trained.
        task: the task.
        groups: AdamW's parameter groups.
        words: what stands for the object in the templates.
        prior: pictures of the superclass (PIL) that are trained on along with the object's, under its
            plain word: as many rows again in each step, as Custom Diffusion has it.

    Returns:
        The seconds that it took.
    """
    began = time.perf_counter()
    rows, unet = 16, pipe.unet
    noises = DDPMScheduler.from_config(pipe.scheduler.config)
    pictures = load_pictures(task.pictures, masks=task.masks, resolution=pipe.vae.config.sample_size)
    latents = encode_pictures(pipe.vae, pictures)
    masks = _masks(pictures, latents)
    prompts = [template.format(words) for template in TEMPLATES]
    if prior is not None:
        more = load_pictures(prior, resolution=pipe.vae.config.sample_size)
        plain_latents = encode_pictures(pipe.vae, more)
        plain_prompts = [template.format(task.superclass) for template in TEMPLATES]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=task.steps)

    def loss_of(step, seed, latents, masks, prompts):
        draw = draw_rows(
            seed,
            step,
            range(rows),
            rows,
            prompts_of_pictures=[range(len(prompts))] * len(latents),
            latent_shape=latents.shape[1:],
        )
        used, which = draw.prompts.unique(return_inverse=True)
        ids = pipe.tokenizer(
            [prompts[i] for i in used],
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        encodings = pipe.text_encoder(ids).last_hidden_state[which]
        clean = latents[draw.pictures]
        prediction = unet(
            noises.add_noise(clean, draw.noise, draw.timesteps), draw.timesteps, encodings
        ).sample
        target = noises.get_velocity(clean, draw.noise, draw.timesteps)
        return loss_fn_weighted_by_mask(prediction, target, masks[draw.pictures])

    for step in range(task.steps):
        loss = loss_of(step, task.seed, latents, masks, prompts)
        if prior is not None:
            plain_masks = torch.ones(len(plain_latents), *latents.shape[-2:])
            loss = loss + loss_of(step, task.seed + 10**6, plain_latents, plain_masks, plain_prompts)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def _masks(pictures, latents):
    """Return masks of the latents' size (b, h, w); all ones where a picture has none."""
    whole = torch.ones(pictures[0].pixels.shape[-2:])
    masks = torch.stack([whole if p.mask is None else p.mask for p in pictures])
    return torch.nn.functional.interpolate(masks.unsqueeze(1), latents.shape[-2:], mode="area").squeeze(1)


def _freeze(pipe):
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)


def _add_token(pipe, task, token=TOKEN):
    """Add the token, whose embedding starts at the superclass's; returns the parameter."""
    embedding = add_concept_token_(pipe.text_encoder, pipe.tokenizer, token, task.superclass)
    embedding.concept_embedding.requires_grad_(True)
    return embedding.concept_embedding


def _embedding_rate(pipe, relative):
    """Return a learning rate relative to the spread of the embeddings, as `train_concept`'s is."""
    return relative * pipe.text_encoder.get_input_embeddings().weight.std().item()


def _save(task, tensors):
    path = task.folder / "learned.safetensors"
    task.folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}, path)
    return path


# ------------------------------------------------------------------------------------------------- the others


def textual_inversion(pipe, task, *, rate=0.04):
    """Gal et al. 2022: the token's embedding alone."""
    _freeze(pipe)
    embedding = _add_token(pipe, task)
    groups = [{"params": [embedding], "lr": _embedding_rate(pipe, rate)}]
    seconds = _train(pipe, task, groups, TOKEN)
    return Learned(TOKEN, embedding.numel(), _save(task, {"embedding": embedding}), seconds)


def lora(pipe, task, *, rank=1, rate=1e-3, targets=CROSS_ATTENTION, token=True, embedding_rate=0.02):
    """Hu et al. 2021, with peft; the object is a trained token, or a rare word (DreamBooth)."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    _freeze(pipe)
    torch.manual_seed(task.seed)  # of LoRA's start
    pipe.unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), adapter_name="new"
    )
    weights = [p for p in pipe.unet.parameters() if p.requires_grad]
    groups, tensors = [{"params": weights, "lr": rate}], {}
    words = TOKEN if token else f"{RARE_WORD} {task.superclass}"
    if token:
        embedding = _add_token(pipe, task)
        groups.append({"params": [embedding], "lr": _embedding_rate(pipe, embedding_rate)})
        tensors["embedding"] = embedding
    seconds = _train(pipe, task, groups, words)
    tensors |= get_peft_model_state_dict(pipe.unet, adapter_name="new")
    pipe.unet.requires_grad_(False)
    return Learned(
        words,
        sum(p.numel() for group in groups for p in group["params"]),
        _save(task, tensors),
        seconds,
        {f"scale {scale:g}": partial(scaled, pipe, scale) for scale in SCALES},
    )


@contextmanager
def scaled(pipe, scale):
    """Use a LoRA at another strength."""
    pipe.unet.set_adapters("new", weights=scale)
    yield
    pipe.unet.set_adapters("new", weights=1.0)


def custom_diffusion(pipe, task, *, rate=1e-3, embedding_rate=0.02, num_prior=50):
    """Kumari et al. 2023: whole keys and values, and a token before the superclass's word.

    Pictures of the superclass, which the model itself made, are trained on as well.
    """
    _freeze(pipe)
    prior = generate(pipe, [f"a photo of a {task.superclass}"] * num_prior, seed=10**6 + task.seed)
    weights = {
        name: parameter
        for name, parameter in pipe.unet.named_parameters()
        if name.removesuffix(".weight").endswith(CROSS_ATTENTION)
    }
    for parameter in weights.values():
        parameter.requires_grad_(True)
    embedding = _add_token(pipe, task)
    groups = [
        {"params": list(weights.values()), "lr": rate},
        {"params": [embedding], "lr": _embedding_rate(pipe, embedding_rate)},
    ]
    words = f"{TOKEN} {task.superclass}"
    seconds = _train(pipe, task, groups, words, prior=prior)
    pipe.unet.requires_grad_(False)
    num_trained = embedding.numel() + sum(p.numel() for p in weights.values())
    return Learned(words, num_trained, _save(task, weights | {"embedding": embedding}), seconds)


METHODS = {
    "perfusion": perfusion,
    "perfusion, as the paper": lambda pipe, task, **options: perfusion(pipe, task, **{**PAPER, **options}),
    "textual inversion": textual_inversion,
    "LoRA, rank 1": lora,
    "LoRA, rank 4": lambda pipe, task, **options: lora(pipe, task, **{"rank": 4} | options),
    "LoRA, all projections": lambda pipe, task, **options: lora(
        pipe, task, **{"rank": 4, "targets": ALL_PROJECTIONS, "token": False} | options
    ),
    "Custom Diffusion": custom_diffusion,
}
