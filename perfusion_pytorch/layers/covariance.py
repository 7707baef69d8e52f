"""The input covariance C of a text encoder: estimate it from captions, check it, invert it, save and load it."""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from beartype import beartype
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from perfusion_pytorch.files import write_atomically

MIN_RECIPROCAL_CONDITION = 1e-12
LARGE_CONDITION = 1e8


class InputCovariance:
    """The uncentred second moment of a text encoder's token encodings, C = E[e eᵀ], and its inverse.

    One object serves every wrapped layer of a model. It is no module and no buffer: `.to`, a state dict and data parallelism never see it.
    The sum and the number of tokens are kept in float64 on the CPU, so more encodings can be added and partial sums merged at any time.

    Args:
        covariance: C, shape (d, d), any floating dtype; symmetrised as (C + Cᵀ) / 2.
        num_tokens: how many tokens C is the mean over; matters for `update` and `merge` only.
        ridge: λ ≥ 0, dimensionless; the inverse is that of C + λ tr(C)/d · I.

    Raises:
        ValueError: C is not square or not finite, or the ridge is negative. A singular C is an error when its inverse is first asked for.

    Example:
        >>> covariance = InputCovariance(torch.diag(torch.tensor([1.0, 4.0])))
        >>> covariance.inverse()
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2500]])
        >>> covariance.condition_number
        4.0
    """

    @beartype
    def __init__(self, covariance: Tensor, *, num_tokens: int = 1, ridge: float | int = 0.0):
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            raise ValueError(
                f"The covariance must be square, (d, d), got {tuple(covariance.shape)}. Pass C = E[e eᵀ] of the text encodings."
            )
        if not covariance.isfinite().all():
            raise ValueError(
                "The covariance must be finite, but it holds NaN or infinity. Recompute it in float32 or float64."
            )
        if num_tokens < 0:
            raise ValueError(f"`num_tokens` must be at least 0, got {num_tokens}.")
        if not ridge >= 0 or ridge == float("inf"):
            raise ValueError(f"`ridge` must be a finite number of at least 0, got {ridge}.")
        covariance = covariance.detach().to("cpu", torch.float64)
        self._sum = (covariance + covariance.mT) / 2 * num_tokens
        self.num_tokens = num_tokens
        self.ridge = float(ridge)
        self._inverses = {}

    @classmethod
    def empty(cls, dim: int, *, ridge: float = 0.0) -> "InputCovariance":
        """Return a covariance of no tokens yet, to be filled by `update` or `merge`."""
        return cls(torch.zeros(dim, dim), num_tokens=0, ridge=ridge)

    @property
    def dim(self) -> int:
        """Number of input features, d."""
        return self._sum.shape[0]

    @property
    def matrix(self) -> Tensor:
        """C without the ridge, shape (d, d), float64, on the CPU."""
        if self.num_tokens == 0:
            raise RuntimeError("The covariance holds no tokens yet. Call `update` with encodings first.")
        return self._sum / self.num_tokens

    @property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue in magnitude, of C with its ridge."""
        eigenvalues = torch.linalg.eigvalsh(self._regularised()).abs()
        return (eigenvalues.max() / eigenvalues.min()).item()

    def _regularised(self) -> Tensor:
        matrix = self.matrix
        return matrix + self.ridge * matrix.trace() / self.dim * torch.eye(self.dim, dtype=matrix.dtype)

    @beartype
    def update(self, encodings: Tensor, mask: Tensor | None = None) -> "InputCovariance":
        """Add encodings to the sum, in place.

        Args:
            encodings: shape (b, n, d) or (n, d), any floating dtype and device.
            mask: bool or 0/1, shape (b, n) or (n,): the tokens that count. None means all.

        Returns:
            This object.

        Raises:
            ValueError: a shape does not fit, or an encoding that counts is not finite; nothing is added then.
        """
        if encodings.ndim not in (2, 3) or encodings.shape[-1] != self.dim:
            raise ValueError(
                f"`encodings` must have shape (b, n, {self.dim}) or (n, {self.dim}), got {tuple(encodings.shape)}."
            )
        if mask is not None and mask.shape != encodings.shape[:-1]:
            raise ValueError(
                f"`mask` must have the encodings' shape without features, {tuple(encodings.shape[:-1])}, got {tuple(mask.shape)}."
            )
        tokens = rearrange(encodings.detach(), "... d -> (...) d")
        if (
            mask is not None
            and not (counts := rearrange(mask, "... -> (...)").bool().to(tokens.device)).all()
        ):
            tokens = tokens[counts]
        # Formed where the encodings are, and in float64: float32's rounding would be seen in the smallest directions.
        tokens = (
            tokens.cpu().double() if tokens.device.type == "mps" else tokens.double()
        )  # Apple's GPUs have no float64
        product = (tokens.mT @ tokens).cpu()
        if not product.isfinite().all():
            raise ValueError(
                "`encodings` must be finite where the mask counts them, but some are NaN or infinite."
            )
        self._sum += product
        self.num_tokens += len(tokens)
        self._inverses.clear()
        return self

    @beartype
    def merge(self, other: "InputCovariance") -> "InputCovariance":
        """Add another covariance's sum and tokens to this one, in place: the same as one pass over the captions of both."""
        if other.dim != self.dim:
            raise ValueError(f"Only covariances of one width can be merged, got {self.dim} and {other.dim}.")
        self._sum += other._sum
        self.num_tokens += other.num_tokens
        self._inverses.clear()
        return self

    def inverse(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (C + λ tr(C)/d · I)⁻¹, shape (d, d), computed in float64 once and kept for each device and dtype.

        Raises:
            ValueError: the reciprocal condition number is below 1e-12.

        Warns:
            UserWarning: C is not positive definite, or its condition number is above 1e8.
        """
        key = (torch.device(device), dtype)
        if key not in self._inverses:
            if not self._inverses:
                self._check()
            self._inverses[key] = torch.linalg.inv(self._regularised()).to(*key)
        return self._inverses[key]

    def _check(self):
        eigenvalues = torch.linalg.eigvalsh(self._regularised())
        largest, smallest = eigenvalues.abs().max(), eigenvalues.abs().min()
        remedy = "Estimate it from more captions, or pass `InputCovariance(C, ridge=1e-6)`."
        if not smallest > MIN_RECIPROCAL_CONDITION * largest:
            raise ValueError(
                f"The covariance must be invertible, but its reciprocal condition number is below {MIN_RECIPROCAL_CONDITION:g}. {remedy}"
            )
        if eigenvalues.min() < 0:
            warnings.warn(
                "The covariance is not positive definite, so similarities to the concept mean little. Compute the real one with "
                "`calculate_input_covariance`.",
                stacklevel=4,
            )
        elif largest > LARGE_CONDITION * smallest:
            warnings.warn(
                f"The covariance is ill-conditioned ({largest / smallest:.1e}), so the metric measures noise. {remedy}",
                stacklevel=4,
            )

    @beartype
    def save(self, path: str | os.PathLike) -> None:
        """Write C (float32), the number of tokens and the ridge as a safetensors file, atomically."""
        about = {"num_tokens": self.num_tokens, "ridge": self.ridge}
        metadata = {"format": "pt", "input_covariance": json.dumps(about)}
        write_atomically(path, save({"covariance": self.matrix.float().contiguous()}, metadata))

    @classmethod
    @beartype
    def load(cls, path: str | os.PathLike) -> "InputCovariance":
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no covariance.
        """
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if "covariance" not in names:
                raise ValueError(
                    f"{path} must hold a tensor named 'covariance', but it holds {sorted(names)}."
                )
            about = json.loads((file.metadata() or {}).get("input_covariance", "{}"))
            return cls(file.get_tensor("covariance"), **about)

    def __repr__(self):
        return f"InputCovariance(dim={self.dim}, num_tokens={self.num_tokens}, ridge={self.ridge:g})"


@beartype
def calculate_input_covariance(
    texts: Iterable[str],
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    *,
    batch_size: int = 32,
    ridge: float | int = 0.0,
    progress: Callable[[Iterator], Iterable] | None = None,
) -> InputCovariance:
    """Estimate the input covariance of a text encoder from captions, in memory that does not grow with their number.

    Args:
        texts: the captions; may be a generator. The paper uses 100K.
        encode: `texts -> (encodings (b, n, d), mask (b, n))`; the mask tells which tokens count (no padding).
        batch_size: captions at a time.
        ridge: see `InputCovariance`.
        progress: wraps the iterator over batches, for instance `tqdm`.

    Returns:
        The mean of e eᵀ over all tokens that count.

    Raises:
        ValueError: there are no captions, or an encoding does not fit.

    Example:
        >>> encode = lambda texts: (torch.eye(2).repeat(len(texts), 1, 1), torch.ones(len(texts), 2, dtype=torch.bool))
        >>> calculate_input_covariance(["a cat", "a dog"], encode).matrix
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    texts = iter(texts)
    batches = iter(lambda: list(islice(texts, batch_size)), [])
    covariance, before = None, None
    for batch in batches if progress is None else progress(batches):
        with torch.no_grad():
            encoded = encode(batch)
        if before is None:
            covariance = InputCovariance.empty(encoded[0].shape[-1], ridge=ridge)
        else:
            covariance.update(*before)  # which waits for the device: it has the next batch to work on already
        before = encoded
    if before is not None:
        covariance.update(*before)
    if covariance is None or covariance.num_tokens == 0:
        raise ValueError("`texts` must hold at least one caption with a token that counts, got none.")
    return covariance
