"""Which strength is recommended: the most like the training pictures of those that still follow prompts."""

from collections.abc import Sequence
from typing import NamedTuple

PROMPT_KEPT = 0.95  # of the base model's figure for following prompts
RULE = (
    "Of the strengths that keep at least 95 % of the base model's figure for following prompts, the one "
    "whose pictures are most like the training pictures; of equals the weakest edit. If none keeps so much, "
    "the one that follows prompts best."
)


class Point(NamedTuple):
    """The figures of one strength.

    Attributes:
        strength: β, or a LoRA's scale.
        identity: how much its pictures are like the training pictures.
        prompt: how well they follow their prompts.
    """

    strength: float
    identity: float
    prompt: float


def recommend(points: Sequence[Point], base_prompt: float, *, higher_is_weaker: bool) -> tuple[Point, bool]:
    """Return the recommended point, and whether it keeps 95 % of the base model's prompt figure.

    Args:
        points: the figures of each strength.
        base_prompt: the base model's figure for following prompts.
        higher_is_weaker: whether a higher strength edits less, as with β.

    Example:
        >>> points = [Point(0.3, 0.8, 0.20), Point(0.5, 0.7, 0.29), Point(0.9, 0.4, 0.30)]
        >>> recommend(points, 0.3, higher_is_weaker=True)
        (Point(strength=0.5, identity=0.7, prompt=0.29), True)
    """
    sign = 1 if higher_is_weaker else -1
    enough = [point for point in points if point.prompt >= least_prompt(base_prompt)]
    if enough:
        return max(enough, key=lambda point: (point.identity, sign * point.strength)), True
    return max(points, key=lambda point: (point.prompt, sign * point.strength)), False


def least_prompt(base_prompt: float) -> float:
    """Return the least prompt figure of a strength that the rule can choose for its identity.

    The base model's figure may be below 0, as cosines can be.
    """
    return base_prompt - (1 - PROMPT_KEPT) * abs(base_prompt)
