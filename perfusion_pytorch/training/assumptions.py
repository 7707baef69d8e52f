"""What the trainer assumes of a pipeline: stated here, and checked here before anything moves.

noise       noisy = sqrt(ᾱ_t) latents + sqrt(1 − ᾱ_t) noise, with ᾱ of DDPM; the UNet predicts the noise,
            the velocity sqrt(ᾱ_t) noise − sqrt(1 − ᾱ_t) latents, or the latents
latents     the inverse of how the pipeline decodes: scaling_factor · means of the VAE, and for SDXL
            (means − latents_mean) · scaling_factor / latents_std where the VAE has these
UNet        takes latents, times and text encodings, for SDXL sizes and pooled encodings: nothing else
attentions  use the projections that are wrapped
weights     are where and what they seem: no offloading, no casting, no compiled copies, one dtype
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.extras import required
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.pipelines.encoding import check_encodes_like_stable_diffusion
from perfusion_pytorch.pipelines.parts import (
    check_embedding,
    denoiser_of,
    find_loaded,
    projections_of,
    text_encoders_of,
)
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.tokens import superclass_token_ids
from perfusion_pytorch.training.options import TrainingOptions

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# What describes the noise in a scheduler's configuration.
OF_NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
# VAEs that encode a picture as a distribution of latents, and scale these by their `scaling_factor`.
VAES = ("AutoencoderKL", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE")
# Pipelines that decode with the VAE's `latents_mean` and `latents_std`; all others ignore them.
DECODE_WITH_MEANS = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
)
NUM_SIZES = 6  # that SDXL is conditioned on: height and width as they were, the crop, and as they are


def check_pipeline(pipe: StableDiffusion, options: TrainingOptions) -> None:
    """Raise a ValueError where a concept cannot be trained on a pipeline; nothing of the pipeline changes."""
    _check_parts(pipe)
    _check_unet(pipe)
    _check_is_bare(pipe)
    check_encodes_like_stable_diffusion(pipe)
    _check_sizes(pipe)
    projections_of(pipe.unet)
    _check_vae(pipe)
    noise_scheduler_of(pipe)
    _check_dtypes(pipe, options.mixed_precision)
    if options.validation_prompts:
        _check_makes_pictures(pipe)
    for _, tokenizer in text_encoders_of(pipe).values():
        superclass_token_ids(tokenizer, options.token, options.superclass)


def modules_of(pipe: StableDiffusion) -> dict[str, nn.Module]:
    """Return the pipeline's parts that are modules, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


# -------------------------------------------------------------------------------------------------- the noise


def noise_scheduler_of(pipe: StableDiffusion) -> "DDPMScheduler":
    """Return a scheduler that adds the noise that the pipeline's model was trained with.

    The pipeline's own may be any sampler of it.

    Raises:
        ValueError: the noise is not that of DDPM, or the UNet predicts something else of it.
    """
    scheduler = pipe.scheduler
    name, config = type(scheduler).__name__, scheduler.config
    schedule = getattr(scheduler, "alphas_cumprod", None)
    is_continuous = config.get("timestep_type", "discrete") != "discrete"
    if not isinstance(schedule, Tensor) or is_continuous or config.get("use_flow_sigmas"):
        raise _wrong_noise(name)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"The scheduler's `prediction_type` must be one of {', '.join(PREDICTIONS)}, got {prediction!r}."
        )
    try:
        # Not by `from_config`, which puts its own defaults in the place of the other class's.
        noise: DDPMScheduler = required("diffusers").DDPMScheduler(
            prediction_type=prediction, **{key: config[key] for key in OF_NOISE if key in config}
        )
    except NotImplementedError as error:  # a schedule of β that DDPM does not have
        raise _wrong_noise(name) from error
    ours = noise.alphas_cumprod
    is_whole = len(ours) == noise.config["num_train_timesteps"]
    # Some samplers put a tiny number in the place of an ᾱ of 0 at the last time.
    if (
        not is_whole
        or ours.shape != schedule.shape
        or not torch.allclose(ours.double(), schedule.double().cpu(), atol=1e-6)
    ):
        raise _wrong_noise(name)
    return noise


def _wrong_noise(name: str) -> ValueError:
    return ValueError(
        "The pipeline's scheduler must be for noise as in DDPM, which its `alphas_cumprod` describes, "
        f"got {name}. Set the scheduler that the model came with; a model of EDM, flow matching or other "
        "noise cannot be trained."
    )


# ------------------------------------------------------------------------------------------------ the latents


def scaled_latents(means: Tensor, vae_config: Any) -> Tensor:
    """Return latents as the denoiser knows them: the inverse of what a pipeline does before it decodes.

    Args:
        means: of the VAE's distributions, shape (b, channels, h, w).
        vae_config: of a VAE that `check_pipeline` let pass.
    """
    mean, std = (_per_channel(vae_config, name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return means * vae_config.scaling_factor
    return (means - mean.to(means)) * vae_config.scaling_factor / std.to(means)


def _per_channel(config: Any, name: str) -> Tensor | None:
    values = getattr(config, name, None)
    return None if values is None else torch.tensor(values).view(1, -1, 1, 1)


def _check_vae(pipe: StableDiffusion) -> None:
    config, kind = pipe.vae.config, type(pipe.vae)
    if not any(base.__name__ in VAES for base in kind.__mro__):
        raise ValueError(
            f"`pipe` must have a VAE that is one of {', '.join(VAES)}, got {kind.__name__}. "
            "Train with the VAE that the model came with, and set another one afterwards."
        )
    for name in ("in_channels", "out_channels"):
        if (channels := pipe.unet.config[name]) != config.latent_channels:
            raise ValueError(
                f"`pipe` must have a UNet that takes and makes latents alone, of {config.latent_channels} "
                f"channels, got `{name}` of {channels}. Choose the base model instead of one for inpainting "
                "or other tasks."
            )
    shift = getattr(config, "shift_factor", None)
    values = [_per_channel(config, name) for name in ("latents_mean", "latents_std")]
    given = [value for value in values if value is not None]
    decodes = any(base.__name__ in DECODE_WITH_MEANS for base in type(pipe).__mro__)
    is_used = decodes and len(given) == 2 and all(v.numel() == config.latent_channels for v in given)
    if shift or (given and not is_used):
        wrong = "shift_factor" if shift else "latents_mean or latents_std"
        raise ValueError(
            f"`pipe` must decode latents with all that its VAE's configuration says of them, but a "
            f"{type(pipe).__name__} ignores its {wrong}. Load the VAE that the model came with."
        )


# ---------------------------------------------------------------------------------------- UNet and its inputs


def _check_unet(pipe: StableDiffusion) -> None:
    """Raise a ValueError where the UNet takes inputs that training does not give it."""
    unet = getattr(pipe, "unet", None)
    if unet is None:
        check_encodes_like_stable_diffusion(pipe)  # raises
    if not isinstance(unet, required("diffusers").UNet2DConditionModel):
        raise ValueError(
            "`pipe` must have a UNet2DConditionModel as Stable Diffusion 1.x, 2.x and XL do, got "
            f"{type(unet).__name__}."
        )
    config = unet.config
    if getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj":  # not an item of the configuration
        raise ValueError(
            "`pipe` must have no IP-Adapter while a concept is trained, since its UNet then wants pictures "
            "beside prompts. Call `unload_ip_adapter` first, and load it again afterwards."
        )
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "`pipe` must have a UNet that predicts noise, got one that was distilled into few steps "
            "(`time_cond_proj_dim`). Train on its base model; the concept then loads on both."
        )
    if any(getattr(block, "s1", None) is not None for block in unet.up_blocks):
        raise ValueError(
            "`pipe` must make pictures as it was trained to while a concept is trained, but FreeU is on. "
            "Call `disable_freeu` first, and enable it again afterwards."
        )
    extra = [
        name
        for name in ("class_embed_type", "num_class_embeds", "addition_embed_type")
        if config.get(name) not in (None, "text_time")
    ]
    if extra:
        raise ValueError(
            "`pipe` must have a UNet that takes latents, times and texts alone, but its configuration has "
            f"{', '.join(f'{name}={config[name]!r}' for name in extra)}. Choose a base model."
        )


def _check_sizes(pipe: StableDiffusion) -> None:
    """Raise a ValueError where SDXL's UNet takes other sizes or pooled encodings than training gives it."""
    config, encoders = pipe.unet.config, text_encoders_of(pipe)
    is_xl = config.get("addition_embed_type") == "text_time"
    if is_xl != ("text_encoder_2" in encoders):
        raise ValueError(
            "`pipe` must have two text encoders and a UNet that takes their pooled output, or neither, got "
            f"{list(encoders)} and `addition_embed_type={config.get('addition_embed_type')!r}`."
        )
    if not is_xl:
        return
    pooled = encoders["text_encoder_2"][0].config.projection_dim
    wanted = pooled + NUM_SIZES * config.addition_time_embed_dim
    if config.projection_class_embeddings_input_dim != wanted:
        raise ValueError(
            f"`pipe` must have a UNet that takes a pooled encoding of {pooled} features and {NUM_SIZES} "
            f"sizes, {wanted} in all, got {config.projection_class_embeddings_input_dim}. Choose the base "
            "model instead of the refiner."
        )


def _check_makes_pictures(pipe: StableDiffusion) -> None:
    if "image" in inspect.signature(pipe.__call__).parameters:
        raise ValueError(
            "`validation_prompt` needs a pipeline that makes pictures from texts alone, got "
            f"{type(pipe).__name__}. Leave it out, or train with a text-to-image pipeline: its `from_pipe` "
            "shares all parts."
        )


# ------------------------------------------------------------------------------------ parts and their weights


def _check_parts(pipe: StableDiffusion) -> None:
    if not hasattr(pipe, "components"):
        denoiser_of(pipe)  # says what a pipeline is
    missing = [name for name in PARTS if pipe.components.get(name, pipe) is None]
    if missing:
        raise ValueError(
            f"`pipe` must have all parts of its model, but its {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} None. Load the whole pipeline."
        )
    for name, part in modules_of(pipe).items():
        if "_orig_mod" in part._modules:
            raise ValueError(
                f"`pipe` must not be compiled while it is trained, but its {name} is. Set `pipe.{name} = "
                f"pipe.{name}._orig_mod`, and compile it afterwards."
            )


def _check_is_bare(pipe: StableDiffusion) -> None:
    """Raise a ValueError where a pipeline has concepts, wrapped layers, or hooks that move its weights."""
    if find_loaded(pipe) is not None:
        raise ValueError(
            "`pipe` must have no loaded concepts while one is trained. Call `unload_concepts` first."
        )
    encoders = [encoder for encoder, _ in text_encoders_of(pipe).values()]
    if any(isinstance(module, Rank1EditModule) for module in pipe.unet.modules()) or any(
        isinstance(encoder.get_input_embeddings(), EmbeddingWrapper) for encoder in encoders
    ):
        raise ValueError(
            "`pipe` must not be wrapped for training already. Save its concept, and load the pipeline again."
        )
    for encoder in encoders:
        check_embedding(encoder)
    for name, part in modules_of(pipe).items():
        if any(hasattr(module, "_hf_hook") for module in part.modules()):
            raise ValueError(
                f"`pipe` must not be offloaded while it is trained, but its {name} is. Call its "
                "`remove_all_hooks`, or `accelerate.hooks.remove_hook_from_submodules`, and move it to a "
                "device."
            )
        hooks = _diffusers_hooks(part)
        if hooks:
            raise ValueError(
                f"`pipe` must have no hooks of diffusers while it is trained, but its {name} has "
                f"{', '.join(hooks)}. Load it again, and set them afterwards."
            )


def _diffusers_hooks(part: nn.Module) -> list[str]:
    """Return the names of diffusers' hooks on a module and its parts, such as "layerwise_casting"."""
    registries = [registry for m in part.modules() if (registry := getattr(m, "_diffusers_hook", None))]
    return sorted({name for registry in registries for name in registry.hooks})


def _check_dtypes(pipe: StableDiffusion, mixed_precision: str | None) -> None:
    dtypes = {"unet": pipe.unet.dtype, "vae": pipe.vae.dtype}
    dtypes |= {name: encoder.dtype for name, (encoder, _) in text_encoders_of(pipe).items()}
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise ValueError(f"The pipeline's {name} must be of a dtype among {known}, got {dtype}.")
    del dtypes["vae"]  # it encodes in float32, whatever its dtype
    # Autocast, which a UNet in half precision gets anyway, lets dtypes meet.
    is_cast = mixed_precision in ("fp16", "bf16") or (
        mixed_precision is None and pipe.unet.dtype.itemsize == 2
    )
    if len(set(dtypes.values())) > 1 and not is_cast:
        found = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
        raise ValueError(
            f"The pipeline's UNet and text encoders must have one dtype, got {found}. Call "
            f"`pipe.to({pipe.unet.dtype})`, or load the pipeline with a dtype."
        )
