"""Averages and learned parameters stay in float32, also in half precision models and under autocast."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def kept_in_float32(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Keep these parameters and buffers as they are when the block converts a module to lower precision.

    A bfloat16 average at decay 0.99 would never move, and neither would a parameter in half precision at a
    small learning rate. Moves to another device still take effect.

    Args:
        module: the module that the block converts.
        names: parameters and buffers; those that the module does not have are ignored.
    """
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    values = {name: (t.detach(), None if t.grad is None else t.grad.detach()) for name, t in before.items()}
    yield
    for name, (value, grad) in values.items():
        now = getattr(module, name)
        if now.dtype not in (torch.float32, torch.float64) and value.dtype in (torch.float32, torch.float64):
            now.data = value.to(now.device)
            now.grad = None if grad is None else grad.to(now.device)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Return a context in which autocast is off on the tensor's device.

    Entering `torch.autocast` takes time, so this does it only if autocast is on.
    """
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else nullcontext()


def is_autocast(tensor: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device; on the meta device it never is."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
