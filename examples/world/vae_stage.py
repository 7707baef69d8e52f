"""The autoencoder, and the latents of all pictures."""

import hashlib
import math
import os

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from drawing import SIZE
from stages import Average, device, train_stage
from torch import nn
from tqdm import tqdm


def as_batch(images):
    """Turn uint8 pictures (b, h, w, 3) into a float batch (b, 3, h, w) in [-1, 1] on the device."""
    pixels = torch.from_numpy(np.array(images)).to(device()).permute(0, 3, 1, 2)
    return pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def make_autoencoder(channels, latent_channels):
    """Return an untrained autoencoder, whose residual blocks start as the identity: it learns its linear part first, and fast."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,  # more groups would take the mean colour of each away
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
    return vae.to(device(), memory_format=torch.channels_last)


def some_rows(count, batch_size, generator):
    """Return which rows a step uses, in the order in which they lie on the disk."""
    return torch.randint(count, (batch_size,), generator=generator, device=device()).cpu().sort().values


def pixel_loss(decoded, pixels):
    """Return the loss of decoded pictures, and their mean squared error."""
    error = decoded.float() - pixels
    square = error.square().mean()
    return error.abs().mean() + 2 * square, square


def train_autoencoder(folder, images, channels, latent_channels, *, batch_size, peak, **budget):
    """Train the autoencoder on pictures, uint8 (count, 64, 64, 3), and return it with the averages of its weights."""
    vae = make_autoencoder(channels, latent_channels)
    modules = nn.ModuleDict({"vae": vae})
    average = Average(modules)
    is_bfloat16 = device() == "cuda"

    def batch_loss(step, progress, generator):
        pixels = as_batch(images[some_rows(len(images), batch_size, generator).numpy()])
        with torch.autocast(device(), dtype=torch.bfloat16, enabled=is_bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator, device=device())
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        loss, square = pixel_loss(decoded, pixels)
        return loss + 1e-6 * posterior.kl().mean(), {"decibel": -10 * torch.log10(square.detach() / 4)}

    train_stage("vae", folder, modules, batch_loss, peak=3e-3, muon_peak=peak, average=average, **budget)
    modules.load_state_dict(average.weights)
    to_pixel_metric_(vae, images[:64])
    return vae


def refine_decoder_(folder, vae, images, latents, *, batch_size, peak, **budget):
    """Train the decoder on, in place, with averaged weights: the latents stay, so that no UNet has to be trained anew.

    Args:
        images, latents: pictures, uint8 (count, 64, 64, 3), and their scaled latents, of `encode_pictures`.
    """
    modules = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    modules.requires_grad_(True)
    average = Average(modules)

    def batch_loss(step, progress, generator):
        rows = some_rows(len(images), batch_size, generator)
        codes = latents[rows].to(device()).float() / vae.config.scaling_factor
        with torch.autocast(device(), dtype=torch.bfloat16, enabled=device() == "cuda"):
            decoded = vae.decode(codes.contiguous(memory_format=torch.channels_last)).sample
        loss, square = pixel_loss(decoded, as_batch(images[rows.numpy()]))
        return loss, {"decibel": -10 * torch.log10(square.detach() / 4)}

    train_stage("decoder", folder, modules, batch_loss, peak=1e-3, muon_peak=peak, average=average, **budget)
    modules.load_state_dict(average.weights)


@torch.no_grad()
def to_pixel_metric_(vae, images, *, strength=1.0, step=0.1, apart=4):
    """Give the latents another basis, in place: the pictures are the same, and what pixels show most is what is largest.

    An autoencoder fills its channels evenly: three of sixteen carry the colours that are nine tenths of a picture's energy, the
    others its details, and a denoiser spends most of its loss on what can hardly be seen. With G the mean energy of the change in the
    pixels by a small change of one cell's channels, G = U diag(g) Uᵀ, the new latents are diag(g^(strength / 2)) Uᵀ times the old ones.

    Args:
        vae: its 1 × 1 convolutions around the latents are changed.
        images: some pictures, uint8 (count, 64, 64, 3).
        strength: 0 only turns the basis, 1 makes all channels equally visible.
        step: size of the small change, in standard deviations of the latents.
        apart: distance of cells that are changed at once.

    Returns:
        The new basis (channels, channels), which latents are multiplied by.
    """
    mean = vae.encode(as_batch(images)).latent_dist.mean
    plain, size, channels = vae.decode(mean).sample, step * mean.std(), mean.shape[1]
    energy = torch.zeros(channels, channels, device=mean.device)
    for offset in ((0, 1), (2, 3)):
        cells = torch.zeros_like(mean[:1, :1])
        cells[..., offset[0] :: apart, offset[1] :: apart] = size
        changes = []
        for channel in range(channels):
            moved = mean.clone()
            moved[:, channel] += cells[:, 0]
            changes.append((vae.decode(moved).sample - plain).flatten().float())
        changes = torch.stack(changes)
        energy += changes @ changes.T
    values, vectors = torch.linalg.eigh(energy)
    scales = (values / values.max()).clamp_min(1e-3) ** (strength / 2)
    basis, back = scales.unsqueeze(1) * vectors.T, vectors / scales
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight[:channels] = torch.einsum("ij,jkhw->ikhw", basis, inner.weight[:channels])
    inner.bias[:channels] = basis @ inner.bias[:channels]
    outer.weight.copy_(torch.einsum("ojhw,jk->okhw", outer.weight, back))
    return basis


@torch.no_grad()
def encode_pictures(folder, vae, images, *, batch_size=128):
    """Return the scaled latents of all pictures, float16 (count, channels, h, w); sets the scaling factor to unit variance."""
    digest = hashlib.sha256(
        b"".join(
            tensor.cpu().numpy().tobytes()
            for part in (vae.encoder, vae.quant_conv)
            for tensor in part.state_dict().values()
        )
    ).hexdigest()
    path = folder / f"latents-{len(images)}-{digest[:12]}.pt"
    if not path.exists():
        parts = []
        for start in tqdm(range(0, len(images), batch_size), desc="latents", mininterval=20):
            with torch.autocast(device(), dtype=torch.bfloat16, enabled=device() == "cuda"):
                mean = vae.encode(as_batch(images[start : start + batch_size])).latent_dist.mean
            parts.append(mean.half().cpu())
        latents = torch.cat(parts)
        scale = 1 / latents[:20_000].float().std().item()
        torch.save({"latents": (latents.float() * scale).half(), "scale": scale}, folder / "tmp.pt")
        os.replace(folder / "tmp.pt", path)
    state = torch.load(path, weights_only=True, mmap=True)
    vae.register_to_config(scaling_factor=state["scale"])
    return state["latents"]


@torch.no_grad()
def reconstruct(vae, images, *, batch_size=64):
    """Return uint8 pictures (count, 64, 64, 3) as the autoencoder gives them back."""
    parts = []
    for start in range(0, len(images), batch_size):
        decoded = vae.decode(vae.encode(as_batch(images[start : start + batch_size])).latent_dist.mean).sample
        parts.append(decoded.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def decibels(images, others):
    """Return the peak signal-to-noise ratio of each picture, (count,), of uint8 pictures (count, h, w, 3)."""
    square = (images.astype(float) - others.astype(float)) ** 2
    return 10 * np.log10(255**2 / square.mean(axis=(1, 2, 3)).clip(1e-3))


def mean_decibels(images, others):
    """Return the ratio of the mean squared error over all pictures, which the worst ones rule."""
    return 10 * math.log10(255**2 / ((images.astype(float) - others.astype(float)) ** 2).mean())
