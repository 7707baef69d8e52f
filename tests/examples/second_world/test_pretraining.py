"""Pretraining: a short run writes a Stable Diffusion, and a stopped one ends as if uninterrupted."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "world"))

import pretrain
from drawing import draw_scene
from vae_stage import (
    as_batch,
    decibels,
    encode_pictures,
    reconstruct,
    refine_decoder_,
    to_pixel_metric_,
)
from world import sample

MODEL = Path(pretrain.__file__).parent / "tiny-sd"

SHORT = {
    "num_pictures": 250,
    "text_steps": 2,
    "text_batch_size": 24,
    "vae_steps": 2,
    "vae_channels": "8,8,16",
    "unet_batch_size": 8,
    "unet_channels": "16,32,32",
}


def run(folder, *flags, **options):
    arguments = ["--work_dir", str(folder), "--output_dir", str(folder / "model"), *flags]
    pretrain.main(
        arguments + [word for name, value in (SHORT | options).items() for word in (f"--{name}", str(value))]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A work folder of two steps of each stage."""
    folder = tmp_path_factory.mktemp("work")
    run(folder, unet_steps=2, save_every=0)
    return folder


def test_the_model_loads_in_one_type_as_it_is_and_draws(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model")
    types = {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()}
    assert types == {torch.float32}
    assert pipe("a bear on red", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    for path in (folder / "model").rglob("*.safetensors"):
        assert path.stat().st_size <= 15 * 2**20
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


def test_samples_show_how_the_unet_comes_on(folder):
    assert sorted(path.name for path in folder.glob("samples-*.png")) == [
        "samples-000001.png",
        "samples-000002.png",
    ]


def test_a_stopped_run_ends_as_an_uninterrupted_one(folder, tmp_path, monkeypatch):
    for path in folder.iterdir():
        if not path.name.startswith(("unet", "model", "samples")):
            (tmp_path / path.name).symlink_to(path)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "draw_samples", stop)  # called behind the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, unet_steps=2, save_every=0)
    assert torch.load(tmp_path / "unet.pt", weights_only=True)["step"] == 1
    run(tmp_path, unet_steps=2, save_every=0)
    whole, stopped = (torch.load(f / "unet.pt", weights_only=True) for f in (folder, tmp_path))
    for part in ("modules", "average"):
        assert whole[part].keys() == stopped[part].keys()
        assert all(torch.equal(tensor, stopped[part][name]) for name, tensor in whole[part].items())


def test_export_writes_what_the_checkpoints_hold(folder, tmp_path):
    run(folder, "--export", "--output_dir", str(tmp_path / "again"))
    for path in (folder / "model").rglob("*.safetensors"):
        again = load_file(tmp_path / "again" / path.relative_to(folder / "model"))
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, again[name])


def test_training_starts_from_the_parts_of_a_model(folder, tmp_path):
    model = folder / "model"
    for path in folder.glob("captions-*"), folder.glob("pictures-*"):
        for file in path:
            (tmp_path / file.name).symlink_to(file)
    run(tmp_path, "--start_from", str(model), unet_steps=0)
    assert not (tmp_path / "text.pt").exists() and not (tmp_path / "vae.pt").exists()
    for path in model.rglob("*.safetensors"):
        again = load_file(tmp_path / "model" / path.relative_to(model))
        for name, tensor in load_file(path).items():
            assert torch.allclose(tensor.float(), again[name].float(), rtol=2e-3, atol=1e-4), name
    config, again = (StableDiffusionPipeline.from_pretrained(f) for f in (model, tmp_path / "model"))
    assert config.vae.config.scaling_factor == pytest.approx(again.vae.config.scaling_factor, rel=1e-2)


def test_the_decoder_alone_is_trained_on(folder):
    """It draws better, and the encoder with its latents is left as it is."""
    vae = AutoencoderKL.from_pretrained(folder / "model" / "vae")
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    images = np.load(folder / "pictures-250.npy")
    latents = encode_pictures(folder, vae, images)
    error = decibels(images, reconstruct(vae, images)).mean()
    refine_decoder_(folder, vae, images, latents, batch_size=8, peak=0.01, steps=30)
    assert decibels(images, reconstruct(vae, images)).mean() > error + 0.2
    changed = {name for name, tensor in vae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_latents_in_the_metric_of_pixels_make_the_same_pictures():
    """The largest channels are those that pixels show most; the committed autoencoder has them so."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float()
    pictures = np.stack([np.asarray(draw_scene(sample(seed).scene)) for seed in range(16)])
    before = reconstruct(vae, pictures)
    mean = vae.encode(as_batch(pictures)).latent_dist.mean
    spread = mean.std(dim=(0, 2, 3))
    assert spread[-3:].min() > 2.2 * spread[:-3].max()  # the colours
    basis = to_pixel_metric_(vae, pictures, strength=0.0)  # another turn, no other sizes
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis)), atol=1e-4)
    assert np.abs(before.astype(int) - reconstruct(vae, pictures)).max() <= 1
    again = vae.encode(as_batch(pictures)).latent_dist.mean
    assert torch.allclose(again, torch.einsum("ij,bjhw->bihw", basis, mean), atol=1e-3)
