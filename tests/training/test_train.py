"""Training a concept on a pipeline: the result is the method's, and the pipeline is left as it should be."""

import os
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from helpers.small_model import assert_unchanged, state_of
from helpers.tiny_pipes import (
    IMAGES,
    KINDS,
    RESOLUTION,
    assert_close,
    assert_same_runs,
    learned,
    options_for,
    tiny_pipe,
)
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from perfusion_pytorch import (
    Concept,
    add_concept_token_,
    concept_inputs,
    get_active_concepts,
    get_finetune_optimizer,
    load_concept,
    loss_fn_weighted_by_mask,
    train_concept,
    unload_concepts,
    wrap_cross_attentions_,
)
from perfusion_pytorch.pipelines.encoding import encode_token_ids, token_ids
from perfusion_pytorch.pipelines.parts import text_encoders_of
from perfusion_pytorch.training.draws import draw_rows
from perfusion_pytorch.training.material import encode_pictures
from perfusion_pytorch.training.pictures import load_pictures
from perfusion_pytorch.training.step import Trainer


def plain_loop(kind, options, steps):
    """The same training as a plain loop: no caches, one backward, nothing shared between rows."""
    pipe = tiny_pipe(kind)
    encoders = text_encoders_of(pipe)
    embeddings = {key: add_concept_token_(*pair, "<car-1>", "red car") for key, pair in encoders.items()}
    for module in [m for encoder, _ in encoders.values() for m in encoder.modules()]:
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = pipe.tokenizer.eos_token_id
    pipe.unet.requires_grad_(False)
    layers = wrap_cross_attentions_(pipe.unet.train(), C=options["covariance"])
    optimizer = get_finetune_optimizer(pipe.unet, *(encoder for encoder, _ in encoders.values()))
    pictures = load_pictures(IMAGES, resolution=RESOLUTION, masks=options["masks"])
    latents = encode_pictures(pipe.vae, pictures)
    masks = torch.nn.functional.interpolate(
        torch.stack([p.mask for p in pictures])[:, None], latents.shape[-2:], mode="area"
    )
    prompts = [template.format("<car-1>") for template in options["templates"]]
    size = [RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]
    for step in range(steps):
        draw = draw_rows(
            0, step, range(4), 4, prompts_of_pictures=[[0, 1]] * 3, latent_shape=latents.shape[1:]
        )
        texts = [prompts[i] for i in draw.prompts]
        ids = token_ids(pipe, texts)
        with_superclass = {key: embeddings[key].with_superclass(rows) for key, rows in ids.items()}
        first = with_superclass["text_encoder"]
        with torch.no_grad():
            superclass, _ = encode_token_ids(
                pipe, {key: prompts.ids for key, prompts in with_superclass.items()}
            )
        text_enc, pooled = encode_token_ids(pipe, ids)
        alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)[draw.timesteps].view(-1, 1, 1, 1)
        clean, noise = latents[draw.pictures], draw.noise
        noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
        target = noise if KINDS[kind] == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * clean
        conditions = (
            None
            if pooled is None
            else {"text_embeds": pooled, "time_ids": torch.tensor([size] * 4, dtype=torch.float32)}
        )
        call = {"concept_indices": first.concept_indices, "superclass_indices": first.superclass_indices}
        with concept_inputs(pipe.unet, text_enc_with_superclass=superclass, **call):
            prediction = pipe.unet(noisy, draw.timesteps, text_enc, added_cond_kwargs=conditions).sample
            loss_fn_weighted_by_mask(prediction, target, masks[draw.pictures]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {
        f"{name}.concept_embedding": embedding.concept_embedding for name, embedding in embeddings.items()
    }
    for name, layer in layers.items():
        state |= {
            f"{name}.{key}": getattr(layer, key)
            for key in ("concept_input", "superclass_input", "initialized", "concept_dual")
        }
        if not layer.is_key_proj:
            state[f"{name}.concept_output"] = layer.concept_output
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_the_concept_is_that_of_a_plain_loop(kind, tmp_path):
    options = options_for(tmp_path, kind, superclass="red car")
    train_concept(tiny_pipe(kind), IMAGES, **options)
    assert_close(learned(tmp_path, 4), plain_loop(kind, options, steps=4), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_has_the_concept_and_is_otherwise_what_it_was(kind, tmp_path):
    pipe = tiny_pipe(kind)
    state = state_of(pipe)
    random = torch.get_rng_state()
    summary = train_concept(pipe, IMAGES, **options_for(tmp_path, kind))
    assert torch.equal(torch.get_rng_state(), random)
    assert get_active_concepts(pipe) == ["<car-1>"]
    unload_concepts(pipe)
    assert_unchanged(pipe, state)

    concept = Concept.load(summary.concept)
    assert (summary.concept, summary.num_bytes) == (
        tmp_path / "concept.safetensors",
        summary.concept.stat().st_size,
    )
    assert (concept.token, concept.superclass) == (summary.token, "car") and set(concept.embeddings) == set(
        text_encoders_of(pipe)
    )
    assert (concept.train_gate, concept.eval_gate) == ((0.75, 0.1), (0.7, 0.15))
    assert summary.num_trainable == sum(
        t.numel() for t in (*concept.embeddings.values(), *concept.outputs.values())
    )
    assert (
        summary.num_steps == 4
        and 0 < summary.loss < 10
        and 0 < summary.seconds < 100
        and summary.logging_dir is None
    )
    assert [path.name for path in summary.checkpoints] == [
        "checkpoint-2",
        "checkpoint-4",
    ] and summary.validation_pictures == ()
    files = ["README.md", "checkpoint-2", "checkpoint-4", "concept.safetensors"]
    assert sorted(os.listdir(tmp_path)) == files

    def picture(prompt):
        return pipe(
            prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images

    plain = picture("a car")
    load_concept(pipe, summary.concept)
    assert not torch.allclose(picture("a <car-1>"), plain, atol=1e-3)


def test_the_loss_falls(tmp_path):
    """On one picture at one time and noise, which the options cannot do but the draws can."""
    losses = []

    def remember(self, number, interruption, _step=Trainer.step):
        loss, stopping = _step(self, 0, interruption)
        losses.append(loss)
        return loss, stopping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", remember)
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, max_train_steps=40))
    assert losses[-1] < 0.98 * losses[0] and sum(a > b for a, b in pairwise(losses)) > 30


@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_the_noise_of_training_does_not_depend_on_the_sampler(scheduler, tmp_path):
    train_concept(tiny_pipe("SD 2"), IMAGES, **options_for(tmp_path / "a"))
    pipe = tiny_pipe("SD 2")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    train_concept(pipe, IMAGES, **options_for(tmp_path / "b"))
    assert type(pipe.scheduler) is scheduler
    assert_same_runs(tmp_path / "a", tmp_path / "b", 4)


def test_recomputation_changes_nothing(tmp_path):
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a"))
    pipe, recomputed = tiny_pipe(), []
    enable = pipe.unet.enable_gradient_checkpointing
    pipe.unet.enable_gradient_checkpointing = lambda: enable(
        lambda block, *inputs: recomputed.append(block) or checkpoint(block, *inputs, use_reentrant=False)
    )
    train_concept(pipe, IMAGES, **options_for(tmp_path / "b", gradient_checkpointing=True))
    assert len(recomputed) >= 4  # one block or more in each step
    assert_close(learned(tmp_path / "a", 4), learned(tmp_path / "b", 4), rtol=1e-3)


def test_accumulated_passes_are_a_step_of_all_their_rows(tmp_path):
    """With one prompt and in the first step, since the averages move with each pass."""
    options = {"templates": ["a {}"], "max_train_steps": 1, "checkpointing_steps": 1}
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a", **options))
    train_concept(
        tiny_pipe(),
        IMAGES,
        **options_for(tmp_path / "b", **options, train_batch_size=2, gradient_accumulation_steps=2),
    )
    one, other = (load_file(tmp_path / run / "checkpoint-1" / "state.safetensors") for run in "ab")
    assert_close(one, other, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_half_precision(way, tmp_path):
    """What is trained and averaged is float32, and close to a float32 run; the weights keep their dtype."""
    # As large as the gradients: else Adam makes a full step of a gradient that is rounding alone.
    options = {"adam_epsilon": 1e-2}
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "a", **options))
    pipe = tiny_pipe()
    if way == "weights":
        pipe.to(torch.bfloat16)
    dtype = pipe.unet.dtype
    state = state_of(pipe)
    options["mixed_precision"] = "bf16" if way == "autocast" else None
    train_concept(pipe, IMAGES, **options_for(tmp_path / "b", **options))
    tensors = load_file(tmp_path / "b" / "checkpoint-4" / "state.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.bool}
    assert pipe.unet.dtype == pipe.vae.dtype == dtype
    (start, end), (other_start, other_end) = (
        [learned(tmp_path / run, step) for step in (2, 4)] for run in ("a", "b")
    )
    assert_close(other_end, end, rtol=0.02)
    for name in (name for name in end if name.endswith(("concept_output", "concept_embedding"))):
        moved = end[name] - start[name]
        error = (other_end[name] - other_start[name] - moved).norm() / moved.norm()
        assert 1e-4 < error < 0.15, name  # bfloat16 was in use, and did no harm
    unload_concepts(pipe)
    assert_unchanged(pipe, state)


def test_the_gates_are_written_into_the_file(tmp_path):
    gate = {"eval_beta": 0.6, "eval_temperature": 0.3, "train_beta": 0.8, "train_temperature": 0.2}
    summary = train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, max_train_steps=1, **gate))
    concept = Concept.load(summary.concept)
    assert concept.eval_gate == pytest.approx((0.6, 0.3)) and concept.train_gate == pytest.approx((0.8, 0.2))


@pytest.mark.slow
def test_a_pipeline_with_a_lora_is_trained_around_it(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny_pipe()
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False, lora_dropout=0.5)
    )
    pipe.unet.train()
    state = state_of(pipe)
    train_concept(pipe, IMAGES, **options_for(tmp_path / "a"))
    unload_concepts(pipe)
    assert_unchanged(pipe, state)
    train_concept(pipe, IMAGES, **options_for(tmp_path / "b"))
    assert_same_runs(tmp_path / "a", tmp_path / "b", 4)  # no dropout
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path / "c"))
    one, other = learned(tmp_path / "a", 4), learned(tmp_path / "c", 4)
    assert any(not torch.allclose(one[name], other[name], rtol=1e-2) for name in one if name in other)
