"""The projection that a layer with edits stands for: its weight and bias, frozen, under the same names."""

from __future__ import annotations

from torch import nn

from perfusion_pytorch.layers.original import OriginalProjection


class WrappedProjection(nn.Linear):
    """A frozen key or value projection in the place of another, whose own weight and bias it takes over.

    It draws no random numbers, and has the same state-dict keys.

    Args:
        proj: the projection.
        is_key_proj: True for keys, False for values.

    Attributes:
        original: the projection, for `unwrap_cross_attentions_`; not registered as a submodule.
    """

    def __init__(self, proj: nn.Linear, *, is_key_proj: bool) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw random numbers
        self.in_features = proj.in_features
        self.out_features = proj.out_features
        self.weight = proj.weight
        self.bias = proj.bias
        self.train(proj.training)
        self.original = OriginalProjection.frozen(proj)
        self.is_key_proj = is_key_proj
