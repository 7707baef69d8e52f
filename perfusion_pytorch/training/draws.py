"""Draw the rows of a training step.

All that is random is a function of (seed, step, row), and of nothing else.
So a resumed run draws what the uninterrupted one would have, and two processes together draw what one process
with the joint batch would.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from beartype import beartype
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Draw:
    """Some rows of a training step. Axes: b rows.

    Attributes:
        pictures, prompts, timesteps: integers, shape (b,).
        noise: shape (b, channels, h, w).
    """

    pictures: Tensor
    prompts: Tensor
    timesteps: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> "Draw":
        """Return the same rows on a device."""
        return Draw(*(getattr(self, field.name).to(device) for field in fields(self)))


@beartype
def draw_rows(
    seed: int,
    step: int,
    rows: range,
    rows_per_step: int,
    *,
    prompts_of_pictures: Sequence[Sequence[int]],
    latent_shape: Sequence[int],
    num_timesteps: int = 1000,
    timestep_power: float = 1.0,
) -> Draw:
    """Draw rows of a step, on the CPU, whatever device trains.

    Every picture comes once before any comes again, in an order that is new each time. Prompts, times and
    noise are drawn independently.

    Args:
        seed, step: integers.
        rows: numbers of the rows, counted over all processes and passes of the step.
        rows_per_step: how many there are in all.
        prompts_of_pictures: for each picture, the numbers of its prompts.
        latent_shape: (channels, h, w).
        num_timesteps: T; a time is ⌊T u^power⌋ for a uniform u in [0, 1).
        timestep_power: 1 draws all times equally often; less draws late times, which have more noise, more
            often.

    Example:
        >>> draw = draw_rows(0, 3, range(2, 4), 4, prompts_of_pictures=[[0], [1, 2]], latent_shape=(4, 8, 8))
        >>> whole = draw_rows(0, 3, range(4), 4, prompts_of_pictures=[[0], [1, 2]], latent_shape=(4, 8, 8))
        >>> torch.equal(draw.noise, whole.noise[2:]), draw.noise.shape
        (True, torch.Size([2, 4, 8, 8]))
    """
    pictures: list[int] = []
    prompts: list[int] = []
    timesteps: list[int] = []
    noise: list[Tensor] = []
    for row in rows:
        turn, place = divmod(step * rows_per_step + row, len(prompts_of_pictures))
        order = torch.randperm(len(prompts_of_pictures), generator=_generator(seed, "order", turn))
        generator = _generator(seed, "row", step, row)
        pictures.append(int(order[place]))
        choices = prompts_of_pictures[pictures[-1]]
        prompts.append(choices[int(torch.randint(len(choices), (), generator=generator))])
        uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
        timesteps.append(min(int(num_timesteps * uniform**timestep_power), num_timesteps - 1))
        noise.append(torch.randn(*latent_shape, generator=generator))
    return Draw(torch.tensor(pictures), torch.tensor(prompts), torch.tensor(timesteps), torch.stack(noise))


def _generator(*key: str | int) -> torch.Generator:
    """Return a generator whose stream depends on the key alone.

    The key is hashed because generators of neighbouring seeds begin alike.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
