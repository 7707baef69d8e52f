"""What the trainer assumes of a pipeline: right numbers, or a refusal by name."""

import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from helpers.small_model import assert_unchanged, state_of
from helpers.tiny_pipes import (
    IMAGES,
    RESOLUTION,
    assert_close,
    assert_same_runs,
    learned,
    options_for,
    tiny_pipe,
    with_trainer,
)
from transformers import CLIPTextModel

from perfusion_pytorch import train_concept
from perfusion_pytorch.training import train
from perfusion_pytorch.training.assumptions import (
    DECODE_WITH_MEANS,
    noise_scheduler_of,
    scaled_latents,
)
from perfusion_pytorch.training.draws import Draw
from perfusion_pytorch.training.pictures import load_pictures


def refused(pipe, folder, match, **options):
    """The pipeline is refused by name; nothing of it or of the folder has changed."""
    before = state_of(pipe)
    with pytest.raises(ValueError, match=match):
        train_concept(pipe, IMAGES, **options_for(folder / "run", **options))
    assert_unchanged(pipe, before)
    assert not (folder / "run").exists()


# ----------------------------------------------------------------------------------------------------- noise

SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "trained": {"trained_betas": [0.001 + 1e-5 * i for i in range(1000)]},
}


def alphas_of(name):
    """ᾱ of a schedule, in float64 and from its definition."""
    options, t = SCHEDULES[name], torch.arange(1000, dtype=torch.float64)
    start, end = options.get("beta_start", 1e-4), options.get("beta_end", 0.02)
    if name == "trained":
        return torch.cumprod(1 - torch.tensor(options["trained_betas"], dtype=torch.float64), 0)
    if name == "cosine":
        level = [torch.cos(((t + i) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2 for i in (0, 1)]
        return torch.cumprod(1 - (1 - level[1] / level[0]).clamp(max=0.999), 0)
    if name == "linear":
        return torch.cumprod(1 - torch.linspace(start, end, 1000, dtype=torch.float64), 0)
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    if name == "zero terminal SNR":
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noisy_latents_and_target_are_those_of_the_formula(schedule, prediction, tmp_path, monkeypatch):
    pipe = tiny_pipe()
    pipe.scheduler = DDPMScheduler(prediction_type=prediction, **SCHEDULES[schedule])
    monkeypatch.setattr("helpers.tiny_pipes.tiny_pipe", lambda kind: pipe)
    shown = {}

    def use(trainer):
        clean = trainer.material.latents
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
        t = torch.tensor([0, 500, 999])
        rows = torch.arange(3)
        forward = pipe.unet.forward

        def seen(noisy, times, *args, **options):
            shown.update(noisy=noisy, times=times)
            return forward(noisy, times, *args, **options)

        pipe.unet.forward = seen
        outputs = [output[torch.zeros(3, dtype=torch.long)] for output in trainer._encode()]
        trainer._loss(Draw(pictures=rows, prompts=rows * 0, timesteps=t, noise=noise), outputs)
        return clean, noise, t, trainer.target(clean, noise, t)

    clean, noise, t, target = with_trainer(tmp_path, use)
    share = alphas_of(schedule)[t].view(-1, 1, 1, 1)
    clean, noise = clean.double(), noise.double()
    noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
    velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction]
    assert torch.equal(shown["times"], t)
    # The cosine schedule ends in products of a thousand numbers near 0.
    assert torch.allclose(shown["noisy"].double(), noisy, atol=2e-4)
    assert torch.allclose(target.double(), expected, atol=2e-4)


# Each scheduler of diffusers is one of these: sampled by, or refused by name.
SAMPLERS_OF_DDPM = {
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler",
    "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "RePaintScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler", "DPMSolverSDEScheduler",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"])
def test_the_defaults_of_a_sampler_are_kept(name):
    """They differ from class to class, and `from_config` replaces them."""
    pipe = tiny_pipe()
    pipe.scheduler = getattr(diffusers, name)()
    assert torch.equal(noise_scheduler_of(pipe).alphas_cumprod, pipe.scheduler.alphas_cumprod)


def schedulers():
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Scheduler") and name[0].isupper() else None
        if inspect.isclass(kind) and hasattr(kind, "from_config"):
            yield name, kind


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_scheduler_of_diffusers_is_a_sampler_of_the_same_noise_or_refused():
    pipe, accepted = tiny_pipe(), set()
    options = SCHEDULES["scaled_linear"] | {"prediction_type": "v_prediction"}
    plain = DDPMScheduler(**options).alphas_cumprod
    for name, kind in schedulers():
        try:
            pipe.scheduler = kind.from_config(DDPMScheduler(**options).config)
        except Exception:  # cannot be made from Stable Diffusion's configuration, or needs another package
            continue
        try:
            noise = noise_scheduler_of(pipe)
        except ValueError as error:
            assert f"got {name}" in str(error)
            continue
        accepted.add(name)
        assert torch.equal(noise.alphas_cumprod, plain) and noise.config.prediction_type == "v_prediction"
    needs_packages = {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}
    assert accepted - needs_packages == SAMPLERS_OF_DDPM - needs_packages


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("CMStochasticIterativeScheduler", {}),
        ("CogVideoXDDIMScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}),
        ("DDPMScheduler", {"trained_betas": [0.01] * 10}),
    ],
)
def test_other_noise_is_refused_by_name(name, options, tmp_path):
    pipe = tiny_pipe()
    pipe.scheduler = getattr(diffusers, name)(**options)
    refused(pipe, tmp_path, f"must be for noise as in DDPM, .* got {name}. Set the scheduler that the model")


# --------------------------------------------------------------------------------------------------- latents

MEANS = {"latents_mean": [0.5, -1.0, 2.0, 0.25], "latents_std": [2.0, 0.5, 3.0, 1.5]}


def decoded(pipe, latents):
    """What a pipeline gives to its VAE's decoder, where its last denoised latents are these."""
    seen = []

    def decode(z, *args, **options):
        seen.append(z)
        return (torch.zeros(len(z), 3, RESOLUTION, RESOLUTION),)

    pipe.vae.decode = decode
    pipe.scheduler.step = lambda *args, **options: (latents,)
    pipe("a", num_inference_steps=1, output_type="pt", height=RESOLUTION, width=RESOLUTION)
    return seen[0]


@pytest.mark.parametrize(("kind", "means"), [("SD 1", {}), ("SDXL", {}), ("SDXL", MEANS)])
def test_latents_are_what_the_pipeline_decodes(kind, means, tmp_path, monkeypatch):
    pipe = tiny_pipe(kind)
    pipe.vae.register_to_config(scaling_factor=0.3, **means)
    pictures = load_pictures(IMAGES, resolution=RESOLUTION)
    with torch.no_grad():
        encoded = torch.cat([pipe.vae.encode(p.pixels[None]).latent_dist.mean for p in pictures])
    monkeypatch.setattr("helpers.tiny_pipes.tiny_pipe", lambda kind: pipe)
    latents = with_trainer(tmp_path, lambda trainer: trainer.material.latents, kind=kind)
    assert not torch.allclose(latents, encoded, atol=0.1)
    assert torch.allclose(decoded(pipe, latents[:1]), encoded[:1], atol=1e-5)


def test_pipelines_that_decode_with_means_are_those_of_diffusers_source():
    """Among the pipelines that make pictures with a UNet of two text encoders."""
    folder = Path(diffusers.__file__).parent / "pipelines"
    seen = set()
    for name in (name for name in dir(diffusers) if re.fullmatch(r"StableDiffusion\w*Pipeline", name)):
        kind = getattr(diffusers, name)
        if folder in Path(inspect.getfile(kind)).parents:  # and not one that needs another package
            source = inspect.getsource(inspect.unwrap(kind.__call__))
            assert ("self.vae.config.latents_mean" in source) == (name in DECODE_WITH_MEANS), name
            seen.add(name)
    assert seen >= set(DECODE_WITH_MEANS) and len(seen) > 30


@pytest.mark.parametrize(
    ("kind", "config", "match"),
    [
        ("SD 1", MEANS, "StableDiffusionPipeline ignores its latents_mean or latents_std"),
        ("SDXL", {"latents_mean": [0.0] * 4}, "StableDiffusionXLPipeline ignores its latents_mean"),
        ("SDXL", {"latents_mean": [0.0], "latents_std": [1.0]}, "ignores its latents_mean"),
        ("SD 1", {"shift_factor": 0.1}, "StableDiffusionPipeline ignores its shift_factor"),
        ("SDXL", {"shift_factor": 0.1}, "StableDiffusionXLPipeline ignores its shift_factor"),
    ],
)
def test_a_vae_that_the_pipeline_decodes_wrongly_is_refused(kind, config, match, tmp_path):
    pipe = tiny_pipe(kind)
    pipe.vae.register_to_config(**config)
    refused(pipe, tmp_path, match, kind=kind)


def test_vaes_without_distributions_are_refused(tmp_path):
    pipe = tiny_pipe()
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    refused(pipe, tmp_path, "must have a VAE that is one of AutoencoderKL, .* got AutoencoderTiny")


def test_a_vae_without_means_scales_alone():
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, scaling_factor=0.2)
    assert torch.equal(scaled_latents(torch.ones(1, 4, 1, 1), vae.config), torch.full((1, 4, 1, 1), 0.2))


# ------------------------------------------------------------------------------------ the UNet and its inputs


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"in_channels": 9}, "of 4 channels, got `in_channels` of 9. Choose the base model"),
        ({"out_channels": 8}, "of 4 channels, got `out_channels` of 8"),
        ({"time_cond_proj_dim": 256}, "distilled into few steps"),
        ({"class_embed_type": "timestep"}, "its configuration has class_embed_type='timestep'"),
        ({"num_class_embeds": 1000}, "its configuration has num_class_embeds=1000"),
        ({"addition_embed_type": "image"}, "its configuration has addition_embed_type='image'"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "must have no IP-Adapter .* `unload_ip_adapter`"),
        ({"encoder_hid_dim_type": "text_proj"}, "must be of Stable Diffusion 1.x, 2.x or XL"),
    ],
)
def test_unets_that_take_something_else_are_refused(config, match, tmp_path):
    pipe = tiny_pipe()
    pipe.unet.register_to_config(**config)
    refused(pipe, tmp_path, match)


def test_sdxls_refiner_and_halves_are_refused(tmp_path):
    pipe = tiny_pipe("SDXL")
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=20 + 5 * 4)
    refused(
        pipe, tmp_path, "20 features and 6 sizes, 44 in all, got 40. .* instead of the refiner", kind="SDXL"
    )
    pipe.unet.register_to_config(addition_embed_type=None)
    refused(pipe, tmp_path, "must have two text encoders and a UNet that takes", kind="SDXL")


def test_an_ip_adapter_is_refused_and_can_be_taken_off(tmp_path):
    """As diffusers loads one, and unloads it."""
    pipe = tiny_pipe()
    width = 12
    projection = {"proj.weight": torch.zeros(4 * width, 8), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    layers, number = {}, 1
    for name, processor in pipe.unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            size = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for key in ("to_k_ip.weight", "to_v_ip.weight"):
                layers[f"{number}.{key}"] = torch.zeros(size, width)
            number += 2
        assert processor is not None
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    with pytest.raises(ValueError, match="must have no IP-Adapter while a concept is trained"):
        train_concept(pipe, IMAGES, **options_for(tmp_path / "a"))
    pipe.unload_ip_adapter()
    train_concept(pipe, IMAGES, **options_for(tmp_path / "b"))
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "c"))
    assert_same_runs(tmp_path / "b", tmp_path / "c", 4)


def test_validation_pictures_need_a_pipeline_of_texts_alone(tmp_path):
    pipe = tiny_pipe()
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    match = "from texts alone, got StableDiffusionImg2ImgPipeline. Leave it out"
    refused(other, tmp_path, match, validation_prompt="a <car-1>")
    train_concept(other, IMAGES, **options_for(tmp_path / "run"))  # without them it is trained


# --------------------------------------------------------------------------------------------- parts, weights


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
def test_missing_parts_are_named(part, tmp_path):
    pipe = tiny_pipe()
    setattr(pipe, part, None)
    with pytest.raises(ValueError, match=f"must have all parts of its model, but its {part} is None"):
        train_concept(pipe, IMAGES, **options_for(tmp_path))


def test_what_is_not_a_pipeline_is_named(tmp_path):
    with pytest.raises(ValueError, match="must be a diffusers pipeline with a `unet`"):
        train_concept(object(), IMAGES, **options_for(tmp_path))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_compiled_parts_are_refused_with_the_way_back(part, tmp_path):
    pipe = tiny_pipe()
    plain = getattr(pipe, part)
    setattr(pipe, part, torch.compile(plain, backend="eager"))
    with pytest.raises(ValueError, match=f"its {part} is. Set `pipe.{part} = pipe.{part}._orig_mod`"):
        train_concept(pipe, IMAGES, **options_for(tmp_path / "run"))
    setattr(pipe, part, getattr(pipe, part)._orig_mod)
    assert getattr(pipe, part) is plain


def test_offloading_of_any_kind_is_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny_pipe()
    accelerate.cpu_offload(pipe.text_encoder, torch.device("cpu"))
    with pytest.raises(
        ValueError, match="must not be offloaded while it is trained, but its text_encoder is"
    ):
        train_concept(pipe, IMAGES, **options_for(tmp_path / "run"))
    pipe = tiny_pipe()
    pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match=r"no hooks of diffusers .* its unet has layerwise_casting"):
        train_concept(pipe, IMAGES, **options_for(tmp_path / "run"))
    pipe = tiny_pipe()
    offload = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    pipe.vae.enable_group_offload(**offload)
    with pytest.raises(ValueError, match="its vae has group_offloading"):
        train_concept(pipe, IMAGES, **options_for(tmp_path / "run"))


def test_dtypes_that_do_not_meet_are_refused(tmp_path):
    pipe = tiny_pipe()
    pipe.text_encoder.to(torch.bfloat16)
    match = "must have one dtype, got unet in torch.float32, text_encoder in torch.bfloat16"
    refused(pipe, tmp_path, match)
    refused(pipe, tmp_path, match, mixed_precision="no")
    train_concept(pipe, IMAGES, **options_for(tmp_path / "cast", mixed_precision="bf16"))
    pipe = tiny_pipe()
    pipe.unet.to(torch.float8_e4m3fn)
    with pytest.raises(
        ValueError, match=r"unet must be of a dtype among float32, .* got torch.float8_e4m3fn"
    ):
        train_concept(pipe, IMAGES, **options_for(tmp_path / "run"))


def test_a_pipeline_in_float64_is_trained(tmp_path):
    pipe = tiny_pipe().to(torch.float64)
    assert train_concept(pipe, IMAGES, **options_for(tmp_path)).loss < 10
    assert pipe.unet.dtype == torch.float64


def test_an_adapter_on_the_token_embedding_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny_pipe()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["token_embedding"]), pipe.text_encoder)
    with pytest.raises(ValueError, match=r"CLIPTextModel must have a plain nn.Embedding, but an adapter"):
        train_concept(pipe, IMAGES, **options_for(tmp_path / "run"))


def test_freeu_and_data_parallelism_are_refused_by_name(tmp_path):
    pipe = tiny_pipe()
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(ValueError, match=r"but FreeU is on. Call `disable_freeu` first"):
        train_concept(pipe, IMAGES, **options_for(tmp_path / "run"))
    pipe.disable_freeu()
    pipe.unet = torch.nn.DataParallel(pipe.unet)
    with pytest.raises(ValueError, match=r"must have a UNet2DConditionModel .*, got DataParallel"):
        train_concept(pipe, IMAGES, **options_for(tmp_path / "run"))


def test_attentions_that_bypass_the_edit_are_refused(tmp_path):
    pipe = tiny_pipe()
    processors = {}
    for name, processor in pipe.unet.attn_processors.items():
        size = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        own = CustomDiffusionAttnProcessor(True, True, size, 12) if "attn2" in name else processor
        processors[name] = own
    pipe.unet.set_attn_processor(processors)
    refused(pipe, tmp_path, "attn2' has .*to_k_custom_diffusion")


@pytest.mark.slow
def test_modules_compiled_in_place_and_tiled_vaes_train_the_same_concept(tmp_path):
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "plain"))
    pipe = tiny_pipe()
    pipe.unet.compile(backend="eager")
    pipe.text_encoder.compile(backend="eager")
    pipe.vae.enable_tiling(), pipe.vae.enable_slicing()
    train_concept(pipe, IMAGES, **options_for(tmp_path / "compiled"))
    assert_close(learned(tmp_path / "compiled", 4), learned(tmp_path / "plain", 4), rtol=1e-3)


def test_a_shorter_text_encoder_is_clip_skip_in_training_and_afterwards(tmp_path):
    """As the docs say: `num_hidden_layers` one less encodes as `clip_skip=1` does, everywhere alike."""
    pipe = tiny_pipe()
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")
    shorter = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", num_hidden_layers=1)
    ids = pipe.tokenizer(["a red car"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        skipped = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        skipped = pipe.text_encoder.final_layer_norm(skipped)
        assert torch.equal(shorter(ids).last_hidden_state, skipped)
    pipe.text_encoder = shorter
    assert torch.equal(pipe.encode_prompt("a red car", "cpu", 1, False)[0], skipped)
    material = []

    def remember(pipe, *args, _make=train.make_material):
        material.append(_make(pipe, *args))
        return material[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_material", remember)
        train_concept(pipe, IMAGES, **options_for(tmp_path / "run", superclass="red car", templates=["a {}"]))
    assert torch.equal(material[0].superclass_encodings, skipped)
