"""Going on from a checkpoint: where a run starts, and what it must share with the run before."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from perfusion_pytorch.files import sha256_of
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.pipelines.parts import projections_of
from perfusion_pytorch.training.checkpoints import checkpoints_in, find_checkpoint, load_checkpoint
from perfusion_pytorch.training.inputs import TrainingInputs
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.user_warnings import warn_user

if TYPE_CHECKING:
    from accelerate import Accelerator

ESSENTIAL = ("token", "superclass")  # settings without which a checkpoint means nothing


@dataclass(frozen=True, eq=False)
class Start:
    """The checkpoint that a run goes on from.

    Attributes:
        checkpoint: its folder.
        tensors, about: its content, see `load_checkpoint`.
    """

    checkpoint: Path
    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of steps that are done."""
        return self.about["step"]

    def warn_of_changes(self, settings: Mapping[str, Any]) -> None:
        """Warn where the run's settings differ from those it began with, so that it ends differently."""
        before = self.about.get("settings", {})
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            warn_user(
                f"The run goes on from {self.checkpoint} with other settings than it began with: "
                f"{', '.join(changed)}."
            )


def find_start(options: TrainingOptions, output_dir: Path) -> Start | None:
    """Read the checkpoint to resume from, and check that the run may go on from it; None for a new run.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the checkpoint is damaged, of another concept, or of more steps than are wanted; or the
            folder holds later ones, which would be mistaken for this run's.

    Warns:
        UserWarning: no step is left to do.
    """
    checkpoint = find_checkpoint(output_dir, options.resume_from_checkpoint)
    if checkpoint is None:
        return None
    tensors, about = load_checkpoint(checkpoint)
    start = Start(checkpoint, tensors, about)
    before = about.get("settings", {})
    for name in ESSENTIAL:
        wanted = getattr(options, name)
        if before.get(name) != wanted:
            raise ValueError(
                f"{checkpoint} must be of the {name} {wanted!r}, got one of {before.get(name)!r}."
            )
    if start.step > options.max_train_steps:
        raise ValueError(
            f"`max_train_steps` must be at least {start.step}, the steps of {checkpoint}, "
            f"got {options.max_train_steps}."
        )
    later = [folder.name for folder in checkpoints_in(output_dir, after=start.step)]
    if later:
        raise ValueError(
            f"`output_dir` must hold no checkpoints after {checkpoint.name}, from which the run goes on, but "
            f"{output_dir} has {later}. Resume from 'latest', choose another folder, or delete them."
        )
    if start.step == options.max_train_steps:
        warn_user(
            f"There is nothing to do: {checkpoint} has all {start.step} steps of `max_train_steps`. Its "
            "concept is written and loaded as it is."
        )
    return start


def settings_of_run(
    options: TrainingOptions,
    accelerator: "Accelerator",
    inputs: TrainingInputs,
    covariance: InputCovariance,
    unet: nn.Module,
) -> dict[str, Any]:
    """Return what a checkpoint records of its run: all that decides what is learned."""
    rows = options.train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes
    pictures = [tensor for p in inputs.pictures for tensor in (p.pixels, p.mask) if tensor is not None]
    weights = [cast(nn.Linear, layer).weight.float() for layer, _ in projections_of(unet).values()]
    return options.recorded | {
        "mixed_precision": accelerator.mixed_precision,
        "rows of a step": rows,
        "pictures": fingerprint(*pictures),
        "prompts": fingerprint(inputs.prompts, inputs.prompts_of_pictures),
        "covariance": fingerprint(covariance.matrix, covariance.ridge),
        "model": fingerprint(*weights),
    }


def fingerprint(*values: Any) -> str:
    """Return a short hash of tensors, and of values by their `repr`."""
    return sha256_of(value if isinstance(value, Tensor) else repr(value) for value in values)[:16]
