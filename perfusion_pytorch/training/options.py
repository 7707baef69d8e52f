"""The options of `train_concept`: their defaults, their ranges, and which of them a checkpoint records."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

from torch import Tensor

from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.options import LAYER_DEFAULTS
from perfusion_pytorch.layers.options import RANGES as LAYER_RANGES


class Range(NamedTuple):
    """Which values an option may have: as a function, and in words."""

    fits: Callable[[Any], bool]
    needed: str


SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
PRECISIONS = ("no", "fp16", "bf16")

COUNT = Range(lambda value: value >= 1, "at least 1")
COUNT_OR_NONE = Range(lambda value: value is None or value >= 1, "at least 1, or None")
AT_LEAST_0 = Range(lambda value: value >= 0, "at least 0")
AT_LEAST_0_OR_NONE = Range(lambda value: value is None or value >= 0, "at least 0, or None")
NOT_NEGATIVE = Range(lambda value: value >= 0 and isfinite(value), "at least 0 and finite")
POSITIVE = Range(lambda value: value > 0 and isfinite(value), "above 0 and finite")
POSITIVE_OR_NONE = Range(lambda value: value is None or value > 0, "above 0, or None")
DECAY = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
SCHEDULER = Range(lambda value: value in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}")
PRECISION = Range(lambda value: value is None or value in PRECISIONS, "'no', 'fp16', 'bf16' or None")
RECORDED = "recorded"  # marks an option that a checkpoint records, and that a resumed run is compared with

# The paper's settings, as arguments of `train_concept`: everything is trained at once, at absolute rates, and
# the edit is eq. 3.
PAPER: Mapping[str, Any] = {
    "embedding_steps": 0,
    "learning_rate": 0.03,
    "embedding_learning_rate": 0.006,
    "relative_learning_rates": False,
    "lr_scheduler": "constant",
    "gates_removal": False,
    "train_beta": LAYER_DEFAULTS.train_beta,
    "train_temperature": LAYER_DEFAULTS.train_temperature,
    "eval_beta": LAYER_DEFAULTS.eval_beta,
    "eval_temperature": LAYER_DEFAULTS.eval_temperature,
}

Number = float | int
PathLike = str | os.PathLike


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingOptions:
    """All arguments of `train_concept` but the pipeline; see there for what they mean.

    Raises:
        ValueError: an option is out of its range; the message names it.

    Example:
        >>> TrainingOptions(images="p", token="<a>", superclass="car", output_dir="o", train_batch_size=0)
        Traceback (most recent call last):
            ...
        ValueError: `train_batch_size` must be at least 1, got 0.
    """

    images: PathLike | Iterable
    token: Annotated[str, RECORDED]
    superclass: Annotated[str, RECORDED]
    output_dir: PathLike
    masks: PathLike | Iterable | None = None
    use_masks: bool = True
    mask_model: PathLike | None = None
    captions: Sequence[str | None] | None = None
    templates: Sequence[str] | None = None
    covariance: InputCovariance | Tensor | Callable[[], InputCovariance] | None = None
    resolution: Annotated[int | None, COUNT_OR_NONE] = None
    center_crop: bool = True
    max_train_steps: Annotated[int, COUNT] = 500
    embedding_steps: Annotated[int | None, AT_LEAST_0_OR_NONE, RECORDED] = None
    train_batch_size: Annotated[int, COUNT] = 16
    gradient_accumulation_steps: Annotated[int, COUNT, RECORDED] = 1
    gradient_checkpointing: bool = False
    mixed_precision: Annotated[str | None, PRECISION] = None
    learning_rate: Annotated[Number, NOT_NEGATIVE, RECORDED] = 0.04
    embedding_learning_rate: Annotated[Number, NOT_NEGATIVE, RECORDED] = 0.04
    relative_learning_rates: Annotated[bool, RECORDED] = True
    lr_scheduler: Annotated[str, SCHEDULER, RECORDED] = "cosine"
    lr_warmup_steps: Annotated[int, AT_LEAST_0, RECORDED] = 0
    adam_beta1: Annotated[Number, DECAY, RECORDED] = 0.9
    adam_beta2: Annotated[Number, DECAY, RECORDED] = 0.999
    adam_weight_decay: Annotated[Number, NOT_NEGATIVE, RECORDED] = 0.0
    adam_epsilon: Annotated[Number, NOT_NEGATIVE, RECORDED] = 1e-8
    max_grad_norm: Annotated[Number | None, POSITIVE_OR_NONE, RECORDED] = None
    gates_removal: Annotated[bool, RECORDED] = True
    train_beta: Annotated[Number, RECORDED] = 0.5
    train_temperature: Annotated[Number, RECORDED] = 0.05
    eval_beta: Annotated[Number, RECORDED] = 0.5
    eval_temperature: Annotated[Number, RECORDED] = 0.05
    input_decay: Annotated[Number, RECORDED] = LAYER_DEFAULTS.input_decay
    frac_gradient_concept_embed: Annotated[Number, RECORDED] = LAYER_DEFAULTS.frac_gradient_concept_embed
    timestep_power: Annotated[Number, POSITIVE, RECORDED] = 1.0
    seed: Annotated[int, RECORDED] = 0
    checkpointing_steps: Annotated[int | None, COUNT_OR_NONE] = 100
    checkpoints_total_limit: Annotated[int | None, COUNT_OR_NONE] = None
    resume_from_checkpoint: PathLike | None = None
    validation_prompt: str | Sequence[str] | None = None
    num_validation_images: Annotated[int, COUNT] = 4
    validation_steps: Annotated[int, COUNT] = 100
    report_to: str | None = None
    logging_dir: str = "logs"
    push_to_hub: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, (fits, needed) in OPTION_RANGES.items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"`{name}` must be {needed}, got {value!r}.")
        if self.mask_model is not None and (self.masks is not None or not self.use_masks):
            raise ValueError(
                "`mask_model` makes masks, so it cannot be given along with `masks` or `use_masks=False`."
            )
        if self.num_embedding_steps >= self.max_train_steps:
            raise ValueError(
                f"`embedding_steps` must be below `max_train_steps`, {self.max_train_steps}, so that some "
                f"are left for the value outputs, got {self.embedding_steps}."
            )

    @property
    def num_embedding_steps(self) -> int:
        """The number of steps that train the embedding alone, before all others."""
        return self.max_train_steps // 2 if self.embedding_steps is None else self.embedding_steps

    @property
    def layer_options(self) -> dict[str, Any]:
        """The options of `Rank1EditModule`."""
        return {name: getattr(self, name) for name in (*LAYER_OPTIONS, "gates_removal")}

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that a checkpoint records, by name: those that change what is learned."""
        names = [name for name in OPTION_NAMES if RECORDED in _marks(name)]
        # Where the embedding's steps end, and how the schedule goes, depend on where the run ends.
        if not self.lr_scheduler.startswith("constant") or self.embedding_steps is None:
            names.append("max_train_steps")
        return {name: getattr(self, name) for name in names}

    @property
    def logging_folder(self) -> Path:
        """The folder of the trackers' files."""
        return Path(self.output_dir) / self.logging_dir

    @property
    def tracker(self) -> str | None:
        """The tracker, or None."""
        return None if self.report_to == "none" else self.report_to

    @property
    def validation_prompts(self) -> list[str]:
        """The prompts of the validation pictures."""
        prompts = self.validation_prompt
        return [prompts] if isinstance(prompts, str) else list(prompts or ())

    @property
    def num_checkpoints(self) -> int:
        """The largest number of checkpoints that the run's folder holds."""
        written = self.max_train_steps // self.checkpointing_steps if self.checkpointing_steps else 0
        limit = self.checkpoints_total_limit
        return written if limit is None else min(written, limit)


_HINTS = get_type_hints(TrainingOptions, include_extras=True)


def _marks(name: str) -> tuple[Any, ...]:
    """Return what an option's annotation says beside its type."""
    return getattr(_HINTS[name], "__metadata__", ())


OPTION_NAMES = tuple(field.name for field in fields(TrainingOptions))
LAYER_OPTIONS = tuple(name for name in OPTION_NAMES if hasattr(LAYER_DEFAULTS, name))
OPTION_DEFAULTS: Mapping[str, Any] = {
    name: getattr(TrainingOptions, name) for name in OPTION_NAMES if hasattr(TrainingOptions, name)
}
OPTION_TYPES: Mapping[str, Any] = get_type_hints(TrainingOptions)
OPTION_RANGES: Mapping[str, Range] = {
    name: mark for name in OPTION_NAMES for mark in _marks(name) if isinstance(mark, Range)
} | {name: Range(*LAYER_RANGES[name]) for name in LAYER_OPTIONS}
