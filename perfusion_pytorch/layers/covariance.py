"""The input covariance C of a text encoder: its estimate from captions, its inverse, and its file."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.layers.covariance_file import covariance_bytes, read_covariance_file
from perfusion_pytorch.user_warnings import warn_user

MIN_RECIPROCAL_CONDITION = 1e-12
LARGE_CONDITION = 1e8


class InputCovariance:
    """The uncentred second moment of a text encoder's token encodings, C = E[e eᵀ], and its inverse.

    One object serves every wrapped layer of a model. It is neither a module nor a buffer: `.to`, state
    dicts and data parallelism never see it. The sum over tokens is kept in float64 on the CPU beside their
    number, so encodings can be added and partial sums merged at any time.

    Args:
        covariance: C, shape (d, d), any floating dtype; symmetrised as (C + Cᵀ) / 2.
        num_tokens: how many tokens C is the mean of; it matters only for `update` and `merge`.
        ridge: λ ≥ 0, dimensionless; the inverse is that of C + λ tr(C)/d · I.

    Raises:
        ValueError: C is not square or not finite, or the ridge is negative. A singular C is an error only
            when its inverse is first needed.

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
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not len(covariance):
            raise ValueError(
                f"The covariance must be square, (d, d), got {tuple(covariance.shape)}. "
                "Pass C = E[e eᵀ] of the text encodings."
            )
        if covariance.is_complex():
            raise ValueError(f"The covariance must be of real numbers, got {covariance.dtype}.")
        if not covariance.isfinite().all():
            raise ValueError(
                "The covariance must be finite, but it holds NaN or infinity. "
                "Recompute it in float32 or float64."
            )
        if num_tokens < 0:
            raise ValueError(f"`num_tokens` must be at least 0, got {num_tokens}.")
        if not ridge >= 0 or ridge == float("inf"):
            raise ValueError(f"`ridge` must be a finite number of at least 0, got {ridge}.")
        covariance = covariance.detach().to("cpu", torch.float64)
        self._sum = (covariance + covariance.mT) / 2 * num_tokens
        self.num_tokens = num_tokens
        self.ridge = float(ridge)
        self._inverses: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def empty(cls, dim: int, *, ridge: float = 0.0) -> "InputCovariance":
        """Return a covariance without any tokens, to be filled by `update` or `merge`.

        Raises:
            ValueError: the width is below 1, or the ridge is negative.
        """
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1, got {dim}.")
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
            mask: bool or 0/1, shape (b, n) or (n,): which tokens count. None means that all do.

        Returns:
            This object.

        Raises:
            ValueError: a shape does not fit, or an encoding that counts is not finite. Then nothing is added.
        """
        if encodings.ndim not in (2, 3) or encodings.shape[-1] != self.dim:
            raise ValueError(
                f"`encodings` must have shape (b, n, {self.dim}) or (n, {self.dim}), "
                f"got {tuple(encodings.shape)}."
            )
        if mask is not None and mask.shape != encodings.shape[:-1]:
            raise ValueError(
                f"`mask` must have the encodings' shape without features, {tuple(encodings.shape[:-1])}, "
                f"got {tuple(mask.shape)}."
            )
        tokens = rearrange(encodings.detach(), "... d -> (...) d")
        if mask is not None:
            counts = rearrange(mask, "... -> (...)").bool().to(tokens.device)
            tokens = tokens if counts.all() else tokens[counts]
        # On the encodings' device if it has float64, which Apple's GPUs do not. In float32, rounding would
        # show in the smallest directions.
        tokens = tokens.cpu().double() if tokens.device.type == "mps" else tokens.double()
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
        """Add another covariance's sum and tokens to this one, in place.

        The result is that of one pass over the captions of both.

        Returns:
            This object.

        Raises:
            ValueError: the other one has another width.
        """
        if other.dim != self.dim:
            raise ValueError(f"Only covariances of one width can be merged, got {self.dim} and {other.dim}.")
        self._sum += other._sum
        self.num_tokens += other.num_tokens
        self._inverses.clear()
        return self

    def inverse(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (C + λ tr(C)/d · I)⁻¹, shape (d, d).

        It is computed in float64, once for each device and dtype.

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

    def is_proportional_to(self, other: "InputCovariance") -> bool:
        """Return whether another covariance is this one times a factor, with the same ridge.

        The edit does not change when C is scaled.
        """
        if other is self:
            return True
        ours = self.matrix / self.matrix.trace()
        theirs = other.matrix / other.matrix.trace()
        return self.ridge == other.ridge and torch.allclose(
            ours, theirs, rtol=1e-4, atol=1e-6 * ours.abs().max().item()
        )

    def _check(self) -> None:
        eigenvalues = torch.linalg.eigvalsh(self._regularised())
        largest, smallest = eigenvalues.abs().max(), eigenvalues.abs().min()
        remedy = "Estimate it from more captions, or pass `InputCovariance(C, ridge=1e-6)`."
        if not smallest > MIN_RECIPROCAL_CONDITION * largest:
            raise ValueError(
                "The covariance must be invertible, but its reciprocal condition number is below "
                f"{MIN_RECIPROCAL_CONDITION:g}. {remedy}"
            )
        if eigenvalues.min() < 0:
            warn_user(
                "The covariance is not positive definite, so similarities to the concept mean little. "
                "Compute the real one with `calculate_input_covariance`."
            )
        elif largest > LARGE_CONDITION * smallest:
            warn_user(
                f"The covariance is ill-conditioned ({largest / smallest:.1e}), "
                f"so the metric measures noise. {remedy}"
            )

    @beartype
    def save(self, path: str | os.PathLike) -> None:
        """Write C, the number of tokens and the ridge to a safetensors file, atomically.

        C is written in float32, or in float64 where its numbers are too large or too small for that. A
        checksum goes with it, so that `load` refuses a file that was damaged since.

        Raises:
            OSError: the file cannot be written; its old content is still there.
        """
        facts = {"num_tokens": self.num_tokens, "ridge": self.ridge}
        matrix = self.matrix.float()
        diagonal = self.matrix.diagonal()
        if not torch.allclose(matrix.double().diagonal(), diagonal, rtol=1e-6, atol=0):
            matrix = self.matrix
        write_atomically(path, covariance_bytes(matrix, facts))

    @classmethod
    @beartype
    def load(cls, path: str | os.PathLike) -> "InputCovariance":
        """Read and check a file that `save` wrote, one of the cache, or an older one without a checksum.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged or holds no covariance. Without a checksum, damage is found where
                the matrix is no longer symmetric or finite.
        """
        covariance, facts = read_covariance_file(Path(path))
        return cls(covariance, **facts)

    def __repr__(self) -> str:
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
    """Estimate the input covariance of a text encoder from captions.

    The memory that it needs does not grow with the number of captions.

    Args:
        texts: the captions; may be a generator. The paper uses 100K.
        encode: `texts -> (encodings (b, n, d), mask (b, n))`; the mask marks the tokens that count (not
            padding).
        batch_size: captions at a time.
        ridge: see `InputCovariance`.
        progress: wraps the iterator over batches, for instance `tqdm`.

    Returns:
        The mean of e eᵀ over all tokens that count.

    Raises:
        ValueError: there are no captions, they are one text, the batch size is below 1, or an encoding does
            not fit.

    Example:
        >>> def encode(texts):
        ...     return torch.eye(2).repeat(len(texts), 1, 1), torch.ones(len(texts), 2, dtype=torch.bool)
        >>> calculate_input_covariance(["a cat", "a dog"], encode).matrix
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    if isinstance(texts, str):
        raise ValueError(f"`texts` must be several captions, got one text, {texts[:40]!r}. Pass a list.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    texts = iter(texts)
    batches = iter(lambda: list(islice(texts, batch_size)), [])
    covariance: InputCovariance | None = None
    waiting: tuple[Tensor, Tensor] | None = None
    for batch in batches if progress is None else progress(batches):
        with torch.no_grad():
            encoded = encode(batch)
        if covariance is None:
            covariance = InputCovariance.empty(encoded[0].shape[-1], ridge=ridge)
        if waiting is not None:
            covariance.update(*waiting)  # this waits for the device, which by now works on the next batch
        waiting = encoded
    if covariance is not None and waiting is not None:
        covariance.update(*waiting)
    if covariance is None or covariance.num_tokens == 0:
        raise ValueError("`texts` must hold at least one caption with a token that counts, got none.")
    return covariance
