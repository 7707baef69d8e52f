"""What of a diffusers pipeline concepts are put on: its denoiser, its text encoders, and what is loaded there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.wiring import cross_attention_projections

CONCEPTS = "_perfusion_concepts"  # attribute of the denoiser
POOLS_AT_LARGEST_ID = 2  # the end token's id in shipped CLIP configurations, which makes CLIP pool at the largest id, a concept's


@dataclass
class LoadedConcepts:
    """What is loaded on a denoiser, by token."""

    concepts: dict[str, Concept] = field(
        default_factory=dict
    )  # with the gate that is set as their `eval_gate`
    active: list[str] = field(default_factory=list)
    is_enabled: bool = True
    pooling: list[nn.Module] = field(default_factory=list)  # modules whose end token was put right


def denoiser_of(pipe):
    """Return the pipeline's UNet or transformer."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(denoiser, nn.Module):
        raise ValueError(
            f"`pipe` must be a diffusers pipeline with a `unet` or a `transformer`, got {type(pipe).__name__}."
        )
    return denoiser


def text_encoders_of(pipe):
    """Return the pipeline's text encoders with their tokenizers, by the encoder's name."""
    pairs = {
        f"text_encoder{n}": (getattr(pipe, f"text_encoder{n}", None), getattr(pipe, f"tokenizer{n}", None))
        for n in ("", "_2", "_3")
    }
    return {name: pair for name, pair in pairs.items() if None not in pair}


def loaded_on(pipe):
    loaded = getattr(denoiser_of(pipe), CONCEPTS, None)
    if loaded is None:
        raise ValueError("The pipeline has no loaded concept. Call `load_concept` first.")
    list(
        cross_attention_projections(denoiser_of(pipe))
    )  # raises where they are fused, so that the edits would be bypassed
    return loaded


def pool_at_end_token_(encoder, tokenizer):
    """Let a CLIP pool at the tokenizer's end token, and not at the largest id, which may be a concept's; return the changed modules."""
    changed = [
        module for module in encoder.modules() if getattr(module, "eos_token_id", None) == POOLS_AT_LARGEST_ID
    ]
    for module in changed:
        module.eos_token_id = tokenizer.eos_token_id
    return changed


@contextmanager
def without_offloading(pipe) -> Iterator[None]:
    """Take accelerate's offloading hooks off a pipeline while its modules change, and put them back, as diffusers' own loaders do.

    Offloading piece by piece keeps weights on the meta device between calls, where none can be read or wrapped.
    """
    hooks = [
        getattr(module, "_hf_hook", None)
        for module in pipe.components.values()
        if isinstance(module, nn.Module)
    ]
    kinds = {type(hook).__name__ for hook in hooks if hook is not None}
    if not kinds:
        yield
        return
    enable = pipe.enable_model_cpu_offload if kinds == {"CpuOffload"} else pipe.enable_sequential_cpu_offload
    device = getattr(pipe, "_offload_device", None)
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        enable(device=device)
