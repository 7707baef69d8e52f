"""The maths of key-locked rank-1 editing, on tensors.

The equations are eq. 3 and appendix B of Perfusion (Tewel et al. 2023, arXiv 2305.01644), and eq. 2 of ROME
(Meng et al. 2022, arXiv 2202.05262).

    paper    here             meaning
    W        weight           the frozen projection (o, d)
    C        covariance       second moment of the text encodings (d, d); see `covariance.py`
    e        text_enc         text encodings that reach the projection (b, n, d)
    i*       concept_input    the concept's target input (c, d)
    C⁻¹ i*   concept_dual     divided by ⟨i*, i*⟩ = i*ᵀ C⁻¹ i*, so that r(e) = concept_dual · e (c, d);
                              see `metric.py`
    o*       concept_output   the concept's target output (c, o)
    β, τ     beta, temperature  the gate's bias and temperature (c,)

Axes: b batch, n tokens, c concepts, p prompt slots, d input features, o output features. A leading `...` is a
batch axis that may be absent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def concept_similarity(text_enc: Tensor, concept_dual: Tensor) -> Tensor:
    """Return r(e), how much of each concept is in each encoding.

    It is 1 at the concept itself and near 0 at unrelated tokens.

    Args:
        text_enc: e, shape (b, n, d).
        concept_dual: shape (c, d), or (b, c, d) if each row has its own dual.

    Returns:
        r, shape (b, n, c).

    Example:
        >>> concept_similarity(torch.tensor([[[3.0, 5.0]]]), torch.tensor([[1 / 3, 0.0]]))
        tensor([[[1.]]])
    """
    return text_enc @ concept_dual.mT


def split_concepts(
    text_enc: Tensor,
    concept_input: Tensor,
    concept_dual: Tensor,
    beta: Tensor | float,
    temperature: Tensor | float,
    active: Tensor | None = None,
    gates_removal: Tensor | bool = False,
    joint: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the encodings without their part in the concepts, and each concept's gate.

        rest(e) = e − Σⱼ iⱼ r̃ⱼ(e),   r̃ = R⁻¹ r,   Rⱼₗ = dualⱼ · iₗ          gateⱼ(e) = σ((rⱼ(e) − βⱼ) / τⱼ)

    The removed part lies in the joint span of the concepts under the metric C⁻¹ (appendix B). For one
    concept, R = 1 (eq. 3). In the gated form the gate closes the removal too,
    rest(e) = e − Σⱼ gateⱼ(e) iⱼ r̃ⱼ(e), so that a token whose gate is shut keeps its whole encoding.

    Args:
        text_enc: e, shape (b, n, d).
        concept_input: i*, shape (c, d), or (b, c, d) if each row has its own inputs.
        concept_dual: of the same shape as `concept_input`.
        beta: gate bias, shape (c,) or a number; dimensionless: 1.0 is the concept itself.
        temperature: gate temperature, shape (c,) or a number, above 0.
        active: bool, shape (..., c). A concept that is not active removes nothing, and its gate is 0. None
            means that all are active.
        gates_removal: which concepts have the gated form: bool, shape (c,), or one bool for all.
        joint: what `joint_duals` returns for these concepts, where it is known already.

    Returns:
        The rest, shape (b, n, d), and the gates, shape (b, n, c).

    Raises:
        torch.linalg.LinAlgError: two active concepts are parallel, so that R is singular.

    Example:
        >>> i = torch.tensor([[1.0, 0.0]])
        >>> split_concepts(torch.tensor([[[2.0, 3.0]]]), i, i, beta=2.0, temperature=0.1)
        (tensor([[[0., 3.]]]), tensor([[[0.5000]]]))
        >>> split_concepts(torch.tensor([[[2.0, 3.0]]]), i, i, beta=2.0, temperature=0.1, gates_removal=True)
        (tensor([[[1., 3.]]]), tensor([[[0.5000]]]))
    """
    if active is not None:
        concept_dual = concept_dual * active.unsqueeze(-1)
        beta = torch.as_tensor(beta, dtype=text_enc.dtype, device=text_enc.device)
        beta = torch.where(active, beta, torch.inf).unsqueeze(-2)
    similarity = concept_similarity(text_enc, concept_dual)
    gate = torch.sigmoid((similarity - beta) / temperature)
    if concept_input.shape[-2] > 1:
        if joint is None:
            joint = joint_duals(concept_input, concept_dual, active, check=True)
        similarity = concept_similarity(text_enc, joint)  # r̃
    if gates_removal is True:
        similarity = similarity * gate
    elif gates_removal is not False:
        similarity = similarity * gate.masked_fill(~gates_removal, 1.0)
    return add_product(text_enc, similarity, concept_input, alpha=-1), gate


def joint_duals(
    concept_input: Tensor, concept_dual: Tensor, active: Tensor | None = None, *, check: bool
) -> Tensor:
    """Return R⁻¹ K, whose products with an encoding are r̃, in the span of several concepts (appendix B).

    Args:
        concept_input: i*, shape (..., c, d).
        concept_dual: of the same shape.
        active: bool, shape (..., c). What is returned for a concept that is not active is 0.
        check: whether parallel concepts are found out, for which a GPU is waited for.

    Returns:
        Of the same shape.

    Raises:
        torch.linalg.LinAlgError: two active concepts are parallel, so that R is singular.

    Example:
        >>> i = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> joint_duals(i, i, check=True)
        tensor([[ 1., -1.],
                [ 0.,  1.]])
    """
    if active is not None:
        concept_dual = concept_dual * active.unsqueeze(-1)
    overlap = concept_dual @ concept_input.mT
    if active is not None:  # a concept that is not gets a row of the identity, which leaves the others alone
        overlap = overlap + torch.diag_embed((~active).to(overlap.dtype))
    solution: Tensor = torch.linalg.solve_ex(overlap, concept_dual, check_errors=check)[0]
    return solution


def add_product(base: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1) -> Tensor:
    """Return base + alpha · left @ right, computed in one kernel.

    For products as thin as these, that takes half of the time.

    Args:
        base: shape (..., n, o).
        left: shape (..., n, c).
        right: shape (c, o), or (b, c, o) if the others have shape (b, n, ...).
        alpha: a factor.

    Example:
        >>> add_product(torch.ones(1, 2), torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[7., 9.]])
    """
    if right.ndim == 3:
        return torch.baddbmm(base, left, right, alpha=alpha)
    if len(right) == 1:
        return torch.addcmul(base, left, right, value=alpha)
    return torch.addmm(base.flatten(0, -2), left.flatten(0, -2), right, alpha=alpha).view(base.shape)


def apply_rank1_edit(
    text_enc: Tensor,
    weight: Tensor,
    concept_input: Tensor,
    concept_dual: Tensor,
    concept_output: Tensor,
    beta: Tensor | float,
    temperature: Tensor | float,
    active: Tensor | None = None,
    gates_removal: Tensor | bool = False,
) -> Tensor:
    """Return the projection with the gated edit of one or several concepts.

        h(e) = W (e − Σⱼ iⱼ r̃ⱼ(e)) + Σⱼ oⱼ* σ((rⱼ(e) − βⱼ) / τⱼ)

    This is Perfusion's eq. 3 for one concept, and its appendix B for several. In the gated form,

        h(e) = W e + Σⱼ σ((rⱼ(e) − βⱼ) / τⱼ) (oⱼ* − W iⱼ r̃ⱼ(e))

    Args:
        text_enc: e, shape (b, n, d).
        weight: W, shape (o, d).
        concept_input, concept_dual, beta, temperature, active, gates_removal: see `split_concepts`.
        concept_output: o*, shape (c, o), or (b, c, o) if each row has its own outputs.

    Returns:
        h(e), shape (b, n, o).

    Example:
        >>> e = i = torch.tensor([[1.0, 0.0]])
        >>> o = torch.tensor([[0.0, 2.0]])
        >>> apply_rank1_edit(e[None], torch.eye(2), i, i, o, beta=0.5, temperature=0.01)
        tensor([[[0., 2.]]])
    """
    rest, gate = split_concepts(
        text_enc, concept_input, concept_dual, beta, temperature, active, gates_removal
    )
    return add_product(F.linear(rest, weight), gate, concept_output)


def overlap_condition(concept_input: Tensor, concept_dual: Tensor) -> float:
    """Return the condition number of R, Rⱼₗ = dualⱼ · iₗ.

    It bounds how much the joint removal of several concepts amplifies rounding errors. It is 1 for orthogonal
    concepts, and (1 + ρ) / (1 − ρ) for two with cosine similarity ρ under the metric C⁻¹.

    Args:
        concept_input: i*, shape (c, d).
        concept_dual: shape (c, d).

    Example:
        >>> i = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> round(overlap_condition(i, i), 3)
        4.0
    """
    # R is similar to the symmetric matrix of the concepts' cosines, so both have the same eigenvalues.
    eigenvalues = torch.linalg.eigvals(concept_dual.double() @ concept_input.double().mT).abs()
    return (eigenvalues.max() / eigenvalues.min()).item()


def rank1_update(
    weight: Tensor, concept_input: Tensor, concept_dual: Tensor, concept_output: Tensor
) -> Tensor:
    """Return the ungated edit as a plain weight, for use without this library.

        Ŵ = W + (O − W I) R⁻¹ K,   Rⱼₗ = dualⱼ · iₗ,   so that   Ŵ iⱼ = oⱼ   for every concept

    With one concept this is ROME's eq. 2, Ŵ = W + Λ (C⁻¹ i*)ᵀ.

    Args:
        weight: W, shape (o, d).
        concept_input: i*, shape (c, d).
        concept_dual: shape (c, d).
        concept_output: o*, shape (c, o).

    Returns:
        Ŵ, shape (o, d), with the weight's dtype.

    Example:
        >>> i = torch.tensor([[1.0, 0.0]])
        >>> rank1_update(torch.eye(2), i, i, torch.tensor([[5.0, 7.0]]))
        tensor([[5., 0.],
                [7., 1.]])
    """
    residual = concept_output - F.linear(concept_input, weight.to(concept_input.dtype))
    overlap = concept_dual @ concept_input.mT
    return weight + (residual.mT @ torch.linalg.solve(overlap, concept_dual)).to(weight.dtype)


def mean_of_seen_slots(values: Tensor, seen: Tensor) -> Tensor:
    """Return the mean of each concept's statistic over the prompt slots that it was seen in.

    Args:
        values: shape (c, p, d).
        seen: bool, shape (c, p).

    Returns:
        The means, shape (c, d); 0 where no slot was seen.

    Example:
        >>> mean_of_seen_slots(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[3.]])
    """
    if values.shape[1] == 1:
        return values.squeeze(1)  # a slot that was never seen holds 0
    return (values * seen.unsqueeze(-1)).sum(dim=1) / seen.sum(dim=1, keepdim=True).clamp_min(1)
