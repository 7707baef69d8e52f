"""What a training call of a wrapped layer needs beside the text encodings, and what is kept of it for recomputation."""

from collections import deque
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from perfusion_pytorch.layers.functional import add_product, split_concepts
from perfusion_pytorch.layers.precision import without_autocast


@dataclass(frozen=True, eq=False)
class SlotMeans:
    """What a training call says of each prompt slot. It depends on no layer, so all layers that see the same encodings share one.

    Axes: b batch, n tokens, d input features, s slots that some row is of (on any rank).
    """

    text_enc: Tensor  # (b, n, d), detached
    count: int  # s
    slots: Tensor | slice  # (s,), which they are
    row_slots: Tensor | None  # (b,), each row's slot as an index into `slots`; None where there is but one
    active: Tensor | None  # (b,), bool: rows with the concept; None where all are
    positions: Tensor  # (b,), 0 in rows without the concept
    averaging: (
        Tensor  # (s, b), takes the concept's encodings in the rows of this rank to their mean in each slot
    )
    concept: Tensor  # (s, d), mean encoding at the concept's token
    superclass: Tensor | None  # (s, d), mean encoding at the superclass's token
    superclass_of_rows: Tensor | None  # (d,), the same over all rows with the concept
    concept_gradient: Tensor | None = (
        None  # (p, d), takes the gradient that reaches i*, in place of the rows that it is the mean of
    )

    def sum_of_slots(self, factors: Tensor, values: Tensor) -> Tensor:
        """Return each slot's sum (s, d), over the tokens of its rows, of factors (b, n, 1) times values (b, n, d)."""
        if self.row_slots is None:  # one product of matrices is faster than one for each row
            return (factors.flatten().unsqueeze(0) @ values.flatten(0, 1))[: self.count]
        return values.new_zeros(self.count, values.shape[2]).index_add_(
            0, self.row_slots, (factors.mT @ values).squeeze(1)
        )


@dataclass(frozen=True, eq=False)
class ConceptInputs:
    """What a training call needs beside the text encodings. Axes: b batch, n tokens, d input features.

    Attributes:
        text_enc_with_superclass: shape (b, n, d), the same prompts with the superclass word; may be missing once every slot was seen.
        concept_indices: integers, shape (b,): the concept's token in each row, −1 where a row is without the concept.
        superclass_indices: integers, shape (b,): the superclass's last token in each row; by default where the concept's stands.
        prompt_ids: integers, shape (b,): the slot of each row's prompt; by default all rows share slot 0.
        concept_id: the concept that is trained.
        concept_gradient: a leaf of zeros, shape (p, d), with gradients; where given, the gradient that reaches i* goes there, summed over
            layers, and none of it into the encodings.
        joint: whether the means are over the rows of all ranks of `torch.distributed`, with one collective for a step's encodings.
        is_split_once: whether a layer takes over the `TrainingSplit` of the layer before where theirs are the same, so that its backward
            runs once for them all. For one forward pass and its backward; a second pass needs new inputs.
    """

    text_enc_with_superclass: Tensor | None
    concept_indices: Tensor
    superclass_indices: Tensor | None = None
    prompt_ids: Tensor | None = None
    concept_id: int = 0
    concept_gradient: Tensor | None = None
    joint: bool = False
    is_split_once: bool = False
    _known: dict = field(default_factory=dict, repr=False)  # the last means, by their number of slots
    _last_split: list = field(default_factory=list, repr=False)  # the last split, after what it was of

    def __reduce__(self):
        return type(None), ()  # a copy of a layer, or its pickle, is in no training step

    def question(self) -> "ConceptInputs":
        """Return what `asks_for` compares and no more: the means would keep the graph of the text encoder alive."""
        return replace(self, text_enc_with_superclass=None, _known={}, _last_split=[])

    def asks_for(self, other: "ConceptInputs") -> bool:
        """Tell whether another call has the same concept at the same positions and slots."""

        def same(a, b):
            return a is b or (a is not None and b is not None and torch.equal(a, b))

        names = ("concept_indices", "superclass_indices", "prompt_ids")
        return self.concept_id == other.concept_id and all(
            same(getattr(self, name), getattr(other, name)) for name in names
        )

    def validate(self, layer, num_tokens: int | None = None):
        """Raise a ValueError that names what does not fit the layer; `num_tokens` defaults to that of the superclass encodings."""
        for name in ("concept_indices", "superclass_indices", "prompt_ids"):
            values = getattr(self, name)
            if not isinstance(values, Tensor) and (values is not None or name == "concept_indices"):
                raise ValueError(
                    f"`{name}` must be a tensor of integers, one a row, got {type(values).__name__}."
                )
        superclass = self.text_enc_with_superclass
        if superclass is not None:
            if superclass.ndim != 3 or superclass.shape[-1] != layer.in_features:
                raise ValueError(
                    f"`text_enc_with_superclass` must have shape (b, n, {layer.in_features}) to match the wrapped projection, "
                    f"got {tuple(superclass.shape)}. Encode the superclass prompts with the same text encoder."
                )
            num_tokens = superclass.shape[1] if num_tokens is None else num_tokens
        rows = self.concept_indices.shape
        if len(rows) != 1 or (superclass is not None and rows[0] != superclass.shape[0]):
            batch = "b" if superclass is None else superclass.shape[0]
            raise ValueError(
                f"`concept_indices` must have shape ({batch},), one position a row, got {tuple(rows)}. Use -1 for rows without it."
            )
        for name, values, low, high in (
            ("concept_indices", self.concept_indices, -1, num_tokens),
            ("superclass_indices", self.superclass_indices, -1, num_tokens),
            ("prompt_ids", self.prompt_ids, 0, layer.num_finetune_prompts),
        ):
            if values is None:
                continue
            if values.shape != rows:
                raise ValueError(
                    f"`{name}` must have shape {tuple(rows)}, as `concept_indices` has, got {tuple(values.shape)}."
                )
            if values.is_floating_point() or values.dtype == torch.bool:
                raise ValueError(f"`{name}` must hold integers, got {values.dtype}.")
            numbers = values.tolist()
            if numbers and (min(numbers) < low or (high is not None and max(numbers) >= high)):
                raise ValueError(
                    f"`{name}` must be {f'at least {low}' if high is None else f'from {low} to {high - 1}'}, "
                    f"got values from {min(numbers)} to {max(numbers)}. "
                    + (
                        "Raise `num_finetune_prompts` for more slots."
                        if name == "prompt_ids"
                        else "It counts tokens; -1 means none."
                    )
                )
        if (
            self.superclass_indices is not None
            and ((self.superclass_indices < 0) & (self.concept_indices >= 0)).any()
        ):
            raise ValueError(
                "`superclass_indices` must be at least 0 wherever `concept_indices` is, but a row with the concept has -1."
            )
        wanted = (layer.num_finetune_prompts, layer.in_features)
        if self.concept_gradient is not None and self.concept_gradient.shape != wanted:
            raise ValueError(
                f"`concept_gradient` must have shape {wanted}, got {tuple(self.concept_gradient.shape)}."
            )
        if not isinstance(self.concept_id, int):
            raise ValueError(f"`concept_id` must be one concept in a training call, got {self.concept_id}.")
        layer._check_concept_id(self.concept_id)

    @torch.no_grad()
    def means(self, text_enc: Tensor, num_slots: int) -> SlotMeans:
        """Return the means of the slots; computed once for all layers that are given the same tensor.

        Raises:
            ValueError: the text encodings do not fit the positions or the superclass encodings.
        """
        of, version, known = self._known.get(num_slots, (None, None, None))
        if of is text_enc and version == text_enc._version:  # changed in place, a tensor is another one
            return known
        if text_enc.ndim != 3 or len(text_enc) != len(self.concept_indices):
            raise ValueError(
                f"`text_enc` must have shape (b, n, d) with one row for each of the {len(self.concept_indices)} `concept_indices`, "
                f"got {tuple(text_enc.shape)}."
            )
        superclass = self.text_enc_with_superclass
        if superclass is not None and superclass.shape != text_enc.shape:
            raise ValueError(
                f"`text_enc_with_superclass` must have shape {tuple(text_enc.shape)}, as `text_enc` has, got {tuple(superclass.shape)}. "
                "Pad the prompts of both to one length."
            )
        device, dtype = text_enc.device, torch.promote_types(text_enc.dtype, torch.float32)
        positions = self.concept_indices.to(device, torch.int64)
        if superclass is None and (positions >= text_enc.shape[1]).any():
            raise ValueError(
                f"`concept_indices` must be from -1 to {text_enc.shape[1] - 1}, got {positions.max()}. It counts tokens."
            )
        active, positions = positions >= 0, positions.clamp_min(0)
        here = active.to(dtype).unsqueeze(0)  # (slots, b)
        if self.prompt_ids is not None:
            prompt_ids = self.prompt_ids.to(device, torch.int64)
            here = here * F.one_hot(prompt_ids, num_slots).T
        rows = torch.arange(len(text_enc), device=device)

        def sums_of(encodings, where):  # a row without the concept may hold anything, NaN included
            return here @ encodings.to(device)[rows, where].to(dtype).masked_fill(~active.unsqueeze(1), 0.0)

        sums = [here.sum(dim=1, keepdim=True), sums_of(text_enc, positions)]
        if superclass is not None:
            where = (
                positions
                if self.superclass_indices is None
                else self.superclass_indices.to(device, torch.int64).clamp_min(0)
            )
            sums.append(sums_of(superclass, where))
        for name, values in zip(("text_enc", "text_enc_with_superclass"), sums[1:], strict=False):
            if not values.isfinite().all():
                raise ValueError(
                    f"`{name}` must be finite at the concept's token, got infinity or NaN. Look at the text encoder's output."
                )
        if (
            self.joint
            and distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size() > 1
        ):
            together = torch.cat(sums, dim=1)
            distributed.all_reduce(together)
            sums = together.split([part.shape[1] for part in sums], dim=1)
        slots = sums[0].squeeze(1).nonzero().squeeze(1)
        counts, concept, *rest = (part[slots] for part in sums) if len(slots) < len(here) else sums
        here = here[slots]
        known = SlotMeans(
            text_enc=text_enc.detach(),
            count=len(slots),
            slots=slice(0, 1)
            if self.prompt_ids is None and len(slots)
            else slots,  # a slice is read and written faster
            row_slots=(prompt_ids.unsqueeze(1) == slots).long().argmax(dim=1) if len(slots) > 1 else None,
            active=None if active.all() else active,
            positions=positions,
            averaging=here / here.sum(dim=1, keepdim=True).clamp_min(1),
            concept=concept / counts,
            superclass=rest[0] / counts if rest else None,
            superclass_of_rows=rest[0].sum(dim=0) / counts.sum().clamp_min(1) if rest else None,
            concept_gradient=self.concept_gradient,
        )
        self._known[num_slots] = text_enc, text_enc._version, known
        return known

    def split(
        self, call: "TrainingCall", text_enc: Tensor, covariance, **options: float
    ) -> tuple[Tensor, Tensor]:
        """Return `call.split(...)`, or what the layer before got from it where that is the same."""
        # With hooks on what is saved, this may be a part of the model that is recomputed by itself (activation checkpointing).
        if not self.is_split_once or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return call.split(text_enc, covariance, **options)
        asked = call.means, covariance, options, torch.is_grad_enabled()
        if self._last_split:
            answered, concept_input, split = self._last_split
            if asked == answered and torch.equal(concept_input, call.concept_input):
                return split
        split = call.split(text_enc, covariance, **options)
        self._last_split[:] = asked, call.concept_input, split
        return split


@dataclass(frozen=True, eq=False)
class TrainingCall:
    """The constants of one training call of a layer, from which its output can be computed any number of times."""

    means: SlotMeans
    concept_id: int
    concept_input: Tensor  # (s, d), the moving average with this call in it
    concept_dual: Tensor  # (s, d)
    concept_norm: Tensor  # (s, 1), ⟨i*, i*⟩
    superclass_input: Tensor  # (s, d)

    def of_rows(self, values: Tensor) -> Tensor:
        """Return each row's own (b, 1, d) of what slots have (s, d), or (1, d) where all have the same; 0 where no row is of a slot."""
        if self.means.row_slots is not None:
            return values[self.means.row_slots].unsqueeze(1)
        return values if self.means.count else values.new_zeros(1, values.shape[1])

    def split(
        self, text_enc: Tensor, covariance, *, beta: float, temperature: float, fraction: float
    ) -> tuple[Tensor, Tensor]:
        """Return `TrainingSplit`'s rest (b, n, d) and gate (b, n, 1), in float32 at least."""
        text_enc = text_enc.to(torch.promote_types(text_enc.dtype, torch.float32))
        inverse = covariance.inverse(text_enc.device, text_enc.dtype)
        return TrainingSplit.apply(
            text_enc, self.means.concept_gradient, self, inverse, beta, temperature, fraction
        )


class TrainingSplit(torch.autograd.Function):
    """`split_concepts` of a training call, with the gradient straight through the moving average to the mean of the call's rows.

        r = k · e,   rest = e − i r,   gate = σ((r − β) / τ),   k = C⁻¹ i / ⟨i, i⟩,   ∂i/∂e := ∂mean/∂e

    A backward in closed form is faster than autograd's through these small steps; it is of first order only. `call` is a `TrainingCall`;
    `fraction` scales the whole gradient into the encodings. `concept_gradient` takes the part through i*, where it is not None.
    """

    @staticmethod
    def forward(ctx, text_enc, concept_gradient, call, inverse, beta, temperature, fraction):
        concept_input, dual = call.of_rows(call.concept_input), call.of_rows(call.concept_dual)
        active = None if call.means.active is None else call.means.active.unsqueeze(1)
        rest, gate = split_concepts(text_enc, concept_input, dual, beta, temperature, active)
        ctx.save_for_backward(text_enc, gate)
        ctx.constants = call, inverse, temperature, fraction
        return rest, gate

    @staticmethod
    @once_differentiable
    def backward(ctx, rest_grad, gate_grad):
        with without_autocast(rest_grad):
            return *TrainingSplit._gradients(ctx, rest_grad, gate_grad), None, None, None, None, None

    @staticmethod
    def _gradients(ctx, rest_grad, gate_grad):
        text_enc, gate = ctx.saved_tensors
        call, inverse, temperature, fraction = ctx.constants
        means, concept_input, dual = (
            call.means,
            call.of_rows(call.concept_input),
            call.of_rows(call.concept_dual),
        )
        if means.active is not None:
            dual = dual * means.active[:, None, None]
        gate_part = torch.ops.aten.sigmoid_backward(gate_grad, gate) / temperature
        similarity_grad = gate_part - rest_grad @ concept_input.mT  # (b, n, 1)
        if means.active is not None:
            similarity_grad = similarity_grad * means.active[:, None, None]
        dual_grad = means.sum_of_slots(similarity_grad, text_enc)  # (s, d)
        input_grad = means.sum_of_slots(text_enc @ dual.mT, rest_grad).neg()
        # k = C⁻¹ i / ⟨i, i⟩, whose differential is (C⁻¹ di) / ⟨i, i⟩ − 2 k (k · di)
        input_grad += (dual_grad @ inverse) / call.concept_norm
        input_grad -= 2 * (dual_grad * call.concept_dual).sum(dim=1, keepdim=True) * call.concept_dual
        text_enc_grad = add_product(rest_grad, similarity_grad, dual)
        if means.concept_gradient is not None:
            concept_grad = torch.zeros_like(means.concept_gradient)
            concept_grad[means.slots] = input_grad.to(concept_grad.dtype) * fraction
            return text_enc_grad.mul_(fraction), concept_grad
        rows = torch.arange(len(text_enc), device=text_enc.device)
        text_enc_grad[rows, means.positions] += means.averaging.mT @ input_grad
        return text_enc_grad.mul_(fraction), None


@dataclass(eq=False)
class RecentCall:
    """A call of a layer in training mode; an inference call has neither inputs nor constants."""

    text_enc: Tensor  # detached
    inputs: ConceptInputs | None
    call: TrainingCall | None
    is_recomputed: bool = False


class RecentCalls(deque):
    """The last calls of a layer in training mode.

    Activation checkpointing calls the layer again in backward; by what it is given a call is recognised. Deep copies and pickles start
    empty.
    """

    def find(self, text_enc: Tensor, inputs: ConceptInputs | None) -> RecentCall | None:
        """Return the call that is recomputed, or None. The same encodings may come back after the averages moved.

        Args:
            text_enc: encodings of the recomputed call.
            inputs: what it was given beside them, where that came as arguments.

        Raises:
            RuntimeError: several different calls had these encodings and wait for their backward pass.
        """
        same = [
            recent
            for recent in self
            if (recent.text_enc.shape, recent.text_enc.dtype) == (text_enc.shape, text_enc.dtype)
            and torch.equal(recent.text_enc, text_enc)
            and (inputs is None or (recent.inputs is not None and inputs.asks_for(recent.inputs)))
        ]
        waiting = [recent for recent in same if not recent.is_recomputed] or same[-1:]
        if not waiting:
            return None
        latest = waiting[-1]
        if latest.call is not None and any(
            r.call is not None and not _is_same_call(latest.call, r.call) for r in waiting[:-1]
        ):
            raise RuntimeError(
                "A call is recomputed in backward, but several calls with the same text encodings wait for theirs, and the averages or the "
                "concept differ between them. Call backward after each forward pass, or switch checkpointing off."
            )
        latest.is_recomputed = True
        return latest

    def __reduce__(self):
        return type(self), ((), self.maxlen)


def _is_same_call(one: TrainingCall, other: TrainingCall) -> bool:
    """Tell whether two calls of equal encodings have the same output."""
    return (
        one.concept_id == other.concept_id
        and torch.equal(one.means.averaging, other.means.averaging)
        and torch.equal(one.means.positions, other.means.positions)
        and torch.equal(one.concept_input, other.concept_input)
        and torch.equal(one.superclass_input, other.superclass_input)
    )
