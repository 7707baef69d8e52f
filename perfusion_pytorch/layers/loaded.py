"""Layers that apply loaded concepts: they hold nothing but the projection of the base model."""

from torch import Tensor, nn

from perfusion_pytorch.layers.checks import check_text_enc
from perfusion_pytorch.layers.precision import without_autocast
from perfusion_pytorch.layers.row_edits import RowEdits
from perfusion_pytorch.layers.wrapped import WrappedProjection


class LoadedProjection(WrappedProjection):
    """A projection with the edits of loaded concepts, each on the rows whose prompts hold it (eq. 3).

    Its state dict, parameters and buffers are those of the projection. Axes: b batch, n tokens, d input
    features, o output features.

    Args:
        proj: the projection to wrap.
        is_key_proj: True for keys, False for values.
        edits: the concepts, which all layers of a denoiser share.
        name: the projection's name in the denoiser as it was built.
    """

    text_seq_len: int | None = None

    def __init__(self, proj: nn.Linear, *, is_key_proj: bool, edits: RowEdits, name: str) -> None:
        super().__init__(proj, is_key_proj=is_key_proj)
        self.edits = edits
        self.name = name

    def forward(self, text_enc: Tensor) -> Tensor:
        """Return keys or values, shape (b, n, o), with the dtype of the plain projection.

        Args:
            text_enc: e, shape (b, n, d); (n, d) is one row.

        Raises:
            ValueError: the shape or the dtype does not fit.
        """
        check_text_enc(self, text_enc)
        if text_enc.ndim == 2:
            return self(text_enc.unsqueeze(0)).squeeze(0)
        split = self.edits.split(text_enc)
        if self.is_key_proj:
            return super().forward(split.keys)
        projected = super().forward(split.rest)
        with without_autocast(text_enc):
            return self.edits.add_outputs(projected, split, self.name)

    def extra_repr(self) -> str:
        """Return what `repr` shows: the linear layer's sizes and the kind."""
        return f"{super().extra_repr()}, is_key_proj={self.is_key_proj}"
