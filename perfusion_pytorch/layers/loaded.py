"""Layers and embeddings that apply loaded concepts: their state dict is that of the base model."""

from collections.abc import Iterable

from torch import nn


def leave_out_of_state_dict_(module: nn.Module, names: Iterable[str]) -> None:
    """Make these parameters and buffers of a module buffers that its state dict leaves out, in place.

    A loaded concept is kept in its file, and the base model is what users save, copy into a ControlNet, or
    load other weights into. As buffers they still move and copy with the module.

    Args:
        module: the module.
        names: those that the module does not have are ignored.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> leave_out_of_state_dict_(layer, ["bias"])
        >>> list(layer.state_dict()), layer.bias.shape
        (['weight'], torch.Size([2]))
    """
    for name in names:
        if (value := getattr(module, name, None)) is None:
            continue
        delattr(module, name)
        module.register_buffer(name, value.detach(), persistent=False)
