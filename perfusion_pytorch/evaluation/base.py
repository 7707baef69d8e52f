"""What all pictures of an evaluation depend on: the base model, and how it is called."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from perfusion_pytorch.files import sha256_of
from perfusion_pytorch.pipelines.parts import denoiser_of
from perfusion_pytorch.pipelines.picture_facts import picture_facts
from perfusion_pytorch.protocols import Pipeline

SAMPLE = 64  # numbers of each weight that are looked at: gigabytes would take long


def own_resolution(pipe: Any) -> int:
    """Return the edge of the pictures that a model was made for, in pixels.

    Raises:
        ValueError: the model does not say.
    """
    size = cast(Any, denoiser_of(pipe)).config.sample_size
    if size is None:
        raise ValueError("`resolution` must be given, since the model does not say its own. Try 512.")
    return int(size if isinstance(size, int) else min(size)) * int(pipe.vae_scale_factor)


def call_options(pipe: Any, *, resolution: int | None, **options: Any) -> dict[str, Any]:
    """Return what a pipeline is called with beside prompts and noise; None means its default."""
    edge = resolution or own_resolution(pipe)
    if edge % pipe.vae_scale_factor:
        raise ValueError(f"`resolution` must be a multiple of {pipe.vae_scale_factor} pixels, got {edge}.")
    given = {name: value for name, value in options.items() if value is not None}
    return {"height": edge, "width": edge} | given


def base_settings(pipe: Pipeline, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return, as JSON can hold it, what all pictures depend on beside prompts, seeds and files."""
    facts = picture_facts(pipe, **options)
    kept = (*options, "num_inference_steps", "guidance_scale", "model", "pipeline", "scheduler", "dtype")
    settings = {name: facts[name] for name in dict.fromkeys(kept) if name in facts}
    scheduler = pipe.components.get("scheduler")
    config = sorted((k, str(v)) for k, v in getattr(scheduler, "config", {}).items() if k[0] != "_")
    settings["scheduler_digest"] = sha256_of([str(config)])[:16]
    settings["weights_digest"] = sha256_of(_weights(pipe))[:16]
    return settings


def _weights(pipe: Pipeline) -> Any:
    """Yield the names, shapes and first numbers of a pipeline's weights."""
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            for key, weight in part.state_dict().items():
                yield f"{name}.{key} {tuple(weight.shape)}"
                yield weight.flatten()[:SAMPLE].float()
