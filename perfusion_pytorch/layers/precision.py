"""Keep what is averaged or learned in float32, through conversions to half precision and under autocast."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def kept_in_float32(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Undo, within the block, what a conversion to float16 or bfloat16 does to these parameters and buffers; devices still change.

    A bfloat16 average at decay 0.99 would never move, and neither would a half precision parameter at a small learning rate.
    """
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    values = {name: (t.detach(), None if t.grad is None else t.grad.detach()) for name, t in before.items()}
    yield
    for name, (value, grad) in values.items():
        now = getattr(module, name)
        if now.dtype in (torch.float16, torch.bfloat16):
            now.data = value.to(now.device)
            now.grad = None if grad is None else grad.to(now.device)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Return a context in which autocast is off on the tensor's device; entering autocast costs time, so only where it is on."""
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else nullcontext()


def is_autocast(tensor: Tensor) -> bool:
    """Tell whether autocast is on for the tensor's device; it never is on the meta device."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
