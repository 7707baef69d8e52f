"""Offloading and concepts: which kinds are taken off while modules change, and which are refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from perfusion_pytorch.module_hooks import GROUP_OFFLOADING, diffusers_hook
from perfusion_pytorch.pipelines.parts import denoiser_of, text_encoders_of
from perfusion_pytorch.protocols import Pipeline


def check_offloading(pipe: Pipeline) -> None:
    """Check that concepts can be put on a pipeline, or taken off, as it is offloaded.

    Raises:
        ValueError: weights are offloaded in a way that only the user can undo; the message says how.
    """
    modules = {"denoiser": denoiser_of(pipe)}
    modules |= {name: encoder for name, (encoder, _) in text_encoders_of(pipe).items()}
    for name, module in modules.items():
        kinds = _offloading_of(module)
        if "groups" in kinds:
            raise ValueError(
                f"Concepts cannot come or go while the pipeline's {name} ({type(module).__name__}) is "
                "offloaded in groups. Load and set them first, and enable group offloading then."
            )
        if "pieces" in kinds and not _by_pipeline(pipe):
            raise ValueError(
                f"Concepts cannot come or go while the pipeline's {name} ({type(module).__name__}) is "
                "offloaded by hooks that this pipeline did not set. Take them off with "
                "`accelerate.hooks.remove_hook_from_submodules`, and offload again afterwards."
            )


def _offloading_of(module: nn.Module) -> set[str]:
    """Return how parts of a module are offloaded: in groups, or in pieces by hooks of accelerate."""
    kinds = set()
    for part in module.modules():
        if diffusers_hook(part, GROUP_OFFLOADING) is not None:
            kinds.add("groups")
        if part is not module and "_hf_hook" in vars(part):
            kinds.add("pieces")
    return kinds


def _by_pipeline(pipe: Pipeline) -> bool:
    return getattr(pipe, "_offload_device", None) is not None


@contextmanager
def without_offloading(pipe: Pipeline) -> Iterator[None]:
    """Take a pipeline's offloading piece by piece off while its modules change, as diffusers' own loaders do.

    It keeps weights on the meta device between calls, where none can be read or wrapped. Offloading of whole
    modules may stay: its hooks are around them.

    Raises:
        ValueError: the pipeline is offloaded in a way that only the user can undo; nothing has changed.
    """
    check_offloading(pipe)
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    if not _by_pipeline(pipe) or not any("pieces" in _offloading_of(module) for module in modules):
        yield
        return
    offloaded: Any = pipe
    device = offloaded._offload_device
    offloaded.remove_all_hooks()
    try:
        yield
    finally:
        offloaded.enable_sequential_cpu_offload(device=device)
