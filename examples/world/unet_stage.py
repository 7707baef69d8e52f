"""The UNet: v-prediction with zero terminal SNR, trained on whitened encodings and stored for plain ones."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from stages import Average, device, train_stage
from text_stage import second_moment
from torch import nn
from words import tokenize

SAMPLE_PROMPTS = (
    "a photo of a large panda on a green background",
    "a koi left of a rose on a black background",
    "a small red car on a white background",
    "a pine on sand",
    "a monarch above a stein on a gray background",
    "a house on the left in front of water",
    "a cup and a trout below a house on a yellow background",
    "a striped bear next to a taxi on bricks",
)


def make_unet(latent_channels, edge, channels, text_width):
    """Return an untrained UNet; cross attention is on all levels but the finest, whose many cells would take most of the time."""
    torch.manual_seed(0)
    below = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=edge,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * below),
        up_block_types=(*["CrossAttnUpBlock2D"] * below, "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(device(), memory_format=torch.channels_last)


def noise_schedule():
    """Return the training scheduler."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


@torch.no_grad()
def whitening(encoder, ids, *, ridge=1e-3, scale=2.0, num_captions=8000):
    """Return the symmetric matrix that gives the encodings of all positions second moment scale² · I.

    Gradient descent learns directions of little power last; in this basis none is. `ridge` is a part of the mean eigenvalue.
    """
    parts = [encoder(part.to(device())).last_hidden_state for part in ids[:num_captions].split(500)]
    values, vectors = torch.linalg.eigh(second_moment(torch.cat(parts).double()))
    return (scale * (vectors * (values + ridge * values.mean()).rsqrt()) @ vectors.T).float()


@torch.no_grad()
def change_basis_(state, matrix):
    """Multiply the weights of all cross attentions' keys and values in a state dict by `matrix`: W(e) becomes W(matrix e)."""
    for name in state:
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            state[name] = state[name] @ matrix.to(state[name])
    return state


def for_whitened(state, encoder, ids):
    """Return the weights of a UNet for plain encodings as they are for whitened ones: the inverse of what training returns."""
    return change_basis_(dict(state), torch.linalg.inv(whitening(encoder, ids).double()).float())


def make_pipeline(tokenizer, encoder, vae, unet):
    """Return the model as a pipeline."""
    scheduler = DDIMScheduler.from_config(noise_schedule().config)
    return StableDiffusionPipeline(
        vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def train_unet(folder, unet, encoder, empty_ids, ids, latents, num_things, *, batch_size, peak, after=None, compiled=False,
               **budget):  # fmt: skip
    """Train the UNet; its checkpoint holds the weights for whitened encodings, and their average.

    Args:
        folder: work folder.
        unet: as `make_unet` makes it.
        encoder: frozen text encoder.
        empty_ids: ids of the empty prompt (1, n), which one caption in ten is replaced by.
        ids, latents, num_things: captions (b, n), latents (b, channels, h, w), how many things each shows (b,).
        batch_size, peak: rows a step, highest learning rate.
        after: called with (step, weights for plain encodings) after each checkpoint.
        compiled: compile the UNet.
        budget: `steps` and `minutes` of `train_stage`.

    Returns:
        The average of the weights, for plain encodings: a state dict.
    """
    noises, on = noise_schedule(), device()
    alphas = noises.alphas_cumprod.to(on)
    white = whitening(encoder, ids)
    ids, empty_ids = ids.to(on), empty_ids.to(on)
    if on == "cuda":
        latents = latents.to(on)
    modules = nn.ModuleDict({"unet": unet})
    average = Average(modules, longest=0.9995)
    weights = (
        torch.as_tensor(num_things, dtype=torch.float32).add(1).to(on)
    )  # pairs are harder, and drawn more often
    call = torch.compile(unet) if compiled else unet

    def batch_loss(step, progress, generator):
        options = {"generator": generator, "device": on}
        rows = torch.multinomial(weights[: 2**24], batch_size, replacement=True, generator=generator)
        batch_ids = torch.where(torch.rand(batch_size, 1, **options) < 0.1, empty_ids, ids[rows])
        clean = latents[rows.to(latents.device)].to(on).float()
        noise = torch.randn(clean.shape, **options)
        # Late times first, where layout and identity must come from the text; the middle is where colours and shapes become clear.
        power = 0.5 + 0.5 * min(1.0, progress / 0.7)
        times = (1000 * torch.rand(batch_size, **options) ** power).long().clamp_max(999)
        with torch.no_grad():
            encodings = encoder(batch_ids).last_hidden_state @ white
        signal = alphas[times].sqrt().view(-1, 1, 1, 1)
        spread = (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
        noisy = (signal * clean + spread * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(on, dtype=torch.bfloat16, enabled=on == "cuda"):
            prediction = call(noisy, times, encodings).sample
        errors = (prediction.float() - (signal * noise - spread * clean)).square().mean((1, 2, 3))
        late = times > 900
        numbers = {"late": errors.detach()[late].mean() if late.any() else errors.new_zeros(())}
        return errors.mean(), numbers

    def plain():
        return change_basis_(
            {name.removeprefix("unet."): t.clone() for name, t in average.weights.items()}, white
        )

    def saved(step):
        if after is not None:
            after(step, plain())

    train_stage("unet", folder, modules, batch_loss, peak=peak, average=average, after=saved, **budget)
    return plain()


def load_average(folder, encoder, ids):
    """Return the average of a checkpoint's weights for plain encodings, and its step."""
    state = torch.load(folder / "unet.pt", map_location=device(), weights_only=True)
    weights = {name.removeprefix("unet."): tensor for name, tensor in state["average"].items()}
    return change_basis_(weights, whitening(encoder, ids)), state["step"]


def loss_by_time(unet, encoder, ids, latents, times=(999, 900, 700, 500, 300, 100)):
    """Return the mean squared error of the velocity at some times on held-out rows, in the order of `times`."""
    noises, found = noise_schedule(), []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    with torch.no_grad():
        encodings = encoder(ids).last_hidden_state
        for time in times:
            at = torch.full((len(ids),), time, device=latents.device)
            prediction = unet(noises.add_noise(latents, noise, at), at, encodings).sample
            found.append(F.mse_loss(prediction, noises.get_velocity(latents, noise, at)).item())
    return found


def empty_prompt(tokenizer):
    """Return the ids of the empty prompt, (1, n)."""
    return tokenize(tokenizer, [""])
