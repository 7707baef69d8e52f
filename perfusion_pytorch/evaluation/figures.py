"""A figure with its uncertainty: a mean over prompts, and a bootstrap interval."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Figure:
    """A mean with the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half the width of the interval, for where there is no room for its two ends."""
        return (self.high - self.low) / 2

    def as_json(self) -> dict[str, float]:
        """Return it as JSON can hold it."""
        return asdict(self)


Figures = Mapping[str, Figure]  # by the names of what is measured


def figure_of(values: Sequence[float]) -> Figure:
    """Return the mean of values with its interval.

    Args:
        values: one for each unit that was drawn independently: a prompt, and not a picture, since pictures
            of one prompt are alike.
    """
    low, high = bootstrap_interval(values)
    return Figure(sum(values) / len(values), low, high)


def bootstrap_interval(values: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of values.

    As many values are drawn with replacement, `draws` times over; the interval holds the middle 95 % of their
    means. Of a single value it is that value alone, which says nothing about its uncertainty.

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)
        >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
        >>> round(low, 1), round(high, 1)
        (0.4, 0.6)
    """
    numbers = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(numbers), (draws, len(numbers)), generator=generator)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = numbers[chosen].mean(dim=1).quantile(ends).tolist()
    return low, high


def means_in_groups(values: Sequence[float], size: int) -> list[float]:
    """Return the means of groups of values that follow one another.

    Example:
        >>> means_in_groups([1.0, 3.0, 5.0, 5.0], 2)
        [2.0, 5.0]
    """
    return [sum(values[i : i + size]) / size for i in range(0, len(values), size)]
