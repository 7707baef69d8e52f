"""Pipelines around the real denoisers, with small text encoders and autoencoders of their own."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from helpers.real_models import MODELS, real_model
from helpers.small_model import MODEL
from helpers.tiny_pipes import stable_diffusion

ROWS = 1200  # of the text encoders' embeddings, some more than the tokenizer has tokens


def make_pipe(name):
    torch.manual_seed(0)
    denoiser = real_model(name).eval()
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    scheduler = DDIMScheduler(clip_sample=False)
    if name == "PixArt":
        tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
        encoder = T5EncoderModel(
            T5Config(vocab_size=ROWS, d_model=4096, d_kv=8, num_heads=2, d_ff=32, num_layers=1)
        ).eval()
        pipe = PixArtAlphaPipeline(
            tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=denoiser, scheduler=scheduler
        )
    else:
        widths = (768, 1280) if name == "SDXL" else (MODELS[name][1]["cross_attention_dim"],)
        pipe = stable_diffusion(denoiser, vae, scheduler, widths, vocab_size=ROWS, num_attention_heads=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe
