"""The maths of key-locked rank-1 editing, on tensors.

Perfusion (Tewel et al. 2023, arXiv 2305.01644) eq. 3 and appendix B; ROME (Meng et al. 2022, arXiv 2202.05262) eq. 2.

    paper    here             meaning
    W        weight           the frozen projection (o, d)
    C        covariance       second moment of the text encodings (d, d)
    e        text_enc         text encodings that reach the projection (b, n, d)
    i*       concept_input    the concept's target input (c, d)
    C⁻¹ i*   concept_dual     divided by ⟨i*, i*⟩ = i*ᵀ C⁻¹ i*, so that r(e) = concept_dual · e (c, d)
    o*       concept_output   the concept's target output (c, o)
    β, τ     beta, temperature  the gate's bias and temperature (c,)

Axes: b batch, n tokens, c concepts, d input features, o output features. A leading `...` is a batch axis that may be absent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def concept_dual(concept_input: Tensor, inverse_covariance: Tensor) -> Tensor:
    """Return the vector whose product with an encoding is its similarity to the concept.

        dual = C⁻¹ i* / ⟨i*, i*⟩,   so that   r(e) = ⟨i*, e⟩ / ⟨i*, i*⟩ = dual · e   (Perfusion, eq. 3)

    Args:
        concept_input: i*, shape (..., d).
        inverse_covariance: C⁻¹, symmetric, shape (d, d).

    Returns:
        The dual, shape (..., d). Scaling C does not change it.

    Example:
        >>> concept_dual(torch.tensor([3.0, 0.0]), torch.eye(2))
        tensor([0.3333, 0.0000])
    """
    image = concept_input @ inverse_covariance
    return image / (image * concept_input).sum(dim=-1, keepdim=True)


def concept_similarity(text_enc: Tensor, concept_dual: Tensor) -> Tensor:
    """Return r(e), how much of each concept is in each encoding: 1 at the concept itself, near 0 at unrelated tokens.

    Args:
        text_enc: e, shape (b, n, d).
        concept_dual: shape (c, d), or (b, c, d) for a dual of each row's own.

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
) -> tuple[Tensor, Tensor]:
    """Return the encodings without their part in the concepts, and each concept's gate.

        rest(e) = e − Σⱼ iⱼ r̃ⱼ(e),   r̃ = R⁻¹ r,   Rⱼₗ = dualⱼ · iₗ          gateⱼ(e) = σ((rⱼ(e) − βⱼ) / τⱼ)

    The part is that in the joint span of the concepts under the metric C⁻¹ (appendix B); for one concept R = 1 (eq. 3).

    Args:
        text_enc: e, shape (b, n, d).
        concept_input: i*, shape (c, d), or (b, c, d) for inputs of each row's own; so is the next.
        concept_dual: shape (..., c, d).
        beta: gate bias, shape (c,) or a number; dimensionless: 1.0 is the concept itself.
        temperature: gate temperature, shape (c,) or a number, above 0.
        active: bool, shape (..., c); a concept that is not active removes nothing, and its gate is 0. None means all.

    Returns:
        The rest, shape (b, n, d), and the gates, shape (b, n, c).

    Raises:
        torch.linalg.LinAlgError: two active concepts are parallel, so that R is singular.

    Example:
        >>> i = torch.tensor([[1.0, 0.0]])
        >>> split_concepts(torch.tensor([[[2.0, 3.0]]]), i, i, beta=2.0, temperature=0.1)
        (tensor([[[0., 3.]]]), tensor([[[0.5000]]]))
    """
    if active is not None:
        concept_dual = concept_dual * active.unsqueeze(-1)
        beta = torch.as_tensor(beta, dtype=text_enc.dtype, device=text_enc.device)
        beta = torch.where(active, beta, torch.inf).unsqueeze(-2)
    similarity = concept_similarity(text_enc, concept_dual)
    gate = torch.sigmoid((similarity - beta) / temperature)
    if concept_input.shape[-2] > 1:
        overlap = concept_dual @ concept_input.mT
        if (
            active is not None
        ):  # an inactive concept is a row of the identity, so that the solve leaves the others alone
            overlap = overlap + torch.diag_embed((~active).to(overlap.dtype))
        concept_input = torch.linalg.solve(overlap.mT, concept_input)  # Σⱼ iⱼ r̃ⱼ = rᵀ R⁻ᵀ I
    return add_product(text_enc, similarity, concept_input, alpha=-1), gate


def add_product(base: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1) -> Tensor:
    """Return base + alpha · left @ right in one kernel, which for these thin products saves half of the time.

    Args:
        base: shape (..., n, o).
        left: shape (..., n, c).
        right: shape (c, o), or (b, c, o) for (b, n, ...) arguments.
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
) -> Tensor:
    """Return the projection with the gated edit of one or several concepts.

        h(e) = W (e − Σⱼ iⱼ r̃ⱼ(e)) + Σⱼ oⱼ* σ((rⱼ(e) − βⱼ) / τⱼ)   (Perfusion, eq. 3 for one concept, appendix B for several)

    Args:
        text_enc: e, shape (b, n, d).
        weight: W, shape (o, d).
        concept_input, concept_dual, beta, temperature, active: see `split_concepts`.
        concept_output: o*, shape (c, o), or (b, c, o) for each row's own.

    Returns:
        h(e), shape (b, n, o).

    Example:
        >>> e = i = torch.tensor([[1.0, 0.0]])
        >>> apply_rank1_edit(e[None], torch.eye(2), i, i, torch.tensor([[0.0, 2.0]]), beta=0.5, temperature=0.01)
        tensor([[[0., 2.]]])
    """
    rest, gate = split_concepts(text_enc, concept_input, concept_dual, beta, temperature, active)
    return add_product(F.linear(rest, weight), gate, concept_output)


def overlap_condition(concept_input: Tensor, concept_dual: Tensor) -> float:
    """Return the condition number of R, Rⱼₗ = dualⱼ · iₗ: how much the joint removal of several concepts amplifies rounding errors.

    It is 1 for orthogonal concepts, and (1 + ρ) / (1 − ρ) for two of cosine similarity ρ under the metric C⁻¹.

    Args:
        concept_input: i*, shape (c, d).
        concept_dual: shape (c, d).

    Example:
        >>> i = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> round(overlap_condition(i, i), 3)
        4.0
    """
    # R is similar to the symmetric matrix of cosines, so its eigenvalues are that matrix's, whatever the concepts' lengths.
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
        Ŵ, shape (o, d), of the weight's dtype.

    Example:
        >>> rank1_update(torch.eye(2), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 7.0]]))
        tensor([[5., 0.],
                [7., 1.]])
    """
    residual = concept_output - F.linear(concept_input, weight.to(concept_input.dtype))
    overlap = concept_dual @ concept_input.mT
    return weight + (residual.mT @ torch.linalg.solve(overlap, concept_dual)).to(weight.dtype)
