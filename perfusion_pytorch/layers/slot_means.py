"""The mean encodings of one training call in each prompt slot, over the rows of this rank or of all."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from perfusion_pytorch.layers.training_batch import TrainingBatch


@dataclass(frozen=True, eq=False)
class SlotMeans:
    """Per-slot means of one training call.

    They depend on no layer, so all layers with the same encodings share them.

    Axes: b batch, n tokens, p prompt slots, d input features, s slots that have a row (on any rank).
    """

    text_enc: Tensor  # (b, n, d), detached
    count: int  # s
    slots: Tensor | slice  # (s,), the numbers of these slots
    row_slots: Tensor | None  # (b,), each row's slot as an index into `slots`; None if there is only one
    active: Tensor | None  # (b,), bool: rows with the concept; None if all are
    positions: Tensor  # (b,), of the concept's token; 0 in rows without the concept
    averaging: Tensor  # (s, b), takes the encodings at the concept's token of this rank's rows to their means
    concept: Tensor  # (s, d), mean encoding at the concept's token
    superclass: Tensor | None  # (s, d), mean encoding at the superclass's token
    superclass_of_rows: Tensor | None  # (d,), the same mean over all rows with the concept
    concept_gradient: Tensor | None = None  # (p, d), see `TrainingBatch`

    def sum_of_slots(self, factors: Tensor, values: Tensor) -> Tensor:
        """Return, for each slot, the sum of factors times values over all tokens of its rows.

        Args:
            factors: shape (b, n, 1).
            values: shape (b, n, d).

        Returns:
            The sums, shape (s, d).
        """
        if self.row_slots is None:  # one product of matrices is faster than one for each row
            return (factors.flatten().unsqueeze(0) @ values.flatten(0, 1))[: self.count]
        sums = values.new_zeros(self.count, values.shape[2])
        return sums.index_add_(0, self.row_slots, (factors.mT @ values).squeeze(1))


@torch.no_grad()
def slot_means(batch: TrainingBatch, text_enc: Tensor, num_slots: int) -> SlotMeans:
    """Return the means of a training call in its slots.

    Args:
        batch: positions, slots and superclass encodings of the call.
        text_enc: text encodings, shape (b, n, d).
        num_slots: p of the layer.

    Raises:
        ValueError: the text encodings do not fit the positions or the superclass encodings, or are not
            finite there.
    """
    _check_shapes(batch, text_enc)
    device, dtype = text_enc.device, torch.promote_types(text_enc.dtype, torch.float32)
    positions = batch.concept_indices.to(device, torch.int64)
    if batch.text_enc_with_superclass is None:
        _check_positions(positions, text_enc.shape[1])
    active = positions >= 0
    positions = positions.clamp_min(0)
    membership = active.to(dtype).unsqueeze(0)  # (slots, b), 1 where a row with the concept is in a slot
    prompt_ids = None
    if batch.prompt_ids is not None:
        prompt_ids = batch.prompt_ids.to(device, torch.int64)
        membership = membership * F.one_hot(prompt_ids, num_slots).T
    counts, concept, superclass = _sums_of_slots(batch, text_enc, membership, active, positions)
    all_active, used = _read(active, counts, {"text_enc": concept, "text_enc_with_superclass": superclass})
    slots = torch.tensor(used, dtype=torch.int64, device=device)
    if len(used) < len(membership):
        counts, concept, membership = counts[slots], concept[slots], membership[slots]
        superclass = None if superclass is None else superclass[slots]
    return SlotMeans(
        text_enc=text_enc.detach(),
        count=len(used),
        # A slice is read and written faster.
        slots=slice(0, 1) if prompt_ids is None and used else slots,
        row_slots=None if prompt_ids is None or len(used) < 2 else _row_slots(prompt_ids, slots),
        active=None if all_active else active,
        positions=positions,
        averaging=membership / membership.sum(dim=1, keepdim=True).clamp_min(1),
        concept=concept / counts,
        superclass=None if superclass is None else superclass / counts,
        superclass_of_rows=None if superclass is None else superclass.sum(dim=0) / counts.sum().clamp_min(1),
        concept_gradient=batch.concept_gradient,
    )


def _read(active: Tensor, counts: Tensor, sums: Mapping[str, Tensor | None]) -> tuple[bool, list[int]]:
    """Return whether all rows have the concept, and the slots that have a row; one read from the device.

    Args:
        active: rows with the concept, bool, shape (b,).
        counts: rows of each slot, shape (slots, 1).
        sums: of the encodings of each slot, by the name of what was given.

    Raises:
        ValueError: encodings are not finite.
    """
    given = {name: total for name, total in sums.items() if total is not None}
    finite = [total.isfinite().all() for total in given.values()]
    flags = torch.cat([torch.stack([*finite, active.all()]), counts.squeeze(1) > 0]).tolist()
    for name, is_finite in zip(given, flags, strict=False):
        if not is_finite:
            raise ValueError(
                f"`{name}` must be finite at the concept's token, got infinity or NaN. "
                "Look at the text encoder's output."
            )
    used = flags[len(finite) + 1 :]
    return flags[len(finite)], [slot for slot, is_used in enumerate(used) if is_used]


def _check_shapes(batch: TrainingBatch, text_enc: Tensor) -> None:
    rows = len(batch.concept_indices)
    if text_enc.ndim != 3 or len(text_enc) != rows:
        raise ValueError(
            f"`text_enc` must have shape (b, n, d) with one row for each of the {rows} `concept_indices`, "
            f"got {tuple(text_enc.shape)}."
        )
    superclass = batch.text_enc_with_superclass
    if superclass is not None and superclass.shape != text_enc.shape:
        raise ValueError(
            f"`text_enc_with_superclass` must have shape {tuple(text_enc.shape)}, as `text_enc` has, "
            f"got {tuple(superclass.shape)}. Pad the prompts of both to one length."
        )


def _check_positions(positions: Tensor, num_tokens: int) -> None:
    if (positions >= num_tokens).any():
        raise ValueError(
            f"`concept_indices` must be from -1 to {num_tokens - 1}, got {positions.max()}. It counts tokens."
        )


def _row_slots(prompt_ids: Tensor, slots: Tensor) -> Tensor:
    """Return, for each row (b,), where its slot stands in `slots`."""
    return (prompt_ids.unsqueeze(1) == slots).long().argmax(dim=1)


def _sums_of_slots(
    batch: TrainingBatch, text_enc: Tensor, membership: Tensor, active: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the number of rows of each slot (slots, 1) and the sums of their encodings (slots, d)."""
    rows = torch.arange(len(text_enc), device=text_enc.device)

    def sum_at(encodings: Tensor, where: Tensor) -> Tensor:
        found = encodings.to(text_enc.device)[rows, where].to(membership.dtype)
        # A row without the concept may hold anything, NaN included.
        return membership @ found.masked_fill(~active.unsqueeze(1), 0.0)

    sums = [membership.sum(dim=1, keepdim=True), sum_at(text_enc, positions)]
    if batch.text_enc_with_superclass is not None:
        where = positions
        if batch.superclass_indices is not None:
            where = batch.superclass_indices.to(text_enc.device, torch.int64).clamp_min(0)
        sums.append(sum_at(batch.text_enc_with_superclass, where))
    if batch.joint:
        sums = _summed_over_ranks(sums)
    return sums[0], sums[1], sums[2] if len(sums) > 2 else None


def _summed_over_ranks(sums: list[Tensor]) -> list[Tensor]:
    """Return the sums over all ranks of `torch.distributed`, with one collective."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return sums
    together = torch.cat(sums, dim=1)
    distributed.all_reduce(together)
    return list(together.split([part.shape[1] for part in sums], dim=1))
