"""The metric of the edit, ⟨a, b⟩ = aᵀ C⁻¹ b, with C the input covariance.

It has a module of its own because the functions in `functional.py` take an argument named `concept_dual`.
"""

from torch import Tensor


def dual_and_norm(concept_input: Tensor, inverse_covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the dual of a concept's input, and the squared norm that it was divided by.

        norm = ⟨i*, i*⟩ = i*ᵀ C⁻¹ i*,   dual = C⁻¹ i* / norm

    Args:
        concept_input: i*, shape (..., d).
        inverse_covariance: C⁻¹, symmetric, shape (d, d).

    Returns:
        The dual, shape (..., d), and the norm, shape (..., 1).

    Example:
        >>> dual_and_norm(torch.tensor([2.0, 0.0]), torch.eye(2))
        (tensor([0.5000, 0.0000]), tensor([4.]))
    """
    image = concept_input @ inverse_covariance
    norm = (image * concept_input).sum(dim=-1, keepdim=True)
    return image / norm, norm


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
    return dual_and_norm(concept_input, inverse_covariance)[0]
