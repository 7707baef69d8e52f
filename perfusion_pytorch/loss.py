"""The training loss, weighted by a mask of the object."""

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor


@beartype
def loss_fn_weighted_by_mask(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the squared error, weighted by a soft mask of the object (Perfusion, section 4).

        loss = mean over all pixels and channels of  mask / max(mask) · (prediction − target)²

    The maximum is taken for each image.

    Args:
        prediction: shape (b, channels, h, w), any floating dtype; the loss is computed in float32 at least.
        target: the same shape.
        mask: shape (b, h, w) or (b, 1, h, w), non-negative, any scale; an image whose mask is all zero adds
            nothing.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: a shape does not fit, or the mask is negative or not finite.

    Example:
        >>> mask = torch.tensor([[[0.0, 2.0]]])
        >>> loss_fn_weighted_by_mask(torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1, 2), mask)
        tensor(0.5000)
    """
    if prediction.ndim != 4 or prediction.shape != target.shape:
        raise ValueError(
            "`prediction` and `target` must share a shape (b, channels, h, w), "
            f"got {tuple(prediction.shape)} and {tuple(target.shape)}."
        )
    b, _, h, w = prediction.shape
    if mask.shape not in ((b, h, w), (b, 1, h, w)):
        raise ValueError(
            f"`mask` must have shape {(b, h, w)} or {(b, 1, h, w)} to match the prediction, "
            f"got {tuple(mask.shape)}. Resize it first."
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    mask = rearrange(mask, "b ... h w -> b (...) h w").to(dtype)
    if not (mask.isfinite() & (mask >= 0)).all():
        raise ValueError(
            "`mask` must be non-negative and finite, but holds negative, NaN or infinite numbers."
        )
    mask = mask / mask.amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    return (mask * (prediction.to(dtype) - target.to(dtype)).square()).mean()
