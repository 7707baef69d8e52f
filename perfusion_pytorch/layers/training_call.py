"""One training call of a layer: its constants, and how it splits the encodings, with the gradient."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.functional import add_product, split_concepts
from perfusion_pytorch.layers.precision import without_autocast
from perfusion_pytorch.layers.slot_means import SlotMeans


@dataclass(frozen=True, eq=False)
class TrainingCall:
    """The constants of one training call of a layer.

    The call's output can be computed from them any number of times. Axes: s slots of the call, d input
    features.
    """

    means: SlotMeans
    covariance: InputCovariance
    concept_id: int
    concept_input: Tensor  # (s, d), the moving average with this call in it
    concept_dual: Tensor  # (s, d)
    concept_norm: Tensor  # (s, 1), ⟨i*, i*⟩
    superclass_input: Tensor  # (s, d)

    def of_rows(self, values: Tensor) -> Tensor:
        """Return the value of each row's slot.

        Args:
            values: one for each slot, shape (s, d).

        Returns:
            Shape (b, 1, d), or (1, d) if all rows share one slot; 0 if no row has a slot.
        """
        if self.means.row_slots is not None:
            return values[self.means.row_slots].unsqueeze(1)
        return values if self.means.count else values.new_zeros(1, values.shape[1])

    def is_same_as(self, other: "TrainingCall") -> bool:
        """Return whether another call of equal text encodings has the same output."""
        return (
            self.concept_id == other.concept_id
            and torch.equal(self.means.averaging, other.means.averaging)
            and torch.equal(self.means.positions, other.means.positions)
            and torch.equal(self.concept_input, other.concept_input)
            and torch.equal(self.superclass_input, other.superclass_input)
        )


class SplitOptions(NamedTuple):
    """What a layer's split depends on beside the call."""

    beta: float
    temperature: float
    fraction: float  # scales the gradient into the encodings


class TrainingSplit(torch.autograd.Function):
    """`split_concepts` of a training call, with a straight-through gradient for the moving average i*.

        r = k · e,   rest = e − i r,   gate = σ((r − β) / τ),   k = C⁻¹ i / ⟨i, i⟩,   ∂i/∂e := ∂mean/∂e

    The gradient of i* goes to the mean of the call's rows. A backward in closed form is faster than
    autograd's through these small steps. It is of first order only.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's context takes any attribute
        text_enc: Tensor,
        concept_gradient: Tensor | None,
        call: TrainingCall,
        inverse: Tensor,
        beta: float,
        temperature: float,
        fraction: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the rest (b, n, d) and the gate (b, n, 1).

        Args:
            ctx: torch's context.
            text_enc: e, shape (b, n, d), float32 or float64.
            concept_gradient: if given, it receives the part of the gradient that goes through i*.
            call: the constants of the call.
            inverse: C⁻¹, shape (d, d).
            beta: β, the gate bias.
            temperature: τ, the gate temperature.
            fraction: scales the whole gradient into the encodings.
        """
        concept_input = call.of_rows(call.concept_input)
        dual = call.of_rows(call.concept_dual)
        active = None if call.means.active is None else call.means.active.unsqueeze(1)
        rest, gate = split_concepts(text_enc, concept_input, dual, beta, temperature, active)
        ctx.save_for_backward(text_enc, gate)
        ctx.constants = call, inverse, temperature, fraction
        return rest, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rest_grad: Tensor, gate_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the text encodings and of `concept_gradient`; the rest is constant."""
        with without_autocast(rest_grad):
            return *_split_gradients(ctx, rest_grad, gate_grad), None, None, None, None, None


def _split_gradients(ctx: Any, rest_grad: Tensor, gate_grad: Tensor) -> tuple[Tensor, Tensor | None]:
    text_enc, gate = ctx.saved_tensors
    call, inverse, temperature, fraction = ctx.constants
    means = call.means
    concept_input = call.of_rows(call.concept_input)
    dual = call.of_rows(call.concept_dual)
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


def split_of_call(text_enc: Tensor, call: TrainingCall, options: SplitOptions) -> tuple[Tensor, Tensor]:
    """Return the rest (b, n, d) and the gate (b, n, 1) of a training call, in float32 at least."""
    text_enc = text_enc.to(torch.promote_types(text_enc.dtype, torch.float32))
    inverse = call.covariance.inverse(text_enc.device, text_enc.dtype)
    return TrainingSplit.apply(
        text_enc,
        call.means.concept_gradient,
        call,
        inverse,
        options.beta,
        options.temperature,
        options.fraction,
    )
