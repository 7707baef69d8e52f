"""The options of a wrapped layer: their defaults, and the range that each must be in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerDefaults:
    """Defaults of `Rank1EditModule`'s numeric options: the paper's values where it gives one."""

    input_decay: float = 0.99
    train_beta: float = 0.75
    train_temperature: float = 0.1
    eval_beta: float = 0.70
    eval_temperature: float = 0.15
    frac_gradient_concept_embed: float = 0.1


LAYER_DEFAULTS = LayerDefaults()


def _is_count(value: int) -> bool:
    return value >= 1


def _is_count_or_none(value: int | None) -> bool:
    return value is None or value >= 1


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


# For each option: whether a value fits, and in words what it must be.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_finetune_prompts": (_is_count, "at least 1"),
    "num_concepts": (_is_count, "at least 1"),
    "input_decay": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "text_seq_len": (_is_count_or_none, "at least 1"),
    "train_beta": (math.isfinite, "finite"),
    "eval_beta": (math.isfinite, "finite"),
    "train_temperature": (_is_positive, "above 0 and finite"),
    "eval_temperature": (_is_positive, "above 0 and finite"),
    "frac_gradient_concept_embed": (lambda value: 0 <= value <= 1, "in [0, 1]"),
}


def check_layer_options(**options: float | None) -> None:
    """Raise a ValueError that names the first of these options that is out of its range.

    Args:
        **options: options of `Rank1EditModule` by name, any of those in `RANGES`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> check_layer_options(train_beta=0.5, train_temperature=0.1)
        >>> check_layer_options(input_decay=1.0)
        Traceback (most recent call last):
            ...
        ValueError: `input_decay` must be in [0, 1), got 1.0.
    """
    for name, value in options.items():
        fits, needed = RANGES[name]
        if not fits(value):
            raise ValueError(f"`{name}` must be {needed}, got {value}.")
