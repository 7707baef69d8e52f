"""What a training run needs before its first step: checked options, accelerate, schedules, what a resumed run must share."""

import hashlib
import warnings
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from perfusion_pytorch.extras import required
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.training.checkpoints import checkpoints_in
from perfusion_pytorch.wiring import base_layer, cross_attention_projections

MIXED = {torch.float16: "fp16", torch.bfloat16: "bf16"}
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")  # kinds of distributed training that take models apart
LAYER_OPTIONS = (
    "train_beta",
    "train_temperature",
    "eval_beta",
    "eval_temperature",
    "input_decay",
    "frac_gradient_concept_embed",
)
# (the names of options, what they must be, in words)
RULES = (
    (
        (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_validation_images",
            "validation_steps",
        ),
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        ("checkpointing_steps", "checkpoints_total_limit", "resolution"),
        lambda value: value is None or value >= 1,
        "at least 1, or None",
    ),
    (
        ("learning_rate", "embedding_learning_rate"),
        lambda value: value >= 0 and isfinite(value),
        "at least 0 and finite",
    ),
    (("lr_warmup_steps",), lambda value: value >= 0, "at least 0"),
    (("max_grad_norm",), lambda value: value is None or value > 0, "above 0, or None"),
    (("adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (
        ("adam_epsilon", "adam_weight_decay"),
        lambda value: value >= 0 and isfinite(value),
        "at least 0 and finite",
    ),
    (("timestep_power",), lambda value: value > 0 and isfinite(value), "above 0 and finite"),
    (("lr_scheduler",), lambda value: value in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}"),
    (
        ("mixed_precision",),
        lambda value: value in (None, "no", "fp16", "bf16"),
        "'no', 'fp16', 'bf16' or None",
    ),
)
LOST_SETTINGS = ("token", "superclass")  # without which a checkpoint means nothing


def check_options(options: Mapping) -> None:
    """Raise a ValueError that names the first option out of its range."""
    for names, fits, needed in RULES:
        for name in names:
            if not fits(options[name]):
                raise ValueError(f"`{name}` must be {needed}, got {options[name]!r}.")
    if options["mask_model"] is not None and (options["masks"] is not None or not options["use_masks"]):
        raise ValueError(
            "`mask_model` makes masks, so it cannot be given along with `masks` or with `use_masks=False`."
        )
    Rank1EditModule(
        nn.utils.skip_init(nn.Linear, 1, 1), **{name: options[name] for name in LAYER_OPTIONS}
    )  # says what does not fit


def process_state():
    """Return accelerate's state of this process: its device, and how many there are.

    Where there is no accelerator, accelerate must be told so, or it takes the processes of `torchrun` for one each.
    """
    there = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    return required("accelerate").PartialState(**({} if there else {"cpu": True}))


def make_accelerator(pipe, mixed_precision: str | None, report_to: str | None, logging_dir: Path):
    """Return accelerate's Accelerator; a second one in a process may have another precision than the first.

    Raises:
        ValueError: the precision or the tracker is not to be had here, or accelerate is configured to take models apart.
        RuntimeError: torch.distributed runs, but not from a launcher that accelerate understands.
    """
    accelerate, state = required("accelerate"), process_state()
    mixed_precision = mixed_precision or MIXED.get(pipe.unet.dtype, "no")
    if mixed_precision == "fp16" and state.device.type == "cpu":
        raise ValueError(
            "`mixed_precision` must be 'no' or 'bf16' on a CPU, got 'fp16'. Load the pipeline in bfloat16 or float32."
        )
    if report_to is not None:
        available = [str(tracker) for tracker in required("accelerate.tracking").get_available_trackers()]
        if report_to not in available:
            raise ValueError(
                f"`report_to` must be an installed tracker, {available}, got {report_to!r}. Run pip install {report_to}."
            )
    known = accelerate.state.AcceleratorState
    if known._shared_state and known().mixed_precision != mixed_precision:
        known._reset_state()  # the processes' own state stays
    accelerator = accelerate.Accelerator(
        mixed_precision=mixed_precision, log_with=report_to, project_dir=str(logging_dir)
    )
    accelerator.gradient_state._set_sync_gradients(
        True
    )  # another Accelerator of this process may be amid an accumulation
    if accelerator.distributed_type.value in SHARDED:
        raise ValueError(
            f"accelerate must run plain data parallelism, since a concept is small, got {accelerator.distributed_type.value}. Choose "
            "'no' for it in `accelerate config`."
        )
    if (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() != accelerator.num_processes
    ):
        raise RuntimeError(
            f"torch.distributed runs {distributed.get_world_size()} processes, but accelerate sees {accelerator.num_processes}. Start "
            "them by `torchrun` or `accelerate launch`, on a machine without a GPU with ACCELERATE_USE_CPU=true."
        )
    return accelerator


def make_lr_scheduler(name: str, optimizer, num_warmup_steps: int, num_training_steps: int):
    """Return diffusers' learning rate schedule of a name."""
    get_scheduler = required("diffusers.optimization").get_scheduler
    return get_scheduler(
        name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps
    )


def own_resolution(pipe) -> int:
    """Return the edge of the pictures that a model was made for, in pixels."""
    size = pipe.unet.config.sample_size
    return (size if isinstance(size, int) else min(size)) * pipe.vae_scale_factor


def num_checkpoint_bytes(pipe) -> int:
    """Return about how large a checkpoint is: averages in each layer; of what is trained the numbers themselves and Adam's two moments."""
    total = 2**16
    for name, is_key in cross_attention_projections(pipe.unet):
        layer = base_layer(pipe.unet, name)[2]
        total += 4 * 3 * (layer.in_features + (0 if is_key else layer.out_features))
    return total


def fingerprint(*values) -> str:
    """Return a short hash of tensors and of what JSON can hold."""
    digest = hashlib.sha256()
    for value in values:
        is_tensor = isinstance(value, Tensor)
        digest.update(
            value.detach().cpu().contiguous().numpy().tobytes() if is_tensor else repr(value).encode()
        )
    return digest.hexdigest()[:16]


def check_resumed(checkpoint: Path, about: Mapping, output_dir: Path, options: Mapping) -> None:
    """See that a run may go on from a checkpoint.

    Raises:
        ValueError: the checkpoint is another concept's, or of more steps than are wanted, or the folder has later ones, which would be
            taken for this run's.
    """
    before = about.get("settings", {})
    for name in LOST_SETTINGS:
        if before.get(name) != options[name]:
            raise ValueError(
                f"{checkpoint} must be of the {name} {options[name]!r}, got one of {before.get(name)!r}."
            )
    if about["step"] > options["max_train_steps"]:
        raise ValueError(
            f"`max_train_steps` must be at least {about['step']}, the steps of {checkpoint}, got {options['max_train_steps']}."
        )
    later = [folder.name for folder in checkpoints_in(output_dir, after=about["step"])]
    if later:
        raise ValueError(
            f"`output_dir` must hold no checkpoints after {checkpoint.name}, from which the run goes on, but {output_dir} has {later}. "
            "Resume from 'latest', take another folder, or delete them."
        )


def warn_of_changes(checkpoint: Path, about: Mapping, settings: Mapping) -> None:
    """Warn where a run goes on with other settings than it began with, so that it does not end where it would have ended."""
    before = about.get("settings", {})
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        warnings.warn(
            f"The run goes on from {checkpoint} with other settings than it began with: {', '.join(changed)}.",
            stacklevel=3,
        )
