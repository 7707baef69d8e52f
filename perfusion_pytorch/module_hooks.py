"""What others hang on a module: it moves along when another module takes its place."""

from typing import Any

from torch import nn

from perfusion_pytorch.extras import required

# The dictionaries in which torch keeps a module's hooks on its calls.
CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
DIFFUSERS_HOOKS = "_diffusers_hook"  # attribute of a module: diffusers' registry of its hooks
CASTING = "layerwise_casting"  # diffusers' names of hooks in there
GROUP_OFFLOADING = "group_offloading"


def diffusers_hook(module: nn.Module, name: str) -> Any:
    """Return the hook of this name that diffusers has on a module, or None."""
    registry: Any = vars(module).get(DIFFUSERS_HOOKS)
    return None if registry is None else registry.get_hook(name)


def take_over_hooks_(module: nn.Module, replaced: nn.Module) -> None:
    """Let a module have the hooks of the one whose place it takes, in place.

    Hooks on calls are shared, so that one which is added or removed later is so on both. Layerwise casting is
    applied to the module anew, which may convert its weight.

    Args:
        module: the new module.
        replaced: the module that stood in its place; it keeps its hooks.
    """
    for name in CALL_HOOKS:
        setattr(module, name, getattr(replaced, name))
    casting = diffusers_hook(replaced, CASTING)
    if casting is not None and diffusers_hook(module, CASTING) is None:
        apply = required("diffusers.hooks.layerwise_casting").apply_layerwise_casting_hook
        apply(module, casting.storage_dtype, casting.compute_dtype, casting.non_blocking)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module itself where `torch.compile` has put another one around it."""
    while isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    return model
