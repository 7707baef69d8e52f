"""`train_concept`: a concept from a handful of pictures, on accelerate."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from beartype import beartype
from torch import Tensor

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.embedding import tokenize_with_concept
from perfusion_pytorch.extras import required
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.optimizer import get_finetune_optimizer
from perfusion_pytorch.pipelines.parts import text_encoders_of
from perfusion_pytorch.pipelines.verbs import load_concept
from perfusion_pytorch.training.checkpoints import checkpoints_in, find_checkpoint, load_checkpoint
from perfusion_pytorch.training.interruption import check_output_dir
from perfusion_pytorch.training.loop import Run
from perfusion_pytorch.training.options import (
    LAYER_OPTIONS,
    check_options,
    check_resumed,
    fingerprint,
    make_accelerator,
    make_lr_scheduler,
    num_checkpoint_bytes,
    own_resolution,
    warn_of_changes,
)
from perfusion_pytorch.training.pictures import add_masks, load_pictures
from perfusion_pytorch.training.preparation import (
    cache_inputs,
    check_pipeline,
    on_device,
    prepared_for_training,
    token_added,
)
from perfusion_pytorch.training.step import Trainer
from perfusion_pytorch.training.templates import TEMPLATES, training_prompts
from perfusion_pytorch.wiring import base_layer, cross_attention_projections

CONCEPT_FILE = "concept.safetensors"
# What a checkpoint says of its run, and a resumed run is compared with.
SETTINGS = (
    "token", "superclass", "seed", "gradient_accumulation_steps", "learning_rate", "embedding_learning_rate",
    "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "timestep_power",
    *LAYER_OPTIONS,
)  # fmt: skip


@dataclass(frozen=True)
class TrainingSummary:
    """What a run did, and where everything is.

    Attributes:
        token: the concept's word in prompts.
        concept: the concept file.
        num_bytes: its size.
        num_trainable: how many numbers were trained.
        num_steps: how many steps the concept was trained, those before a resumption among them.
        loss: the last step's; None where there was no step left to do.
        seconds: how long the run took, from the call to the end.
        checkpoints, validation_pictures: what is beside the concept, the oldest first.
        logging_dir: where the trackers wrote, if there were any.
    """

    token: str
    concept: Path
    num_bytes: int
    num_trainable: int
    num_steps: int
    loss: float | None
    seconds: float
    checkpoints: tuple[Path, ...]
    validation_pictures: tuple[Path, ...]
    logging_dir: Path | None


@beartype
def train_concept(
    pipe,
    images: str | os.PathLike | Sequence,
    *,
    token: str,
    superclass: str,
    output_dir: str | os.PathLike,
    masks: str | os.PathLike | Sequence | None = None,
    use_masks: bool = True,
    mask_model: str | os.PathLike | None = None,
    captions: Sequence[str | None] | None = None,
    templates: Sequence[str] | None = None,
    covariance: InputCovariance | Tensor | Callable[[], InputCovariance] | None = None,
    resolution: int | None = None,
    center_crop: bool = True,
    max_train_steps: int = 400,
    train_batch_size: int = 16,
    gradient_accumulation_steps: int = 1,
    gradient_checkpointing: bool = False,
    mixed_precision: str | None = None,
    learning_rate: float | int = 0.03,
    embedding_learning_rate: float | int = 0.006,
    lr_scheduler: str = "constant",
    lr_warmup_steps: int = 0,
    adam_beta1: float | int = 0.9,
    adam_beta2: float | int = 0.999,
    adam_weight_decay: float | int = 0.0,
    adam_epsilon: float | int = 1e-8,
    max_grad_norm: float | int | None = None,
    train_beta: float | int = 0.75,
    train_temperature: float | int = 0.1,
    eval_beta: float | int = 0.70,
    eval_temperature: float | int = 0.15,
    input_decay: float | int = 0.99,
    frac_gradient_concept_embed: float | int = 0.1,
    timestep_power: float | int = 1.0,
    seed: int = 0,
    checkpointing_steps: int | None = 100,
    checkpoints_total_limit: int | None = None,
    resume_from_checkpoint: str | os.PathLike | None = None,
    validation_prompt: str | Sequence[str] | None = None,
    num_validation_images: int = 4,
    validation_steps: int = 100,
    report_to: str | None = None,
    logging_dir: str = "logs",
    progress: bool = True,
) -> TrainingSummary:
    """Train a concept from some pictures, write it as a concept file, and load it on the pipeline.

    It trains on accelerate's device, in as many processes as accelerate's or torch's launcher started, and draws no number from a global
    generator: the result is a function of the arguments, and of how many rows a step has over all processes. Afterwards the pipeline is
    what it was, where it was, with the concept loaded from its file as `load_concept` does; after an exception it is what it was.

    Args:
        pipe: a pipeline of Stable Diffusion 1.x, 2.x or XL, in any floating dtype; what is trained is float32.
        images, masks, use_masks, captions, center_crop: see `load_pictures`. A caption holds the token, or names the superclass, whose
            place it then takes.
        token: the concept's new word in prompts, lower case, such as "<teddy-1>".
        superclass: what it is one of, such as "teddy bear".
        output_dir: folder for `concept.safetensors`, checkpoints and validation pictures; several processes must see the same.
        mask_model: a CLIPSeg model's name or folder, which makes masks from the superclass's words.
        templates: prompts with {} for the concept, for pictures without captions; by default `TEMPLATES`.
        covariance: the input covariance C of the pipeline's text encodings, or a function that computes it, which is called once all else
            was found right; by default `cached_covariance(pipe)`.
        resolution: edge of the pictures in pixels, by default the model's own.
        max_train_steps: number of optimizer steps.
        train_batch_size: rows of a forward pass in each process.
        gradient_accumulation_steps: forward passes of a step; the moving averages move with each.
        gradient_checkpointing: recompute the UNet in backward to save memory.
        mixed_precision: "no", "fp16" or "bf16", by default as the pipeline's weights are. To save memory, load the pipeline in half
            precision: its weights are left as they are.
        learning_rate, embedding_learning_rate: of the value outputs o*, and of the token's embedding.
        lr_scheduler, lr_warmup_steps: see diffusers' `get_scheduler`.
        adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon: AdamW's.
        max_grad_norm: scale larger gradients down to this norm.
        train_beta, train_temperature, eval_beta, eval_temperature, input_decay, frac_gradient_concept_embed: see `Rank1EditModule`; the
            gate for inference is written into the file.
        timestep_power: see `draw_rows`: less than 1 draws noisier times more often, where a picture's layout and colours are decided.
        seed: of everything random.
        checkpointing_steps: steps from one checkpoint to the next; None for none.
        checkpoints_total_limit: how many to keep.
        resume_from_checkpoint: a checkpoint's folder or name, or "latest"; the run ends as if it had not been interrupted.
        validation_prompt: one or several, with the token; a grid of pictures is written every `validation_steps` steps and after the last.
        num_validation_images: pictures for each.
        validation_steps: see above.
        report_to: one of accelerate's trackers, such as "tensorboard".
        logging_dir: where it writes, in `output_dir`.
        progress: show a progress bar with the loss on stderr.

    Returns:
        Numbers and paths.

    Raises:
        ValueError: an argument does not fit, before anything has changed.
        OSError: the output folder cannot be written to.
        RuntimeError: the loss is not finite; the last checkpoint is there.
        KeyboardInterrupt: Ctrl-C was pressed; a checkpoint of the last whole step was written.

    Example:
        summary = train_concept(pipe, "pictures/", token="<teddy-1>", superclass="teddy bear", output_dir="teddy")
        pipe("a <teddy-1> on the beach")
    """
    options, started = dict(locals()), time.monotonic()
    check_options(options)
    check_pipeline(pipe, token, superclass)
    accelerator = make_accelerator(pipe, mixed_precision, report_to, Path(output_dir) / logging_dir)
    diffusers, resolution = required("diffusers"), resolution or own_resolution(pipe)
    if resolution % pipe.vae_scale_factor:
        raise ValueError(
            f"`resolution` must be a multiple of {pipe.vae_scale_factor} pixels, got {resolution}."
        )
    pictures = load_pictures(
        images,
        resolution=resolution,
        masks=masks,
        use_masks=use_masks and mask_model is None,
        captions=captions,
        center_crop=center_crop,
    )
    if mask_model is not None:
        pictures = add_masks(pictures, superclass, mask_model, device=accelerator.device)
    templates, captions = (
        TEMPLATES if templates is None else templates,
        [picture.captions for picture in pictures],
    )
    prompts, of_pictures = training_prompts(
        len(pictures), token, superclass, captions=captions, templates=templates
    )
    num_checkpoints = max_train_steps // checkpointing_steps if checkpointing_steps else 0
    if checkpoints_total_limit is not None:
        num_checkpoints = min(num_checkpoints, checkpoints_total_limit)
    output_dir = check_output_dir(output_dir, (num_checkpoints + 2) * num_checkpoint_bytes(pipe))
    checkpoint = find_checkpoint(output_dir, resume_from_checkpoint)
    tensors, about = ({}, {"step": 0}) if checkpoint is None else load_checkpoint(checkpoint)
    if checkpoint is not None:
        check_resumed(checkpoint, about, output_dir, options)
    shown = [validation_prompt] if isinstance(validation_prompt, str) else list(validation_prompt or ())
    with ExitStack() as stack:
        stack.enter_context(on_device(pipe, accelerator.device))
        embeddings = stack.enter_context(token_added(pipe, token, superclass))
        for _, tokenizer in text_encoders_of(pipe).values():
            tokenize_with_concept(
                tokenizer, [*prompts, *shown], token
            )  # says now what would be wrong after the covariance, or many steps
        covariance = _covariance(pipe, covariance, accelerator, progress)
        projections = [
            base_layer(pipe.unet, name)[2].weight.float()
            for name, _ in cross_attention_projections(pipe.unet)
        ]
        settings = {name: options[name] for name in SETTINGS} | {
            "mixed_precision": accelerator.mixed_precision,
            "rows of a step": train_batch_size * gradient_accumulation_steps * accelerator.num_processes,
            "pictures": fingerprint(*(t for p in pictures for t in (p.pixels, p.mask) if t is not None)),
            "prompts": fingerprint(prompts, of_pictures),
            "covariance": fingerprint(covariance.matrix, covariance.ridge),
            "model": fingerprint(*projections),
        }
        if not lr_scheduler.startswith("constant"):
            settings["max_train_steps"] = max_train_steps
        if checkpoint is not None:
            warn_of_changes(checkpoint, about, settings)
        options_of_layers = {name: options[name] for name in LAYER_OPTIONS}
        prepared = stack.enter_context(
            prepared_for_training(
                pipe,
                embeddings,
                covariance,
                gradient_checkpointing=gradient_checkpointing,
                layer_options=options_of_layers,
            )
        )
        optimizer = get_finetune_optimizer(
            pipe.unet,
            *(encoder for encoder, _ in text_encoders_of(pipe).values()),
            lr_output=float(learning_rate),
            lr_embedding=float(embedding_learning_rate),
            betas=(float(adam_beta1), float(adam_beta2)),
            weight_decay=float(adam_weight_decay),
        )
        for group in optimizer.param_groups:
            group["eps"] = float(adam_epsilon)
        with accelerator.autocast():
            cached = cache_inputs(pipe, prepared, pictures, prompts, token)
        trainer = Trainer(
            pipe=pipe,
            accelerator=accelerator,
            prepared=prepared,
            cached=cached,
            noises=diffusers.DDPMScheduler.from_config(pipe.scheduler.config),
            lr_scheduler=make_lr_scheduler(lr_scheduler, optimizer, lr_warmup_steps, max_train_steps),
            optimizer=accelerator.prepare_optimizer(optimizer),
            prompts_of_pictures=of_pictures,
            seed=seed,
            rows=train_batch_size,
            passes=gradient_accumulation_steps,
            max_grad_norm=max_grad_norm,
            timestep_power=timestep_power,
        )
        if checkpoint is not None:
            trainer.restore(tensors, about)
        run = Run(
            output_dir=output_dir,
            settings=settings,
            checkpointing_steps=checkpointing_steps,
            checkpoints_total_limit=checkpoints_total_limit,
            prompts=shown,
            num_images=num_validation_images,
            validation_steps=validation_steps,
            resolution=resolution,
            progress=progress,
        )
        with _trackers(accelerator, settings):
            run.steps(trainer, about["step"], max_train_steps)
        path = output_dir / CONCEPT_FILE
        if accelerator.is_main_process:
            rows = {name: embedding.concept_embedding[0] for name, embedding in prepared.embeddings.items()}
            Concept.of_model(pipe.unet, token=token, superclass=superclass, embeddings=rows).save(path)
        accelerator.wait_for_everyone()
    load_concept(pipe, path, token=token)
    return TrainingSummary(
        token=token,
        concept=path,
        num_bytes=path.stat().st_size,
        num_trainable=sum(p.numel() for p in trainer.parameters),
        num_steps=max_train_steps,
        loss=run.loss,
        seconds=time.monotonic() - started,
        checkpoints=tuple(checkpoints_in(output_dir)),
        validation_pictures=tuple(sorted(output_dir.glob("validation-*.png"))),
        logging_dir=None if report_to is None else output_dir / logging_dir,
    )


def _covariance(pipe, covariance, accelerator, progress):
    """Return the covariance to train with: what was given, or what its function makes, or what the cache has or gets."""
    if isinstance(covariance, InputCovariance):
        return covariance
    if isinstance(covariance, Tensor):
        return InputCovariance(covariance)
    with accelerator.main_process_first():  # the others find what it put into the cache
        if covariance is not None:
            return covariance()
        from perfusion_pytorch.pipelines.covariance_cache import cached_covariance

        return cached_covariance(pipe, progress=progress and accelerator.is_main_process)


@contextmanager
def _trackers(accelerator, settings):
    """Tell the trackers of the run's settings, and finish them after it."""
    if accelerator.log_with:
        accelerator.init_trackers(
            "perfusion", {name: v for name, v in settings.items() if isinstance(v, (int, float, str))}
        )
    try:
        yield
    finally:
        for (
            tracker
        ) in accelerator.trackers:  # `end_training` would also end the process group, which may not be ours
            tracker.finish()
