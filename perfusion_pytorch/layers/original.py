"""The projection that a wrapped layer stands for, kept so that it can be put back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, eq=False)
class OriginalProjection:
    """A wrapped projection, and whether its parameters required gradients before they were frozen.

    A layer that holds it in this object does not register it as a submodule.
    """

    module: nn.Linear
    requires_grad: tuple[bool, ...]

    @classmethod
    def frozen(cls, proj: nn.Linear) -> OriginalProjection:
        """Freeze a projection's parameters, in place, and return it with their former flags."""
        flags = tuple(parameter.requires_grad for parameter in proj.parameters())
        proj.requires_grad_(False)
        return cls(proj, flags)

    def restored(self, layer: nn.Linear) -> nn.Linear:
        """Return the very module that was wrapped, with its own `requires_grad` flags.

        Args:
            layer: the layer over it; its weight, bias and mode, which may have changed since, are taken over.
        """
        self.module.weight = layer.weight
        self.module.bias = layer.bias
        for parameter, flag in zip(self.module.parameters(), self.requires_grad, strict=True):
            parameter.requires_grad_(flag)
        return self.module.train(layer.training)
