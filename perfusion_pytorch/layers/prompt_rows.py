"""Which concepts the rows of a batch hold: a row is recognised by the text encodings of its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CPU = torch.device("cpu")
CAPACITY = 1024  # prompts that are remembered; the oldest are forgotten
# Concepts in one prompt that there is room for from the start, so that what one gives depends on it alone.
WIDTH = 4
NO_PROMPT = 1  # fingerprint of a place in the memory that is free
NO_CONCEPT = -1
AS_SET = float("nan")  # a gate that is the concept's own
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


@dataclass(frozen=True)
class Held:
    """A concept that a prompt holds.

    Attributes:
        slot: its row in the table of concepts.
        beta, temperature: its gate for this prompt alone; NaN means the concept's own.
    """

    slot: int
    beta: float = AS_SET
    temperature: float = AS_SET


@dataclass(frozen=True, eq=False)
class HeldConcepts:
    """The concepts of the rows of a batch. Axes: b batch, m concepts in one row.

    Attributes:
        slots: int64, shape (b, m); −1 where a row holds fewer.
        beta, temperature: their gates for these rows alone, shape (b, m); NaN means the concept's own.
        is_known: whether the row's prompt is remembered, shape (b,).
    """

    slots: Tensor
    beta: Tensor
    temperature: Tensor
    is_known: Tensor


def fingerprints(text_enc: Tensor, *, offset: int = 0, width: int | None = None) -> Tensor:
    """Return a number for each row of a batch that equal rows share, and others do not.

    Args:
        text_enc: e, of any floating dtype, shape (b, n, d).
        offset: where these features begin among all, if they are some of those that are put side by side.
        width: how many features these are in all; by default d.

    Returns:
        int64, shape (b,). Two different rows have the same one with a chance of about 2⁻⁶⁴. Those of features
        side by side are the sum of their parts'.

    Example:
        >>> one, other, again = fingerprints(torch.tensor([[[1.0]], [[2.0]], [[1.0]]])).tolist()
        >>> one == again, one == other
        (True, False)
    """
    bits = text_enc.detach().contiguous().view(INTEGERS[text_enc.element_size()]).long()
    _, n, d = bits.shape
    tokens, features = torch.arange(n, device=bits.device), torch.arange(d, device=bits.device)
    places = tokens.unsqueeze(1) * (width or d) + features + offset + 1
    weights = places * -7046029254386353131
    weights = (weights ^ (weights >> 31)) * -4658895280553007687  # constants of splitmix64, modulo 2⁶⁴
    weights = weights ^ (weights >> 29)
    return (bits * (weights | 1)).sum(dim=(1, 2))


class PromptRows:
    """The latest prompts that a pipeline encoded, and the concepts that each holds.

    Where prompts with different gates have the same encodings, their order tells them apart: the first of
    them in a batch is the first that was remembered.
    """

    def __init__(self) -> None:
        shape = (CAPACITY, WIDTH)
        gates = torch.full(shape, AS_SET)
        # By device, from the oldest prompt to the latest: fingerprints (k,); slots, betas and temperatures
        # (k, m).
        self.memory: dict[torch.device, tuple[Tensor, ...]] = {
            CPU: (torch.full((CAPACITY,), NO_PROMPT), torch.full(shape, NO_CONCEPT), gates, gates)
        }

    def remember(self, new: Tensor, held: Sequence[Sequence[Held]]) -> None:
        """Remember prompts that were encoded together.

        Args:
            new: fingerprints of their encodings, shape (b,), on the device of the layers.
            held: the concepts of each prompt.
        """
        device, new = new.device, new.cpu()
        keys, *columns = self.memory[CPU]
        m = max([columns[0].shape[1], *map(len, held)])
        keys = torch.where(torch.isin(keys, new), NO_PROMPT, keys)
        self.memory = {CPU: (_latest(keys, new), *map(_latest, _widened(columns, m), _columns(held, m)))}
        self._on(device)  # now, so that no later call waits for the copy

    def forget_concept(self, slot: int) -> None:
        """Let no remembered prompt hold the concept of a slot that is freed."""
        keys, slots, *gates = self.memory[CPU]
        self.memory = {CPU: (keys, slots.masked_fill(slots == slot, NO_CONCEPT), *gates)}

    def find(self, text_enc: Tensor) -> HeldConcepts:
        """Return what the rows of a batch hold; nothing waits for the device.

        Args:
            text_enc: shape (b, n, d).
        """
        keys, slots, beta, temperature = self._on(text_enc.device)
        own = fingerprints(text_enc).unsqueeze(1)
        matches, equal = own == keys, own == own.mT
        # Of b equal rows in a batch and r remembered ones that equal them, row j is that of number ⌊j r / b⌋.
        remembered = matches.sum(dim=1, keepdim=True)
        number = equal.tril(-1).sum(dim=1, keepdim=True) * remembered // equal.sum(dim=1, keepdim=True)
        place = (matches & (matches.cumsum(dim=1) == number + 1)).int().argmax(dim=1)
        is_known = remembered.squeeze(1) > 0
        return HeldConcepts(
            slots[place].masked_fill(~is_known.unsqueeze(1), NO_CONCEPT),
            beta[place].masked_fill(~is_known.unsqueeze(1), AS_SET),
            temperature[place].masked_fill(~is_known.unsqueeze(1), AS_SET),
            is_known,
        )

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self.memory:
            self.memory[device] = tuple(tensor.to(device) for tensor in self.memory[CPU])
        return self.memory[device]


def _latest(old: Tensor, new: Tensor) -> Tensor:
    """Return the last rows of both, as many as there is room for."""
    return torch.cat([old, new])[-CAPACITY:]


def _columns(held: Sequence[Sequence[Held]], m: int) -> list[Tensor]:
    """Return the slots, betas and temperatures of some rows, each of shape (rows, m)."""
    rows = [[*row, *[Held(NO_CONCEPT)] * (m - len(row))] for row in held]
    return [
        torch.tensor([[getattr(one, name) for one in row] for row in rows], dtype=dtype).view(len(rows), m)
        for name, dtype in (("slot", torch.int64), ("beta", torch.float32), ("temperature", torch.float32))
    ]


def _widened(columns: Sequence[Tensor], m: int) -> list[Tensor]:
    """Return slots, betas and temperatures with room for m concepts in a row."""
    fills = (NO_CONCEPT, AS_SET, AS_SET)
    return [
        F.pad(column, (0, m - column.shape[1]), value=fill)
        for column, fill in zip(columns, fills, strict=True)
    ]
