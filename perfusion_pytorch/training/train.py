"""`train_concept`: a concept from a handful of pictures, on accelerate."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.concept_file import RUN_FILE
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.pipelines.verbs import load_concept
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.push import check_can_push
from perfusion_pytorch.training.accelerator import make_accelerator, own_modes, trackers
from perfusion_pytorch.training.announcement import announce, announce_covariance
from perfusion_pytorch.training.assumptions import check_pipeline, noise_scheduler_of
from perfusion_pytorch.training.cautions import warn_of_covariance, warn_of_settings
from perfusion_pytorch.training.checkpoints import checkpoints_in
from perfusion_pytorch.training.inputs import (
    TrainingInputs,
    check_folders,
    check_prompts,
    input_covariance,
    load_inputs,
)
from perfusion_pytorch.training.interruption import termination_as_interrupt
from perfusion_pytorch.training.loop import Run
from perfusion_pytorch.training.material import make_material
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.outcome import pushed, write_concept
from perfusion_pytorch.training.phases import make_phases
from perfusion_pytorch.training.preparation import (
    Trainables,
    on_device,
    token_added,
    wrapped_for_training,
)
from perfusion_pytorch.training.resuming import Start, find_start, settings_of_run
from perfusion_pytorch.training.run_folder import run_folder
from perfusion_pytorch.training.state import num_checkpoint_bytes
from perfusion_pytorch.training.step import Trainer
from perfusion_pytorch.user_warnings import warn_user

if TYPE_CHECKING:
    from accelerate import Accelerator

SIMILARITY = (0.8, 1.2)  # beyond these, the gate takes the concept's own token for something else


@dataclass(frozen=True)
class TrainingSummary:
    """What a run did, and where everything is.

    Attributes:
        token: the concept's word in prompts.
        concept: the concept file.
        num_bytes: its size.
        num_trainable: how many numbers were trained.
        num_steps: how many steps the concept was trained, including those before it was resumed.
        loss: the last step's; None where no step was left to do.
        similarity: the smallest and the largest similarity r of the token to its concept over the training
            prompts; both should be near 1.
        seconds: how long the run took, from the call to the end.
        checkpoints, validation_pictures: the other files of the run's folder, the oldest first.
        logging_dir: where the trackers wrote, if there were any.
        pushed: the address of the concept's page on the hub, if it was pushed.
    """

    token: str
    concept: Path
    num_bytes: int
    num_trainable: int
    num_steps: int
    loss: float | None
    similarity: tuple[float, float]
    seconds: float
    checkpoints: tuple[Path, ...]
    validation_pictures: tuple[Path, ...]
    logging_dir: Path | None
    pushed: str | None = None


@beartype
def train_concept(
    pipe: StableDiffusion,
    images: str | os.PathLike | Iterable,
    *,
    token: str,
    superclass: str,
    output_dir: str | os.PathLike,
    masks: str | os.PathLike | Iterable | None = TrainingOptions.masks,
    use_masks: bool = TrainingOptions.use_masks,
    mask_model: str | os.PathLike | None = TrainingOptions.mask_model,
    captions: Sequence[str | None] | None = TrainingOptions.captions,
    templates: Sequence[str] | None = TrainingOptions.templates,
    covariance: InputCovariance | Tensor | Callable[[], InputCovariance] | None = TrainingOptions.covariance,
    resolution: int | None = TrainingOptions.resolution,
    center_crop: bool = TrainingOptions.center_crop,
    max_train_steps: int = TrainingOptions.max_train_steps,
    embedding_steps: int | None = TrainingOptions.embedding_steps,
    train_batch_size: int = TrainingOptions.train_batch_size,
    gradient_accumulation_steps: int = TrainingOptions.gradient_accumulation_steps,
    gradient_checkpointing: bool = TrainingOptions.gradient_checkpointing,
    mixed_precision: str | None = TrainingOptions.mixed_precision,
    learning_rate: float | int = TrainingOptions.learning_rate,
    embedding_learning_rate: float | int = TrainingOptions.embedding_learning_rate,
    relative_learning_rates: bool = TrainingOptions.relative_learning_rates,
    lr_scheduler: str = TrainingOptions.lr_scheduler,
    lr_warmup_steps: int = TrainingOptions.lr_warmup_steps,
    adam_beta1: float | int = TrainingOptions.adam_beta1,
    adam_beta2: float | int = TrainingOptions.adam_beta2,
    adam_weight_decay: float | int = TrainingOptions.adam_weight_decay,
    adam_epsilon: float | int = TrainingOptions.adam_epsilon,
    max_grad_norm: float | int | None = TrainingOptions.max_grad_norm,
    gates_removal: bool = TrainingOptions.gates_removal,
    train_beta: float | int = TrainingOptions.train_beta,
    train_temperature: float | int = TrainingOptions.train_temperature,
    eval_beta: float | int = TrainingOptions.eval_beta,
    eval_temperature: float | int = TrainingOptions.eval_temperature,
    input_decay: float | int = TrainingOptions.input_decay,
    frac_gradient_concept_embed: float | int = TrainingOptions.frac_gradient_concept_embed,
    timestep_power: float | int = TrainingOptions.timestep_power,
    seed: int = TrainingOptions.seed,
    checkpointing_steps: int | None = TrainingOptions.checkpointing_steps,
    checkpoints_total_limit: int | None = TrainingOptions.checkpoints_total_limit,
    resume_from_checkpoint: str | os.PathLike | None = TrainingOptions.resume_from_checkpoint,
    validation_prompt: str | Sequence[str] | None = TrainingOptions.validation_prompt,
    num_validation_images: int = TrainingOptions.num_validation_images,
    validation_steps: int = TrainingOptions.validation_steps,
    report_to: str | None = TrainingOptions.report_to,
    logging_dir: str = TrainingOptions.logging_dir,
    push_to_hub: str | None = TrainingOptions.push_to_hub,
    progress: bool = TrainingOptions.progress,
) -> TrainingSummary:
    """Train a concept from some pictures, write it as a concept file, and load it on the pipeline.

    It trains on accelerate's device, in as many processes as accelerate's or torch's launcher started. It
    draws no number from a global generator: the result is a function of the arguments, and of how many rows a
    step has over all processes. Afterwards the pipeline is what it was, where it was, with the concept loaded
    from its file as `load_concept` does; after an exception it is what it was.

    Args:
        pipe: a pipeline of Stable Diffusion 1.x, 2.x or XL, in any floating dtype; what is trained is
            float32.
        images, masks, use_masks, captions, center_crop: see `load_pictures`. A caption holds the token, or
            names the superclass, which the token then replaces.
        token: the concept's new word in prompts, lower case, such as "<teddy-1>".
        superclass: the kind of thing it is, such as "teddy bear".
        output_dir: folder for `concept.safetensors`, its README, checkpoints and validation pictures. With
            several processes, all must see the same folder.
        mask_model: name or folder of a CLIPSeg model, which makes masks from the superclass's words.
        templates: prompts with {} for the concept, for pictures without captions; by default those that the
            model's folder names (see `notes_of`), else `TEMPLATES`.
        covariance: the input covariance C of the pipeline's text encodings, or a function that computes it,
            which is called after all other checks passed; by default `cached_covariance(pipe)`,
            of the captions that the model's folder names (see `notes_of`), else of the built-in ones.
        resolution: edge of the pictures in pixels, by default the model's own.
        max_train_steps: number of optimizer steps.
        embedding_steps: how many of them train the token's embedding, alone and first, with the layers
            unedited. The others train the value outputs, with everything else settled. By default half; 0
            trains all at once with moving averages, as the paper does.
        train_batch_size: rows of a forward pass in each process.
        gradient_accumulation_steps: forward passes of a step; each updates the moving averages.
        gradient_checkpointing: recompute the UNet in backward to save memory.
        mixed_precision: "no", "fp16" or "bf16", by default that of the pipeline's weights. To save memory,
            load the pipeline in half precision: its weights are left as they are.
        learning_rate, embedding_learning_rate: of the value outputs o*, and of the token's embedding.
        relative_learning_rates: whether the rates are relative: to the root mean square of each layer's W s,
            and to the standard deviation of the text encoder's embeddings. An absolute rate means something
            else in every model.
        lr_scheduler, lr_warmup_steps: see diffusers' `get_scheduler`; each phase has its own.
        adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon: AdamW's.
        max_grad_norm: scale larger gradients down to this norm.
        gates_removal, train_beta, train_temperature, eval_beta, eval_temperature, input_decay,
            frac_gradient_concept_embed: see `Rank1EditModule`. The form and the gate for inference are
            written into the file. The last two matter only if `embedding_steps` is 0.
        timestep_power: see `draw_rows`. Less than 1 draws noisier times more often, where a picture's layout
            and colours are decided.
        seed: of everything random.
        checkpointing_steps: steps from one checkpoint to the next; None for none.
        checkpoints_total_limit: how many checkpoints to keep; None for all.
        resume_from_checkpoint: a checkpoint's folder or name, or "latest"; the run ends as if uninterrupted.
        validation_prompt: one or several, with the token; a grid of pictures is written every
            `validation_steps` steps and after the last.
        num_validation_images: pictures of each validation prompt.
        validation_steps: steps from one grid to the next.
        report_to: one of accelerate's trackers, such as "tensorboard"; "all" for all that are installed,
            "none" for none.
        logging_dir: folder in `output_dir` where the tracker writes.
        push_to_hub: "user/name" on the hub, where the concept is pushed at the end; see `push_concept`.
        progress: show a progress bar with the loss on stderr. Where stderr is neither a terminal nor a
            notebook, a line a minute goes to the log instead, at the level INFO of "perfusion_pytorch".

    Returns:
        Numbers and paths.

    Warns:
        UserWarning: settings that cannot work; a finished run is resumed, so that there is nothing to do; the
            concept is not the same in all prompts: r at its token leaves 0.8 to 1.2; it was not pushed.

    Raises:
        ValueError: an argument does not fit, or another run is in the output folder; nothing has changed yet.
        OSError: the output folder cannot be written to; there is no token for the hub, or no answer.
        RuntimeError: the loss is not finite; earlier checkpoints are good.
        KeyboardInterrupt: Ctrl-C was pressed, or SIGTERM came; a checkpoint of the last whole step was
            written. After SIGTERM its `exit_code` is 143.

    Example:
        summary = train_concept(pipe, "pictures/", token="<teddy-1>", superclass="teddy bear",
        output_dir="teddy") pipe("a <teddy-1> on the beach")
    """
    options = TrainingOptions(**{name: value for name, value in locals().items() if name != "pipe"})
    started = time.monotonic()
    check_pipeline(pipe, options)
    check_folders(options)
    if options.push_to_hub is not None:
        check_can_push(options.push_to_hub)
    accelerator = make_accelerator(pipe, options.mixed_precision, options.report_to, options.logging_folder)
    num_bytes = (options.num_checkpoints + 2) * num_checkpoint_bytes(pipe)
    with termination_as_interrupt(), run_folder(options.output_dir, num_bytes, accelerator) as folder:
        start = find_start(options, folder)
        if accelerator.is_main_process:
            warn_of_settings(pipe, options)
        inputs = load_inputs(pipe, options, accelerator.device)
        announce(pipe, options, accelerator, inputs, start)
        with own_modes(accelerator.device), on_device(pipe, accelerator.device):
            trainer, run, similarity = _train(pipe, options, accelerator, inputs, start, folder)
    if accelerator.is_main_process:
        _warn_of_similarity(options.token, *similarity)
    concept = folder / RUN_FILE
    load_concept(pipe, concept, token=options.token)
    return TrainingSummary(
        token=options.token,
        concept=concept,
        num_bytes=concept.stat().st_size,
        num_trainable=sum(p.numel() for phase in trainer.phases for p in phase.parameters),
        num_steps=options.max_train_steps,
        loss=run.loss,
        similarity=similarity,
        seconds=time.monotonic() - started,
        checkpoints=tuple(checkpoints_in(folder)),
        validation_pictures=tuple(sorted(folder.glob("validation-*.png"))),
        logging_dir=None if options.tracker is None else options.logging_folder,
        pushed=pushed(options, concept) if accelerator.is_main_process else None,
    )


def _train(
    pipe: StableDiffusion,
    options: TrainingOptions,
    accelerator: "Accelerator",
    inputs: TrainingInputs,
    start: Start | None,
    folder: Path,
) -> tuple[Trainer, Run, tuple[float, float]]:
    """Train the concept and write its file; afterwards the pipeline is what it was."""
    with token_added(pipe, options.token, options.superclass) as embeddings:
        check_prompts(pipe, [*inputs.prompts, *options.validation_prompts], options.token)
        covariance = _checked_covariance(pipe, options, accelerator)
        settings = settings_of_run(options, accelerator, inputs, covariance, pipe.unet)
        if start is not None:
            start.warn_of_changes(settings)
        with wrapped_for_training(
            pipe,
            embeddings,
            covariance,
            gradient_checkpointing=options.gradient_checkpointing,
            layer_options=options.layer_options,
        ) as trainables:
            trainer = _make_trainer(pipe, options, accelerator, inputs, trainables)
            if start is not None:
                trainer.restore(start.step, start.tensors, start.about)
            run = Run(options, folder, settings, inputs.resolution)
            with trackers(accelerator, settings):
                run.steps(trainer, 0 if start is None else start.step, options.max_train_steps)
            if accelerator.is_main_process:
                write_concept(pipe, options, inputs, settings, trainables, folder / RUN_FILE)
            accelerator.wait_for_everyone()
            return trainer, run, trainer.similarity()


def _checked_covariance(
    pipe: StableDiffusion, options: TrainingOptions, accelerator: "Accelerator"
) -> InputCovariance:
    """Return the covariance to train with, and tell of it."""
    started = time.monotonic()
    covariance = input_covariance(pipe, options, accelerator)
    if not isinstance(covariance, InputCovariance):
        raise ValueError(
            "`covariance` must be an InputCovariance, or a function that returns one, but it returned "
            f"{type(covariance).__name__}. Return `InputCovariance(C)` for a matrix C."
        )
    if accelerator.is_main_process:
        announce_covariance(covariance, time.monotonic() - started)
        warn_of_covariance(covariance)
    return covariance


def _make_trainer(
    pipe: StableDiffusion,
    options: TrainingOptions,
    accelerator: "Accelerator",
    inputs: TrainingInputs,
    trainables: Trainables,
) -> Trainer:
    """Return the trainer of a prepared pipeline, before its first step."""
    with accelerator.autocast():
        material = make_material(pipe, trainables.embeddings, inputs.pictures, inputs.prompts, options.token)
    return Trainer(
        pipe=pipe,
        accelerator=accelerator,
        trainables=trainables,
        material=material,
        noise_scheduler=noise_scheduler_of(pipe),
        phases=make_phases(options, trainables, material, accelerator),
        train_gate=(float(options.train_beta), float(options.train_temperature)),
        prompts_of_pictures=inputs.prompts_of_pictures,
        seed=options.seed,
        rows=options.train_batch_size,
        passes=options.gradient_accumulation_steps,
        max_grad_norm=options.max_grad_norm,
        timestep_power=options.timestep_power,
    )


def _warn_of_similarity(token: str, low: float, high: float) -> None:
    if SIMILARITY[0] <= low and high <= SIMILARITY[1]:
        return
    warn_user(
        f"The similarity r of {token} to its concept should be near 1 in every prompt, but goes from "
        f"{low:.2f} to {high:.2f} over the training prompts, so the edit is too weak or too strong in some. "
        "Train with more steps, or with prompts that are more alike."
    )
